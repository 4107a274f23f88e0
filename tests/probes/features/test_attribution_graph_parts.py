"""Links, sub-graphs and paths of attribution graphs, against loops over a small graph."""

import itertools

import pytest
import torch
from frozen_cases import gaps, ids, native, transcoders

from workbench.errors import UnknownName, WorkbenchError
from workbench.feature_graph import FeatureGraph, FeatureNodes
from workbench.probes.features.attribution_graph import attribution_graph
from workbench.probes.features.influence import logit_weight, normalised
from workbench.probes.features.subgraph import (
    describe,
    find_nodes,
    node_index,
    node_links,
    path_text,
    strongest_paths,
    subgraph,
)

KINDS = ["embedding", "embedding", "feature", "feature", "error", "feature", "logit", "logit"]
LAYERS, PLACES, FEATURES = [-1, -1, 0, 0, 0, 1, 2, 2], [0, 1, 0, 1, 1, 1, 1, 1], [5, 6, 3, 4, -1, 9, 7, 8]
EDGES = {
    (0, 2): 2.0,
    (0, 3): -1.0,
    (1, 3): 3.0,
    (2, 5): -4.0,
    (3, 5): 1.0,
    (4, 5): 0.5,
    (5, 6): 2.0,
    (3, 6): -1.0,
    (5, 7): 1.0,
}


def graph():
    nodes = FeatureNodes.of(
        KINDS, LAYERS, PLACES, FEATURES, label=["a", "b", "", "", "", "", "c", "d"],
        columns={"omitted": torch.zeros(8, dtype=torch.float64)},
    )  # fmt: skip
    source, target = zip(*EDGES, strict=True)
    return FeatureGraph(nodes, source, target, torch.tensor(list(EDGES.values()), dtype=torch.float64), ("a", "b"))


def ends(made):
    names = [made.name(i) for i in range(len(made.nodes))]
    return {(names[s], names[t]) for s, t in zip(made.source.tolist(), made.target.tolist(), strict=True)}


def test_links_of_a_node_strongest_first():
    found = node_links(graph(), "L1 feature 9 @ 1")
    assert found.other.tolist() == [2, 3, 4, 6, 7]
    assert found.weight.tolist() == [-4.0, 1.0, 0.5, 2.0, 1.0]
    assert found.names[2] == "L0 error at 1 'b'"
    assert found.names[3] == "logit 'c'"
    assert node_links(graph(), 5, top=1).other.tolist() == [2, 6]
    assert found.frame()["direction"].tolist() == ["in"] * 3 + ["out"] * 2
    assert len(found.plot().patches) == 5


def test_nodes_by_name_and_by_what_they_are():
    made = graph()
    assert [int(node_index(made, made.name(i))[0]) for i in range(8)] == list(range(8))
    assert find_nodes(made, position=1, layer=0).tolist() == [3, 4]
    assert describe(made, 3) == "L0 feature 4 at 1 'b'"
    assert describe(made, 0) == "token 0 'a'"
    with pytest.raises(UnknownName, match="L0 feature 3 @ 0"):
        node_index(made, "L0 feature 30 @ 0")
    for wrong in ("feature three", 8, -1, True):
        with pytest.raises(WorkbenchError):
            node_index(made, wrong)


def test_pinned_nodes_with_the_edges_among_them():
    made = graph()
    part = subgraph(made, [0, 3, "L1 feature 9 @ 1", 6])
    assert ends(part) == {(made.name(s), made.name(t)) for s, t in EDGES if {s, t} <= {0, 3, 5, 6}}
    # What is gone is told, node by node.
    assert part.nodes.columns["omitted"].tolist() == [0, 3.0, -3.5, 0]
    strongest = subgraph(made, [0, 3, 5, 6], top=1)
    assert ends(strongest) == {(made.name(s), made.name(t)) for s, t in ((0, 3), (3, 5), (5, 6))}


