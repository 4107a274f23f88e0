"""Which pairs of features make a head look from one token to another?

Before softmax a head's score is bilinear in the stream at the query p and at the key j. With both written as sums, of a coder's
features (error and biases are terms too) or of the components that wrote them, the score is a sum over pairs,

    score(p, j) = sum_ab  f_a(p) f_b(j)  d_a^T W_Q R_p R_j^T W_K^T d_b  /  (scale size_p size_j)   + bias and error terms,

with the sizes of all norms (on queries and keys too) held at what they were, and R the rotations at these very positions
(transformer-circuits.pub/2025/attention-qk). W_Q W_K^T without them describes another model: see the page on feature attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import GatedMap
from workbench.models.protocol import Model
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.features.feature_attribution import site_of
from workbench.probes.features.heat import heat_limits
from workbench.probes.features.layer_weights import layer_weights
from workbench.probes.features.qk_operator import Rotations, Side
from workbench.probes.features.stream import Point, Stream, agrees
from workbench.results import Result, axis
from workbench.run import Provenance
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from workbench.coders.coder import Coder


class Term(NamedTuple):
    """A part of the stream: a ``feature`` (number) of the coder, its ``error`` or ``decoder bias``; or an ``embedding``,
    ``position``, ``head`` (layer, number), ``mlp`` (layer) or ``output bias``; ``bias`` is that of projection and norm."""

    kind: str
    layer: int = -1
    number: int = -1

    def __str__(self) -> str:
        if self.kind == "head":
            return f"head {self.layer}.{self.number}"
        numbers = [str(n) for n in (self.layer, self.number) if n >= 0]
        return " ".join([self.kind, *numbers])


@dataclass(frozen=True)
class QKAttribution(Result):
    """``values`` ``[A, B]``: what each pair of a term at the query and a term at the key adds to the score.

    They sum to ``score``, q . k * scale of the query and key that the model's own kernel was called with, rotated and normed.
    ``logit`` is what softmax is given: the score after ``softcap`` (None where there is none) and with ``position_bias``, which
    belong to no pair. Positive draws attention.
    """

    layer: int
    head: int
    query: int
    key: int
    query_terms: tuple[Term, ...]
    key_terms: tuple[Term, ...]
    values: Tensor
    score: float
    logit: float
    scale: float
    softcap: float | None
    position_bias: float
    tokens: tuple[str, ...]
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    @property
    def total(self) -> float:
        """Sum over all pairs."""
        return float(self.values.double().sum())

    @property
    def error(self) -> float:
        """What the sum is off the model's own score by: rounding."""
        return abs(self.total - self.score)

    def kinds(self) -> pd.DataFrame:
        """The score by kind of query term (rows) and of key term (columns)."""
        frame = self.frame()
        return frame.pivot_table(index="query_kind", columns="key_kind", values="value", aggfunc="sum", fill_value=0.0)

    def frame(self) -> pd.DataFrame:
        """One row per pair, strongest first: ``query_term query_kind query_layer query_index``, then of the key, ``value``."""
        import pandas as pd

        order = self.values.abs().flatten().argsort(descending=True, stable=True)
        columns: dict[str, Any] = {}
        width = self.values.shape[1]
        for side, terms, index in (
            ("query", self.query_terms, order // width),
            ("key", self.key_terms, order % width),
        ):
            found = [terms[i] for i in index.tolist()]
            columns[f"{side}_term"] = list(map(str, found))
            columns[f"{side}_kind"] = [term.kind for term in found]
            columns[f"{side}_layer"] = [term.layer for term in found]
            columns[f"{side}_index"] = [term.number for term in found]
        return pd.DataFrame({**columns, "value": self.values.flatten()[order].tolist()})

    def plot(self, ax: Axes | None = None, terms: int = 12) -> Axes:
        """Heat of the strongest terms of either side."""
        rows = _strongest(self.values.abs().sum(1), terms)
        columns = _strongest(self.values.abs().sum(0), terms)
        part = self.values[rows][:, columns].double().numpy()
        ax = axis(ax, 3 + 0.35 * len(columns), 2.4 + 0.3 * len(rows))
        low, high = heat_limits(part)
        image = ax.imshow(part, aspect="auto", cmap="RdBu", vmin=low, vmax=high, interpolation="nearest")
        ax.set_xticks(range(len(columns)), [str(self.key_terms[i]) for i in columns], rotation=60, ha="right")
        ax.set_yticks(range(len(rows)), [str(self.query_terms[i]) for i in rows])
        ax.set(xlabel=f"key at {self.key}", ylabel=f"query at {self.query}", title=self._title().replace("$", r"\$"))
        ax.figure.colorbar(image, ax=ax, label="added to the score")
        return ax

    def _title(self) -> str:
        names = [repr(self.tokens[t])[1:-1] for t in (self.query, self.key)]
        return f"head {self.layer}.{self.head}: {names[0]} @ {self.query} to {names[1]} @ {self.key}, score {self.score:.4g}"


@torch.no_grad()
def qk_attribution(
    model: Model,
    text: Any,
    layer: int,
    head: int,
    query: int,
    key: int,
    query_coder: Coder | None = None,
    key_coder: Coder | None = None,
) -> QKAttribution:
    """The score of ``head`` for positions ``query`` and ``key`` of one text, as a sum over pairs of terms of the stream.

    ``query_coder``, ``key_coder``: autoencoders of ``blocks.{layer}.hook_resid_pre`` (or of the post site before it, or of
    ``ln1.hook_normalized``), one may serve both; without one the terms are the components that wrote the stream. Serves native
    models and Hugging Face models whose queries and keys are plain projections of the normed stream, with norms on heads and
    rotations. Refused: layers without softmax scores, keys hidden from the query, coders of other sites.
    """
    coders = {"query": query_coder, "key": key_coder}
    sites = {name: _coder_site(coder, layer) for name, coder in coders.items() if coder is not None}
    if not 0 <= layer < model.shape.layers:
        raise UnknownName("layer", layer, [f"0 to {model.shape.layers - 1}"])
    if not 0 <= head < model.shape.heads:
        raise UnknownName("head", head, [f"0 to {model.shape.heads - 1}"])
    reads = [Site("resid_pre", layer), *sites.values()]
    rotations = Rotations(model, layer)
    with rotations.watched():
        reach = Point(0, 0) if len(sites) == 2 else Point(layer, layer)
        stream = Stream(model, text, reach, reads=reads, maps=[layer])
    at = {"query": stream.check_position(query, "query"), "key": stream.check_position(key, "key")}
    scores = _scores(stream, layer)
    logit = float(scores.scores.tile(slice(at["query"], at["query"] + 1), slice(at["key"], at["key"] + 1))[0, head])
    if logit == float("-inf"):
        raise Refused(
            f"key {at['key']} is hidden from query {at['query']} in layer {layer} of {model.name}: it has no score"
        )
    weights = layer_weights(model, layer)
    parts, names = {}, {}
    x = stream.run.acts[Site("resid_pre", layer)][0].detach().to(stream.dtype)
    where = f"layer {layer} of {model.name}"
    for name, letter in (("query", "q"), ("key", "k")):
        projection = weights.q if letter == "q" else weights.k
        if projection is None:
            raise Refused(f"{where}: its mixer has no W_{letter.upper()}")
        own = getattr(scores.scores, letter)
        vectors = own[0, :, at[name]].to(stream.dtype)
        index = head // (model.shape.heads // len(vectors))
        turn = rotations.matrix(at[name], vectors)
        side = Side(weights.before, projection, x[at[name]], index, turn, where)
        coder = coders[name]
        if coder is None:
            streams, terms = _components(stream, at[name])
            made = side.of_stream(streams)
        else:
            made, terms = _features(coder, stream, sites[name], at[name], side)
        made, terms = torch.cat([made, side.constant[None]]), (*terms, Term("bias"))
        what = f"{where}: its {name} at {at[name]} is no linear function of the normed stream"
        agrees(vectors[index], made.sum(0), what, own.dtype)
        parts[name], names[name] = made, terms
        parts[letter] = vectors[index].double()
    scale = float(scores.scores.scale or 1.0)
    bias = 0.0
    if scores.scores.bias is not None:
        rows, columns = (slice(t, t + 1) for t in at.values())
        bias = float(scores.scores.bias_tile(rows, columns).expand(1, model.shape.heads, 1, 1)[0, head])
    return QKAttribution(
        layer=layer,
        head=head,
        query=at["query"],
        key=at["key"],
        query_terms=names["query"],
        key_terms=names["key"],
        values=(parts["query"] @ parts["key"].T * scale).cpu(),
        score=float(parts["q"] @ parts["k"]) * scale,
        logit=logit,
        scale=scale,
        softcap=scores.scores.softcap,
        position_bias=bias,
        tokens=stream.tokens,
        provenance=stream.run.provenance,
    )


def _coder_site(coder: Coder, layer: int) -> Site:
    site = site_of(coder)
    fits = [("resid_pre", layer), ("resid_post", layer - 1), ("attn_norm", layer)]
    writes: Any = coder.about.get("writes") or coder.about.get("reads")
    writes = Site.parse(writes if isinstance(writes, str | Site) else writes[0])
    if (site.kind, site.layer) not in fits or writes != site:
        raise Refused(
            f"queries and keys of layer {layer} are made of its resid_pre and of what ln1 makes of it: they take an autoencoder "
            f"of one of these; got a coder that reads {site} and writes {writes}"
        )
    return site


def _scores(stream: Stream, layer: int) -> SoftmaxMap:
    amap = stream.run.maps[layer]
    while isinstance(amap, GatedMap):
        amap = amap.raw
    if not isinstance(amap, SoftmaxMap):
        raise Refused(
            f"layer {layer} of {stream.model.name} has a {type(amap).__name__}: no scores q . k that softmax reads"
        )
    return amap


def _components(stream: Stream, t: int) -> tuple[Tensor, tuple[Term, ...]]:
    """The stream in front of the layer at t, ``[A, D]``, by what wrote it."""
    rows, terms = [stream.embed[t]], [Term("embedding")]
    if stream.position is not None:
        rows.append(stream.position[t])
        terms.append(Term("position"))
    for index, layer in stream.layers.items():
        written = torch.einsum("he,hed->hd", layer.z[t], layer.o) * layer.out_inverse[t]
        rows += [*written, layer.bias(t)]
        terms += [*(Term("head", index, h) for h in range(layer.heads)), Term("output bias", index)]
    for index, out in stream.mlps.items():
        rows.append(out[t])
        terms.append(Term("mlp", index))
    kept = [i for i, term in enumerate(terms) if term.kind != "output bias" or bool(rows[i].any())]
    return torch.stack([rows[i] for i in kept]), tuple(terms[i] for i in kept)


def _features(coder: Coder, stream: Stream, site: Site, t: int, side: Side) -> tuple[Tensor, tuple[Term, ...]]:
    """Queries or keys ``[A, E]`` of the active features at t, of the decoder's bias and of the error."""
    x = stream.run.acts[site][0, t].detach()
    if len(x) != coder.reads[0]:
        raise WorkbenchError(f"{site} has width {len(x)} in this model; the coder expects {coder.reads[0]}")
    given = x.to(coder.W_enc.device, coder.W_enc.dtype)
    f = coder.encode(given[None])[0].detach()
    active = f.nonzero()[:, 0]
    rows = (f[active, None] * coder.W_dec.detach()[active]).to(x.device, stream.dtype)
    bias = coder.b_dec.detach().to(rows)
    error = x.to(rows) - rows.sum(0) - bias
    terms = (*(Term("feature", -1, i) for i in active.tolist()), Term("decoder bias"), Term("error"))
    streams = torch.cat([rows, bias[None], error[None]])
    if site.kind != "attn_norm":
        return side.of_stream(streams), terms
    streams[-1] -= side.before.fold.shift.to(streams)  # it is in the constant of the query or key
    return side.of_normed(streams), terms


def _strongest(sizes: Tensor, count: int) -> list[int]:
    return sizes.argsort(descending=True, stable=True)[:count].sort().values.tolist()
