"""Which heads carry an edge of an attribution graph, from which token to which?

An edge's weight runs along paths through frozen attention (and the skip terms of transcoders) from the position s of its source
to the position t of its target. Per edge, with x the source's signal on its way up and g the target's gradient on its way down,

    loading[l, h] = sum_qk A[h, q, k] (x_l[k] W_V^h) . (g_l[q] W_O^h^T)      all paths through the head,

which is what vanishes from the edge when the head is skipped under frozen patterns. A path through two heads counts for both, so
that loadings need not sum to the weight. ``last`` splits by the last head that a path crosses, the one that brings it to t, and
by the token k that it reads there; with ``direct``, the paths that cross none, it sums to the weight exactly:

    weight = direct + sum_lhk last[l, h, k].

Where one layer lies between source and target, both are the same. Cells (q, k) name the tile of the attention map that carries
the edge. Head loadings are described in transformer-circuits.pub/2025/attention-qk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.feature_graph import FeatureGraph, kind_code
from workbench.fragments import table_view
from workbench.models.protocol import Model
from workbench.probes.features.edge_paths import EdgePaths
from workbench.probes.features.frozen import frozen_model
from workbench.probes.features.heat import heat_limits, plain, token_heat
from workbench.probes.features.replacement import Coders, replacement
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_TOLD = ("edge", "source", "target", "weight")


@dataclass(frozen=True)
class HeadLoadings(Result):
    """``edges`` ``[M]`` of a graph with their ``weight`` ``[M]``; ``direct`` ``[M]`` crosses no head. ``loading`` ``[M, L, H]``,
    ``last`` ``[M, L, H, T]`` by the token that the last head reads. ``cell`` ``[M, L, H, 2]`` is the query and key through which
    most of a head's loading goes, ``carried`` ``[M, L, H]`` how much; -1 and 0 where nothing does. All in the unit of the edges.
    """

    edges: Tensor
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_positions: tuple[int, ...]
    target_positions: tuple[int, ...]
    tokens: tuple[str, ...]
    weight: Tensor
    direct: Tensor
    loading: Tensor
    last: Tensor
    cell: Tensor
    carried: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    @property
    def error(self) -> float:
        """Largest difference between an edge and the sum over its last heads: rounding."""
        return float((self.direct + self.last.sum((1, 2, 3)) - self.weight).abs().max())

    def frame(self) -> pd.DataFrame:
        """One row per edge and head that carries some of it, strongest first: ``edge source target weight layer head loading
        share last query key query_token key_token carried``; layer and head -1 for the paths that cross no head."""
        import pandas as pd

        last = self.last.sum(3)
        rows: list[dict[str, Any]] = []
        for m, edge in enumerate(self.edges.tolist()):
            weight = float(self.weight[m])
            told = {"edge": edge, "source": self.sources[m], "target": self.targets[m], "weight": weight}
            found = self.loading[m].nonzero().tolist()
            found.sort(key=lambda at: -abs(float(self.loading[m, at[0], at[1]])))
            if float(self.direct[m]):
                t, value = self.target_positions[m], float(self.direct[m])
                rows.append({**told, **_row(-1, -1, value, value, weight, t, t, value, self.tokens)})
            for layer, head in found:
                q, k = self.cell[m, layer, head].tolist()
                value, end = float(self.loading[m, layer, head]), float(last[m, layer, head])
                carried = float(self.carried[m, layer, head])
                rows.append({**told, **_row(layer, head, value, end, weight, q, k, carried, self.tokens)})
        return pd.DataFrame(rows, columns=[*_TOLD, *_row(0, 0, 0.0, 0.0, 1.0, 0, 0, 0.0, ("",))])

    def onto(self, graph: FeatureGraph) -> FeatureGraph:
        """The graph with what carries each of these edges as columns: ``carrier_layer carrier_head carrier_query carrier_key``
        (-1 for the residual stream alone, and for edges that were not split) and ``carrier_loading`` (NaN for those)."""
        count, heads = len(graph.weight), self.loading.shape[2]
        numbers = {name: torch.full((count,), -1) for name in ("layer", "head", "query", "key")}
        loading = torch.full((count,), float("nan"), dtype=torch.float64)
        for m, edge in enumerate(self.edges.tolist()):
            if not 0 <= edge < count or not torch.isclose(
                graph.weight[edge].double(), self.weight[m].double(), rtol=1e-3
            ):
                raise WorkbenchError(
                    f"edge {edge} of this graph is not the one that was split; split the edges of this graph"
                )
            best = int(self.loading[m].abs().flatten().argmax())
            value = float(self.loading[m].flatten()[best])
            if abs(value) < abs(float(self.direct[m])):
                loading[edge] = float(self.direct[m])
                continue
            loading[edge] = value
            query, key = self.cell[m, best // heads, best % heads].tolist()
            for name, number in (("layer", best // heads), ("head", best % heads), ("query", query), ("key", key)):
                numbers[name][edge] = number
        columns = {**{f"carrier_{name}": values for name, values in numbers.items()}, "carrier_loading": loading}
        return replace(graph, columns={**graph.columns, **columns})

    def plot(self, ax: Axes | None = None, *, edge: int | None = None) -> Axes:
        """Heat of one edge (the first by default): last heads by the token that they read."""
        m = self._index(edge)
        part = self.last[m].flatten(0, 1)
        heads = self.loading.shape[2]
        shown = [i for i in range(len(part)) if bool(part[i].any())] or [0]
        numbers = part[shown].double().numpy()
        ax = axis(ax, max(5.0, 2 + 0.3 * len(self.tokens)), max(2.6, 1.8 + 0.25 * len(shown)))
        low, high = heat_limits(numbers)
        image = ax.imshow(numbers, aspect="auto", cmap="RdBu", vmin=low, vmax=high, interpolation="nearest")
        step = max(1, len(self.tokens) // 60)
        ax.set_xticks(range(0, len(self.tokens), step), plain(self.tokens[::step]), rotation=60, ha="right")
        ax.set_yticks(range(len(shown)), [f"head {i // heads}.{i % heads}" for i in shown])
        title = (
            f"{self.sources[m]} to {self.targets[m]}: {float(self.weight[m]):.3g}, {float(self.direct[m]):.3g} directly"
        )
        ax.set(xlabel="token that the last head reads", title=title)
        ax.figure.colorbar(image, ax=ax, label="part of the edge's weight")
        return ax

    def _index(self, edge: int | None) -> int:
        if edge is None:
            return 0
        if edge not in self.edges.tolist():
            raise UnknownName("edge of this split", edge, self.edges.tolist())
        return self.edges.tolist().index(edge)

    def _repr_html_(self) -> str:
        parts = []
        for m in range(min(3, len(self.edges))):
            edge = f"{self.sources[m]} to {self.targets[m]}: {float(self.weight[m]):.4g}"
            caption = f"{edge}, by the token that the last head reads"
            parts.append(token_heat(self.tokens, self.last[m].sum((0, 1)), caption, self.target_positions[m]))
        return "".join(parts) + table_view(self.frame(), type(self).__name__, rows=20)


@torch.no_grad()
def head_loadings(
    graph: FeatureGraph,
    model: Model,
    coders: Coders,
    edges: int | tuple[int, int] | Sequence[int | tuple[int, int]],
    *,
    prompt: Any = None,
) -> HeadLoadings:
    """Split edges of an attribution graph over the heads that carry them.

    ``edges``: indices of edges, or pairs (source node, target node); one or several. ``coders`` and ``model`` are those that the
    graph was made of. ``prompt`` is needed where the graph has not kept the embeddings of all tokens. Sources are embeddings,
    features and errors, targets features and logits. Refused: edges that are not in the graph, other kinds of nodes, and a graph
    whose weights are not what model and coders say.
    """
    chosen = _edges(graph, edges)
    frozen = frozen_model(model, _prompt(graph, model) if prompt is None else prompt)
    if graph.tokens and frozen.labels != graph.tokens:
        raise WorkbenchError(
            f"the graph is of another prompt: {' '.join(graph.tokens[:8])!r}...; pass the prompt that it was made of"
        )
    paths = EdgePaths(graph, frozen, replacement(frozen, coders))
    split = [paths.split(edge) for edge in chosen]
    return HeadLoadings(
        edges=torch.tensor(chosen),
        sources=tuple(graph.name(int(graph.source[e])) for e in chosen),
        targets=tuple(graph.name(int(graph.target[e])) for e in chosen),
        source_positions=tuple(int(graph.nodes.position[graph.source[e]]) for e in chosen),
        target_positions=tuple(int(graph.nodes.position[graph.target[e]]) for e in chosen),
        tokens=frozen.labels,
        weight=graph.weight[torch.tensor(chosen)].to(split[0].last.dtype),
        direct=torch.stack([part.direct for part in split]).cpu(),
        loading=torch.stack([part.loading for part in split]).cpu(),
        last=torch.stack([part.last for part in split]).cpu(),
        cell=torch.stack([part.cell for part in split]).cpu(),
        carried=torch.stack([part.carried for part in split]).cpu(),
        provenance=frozen.provenance,
    )


def _row(
    layer: int,
    head: int,
    loading: float,
    last: float,
    weight: float,
    q: int,
    k: int,
    carried: float,
    tokens: Sequence[str],
) -> dict[str, Any]:
    return {
        "layer": layer,
        "head": head,
        "loading": loading,
        "share": loading / weight if weight else float("nan"),
        "last": last,
        "query": q,
        "key": k,
        "query_token": tokens[q],
        "key_token": tokens[k],
        "carried": carried,
    }


def _edges(graph: FeatureGraph, given: Any) -> list[int]:
    """Indices of edges, each once."""
    single = isinstance(given, int) or (
        isinstance(given, tuple) and len(given) == 2 and all(isinstance(i, int) for i in given)
    )
    found = []
    for edge in [given] if single else list(given):
        if isinstance(edge, tuple):
            source, target = edge
            at = ((graph.source == source) & (graph.target == target)).nonzero()[:, 0].tolist()
            if not at:
                raise UnknownName(
                    "edge between the nodes", edge, [f"{len(graph.weight)} edges; see graph.edge_frame()"]
                )
            found.append(at[0])
            continue
        if isinstance(edge, bool) or not 0 <= int(edge) < len(graph.weight):
            raise UnknownName("edge", edge, [f"0 to {len(graph.weight) - 1}"])
        found.append(int(edge))
    if not found:
        raise WorkbenchError("name at least one edge")
    return list(dict.fromkeys(found))


def _prompt(graph: FeatureGraph, model: Model) -> Tensor:
    """The token ids of the prompt: from the embeddings, or from the texts of the tokens."""
    nodes = graph.nodes
    kept = (nodes.kind == kind_code("embedding")).nonzero()[:, 0]
    positions = nodes.position[kept]
    if len(graph.tokens) and sorted(positions.tolist()) == list(range(len(graph.tokens))):
        return nodes.feature[kept][positions.argsort()][None]
    tokenizer = model.tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(graph.tokens)) if tokenizer is not None and graph.tokens else []
    if not ids or any(i is None for i in ids) or tuple(tokenizer.convert_ids_to_tokens(ids)) != tuple(graph.tokens):
        raise WorkbenchError(
            "the graph has not kept the embeddings of all tokens: pass prompt=, the prompt that it was made of"
        )
    return torch.tensor(ids)[None]