def test_surroundings_by_depth():
    made = graph()
    name = made.name
    assert ends(subgraph(made, around=5)) == {(name(s), name(t)) for s, t in EDGES if 5 in (s, t)}
    whole = subgraph(made, around=5, depth=2)
    assert len(whole.nodes) == 8
    assert ends(whole) == {(name(s), name(t)) for s, t in EDGES} - {(name(3), name(6))}  # no turn on the way
    assert ends(subgraph(made, around=[5], depth=2, top=1)) == {(name(s), name(t)) for s, t in ((2, 5), (0, 2), (5, 6))}
    assert len(subgraph(made, around=0, depth=9).nodes) == 6


def test_strongest_paths_are_those_of_a_search_through_all():
    made = graph()
    share, own = normalised(made), logit_weight(made)
    step = {edge: float(share[i]) for i, edge in enumerate(EDGES)}
    found = {}
    for length in range(2, 6):
        for nodes in itertools.permutations(range(8), length):
            pairs = list(itertools.pairwise(nodes))
            if all(p in EDGES for p in pairs) and nodes[0] in (0, 1, 4) and nodes[-1] in (6, 7):
                value, sign = float(own[nodes[-1]]), 1
                for p in pairs:
                    value, sign = value * step[p], sign * (1 if EDGES[p] > 0 else -1)
                found[nodes] = (value, sign)
    paths = strongest_paths(made, 100)
    assert {p.nodes: (pytest.approx(p.share), p.sign) for p in paths} == found
    assert [p.share for p in paths] == sorted((p.share for p in paths), reverse=True)
    assert sum(p.share for p in paths) == pytest.approx(1)
    assert [p.nodes for p in strongest_paths(made, 3)] == [p.nodes for p in paths[:3]]
    assert path_text(made, paths[0]).startswith("token 0 'a' -> L0 feature 3 at 0 'a' -> L1 feature 9")


@pytest.mark.parametrize("seed", range(6))
def test_few_paths_are_the_first_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = ["embedding"] * 3 + ["feature"] * 9 + ["logit"] * 2
    layers = [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [3] * 2
    nodes = FeatureNodes.of(
        kinds, layers, [0] * 14, [*range(3), *range(9), 1, 2], probability=[float("nan")] * 12 + [0.7, 0.1]
    )
    pairs = [(s, t) for s in range(14) for t in range(14) if layers[s] < layers[t]]
    weight = torch.randn(len(pairs), dtype=torch.float64, generator=generator).exp()
    made = FeatureGraph(nodes, [s for s, _ in pairs], [t for _, t in pairs], weight)
    every = strongest_paths(made, 100_000)
    assert sum(path.share for path in every) == pytest.approx(1)
    shares = sorted((path.share for path in every), reverse=True)
    for top in (1, 4, 30):
        assert [path.share for path in strongest_paths(made, top)] == pytest.approx(shares[:top])


def test_parts_of_a_model_graph_keep_their_sums():
    model = native()
    whole = attribution_graph(model, transcoders(model), ids(model))
    node = int(find_nodes(whole, "feature", layer=1)[3])
    for part in (subgraph(whole, around=node, depth=2, top=3), subgraph(whole, find_nodes(whole, layer=1))):
        assert 0 < len(part.nodes) < len(whole.nodes)
        assert float(gaps(part).abs().max()) < 1e-10
    paths = strongest_paths(whole, 5)
    assert len(paths) == 5
    assert all(p.nodes[-1] in whole.logits.tolist() for p in paths)


def test_refusals():
    made = graph()
    for given in ({}, {"nodes": [0], "around": [0]}):
        with pytest.raises(WorkbenchError, match="one of them"):
            subgraph(made, **given)
    with pytest.raises(WorkbenchError, match="depth"):
        subgraph(made, around=0, depth=0)
    with pytest.raises(WorkbenchError, match="top"):
        subgraph(made, around=0, top=0)
