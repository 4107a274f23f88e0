"""Pictures of feature graphs: positions from left to right, layers from bottom to top."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.feature_graph import NODE_KINDS, FeatureGraph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EDGES, NODES, LABELS = 300, 1500, 40
"""At most so many edges, nodes and names of tokens are drawn."""
_RAISES, _LOWERS = "#1f6f8b", "#c1502e"
_COLOURS = {
    "embedding": "#5b6770",
    "feature": "#1f6f8b",
    "attention feature": "#3f8f4f",
    "head": "#8a5ea8",
    "bias": "#9a8a5e",
    "logit": "#b0407e",
    "residual feature": "#b8860b",
}


def draw(graph: FeatureGraph, ax: Axes) -> Axes:
    """The strongest edges, blue where they raise their target and red where they lower it, and the nodes that carry most."""
    nodes = graph.nodes
    carried = importance(graph)
    edges = carried.argsort(descending=True, stable=True)[:EDGES]
    shown = _shown(graph, edges)
    x, y = _places(graph, shown)
    strongest = float(carried[edges].max()) if len(edges) and float(carried[edges].max()) > 0 else 1.0
    for edge in edges.tolist():
        source, target = int(graph.source[edge]), int(graph.target[edge])
        width = 0.3 + 2.2 * float(carried[edge]) / strongest
        colour = _RAISES if float(graph.weight[edge]) >= 0 else _LOWERS
        ax.plot([x[source], x[target]], [y[source], y[target]], color=colour, linewidth=width, alpha=0.4, zorder=1)
    for kind in NODE_KINDS:
        index = nodes.where(kind)
        index = index[shown[index]]
        if len(index):
            colour = _COLOURS.get(kind, "#c1502e")
            ax.scatter(
                x[index], y[index], s=14, color=colour, marker="o" if kind in _COLOURS else "D", label=kind, zorder=2
            )
    top = int(nodes.layer.max()) if len(nodes) else 0
    names = {-1: "embedding"}
    if len(graph.logits):
        names[int(nodes.layer[graph.logits[0]])] = "logits"
    ax.set_yticks(range(-1, top + 1), [names.get(i, f"layer {i}") for i in range(-1, top + 1)])
    if graph.tokens:
        step = -(-len(graph.tokens) // LABELS)
        texts = [repr(token)[1:-1].replace("$", r"\$") for token in graph.tokens[::step]]
        ax.set_xticks(range(0, len(graph.tokens), step), texts, rotation=45, ha="right", fontsize="small")
    more = f", strongest {EDGES} drawn" if len(graph.source) > EDGES else ""
    ax.set_title(f"{len(nodes):,} nodes, {len(graph.source):,} edges{more}")
    if len(nodes):
        ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def graph_html(graph: FeatureGraph) -> str:
    """The prompt, the scores of the graph, its picture, and the nodes that carry most."""
    from matplotlib.figure import Figure

    from workbench.figure_html import picture
    from workbench.fragments import line, table_view

    wide = min(14.0, max(6.4, 1.5 + 0.4 * len(graph.tokens)))
    frame = graph.frame()
    if len(frame) and not frame["influence"].isna().all():
        frame = frame.sort_values("influence", ascending=False, kind="stable")
    told = "; ".join(f"{name.replace('_', ' ')} {graph.meta[name]:.3f}" for name in _SCORES if name in graph.meta)
    prompt = " ".join(graph.tokens[-LABELS:])
    drawn = picture(
        lambda: draw(graph, Figure(figsize=(wide, 4.8), layout="constrained").subplots()), "attribution graph"
    )
    known = [name for name in frame.columns if not frame[name].isna().all()]
    return table_view(frame[known], "FeatureGraph", line(prompt), line(told) if told else "", drawn, rows=20)


_SCORES = ("replacement_score", "completeness_score")


def importance(graph: FeatureGraph) -> Tensor:
    """What orders edges, ``[M]``: their share in the inputs of their target times what the target carries where that is known,
    and else their absolute weight."""
    size, nodes = graph.weight.abs().double(), graph.nodes
    carried = torch.where(nodes.influence.isnan(), 0.0, nodes.influence)
    logits = graph.logits
    if not len(logits) or not bool((carried > 0).any()):
        return size
    own = nodes.probability[logits]
    carried[logits] = own if bool(torch.isfinite(own).all()) else 1 / len(logits)
    total = torch.zeros(len(nodes), dtype=torch.float64).index_add_(0, graph.target, size)
    return size / total[graph.target].clamp(min=1e-300) * carried[graph.target]


def _shown(graph: FeatureGraph, edges: Tensor) -> Tensor:
    """Nodes that are drawn: the ends of drawn edges, and of the others those that carry most."""
    rank = torch.where(graph.nodes.influence.isnan(), 0.0, graph.nodes.influence)
    rank[torch.cat([graph.source[edges], graph.target[edges], graph.logits])] = float("inf")
    shown = torch.zeros(len(rank), dtype=torch.bool)
    shown[rank.argsort(descending=True, stable=True)[:NODES]] = True
    return shown


def _places(graph: FeatureGraph, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes of one position and layer stand side by side, so that none hides another."""
    nodes = graph.nodes
    x, y = nodes.position.double(), nodes.layer.double()
    index = shown.nonzero()[:, 0]
    if not len(index):
        return x, y
    group = nodes.position[index] * (int(nodes.layer.max()) + 2) + nodes.layer[index] + 1
    order = group.argsort(stable=True)
    _, counts = torch.unique_consecutive(group[order], return_counts=True)
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    x[index[order]] += 0.7 * (rank + 0.5) / counts.repeat_interleave(counts) - 0.35
    return x, y
