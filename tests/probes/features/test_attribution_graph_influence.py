"""Influence, pruning and scores on a graph whose numbers are worked out by hand, and on random graphs against matrices."""

import pytest
import torch
from frozen_cases import gaps, ids, native, transcoders
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import WorkbenchError
from workbench.feature_graph import FeatureGraph, FeatureNodes
from workbench.probes.features.attribution_graph import attribution_graph
from workbench.probes.features.influence import (
    completeness_score,
    edge_influence,
    graph_scores,
    influence,
    normalised,
    pruned,
    replacement_score,
)

# Twelve nodes: embeddings 0 1 2, layer 0: error 3, features 4 5 6, layer 1: error 7, features 8 9, logits 10 11.
KINDS = ["embedding"] * 3 + ["error"] + ["feature"] * 3 + ["error"] + ["feature"] * 2 + ["logit"] * 2
LAYERS = [-1] * 3 + [0] * 4 + [1] * 3 + [2] * 2
PLACES = [0, 1, 2, 2, 0, 1, 2, 2, 1, 2, 2, 2]
FEATURES = [5, 6, 7, -1, 0, 1, 2, -1, 0, 1, 8, 9]
EDGES = [
    (0, 4, 2.0),
    (0, 5, -1.0), (1, 5, 3.0),
    (1, 6, 1.0), (2, 6, 1.0),
    (4, 8, 3.0), (5, 8, -1.0),
    (5, 9, 2.0), (6, 9, 1.0), (3, 9, -1.0),
    (8, 10, 3.0), (9, 10, 5.0), (7, 10, -2.0),
    (9, 11, -1.0), (6, 11, 1.0),
]  # fmt: skip
PROBABILITIES = [float("nan")] * 10 + [0.6, 0.2]
# Logits count 3/4 and 1/4. Worked out from the top:
# 8: 3/4 * 3/10 = 9/40.  9: 3/4 * 5/10 + 1/4 * 1/2 = 1/2.  7: 3/4 * 2/10 = 3/20.
# 4: 9/40 * 3/4 = 27/160.  5: 9/40 * 1/4 + 1/2 * 2/4 = 49/160.  6: 1/2 * 1/4 + 1/4 * 1/2 = 1/4.  3: 1/2 * 1/4 = 1/8.
# 0: 27/160 + 49/160 * 1/4 = 157/640.  1: 49/160 * 3/4 + 1/4 * 1/2 = 227/640.  2: 1/4 * 1/2 = 1/8.
INFLUENCE = [157 / 640, 227 / 640, 1 / 8, 1 / 8, 27 / 160, 49 / 160, 1 / 4, 3 / 20, 9 / 40, 1 / 2, 0, 0]


def graph(**changes):
    nodes = FeatureNodes.of(
        KINDS,
        LAYERS,
        PLACES,
        FEATURES,
        probability=PROBABILITIES,
        columns={"omitted": torch.zeros(12, dtype=torch.float64)},
    )
    source, target, weight = zip(*EDGES, strict=True)
    given = {"nodes": nodes, "source": source, "target": target, "weight": torch.tensor(weight, dtype=torch.float64)}
    return FeatureGraph(**{**given, **changes}, tokens=("a", "b", "c"))


def test_influence_by_hand():
    torch.testing.assert_close(influence(graph()), torch.tensor(INFLUENCE, dtype=torch.float64))
    leaves = [0, 1, 2, 3, 7]
    assert sum(INFLUENCE[i] for i in leaves) == pytest.approx(1)


def test_scores_by_hand():
    tokens, errors = (157 + 227) / 640 + 1 / 8, 1 / 8 + 3 / 20
    assert replacement_score(graph()) == pytest.approx(tokens / (tokens + errors))
    # Inputs of 4 5 6 8 are whole, of 9 3/4, of logit 10 8/10, of logit 11 whole.
    weight = {4: 27 / 160, 5: 49 / 160, 6: 1 / 4, 8: 9 / 40, 9: 1 / 2, 10: 3 / 4, 11: 1 / 4}
    share = {9: 3 / 4, 10: 8 / 10}
    wanted = sum(w * share.get(i, 1) for i, w in weight.items()) / sum(weight.values())
    assert completeness_score(graph()) == pytest.approx(wanted)
    scored = graph_scores(graph())
    assert scored.meta == {"replacement_score": replacement_score(graph()), "completeness_score": pytest.approx(wanted)}
    torch.testing.assert_close(scored.nodes.influence, influence(graph()))


def test_edge_influence_by_hand():
    found = dict(zip([(s, t) for s, t, _ in EDGES], edge_influence(graph()).tolist(), strict=True))
    assert found[9, 10] == pytest.approx(3 / 4 * 1 / 2)
    assert found[5, 9] == pytest.approx(1 / 2 * 1 / 2)
    assert found[0, 5] == pytest.approx(49 / 160 / 4)


