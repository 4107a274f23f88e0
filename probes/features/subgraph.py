"""Parts of an attribution graph: the links of one node, the surroundings of some, the strongest paths.

All are functions of a graph alone, so that a viewer asks for the part it shows and nothing larger leaves the engine.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.feature_graph import NODE_KINDS, FeatureGraph, kind_code
from workbench.probes.features.influence import logit_weight, normalised, restricted
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Nodes = int | str | Sequence[int | str] | Tensor
_NAME = re.compile(r"^(?:L(?P<layer>\d+) )?(?P<kind>[a-z ]+?)(?: (?P<feature>\d+))? @ (?P<position>\d+)$")


def find_nodes(
    graph: FeatureGraph,
    kind: str | None = None,
    *,
    layer: int | None = None,
    position: int | None = None,
    feature: int | None = None,
) -> Tensor:
    """Indices ``[n]`` of the nodes that agree with everything that is given."""
    nodes = graph.nodes
    found = torch.ones(len(nodes), dtype=torch.bool)
    code = None if kind is None else kind_code(kind)
    for column, wanted in (
        (nodes.kind, code),
        (nodes.layer, layer),
        (nodes.position, position),
        (nodes.feature, feature),
    ):
        if wanted is not None:
            found &= column == wanted
    return found.nonzero()[:, 0]


def node_index(graph: FeatureGraph, nodes: Nodes) -> Tensor:
    """Indices ``[n]`` of nodes given by index or by name (``L3 feature 17 @ 5``, as ``graph.name`` writes it)."""
    if isinstance(nodes, Tensor):
        nodes = nodes.flatten().tolist()
    given = [nodes] if isinstance(nodes, int | str) else nodes
    return torch.tensor([_index(graph, node) for node in given], dtype=torch.int64)


def describe(graph: FeatureGraph, node: int) -> str:
    """A node in words, with its token: ``L1 feature 17 at 5 'gave'``, ``token 3 'Mary'``, ``logit 'Mary'``."""
    nodes = graph.nodes
    kind, position = NODE_KINDS[int(nodes.kind[node])], int(nodes.position[node])
    label = nodes.label[node]
    token = f" {graph.tokens[position]!r}" if graph.tokens else ""
    if kind == "logit":
        return f"logit {label!r}" if label else f"logit {int(nodes.feature[node])}"
    if kind == "embedding":
        return f"token {position}{token}"
    index = f" {int(nodes.feature[node])}" if int(nodes.feature[node]) >= 0 else ""
    said = f" ({label})" if label else ""
    return f"L{int(nodes.layer[node])} {kind}{index}{said} at {position}{token}"


@dataclass(frozen=True)
class NodeLinks(Result):
    """Links of ``node``: edges ``incoming`` ``[i]`` and ``outgoing`` ``[o]`` (indices into the graph), strongest first, with
    ``weight [i + o]`` and the node at the other end, ``other`` ``[i + o]`` and ``names``, first the incoming ones."""

    node: int
    name: str
    incoming: Tensor
    outgoing: Tensor
    other: Tensor
    weight: Tensor
    names: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """One row per link: ``direction node name weight``."""
        import pandas as pd

        directions = ["in"] * len(self.incoming) + ["out"] * len(self.outgoing)
        return pd.DataFrame(
            {
                "direction": directions,
                "node": self.other.numpy(),
                "name": list(self.names),
                "weight": self.weight.numpy(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Weights of incoming links, then of outgoing ones."""
        count = len(self.names)
        ax = axis(ax, 6.4, max(2.0, 1.0 + 0.22 * count))
        colours = ["#1f6f8b" if w >= 0 else "#c1502e" for w in self.weight.tolist()]
        ax.barh(range(count), self.weight.tolist(), color=colours)
        arrows = ["from "] * len(self.incoming) + ["to "] * len(self.outgoing)
        ax.set_yticks(range(count), [a + n for a, n in zip(arrows, self.names, strict=True)], fontsize="small")
        ax.invert_yaxis()
        ax.set(xlabel="weight", title=self.name)
        return ax


def node_links(graph: FeatureGraph, node: int | str, top: int | None = None) -> NodeLinks:
    """The links of one node by absolute weight, strongest first, at most ``top`` in each direction."""
    at, limit = int(node_index(graph, node)[0]), _top(top)
    ends = []
    for here in (graph.target, graph.source):
        edges = (here == at).nonzero()[:, 0]
        order = graph.weight[edges].abs().argsort(descending=True, stable=True)
        ends.append(edges[order][:limit])
    other = torch.cat([graph.source[ends[0]], graph.target[ends[1]]])
    names = tuple(describe(graph, i) for i in other.tolist())
    return NodeLinks(at, describe(graph, at), ends[0], ends[1], other, graph.weight[torch.cat(ends)], names)


