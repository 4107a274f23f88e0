"""Which source tokens, through which heads, make a feature fire? Exactly, and without a gradient.

The pre-activation of a feature is linear in what its coder reads. A coder of concatenated head outputs z reads (Kissane et al.,
arXiv 2406.17759, "direct feature attribution")

    pre_i(t) = sum_h sum_s A[h, t, s] (v[h, s] . W_enc[slice h, i]) + const,

one of an attention output the same through W_O, and one of the residual stream (or of a norm's output, with the size of the norm
held) what the embedding, every head from every source, and every MLP have added to the stream. A is the model's own map, gates
and sinks included; biases b_V move with the values, all other biases are constants. A coder of an MLP's output reads one
component, which is not linear in its input: use a transcoder there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.fragments import table_view
from workbench.models.protocol import Model
from workbench.probes.features.heat import heat_limits, plain, token_heat
from workbench.probes.features.layer_weights import layer_weights
from workbench.probes.features.reading import check_features
from workbench.probes.features.stream import Layer, Point, Stream, agrees, point_of
from workbench.results import Result, axis
from workbench.run import Provenance
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from workbench.coders.coder import Coder

_NORMED = ("attn_norm", "mlp_norm", "final_norm")


class Component(NamedTuple):
    """Something that writes to the stream: ``embedding``, ``position``, ``head`` or ``mlp``; -1 where there is no number."""

    kind: str
    layer: int
    head: int

    def __str__(self) -> str:
        place = "" if self.layer < 0 else f" {self.layer}" if self.head < 0 else f" {self.layer}.{self.head}"
        return f"{self.kind}{place}"


@dataclass(frozen=True)
class FeatureAttribution(Result):
    """``values`` ``[F, P, C, S]``: what component c adds to the pre-activation of each feature at each position from source s.

    Embeddings and MLPs stand at the position itself. ``constants`` name -> ``[F, P]``: ``coder`` (b_enc and what the centre
    takes off), ``b_O`` and ``norm``. Values and constants sum to ``pre`` ``[F, P]``, the coder's own pre-activation. Positive
    raises it.
    """

    site: str
    features: tuple[int, ...]
    positions: tuple[int, ...]
    components: tuple[Component, ...]
    tokens: tuple[str, ...]
    values: Tensor
    constants: Mapping[str, Tensor]
    pre: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    @property
    def total(self) -> Tensor:
        """Sum of everything, ``[F, P]``."""
        return self.values.sum((2, 3)) + sum(self.constants.values(), torch.zeros_like(self.pre))

    @property
    def error(self) -> float:
        """Largest difference between a sum and the coder's own pre-activation: rounding."""
        return float((self.total - self.pre).abs().max())

    @property
    def by_source(self) -> Tensor:
        """``[F, P, S]``: what comes from each source token."""
        return self.values.sum(2)

    @property
    def by_component(self) -> Tensor:
        """``[F, P, C]``: what each component adds."""
        return self.values.sum(3)

    def frame(self) -> pd.DataFrame:
        """One row per number that is not 0: ``feature position token component layer head source source_token value``, the
        strongest of each feature and position first; constants have source -1."""
        import pandas as pd

        blocks = []
        for i, feature in enumerate(self.features):
            for j, position in enumerate(self.positions):
                part = self.values[i, j]
                c, s = part.nonzero(as_tuple=True)
                found = part[c, s]
                order = found.abs().argsort(descending=True, stable=True)
                named = [self.components[k] for k in c[order].tolist()]
                sources = s[order].tolist()
                extra = {name: float(value[i, j]) for name, value in self.constants.items()}
                blocks.append(
                    pd.DataFrame(
                        {
                            "feature": feature,
                            "position": position,
                            "token": self.tokens[position],
                            "component": [*map(str, named), *(f"constant {name}" for name in extra)],
                            "layer": [*(x.layer for x in named), *(-1 for _ in extra)],
                            "head": [*(x.head for x in named), *(-1 for _ in extra)],
                            "source": [*sources, *(-1 for _ in extra)],
                            "source_token": [*(self.tokens[k] for k in sources), *("" for _ in extra)],
                            "value": [*found[order].tolist(), *extra.values()],
                        }
                    )
                )
        return pd.concat(blocks, ignore_index=True)

    def plot(self, ax: Axes | None = None, *, feature: int | None = None, position: int | None = None) -> Axes:
        """Heat of components by source tokens for one feature at one position, the first by default."""
        i = 0 if feature is None else _index("feature", feature, self.features)
        j = 0 if position is None else _index("position", position, self.positions)
        part = self.values[i, j].double().numpy()
        shown = [c for c in range(len(self.components)) if part[c].any()] or [0]
        ax = axis(ax, max(5.0, 2 + 0.3 * len(self.tokens)), max(2.6, 1.8 + 0.25 * len(shown)))
        low, high = heat_limits(part)
        image = ax.imshow(part[shown], aspect="auto", cmap="RdBu", vmin=low, vmax=high, interpolation="nearest")
        step = max(1, len(self.tokens) // 60)
        ax.set_xticks(range(0, len(self.tokens), step), plain(self.tokens[::step]), rotation=60, ha="right")
        ax.set_yticks(range(len(shown)), [str(self.components[c]) for c in shown])
        ax.set(
            xlabel="source token",
            title=f"feature {self.features[i]} at {self.positions[j]}: {float(self.pre[i, j]):.3g}",
        )
        ax.figure.colorbar(image, ax=ax, label="added to the pre-activation")
        return ax

    def _repr_html_(self) -> str:
        parts = []
        for i, feature in enumerate(self.features[:3]):
            for j, position in enumerate(self.positions[:3]):
                caption = f"feature {feature} of {self.site} at {position}: pre-activation {float(self.pre[i, j]):.4g}"
                parts.append(token_heat(self.tokens, self.by_source[i, j], caption, position))
        return "".join(parts) + table_view(self.frame(), type(self).__name__, rows=20)


@torch.no_grad()
def feature_attribution(
    coder: Coder,
    model: Model,
    text: Any,
    features: int | Sequence[int],
    positions: int | Sequence[int] = -1,
    *,
    site: str | Site | None = None,
) -> FeatureAttribution:
    """Direct feature attribution: pre-activations of ``features`` at ``positions`` of one text, by component and source token.

    ``site``: what the coder reads, its own by default: ``hook_z`` or ``hook_attn_out`` (heads of that layer by source; any model
    that serves values and maps), or ``hook_resid_*``, ``hook_mlp_in`` or a norm's output (everything that wrote to the stream).
    Negative positions count from the end. Only the rows of the maps at ``positions`` are made. Refused: unknown features and
    positions, layers whose output is not their map times their values, streams that are no sum of known parts.
    """
    where = site_of(coder, site)
    chosen = check_features([features] if isinstance(features, int) else list(features), coder.features)
    wanted = [positions] if isinstance(positions, int) else list(positions)
    if not chosen or not wanted:
        raise WorkbenchError("name at least one feature and one position")
    stream = stream_to(model, text, where)
    at = list(dict.fromkeys(stream.check_position(t) for t in wanted))
    own = own_pre(coder, stream, where, chosen, at)
    reader = Reader(stream, where, coder.W_enc.detach()[:, chosen])
    values, constants = [], []
    for t in at:
        found, constant = reader.components(t)
        values.append(found)
        constants.append({**constant, "coder": coder_constant(coder, chosen).to(own)})
    result = FeatureAttribution(
        site=str(where),
        features=tuple(chosen),
        positions=tuple(at),
        components=reader.names,
        tokens=stream.tokens,
        values=torch.stack(values, 1).cpu(),
        constants={name: torch.stack([c[name] for c in constants], 1).cpu() for name in constants[0]},
        pre=own.cpu(),
        provenance=stream.run.provenance,
    )
    size = result.values.abs().sum((2, 3)).max().clamp(min=1)
    what = f"{where} of {model.name} is no sum of what is known to write to it"
    agrees(result.pre / size, result.total / size, what, reader.kind)
    return result


def site_of(coder: Coder, site: str | Site | None = None) -> Site:
    """The one site that a coder reads; refused for those that read several."""
    about = getattr(coder, "about", None) or {}
    found = about.get("reads") if site is None else site
    if site is not None and not isinstance(site, str | Site):
        raise WorkbenchError(f"site names one site; got {site!r}")
    if not found:
        raise WorkbenchError("the coder does not say where it reads; pass site=, as in site='blocks.1.attn.hook_z'")
    listed = [found] if isinstance(found, str | Site) else list(found)
    if len(listed) != 1 or len(coder.reads) != 1:
        count = max(len(listed), len(coder.reads))
        raise Refused(f"a coder that reads {count} sites has no single place to attribute to; use a coder of one site")
    where = Site.parse(listed[0])
    if where.head is not None or where.stack:
        raise Refused(f"{where}: attributions are for whole sites of models of one stack")
    return where


def stream_to(model: Model, text: Any, site: Site) -> Stream:
    """The run up to a site; refused for sites that are no sum of components."""
    if site.kind in ("z", "attn_out"):
        layer = site.layer
        assert layer is not None
        stream = Stream(model, text, Point(0, 0), reads=[site], only=layer)
        if site.kind == "attn_out":
            stream.layers[layer].connect_output(layer_weights(model, layer), stream.run.acts[site][0].detach())
        return stream
    end = Point(model.shape.layers, model.shape.layers)
    point = end if site.kind == "final_norm" else point_of(site)
    if point is None:
        known = "hook_z, hook_attn_out, hook_resid_pre/mid/post, hook_mlp_in, ln1/ln2/ln_final.hook_normalized"
        more = "; one component writes there, and it is not linear: use a transcoder that reads ln2.hook_normalized"
        raise Refused(
            f"{site} is no sum of heads and components; sites that are: {known}{more if 'mlp' in site.kind else ''}"
        )
    return Stream(model, text, point, reads=[site])


def own_pre(coder: Coder, stream: Stream, site: Site, features: Sequence[int], at: Sequence[int]) -> Tensor:
    """The coder's own pre-activations of what the model has at the site, ``[F, P]``."""
    x = stream.run.acts[site][0].detach().flatten(1)[list(at)]
    if x.shape[1] != coder.reads[0]:
        raise WorkbenchError(f"{site} has width {x.shape[1]} in this model; the coder expects {coder.reads[0]}")
    pre: Tensor = coder.pre(x.to(coder.W_enc.device, coder.W_enc.dtype))
    return pre.detach()[:, list(features)].T


def coder_constant(coder: Coder, features: Sequence[int]) -> Tensor:
    """What the coder's pre-activations are where it reads zeros, ``[F]``."""
    zeros = coder.W_enc.new_zeros(1, coder.W_enc.shape[0])
    return coder.pre(zeros).detach()[0, list(features)]


class Reader:
    """How directions ``columns`` ``[D_in, F]`` of a site read what wrote to it."""

    def __init__(self, stream: Stream, site: Site, columns: Tensor) -> None:
        self.stream, self.site = stream, site
        self.deep = site.kind not in ("z", "attn_out")
        first = next(iter(stream.layers.values()), None)
        self.dtype = stream.dtype if self.deep or first is None else first.z.dtype
        self.kind = stream.run.acts[site].dtype
        self.columns = columns.to(stream.run.acts[site].device, self.dtype)
        self.layers: list[Layer] = list(stream.layers.values())
        names = [Component("embedding", -1, -1)] if self.deep else []
        if self.deep and stream.position is not None:
            names.append(Component("position", -1, -1))
        for layer in self.layers:
            names += [Component("head", layer.index, h) for h in range(layer.heads)]
        names += [Component("mlp", layer, -1) for layer in (stream.mlps if self.deep else ())]
        self.names = tuple(names)
        self.norm = None
        if site.kind in _NORMED:
            norm, point = stream.norm_at(site)
            self.norm = norm
            self.sizes = norm.sizes(stream.at(point), str(site))

    def directions(self, t: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Directions ``[F, D]`` of the stream that the columns read at t, and constants ``[F]``."""
        if self.norm is None:
            return self.columns.T, {}
        back = self.norm.back(self.columns.T)
        shift = self.norm.fold.shift @ self.columns
        return back * self.sizes[t], {"norm": shift}

    def heads_read(self, t: int) -> tuple[Tensor, dict[str, Tensor]]:
        """For coders of one layer's heads: directions ``[F, H, E]`` of z, and constants."""
        layer = self.layers[0]
        if self.site.kind == "z":
            return self.columns.T.unflatten(1, (layer.heads, -1)), {}
        return layer.heads_read(self.columns.T, t), {"b_O": layer.bias(t) @ self.columns}

    def components(self, t: int) -> tuple[Tensor, dict[str, Tensor]]:
        """``[F, C, S]`` and constants ``[F]`` at position t."""
        stream = self.stream
        if not self.deep:
            reads, constants = self.heads_read(t)
            return self.layers[0].moved(reads, t), constants
        r, constants = self.directions(t)
        count = stream.length

        def here(part: Tensor) -> Tensor:
            out = part.new_zeros(len(r), 1, count)
            out[:, 0, t] = r @ part[t]
            return out

        blocks = [here(stream.embed)]
        if stream.position is not None:
            blocks.append(here(stream.position))
        bias = r.new_zeros(len(r))
        for layer in self.layers:
            blocks.append(layer.moved(layer.heads_read(r, t), t))
            bias = bias + r @ layer.bias(t)
        blocks += [here(part) for part in stream.mlps.values()]
        return torch.cat(blocks, 1), {**constants, "b_O": bias}


def _index(what: str, wanted: int, known: Sequence[int]) -> int:
    if wanted not in known:
        raise UnknownName(what, wanted, known)
    return list(known).index(wanted)