def test_pruning_by_hand():
    # All influence is 1 + 27/160 + 49/160 + 1/4 + 9/40 + 1/2 = 2.45. Largest first: 9 (.5), 1 (.3547), 5 (.30625), 6 (.25),
    # 0 (.2453), 8 (.225): 1.8812 of 2.45 are 76.8%; with 4 (.16875) 83.7%.
    small = pruned(graph(), node_share=0.75, edge_share=1.0)
    assert small.nodes.key[:, 1:].tolist() == [
        [layer, place, feature]
        for i, (layer, place, feature) in enumerate(zip(LAYERS, PLACES, FEATURES, strict=True))
        if i in (0, 1, 2, 5, 6, 8, 9, 10, 11)
    ]
    assert len(small.source) == len([e for e in EDGES if not {3, 4, 7} & {e[0], e[1]}])
    # What was taken out stays in the sums.
    assert small.nodes.columns["omitted"].tolist() == [0, 0, 0, 0, 0, 3.0, -1.0, -2.0, 0]
    assert {(3, 9), (4, 8)} <= {(s, t) for s, t, _ in EDGES}
    torch.testing.assert_close(
        small.nodes.influence.isnan(), torch.ones(9, dtype=torch.bool)
    )  # untouched: this graph never had any


def test_pruning_takes_out_what_leads_nowhere():
    # Edge scores: weak edges go, and with the only edge of 8 to the logits (3/10) gone, 8 and then 4 go too.
    found = pruned(graph(), node_share=1.0, edge_share=0.45)
    kept = {tuple(k) for k in found.nodes.key.tolist()}
    whole = graph()
    inner = [tuple(whole.nodes.key[i].tolist()) for i in range(12) if KINDS[i] in ("feature", "error")]
    out = {tuple(whole.nodes.key[i].tolist()) for i in (0, 1, 2, 10, 11)}
    assert out <= kept
    for key in set(inner) & kept:
        at = [tuple(k) for k in found.nodes.key.tolist()].index(key)
        assert bool((found.source == at).any())
        assert key[0] != 1 or bool((found.target == at).any())
    assert len(kept) < 12


def test_features_without_inputs_count_as_neither_and_are_pruned():
    lone = [edge for edge in EDGES if edge[1] != 6]  # nothing leads to feature 6, which has 1/4 of the influence
    source, target, weight = zip(*lone, strict=True)
    made = graph(source=source, target=target, weight=torch.tensor(weight, dtype=torch.float64))
    tokens, errors = 157 / 640 + 49 / 160 * 3 / 4, 1 / 8 + 3 / 20
    assert replacement_score(made) == pytest.approx(tokens / (tokens + errors))
    small = pruned(made, 1.0, 1.0)
    assert [0, 2, 2] not in small.nodes.key[:, 1:].tolist()
    assert len(small.nodes) == 11


def test_whole_shares_keep_everything_that_matters():
    whole = pruned(graph(), 1.0, 1.0)
    assert len(whole.nodes) == 12
    assert len(whole.source) == len(EDGES)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_one_walk_down_is_the_inverse(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(4, 14, (1,), generator=generator))
    layers = torch.randint(0, 4, (n,), generator=generator).sort().values
    kinds = ["feature" if i % 3 else "attention feature" for i in range(n)] + ["logit"]
    nodes = FeatureNodes.of(kinds, [*layers.tolist(), 4], [0] * (n + 1), [*range(n), 3])
    pairs = [
        (s, t) for s in range(n + 1) for t in range(n + 1)
        if (int(nodes.depth[s]), s) < (int(nodes.depth[t]), t) and float(torch.rand(1, generator=generator)) < 0.5
    ]  # fmt: skip
    if not pairs:
        return
    weight = torch.randn(len(pairs), dtype=torch.float64, generator=generator)
    made = FeatureGraph(nodes, [s for s, _ in pairs], [t for _, t in pairs], weight)
    a = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    a[made.target, made.source] = normalised(made)
    inverse = torch.linalg.inv(torch.eye(n + 1, dtype=torch.float64) - a) - torch.eye(n + 1, dtype=torch.float64)
    torch.testing.assert_close(influence(made), inverse[n], atol=1e-10, rtol=1e-8)


def test_pruned_graphs_of_a_model_keep_their_sums():
    model = native()
    whole = attribution_graph(model, transcoders(model), ids(model))
    small = pruned(whole)
    assert 0 < len(small.nodes) < len(whole.nodes)
    assert len(small.source) < len(whole.source)
    assert float(gaps(small).abs().max()) < 1e-10
    share = float(small.nodes.influence.sum() / whole.nodes.influence.sum())
    assert 0.75 < share < 1
    assert small.meta["pruned_from"] == [len(whole.nodes), len(whole.source)]
    assert 0 < whole.meta["replacement_score"] < 1
    assert 0 < whole.meta["completeness_score"] < 1


def test_refusals():
    with pytest.raises(WorkbenchError, match="node_share is a share"):
        pruned(graph(), 1.2)
    with pytest.raises(WorkbenchError, match="none"):
        influence(FeatureGraph(FeatureNodes.of(["feature"], [0], [0], [0]), [], [], torch.zeros(0)))
    within = FeatureNodes.of(["attention feature"] * 2 + ["logit"], [0, 0, 1], [0, 1, 1], [1, 2, 3])
    with pytest.raises(WorkbenchError, match="cycle"):
        influence(FeatureGraph(within, [0, 1, 0], [1, 0, 2], torch.ones(3)))