def subgraph(
    graph: FeatureGraph,
    nodes: Nodes | None = None,
    *,
    around: Nodes | None = None,
    depth: int = 1,
    top: int | None = None,
) -> FeatureGraph:
    """The graph of some pinned ``nodes`` with all edges among them, or what lies within ``depth`` links ``around`` some.

    ``top`` keeps only so many of the strongest links: with ``nodes`` into each node, with ``around`` into and out of each node
    that is passed. Links are followed upwards and downwards, without turning. ``omitted`` of the nodes takes up what goes.
    """
    if (nodes is None) == (around is None):
        raise WorkbenchError("a sub-graph is of nodes=, or of what lies around= some; give one of them")
    limit, size = _top(top), graph.weight.abs()
    if around is None:
        assert nodes is not None
        kept = torch.zeros(len(graph.nodes), dtype=torch.bool)
        kept[node_index(graph, nodes)] = True
        edges = kept[graph.source] & kept[graph.target]
        return restricted(graph, kept, _strongest(graph.target, size, edges, limit))
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise WorkbenchError(f"depth is a number of links, from 1; got {depth!r}")
    start = node_index(graph, around)
    kept = torch.zeros(len(graph.nodes), dtype=torch.bool)
    kept[start] = True
    edges = torch.zeros(len(graph.source), dtype=torch.bool)
    for here, there in ((graph.target, graph.source), (graph.source, graph.target)):
        reached = torch.zeros_like(kept)
        reached[start] = True
        edge_of = reached
        for _ in range(depth):
            followed = _strongest(here, size, edge_of[here], limit)
            edges |= followed
            edge_of = torch.zeros_like(kept)
            edge_of[there[followed]] = True
            edge_of &= ~reached
            reached |= edge_of
            if not bool(edge_of.any()):
                break
        kept |= reached
    return restricted(graph, kept, edges)


@dataclass(frozen=True)
class Path:
    """``nodes`` from a source to a logit; ``share`` of the logits that goes along it (product of the shares of its edges), with
    the ``sign`` of the product of its weights."""

    nodes: tuple[int, ...]
    share: float
    sign: int


def strongest_paths(graph: FeatureGraph, top: int = 10) -> list[Path]:
    """The ``top`` paths from nodes without inputs to logits that carry most, strongest first.

    Exact: paths are extended downwards in the order of the best that can still come of them.
    """
    share, own = normalised(graph), logit_weight(graph)
    order = torch.argsort(graph.target, stable=True)
    bounds = torch.searchsorted(graph.target[order], torch.arange(len(graph.nodes) + 1)).tolist()
    best = _best(graph, share)
    heap: list[tuple[float, int, float, int, tuple[int, ...]]] = []
    count = 0
    for logit in graph.logits.tolist():
        heapq.heappush(heap, (-float(own[logit] * best[logit]), count, float(own[logit]), 1, (logit,)))
        count += 1
    found: list[Path] = []
    while heap and len(found) < top:
        _, _, so_far, sign, nodes = heapq.heappop(heap)
        edges = order[bounds[nodes[0]] : bounds[nodes[0] + 1]]
        if not len(edges):
            if len(nodes) > 1:
                found.append(Path(nodes, so_far, sign))
            continue
        promise = share[edges] * best[graph.source[edges]]
        # No more than the best ``top`` ways on from one node can be among the best ``top`` of all.
        for at in promise.topk(min(top, len(edges))).indices.tolist():
            edge = int(edges[at])
            if float(promise[at]) <= 0:
                continue
            turn = sign if float(graph.weight[edge]) > 0 else -sign
            source = int(graph.source[edge])
            heapq.heappush(
                heap, (-so_far * float(promise[at]), count, so_far * float(share[edge]), turn, (source, *nodes))
            )
            count += 1
    return found


def path_text(graph: FeatureGraph, path: Path) -> str:
    """A path in words, from its source to the logit."""
    return " -> ".join(describe(graph, node) for node in path.nodes)


def _best(graph: FeatureGraph, share: Tensor) -> Tensor:
    """The largest product of shares on a way down from each node, 1 where there are no inputs, ``[N]``."""
    inputs = torch.zeros(len(graph.nodes), dtype=torch.bool)
    inputs[graph.target] = True
    best = (~inputs).double()
    depth = graph.nodes.depth[graph.target]
    order = torch.argsort(depth, stable=True)
    _, counts = torch.unique_consecutive(depth[order], return_counts=True)
    for edges in order.split(counts.tolist()):
        while True:  # once more as long as edges within a level move something
            before = best.clone()
            best.scatter_reduce_(0, graph.target[edges], share[edges] * best[graph.source[edges]], "amax")
            if bool((best == before).all()):
                break
    return best


def _strongest(group: Tensor, size: Tensor, among: Tensor, top: int | None) -> Tensor:
    """Of the edges ``among`` (bool ``[M]``) the ``top`` largest of each group, as bool ``[M]``."""
    if top is None:
        return among
    index = among.nonzero()[:, 0]
    index = index[size[index].argsort(descending=True, stable=True)]
    index = index[group[index].argsort(stable=True)]
    _, counts = torch.unique_consecutive(group[index], return_counts=True)
    rank = torch.arange(len(index)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    out = torch.zeros_like(among)
    out[index[rank < top]] = True
    return out


def _top(top: int | None) -> int | None:
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise WorkbenchError(f"top is a number of links, from 1; got {top!r}")
    return top


def _index(graph: FeatureGraph, node: int | str) -> int:
    if isinstance(node, int) and not isinstance(node, bool):
        if not 0 <= node < len(graph.nodes):
            raise WorkbenchError(f"nodes of this graph are 0 to {len(graph.nodes) - 1}; got {node}")
        return node
    match = _NAME.match(node) if isinstance(node, str) else None
    if match is None:
        raise WorkbenchError(f"a node is an index or a name such as 'L1 feature 17 @ 5'; got {node!r}")
    layer = None if match["layer"] is None else int(match["layer"])
    feature = None if match["feature"] is None else int(match["feature"])
    found = find_nodes(graph, match["kind"], layer=layer, position=int(match["position"]), feature=feature)
    if len(found) != 1:
        raise UnknownName("node", node, [graph.name(i) for i in find_nodes(graph, match["kind"])[:40].tolist()])
    return int(found[0])
