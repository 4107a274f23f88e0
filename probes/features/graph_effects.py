"""Do the edges of an attribution graph say what happens when their source is changed?

A source is scaled in the model itself: what it writes into the stream is changed at its MLP output (or in the embedding), all
other MLP outputs are held at what they were (an edge is a direct effect) but for skip terms, and the model runs forward. With the
attention maps and norm sizes of the prompt put in the place of its own, the target's pre-activation changes by exactly

    predicted = (scale - 1) * weight.

With attention and norms free it does not; the correlation of these changes with the prediction says how far the linear
picture carries. Nothing here takes a gradient: patterns, norms and MLP outputs are edited in forward runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.feature_graph import NODE_KINDS, FeatureGraph
from workbench.models.native import NativeModel
from workbench.models.native_mixers import MIXERS
from workbench.models.protocol import Edit, Model
from workbench.probes.features.frozen import FrozenModel, FrozenNorm, frozen_model
from workbench.probes.features.replacement import Active, Replacement, active_features, replacement
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_NUMBERS = 2**24
"""Numbers of attention maps and logits in one forward pass."""


@dataclass(frozen=True)
class GraphEffects(Result):
    """Edges ``edge [m]`` (indices into the graph) from ``source`` to ``target`` (names of nodes, target layers in ``layer [m]``),
    in the unit of the target: the change that the graph ``predicted``, the one ``measured`` with attention and norms frozen, and
    the one when they are ``free``. ``scale`` is what the source was multiplied by."""

    edge: Tensor
    source: tuple[str, ...]
    target: tuple[str, ...]
    layer: Tensor
    predicted: Tensor
    measured: Tensor
    free: Tensor
    scale: float
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    @property
    def correlation(self) -> float:
        """Pearson correlation of measured and predicted changes, over all edges; NaN below two edges."""
        return _correlation(self.predicted, self.measured)

    @property
    def free_correlation(self) -> float:
        """The same where attention and norms answer to the change."""
        return _correlation(self.predicted, self.free)

    @property
    def worst(self) -> float:
        """Largest difference of measured and predicted changes, as a share of the largest predicted one."""
        return float((self.measured - self.predicted).abs().max() / self.predicted.abs().max().clamp(min=1e-300))

    def by_layer(self) -> pd.DataFrame:
        """One row per layer of targets (the number of layers for logits): ``layer edges correlation free_correlation``."""
        import pandas as pd

        rows = []
        for layer in self.layer.unique().tolist():
            at = self.layer == layer
            parts = [_correlation(self.predicted[at], changed[at]) for changed in (self.measured, self.free)]
            rows.append((layer, int(at.sum()), *parts))
        return pd.DataFrame(rows, columns=["layer", "edges", "correlation", "free_correlation"])

    def frame(self) -> pd.DataFrame:
        """One row per edge: ``source target layer predicted measured free``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "source": list(self.source),
                "target": list(self.target),
                "layer": self.layer.numpy(),
                "predicted": self.predicted.numpy(),
                "measured": self.measured.numpy(),
                "free": self.free.numpy(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Changes against what the graph predicted."""
        ax = axis(ax, 4.8, 4.4)
        for name, changed, correlation in (
            ("attention and norms free", self.free, self.free_correlation),
            ("frozen", self.measured, self.correlation),
        ):
            ax.scatter(self.predicted, changed, s=6, alpha=0.6, label=f"{name}: r = {correlation:.4f}")
        ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
        ax.set(
            xlabel="predicted change", ylabel="change", title=f"{len(self.edge):,} edges, sources times {self.scale:g}"
        )
        ax.legend(fontsize="small")
        return ax


@torch.no_grad()
def graph_effects(
    model: Model,
    coders: Any,
    graph: FeatureGraph,
    edges: Sequence[int] | Tensor | int | None = None,
    *,
    scale: float = 0.0,
) -> GraphEffects:
    """Multiply the sources of edges by ``scale`` (0 removes them), one at a time, and compare targets with what the edges say.

    ``edges``: indices, a number (that many strongest ones), or None for all. ``model`` and ``coders`` are those of the graph. One
    forward pass per source and setting (frozen, free), in batches; prune a graph before asking for all of its edges.
    """
    chosen = _chosen(graph, edges)
    if scale == 1:
        raise WorkbenchError("a source multiplied by 1 is not changed; scale=0 removes it")
    frozen = frozen_model(model, _ids(graph, model))
    coded = replacement(frozen, coders)
    nodes = graph.nodes
    forward = _Forward(frozen, coded, active_features(frozen, coded), graph)
    forward.check(chosen)
    sources, index = graph.source[chosen].unique(return_inverse=True)
    measured, free = (torch.zeros(len(chosen), dtype=torch.float64) for _ in range(2))
    heads, length, vocab = frozen.model.shape.heads, frozen.length, frozen.logits.shape[1]
    size = max(1, _NUMBERS // (heads * length**2 + length * vocab))
    for out, held in ((measured, True), (free, False)):
        start = forward.targets(forward.run(sources[:0], 0.0, held), held)
        for part in torch.arange(len(sources)).split(size):
            found = forward.targets(forward.run(sources[part], scale - 1, held), held)
            for row, at in enumerate(part.tolist()):
                mine = (index == at).nonzero()[:, 0]
                wanted = graph.target[chosen[mine]]
                out[mine] = (found[row, forward.column[wanted]] - start[0, forward.column[wanted]]).double().cpu()
    names = {int(i): graph.name(int(i)) for i in torch.cat([graph.source[chosen], graph.target[chosen]]).unique()}
    return GraphEffects(
        chosen,
        tuple(names[i] for i in graph.source[chosen].tolist()),
        tuple(names[i] for i in graph.target[chosen].tolist()),
        nodes.layer[graph.target[chosen]],
        (scale - 1) * graph.weight[chosen].double(),
        measured,
        free,
        float(scale),
        frozen.provenance,
    )


def _chosen(graph: FeatureGraph, edges: Any) -> Tensor:
    count = len(graph.source)
    if isinstance(edges, int) and not isinstance(edges, bool):
        if edges < 1:
            raise WorkbenchError(f"edges is how many of the strongest, at least 1; got {edges}")
        return graph.weight.abs().argsort(descending=True, stable=True)[:edges].sort().values
    chosen = torch.arange(count) if edges is None else torch.as_tensor(edges, dtype=torch.int64)
    if not len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= count:
        raise WorkbenchError(f"edges are indices of the graph's {count:,} edges, at least one; got {edges!r}")
    return chosen


def _ids(graph: FeatureGraph, model: Model) -> Tensor:
    """The prompt of a graph."""
    if "ids" not in graph.meta or "target_ids" not in graph.meta:
        raise WorkbenchError("this graph does not hold its prompt; effects are of graphs that attribution_graph made")
    if graph.meta["model"] != model.name:
        raise WorkbenchError(f"the graph is of {graph.meta['model']!r}; got {model.name!r}")
    return torch.tensor(graph.meta["ids"])


class _Forward:
    """Forward passes with a source changed in each row, and what the targets of the graph become."""

    def __init__(self, frozen: FrozenModel, coders: Replacement, active: Active, graph: FeatureGraph) -> None:
        self.frozen, self.coders, self.active, self.graph = frozen, coders, active, graph
        # Native softmax attention takes its patterns back; where none can be replaced, z is made from them and the values.
        sites = []
        if isinstance(frozen.model, NativeModel) and frozen.model.net.config.mixer in MIXERS:
            gated = frozen.model.net.config.mixer == "gated-softmax"
            kinds = ("pattern", "gate") if gated else ("pattern",)
            sites = [Site(kind, layer) for kind in kinds for layer in range(frozen.layers)]
        self._held = frozen.model.run(frozen.tokens, read=sites).acts if sites else {}
        kind = graph.nodes.kind
        self._readers: list[tuple[int, Tensor]] = []
        self.column = torch.full((len(graph.nodes),), -1)
        count = 0
        for layer in (*coders.layers, frozen.layers):
            name = "logit" if layer == frozen.layers else "feature"
            found = ((kind == NODE_KINDS.index(name)) & (graph.nodes.layer == layer)).nonzero()[:, 0]
            self._readers.append((layer, found))
            self.column[found] = torch.arange(count, count + len(found))
            count += len(found)

    def check(self, edges: Tensor) -> None:
        """Refuse edges whose ends are not features, errors, embeddings or logits of these coders on this prompt."""
        kinds = {NODE_KINDS[int(k)] for k in self.graph.nodes.kind[self.graph.source[edges]].unique()}
        if kinds - {"feature", "error", "embedding"} or bool((self.column[self.graph.target[edges]] < 0).any()):
            raise WorkbenchError("effects are of edges from features, errors and embeddings to features and logits")

    def run(self, sources: Tensor, change: float, held: bool) -> Run:
        """One row per source, whose output is changed by ``change`` times what it is; one unchanged row without sources."""
        frozen, layers, rows = self.frozen, range(self.frozen.layers), max(1, len(sources))
        embedded, written = self._changes(sources, change, rows)
        edits: dict[Site | str, Edit | Tensor] = {Site("resid_pre", 0): _adds(embedded)}
        for layer in layers:
            mlp = frozen.mlps[layer]
            if mlp is not None:
                at: list[Tensor] = []
                edits[Site("resid_mid", layer)] = _seen(at)
                edits[Site("mlp_out", layer)] = self._output(layer, mlp.written + written[layer], at, held)
        if held:
            edits.update(self._attention())
        reads = [Site("resid_mid", layer) for layer in self.coders.layers]
        given = frozen.tokens.ids.expand(rows, -1)
        norms = [layer.norm for layer in frozen.attention] + [mlp.norm for mlp in frozen.mlps if mlp is not None]
        with _held_norms([*norms, frozen.final] if held else []):
            return frozen.model.run(given, read=reads, edit=edits)

    def _attention(self) -> dict[Site | str, Edit | Tensor]:
        """Edits that put the attention maps of the prompt in the place of the model's own."""
        if self._held:
            return {site: _instead(value) for site, value in self._held.items()}
        edits: dict[Site | str, Edit | Tensor] = {}
        for layer, attention in enumerate(self.frozen.attention):
            values: list[Tensor] = []
            edits[Site("v", layer)] = _seen(values)
            edits[Site("z", layer)] = _mixed(attention.pattern, values)
        return edits

    def targets(self, run: Run, held: bool) -> Tensor:
        """Pre-activations and logits of the graph's targets, ``[rows, targets]`` (``column`` tells which is where)."""
        frozen, nodes = self.frozen, self.graph.nodes
        found = []
        for layer, index in self._readers:
            position = nodes.position[index]
            if layer == frozen.layers:
                assert run.logits is not None
                logits = run.logits[:, position].to(frozen.embedded)
                which = torch.arange(len(index))
                value = logits[:, which, nodes.feature[index]]
                other = (
                    logits[:, which, self.graph.meta["target_ids"][-1]]
                    if self.graph.meta["difference"]
                    else logits.mean(-1)
                )
                found.append(value - other)
                continue
            x = self._input(layer, run.acts[Site("resid_mid", layer)].to(frozen.embedded), held)
            rows, b_enc = self.coders.encoder(layer, nodes.feature[index])
            found.append(torch.einsum("bnd,nd->bn", x[:, position], rows) + b_enc)
        return torch.cat(found, 1)

    def _input(self, layer: int, mid: Tensor, held: bool) -> Tensor:
        mlp = self.frozen.mlps[layer]
        assert mlp is not None
        if not self.coders.normed[layer]:
            return mid
        if held:
            return mlp.norm(mid)
        like = next(iter(mlp.norm.module.parameters()), mid)
        return mlp.norm.module(mid.to(like.dtype)).to(mid)

    def _output(self, layer: int, written: Tensor, mid: list[Tensor], held: bool) -> Edit:
        """What an MLP writes: what it wrote, with the change; a skip term follows the stream."""

        def edit(output: Tensor) -> Tensor:
            skip = self.coders.skip(layer) if layer in self.coders.layers else None
            if skip is None:
                return written.to(output).expand_as(output)
            mlp = self.frozen.mlps[layer]
            assert mlp is not None
            moved = self._input(layer, mid[0].to(written), held) - self.coders.input(layer, mlp)
            return (written + moved @ skip).to(output)

        return edit

    def _changes(self, sources: Tensor, change: float, rows: int) -> tuple[Tensor, list[Tensor]]:
        """What is added to the embeddings ``[rows, T, D]`` and to each MLP output."""
        frozen, nodes, active = self.frozen, self.graph.nodes, self.active
        blank = frozen.embedded.new_zeros(rows, *frozen.embedded.shape)
        embedded, written = blank.clone(), [blank.clone() for _ in frozen.mlps]
        for row, source in enumerate(sources.tolist()):
            kind = NODE_KINDS[int(nodes.kind[source])]
            layer, position, feature = (int(x[source]) for x in (nodes.layer, nodes.position, nodes.feature))
            if kind == "embedding":
                embedded[row, position] = change * frozen.embedded[position]
            elif kind == "error":
                error = active.errors[layer]
                assert error is not None
                written[layer][row, position] = change * error[position]
            else:
                mine = (active.layer == layer) & (active.position == position) & (active.feature == feature)
                value = active.value[mine]
                if len(value) != 1:
                    raise WorkbenchError(
                        f"{self.graph.name(source)} is not active with these coders: they are not the graph's"
                    )
                for into in range(layer, frozen.layers):
                    for origin, decoder in self.coders.writers(into):
                        if origin == layer:
                            written[into][row, position] = change * float(value) * decoder[feature]
        return embedded, written


def _adds(change: Tensor) -> Edit:
    return lambda x: x + change.to(x)


def _instead(value: Tensor) -> Edit:
    return lambda x: value.to(x).expand_as(x)


def _seen(kept: list[Tensor]) -> Edit:
    def edit(x: Tensor) -> Tensor:
        kept[:] = [x]
        return x

    return edit


def _mixed(pattern: Tensor, values: list[Tensor]) -> Edit:
    def edit(z: Tensor) -> Tensor:
        v = values[0].to(pattern)
        return torch.einsum("hqk,bkhe->bqhe", pattern, v.repeat_interleave(len(pattern) // v.shape[2], 2)).to(z)

    return edit


@contextmanager
def _held_norms(norms: Sequence[FrozenNorm]) -> Iterator[None]:
    """Norms divide by their sizes on the prompt, in this thread."""
    here, placed = threading.get_ident(), []

    def hook(norm: FrozenNorm) -> Callable[..., Any]:
        def act(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if threading.get_ident() != here:
                return None
            x = args[0].to(norm.size).reshape(-1, len(norm.size), args[0].shape[-1])  # some blocks flatten [B, T]
            return norm(x).reshape(output.shape).to(output)

        return act

    try:
        for norm in norms:
            placed.append(norm.module.register_forward_hook(hook(norm)))
        yield
    finally:
        for handle in placed:
            handle.remove()


def _correlation(a: Tensor, b: Tensor) -> float:
    if len(a) < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    size = a.norm() * b.norm()
    return float((a @ b) / size) if float(size) > 0 else float("nan")
