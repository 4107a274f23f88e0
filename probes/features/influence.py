"""Which nodes and edges of an attribution graph carry the logits, and which can go?

With A the absolute weights, each row (the edges into one node) divided by its sum, and p the probabilities of the logits,

    influence = p (A + A^2 + A^3 + ...) = p ((I - A)^-1 - I).

A graph is without cycles, so one walk from the logits down gives the sum exactly, edge by edge; no N x N matrix is made.
Thresholds and the order of pruning are those of circuit-tracer (``prune_graph``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.feature_graph import FeatureGraph, FeatureNodes

_WHOLE = ("embedding", "logit")
"""Nodes that pruning never takes."""
_LEFT = ("error", "attention error")


def influence(graph: FeatureGraph) -> Tensor:
    """Share of the logits that each node carries, ``[N]`` float64; 0 for logits themselves.

    Shares of all nodes that have no inputs sum to 1 (less what logits without inputs have). Logits count by their probability,
    equally where it is not known; a graph without logits is refused.
    """
    return _carried(graph, normalised(graph), logit_weight(graph))


def normalised(graph: FeatureGraph) -> Tensor:
    """A by edge, ``[M]`` float64: the share of each edge in the absolute weights of all edges into its target."""
    size = graph.weight.abs().double()
    total = torch.zeros(len(graph.nodes), dtype=torch.float64).index_add_(0, graph.target, size)
    return size / total[graph.target].clamp(min=1e-300)


def edge_influence(graph: FeatureGraph) -> Tensor:
    """Share of the logits that each edge carries, ``[M]``: A times what its target carries or, for logits, is."""
    share, own = normalised(graph), logit_weight(graph)
    return share * (_carried(graph, share, own) + own)[graph.target]


def pruned(graph: FeatureGraph, node_share: float = 0.8, edge_share: float = 0.98) -> FeatureGraph:
    """The graph without its weak nodes and edges.

    Kept are the nodes of largest influence that have the share ``node_share`` of all influence, embeddings and logits; then, of
    the edges among them, the largest that have the share ``edge_share``; then features and errors that lead nowhere and features
    that nothing leads to are taken out until none is left. ``influence`` of the nodes stays that of the whole graph.
    """
    for name, value in (("node_share", node_share), ("edge_share", edge_share)):
        if isinstance(value, bool) or not 0 <= value <= 1:
            raise WorkbenchError(f"{name} is a share, 0 to 1; got {value!r}")
    n, nodes = len(graph.nodes), graph.nodes
    carried = influence(graph)
    always = torch.zeros(n, dtype=torch.bool)
    always[nodes.where(*_WHOLE)] = True
    inner = torch.zeros(n, dtype=torch.bool)
    inner[nodes.where("feature", "attention feature")] = True
    keep = (carried >= _threshold(carried, node_share)) | always
    among = keep[graph.source] & keep[graph.target]
    smaller = replace(
        graph, source=graph.source[among], target=graph.target[among], weight=graph.weight[among], columns={}
    )
    scores = torch.zeros(len(graph.source), dtype=torch.float64)
    scores[among] = edge_influence(smaller)
    edges = among & (scores >= _threshold(scores[among], edge_share))
    while True:
        leads, reached = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        leads[graph.source[edges]] = True
        reached[graph.target[edges]] = True
        left = keep & (always | (leads & (~inner | reached)))
        if bool((left == keep).all()):
            break
        keep = left
        edges = edges & keep[graph.source] & keep[graph.target]
    told = {**graph.meta, "node_share": node_share, "edge_share": edge_share, "pruned_from": [n, len(graph.source)]}
    return restricted(graph, keep, edges, told)


def restricted(
    graph: FeatureGraph, nodes: Tensor, edges: Tensor, meta: Mapping[str, Any] | None = None
) -> FeatureGraph:
    """The graph of some nodes ``[N]`` and edges ``[M]`` (bool); edges of nodes that are gone go too.

    The weights of edges that go are added to ``omitted`` of their targets, where the graph has that column.
    """
    edges = edges & nodes[graph.source] & nodes[graph.target]
    columns = dict(graph.nodes.columns)
    if "omitted" in columns:
        gone = ~edges
        columns["omitted"] = columns["omitted"].index_add(
            0, graph.target[gone], graph.weight[gone].to(columns["omitted"])
        )
    number = nodes.cumsum(0) - 1
    kept = replace(graph.nodes, columns=columns).take(nodes.nonzero()[:, 0])
    return FeatureGraph(
        kept,
        number[graph.source[edges]],
        number[graph.target[edges]],
        graph.weight[edges],
        graph.tokens,
        graph.meta if meta is None else meta,
        {name: values[edges] for name, values in graph.columns.items()},
    )


def replacement_score(graph: FeatureGraph) -> float:
    """Share of the influence of embeddings in that of embeddings and errors: how much of what leads from the tokens to the logits
    passes features and not errors, 1 at best. NaN if neither carries anything."""
    return _replacement(graph, influence(graph))


def completeness_score(graph: FeatureGraph) -> float:
    """Share of the inputs of nodes that are not errors, weighted by what each node carries (logits: by their probability).

    Nodes without inputs have no share and do not count; circuit-tracer counts them as complete, which gives larger numbers.
    """
    return _completeness(graph, edge_influence(graph))


def graph_scores(graph: FeatureGraph) -> FeatureGraph:
    """The graph with ``influence`` of its nodes, and both scores in ``meta``."""
    share, own = normalised(graph), logit_weight(graph)
    carried = _carried(graph, share, own)
    scores = {
        "replacement_score": _replacement(graph, carried),
        "completeness_score": _completeness(graph, share * (carried + own)[graph.target]),
    }
    nodes: FeatureNodes = replace(graph.nodes, influence=carried)
    return replace(graph, nodes=nodes, meta={**graph.meta, **scores})


def _replacement(graph: FeatureGraph, carried: Tensor) -> float:
    tokens, errors = (float(carried[graph.nodes.where(*kinds)].sum()) for kinds in (("embedding",), _LEFT))
    return tokens / (tokens + errors) if tokens + errors > 0 else float("nan")


def _completeness(graph: FeatureGraph, weight: Tensor) -> float:
    error = torch.zeros(len(graph.nodes), dtype=torch.bool)
    error[graph.nodes.where(*_LEFT)] = True
    total = float(weight.sum())
    return float(weight[~error[graph.source]].sum()) / total if total > 0 else float("nan")


def logit_weight(graph: FeatureGraph) -> Tensor:
    """``[N]`` float64: the probability of logits, equal parts where it is not known, with sum 1; 0 for other nodes."""
    logits = graph.logits
    if not len(logits):
        raise WorkbenchError("influence is on logits, and this graph has none")
    probability = graph.nodes.probability[logits]
    known = bool(torch.isfinite(probability).all()) and float(probability.sum()) > 0
    weight = torch.zeros(len(graph.nodes), dtype=torch.float64)
    weight[logits] = probability / probability.sum() if known else 1 / len(logits)
    return weight


def _carried(graph: FeatureGraph, share: Tensor, own: Tensor) -> Tensor:
    """own (A + A^2 + ...), by walking from the deepest targets down."""
    depth = graph.nodes.depth
    carried = torch.zeros_like(own)
    order = torch.argsort(depth[graph.target], descending=True, stable=True)
    levels, counts = torch.unique_consecutive(depth[graph.target][order], return_counts=True)
    for level, edges in zip(levels.tolist(), order.split(counts.tolist()), strict=True):
        source, target, part = graph.source[edges], graph.target[edges], share[edges]
        inside = depth[source] == level
        # Edges within a level (attention features of one layer) are followed until nothing moves.
        moving = torch.where(depth == level, carried + own, 0.0)
        for _ in range(len(own)):
            added = torch.zeros_like(own).index_add_(0, source[inside], moving[target[inside]] * part[inside])
            if not bool(added.any()):
                break
            carried += added
            moving = added
        else:
            if bool(inside.any()):
                raise WorkbenchError("the graph has a cycle; influence is defined for graphs without")
        carried.index_add_(0, source[~inside], (carried + own)[target[~inside]] * part[~inside])
    return carried


def _threshold(scores: Tensor, share: float) -> float:
    """The smallest score of the largest ones that have a share of the sum, as circuit-tracer finds it."""
    ordered = scores.sort(descending=True).values
    if not len(ordered) or float(ordered.sum()) <= 0:
        return 0.0
    at = int(torch.searchsorted(ordered.cumsum(0) / ordered.sum(), share))
    return float(ordered[min(at, len(ordered) - 1)])
