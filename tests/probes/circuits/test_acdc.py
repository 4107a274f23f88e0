"""ACDC against a literal greedy loop, its limits, and the circuits of compiled models."""

import pytest
import torch

from workbench.errors import UnknownName, WorkbenchError
from workbench.graph import edge_parts
from workbench.pairs import at_answer
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.labels import auroc
from workbench.probes.circuits.masked import masked


def test_limits_of_tau(soft, induction):
    none = find_circuit(soft, induction, method="acdc", tau=1e9)
    every = find_circuit(soft, induction, method="acdc", tau=0.0)
    assert len(none) == 0
    assert len(every) == len(every.names) == 81


def test_limits_of_tau_with_norms_mlps_and_grouped_heads(make, make_pairs):
    model, pairs = make(), make_pairs()
    for level in ("node", "edge"):
        assert len(find_circuit(model, pairs, method="acdc", level=level, tau=1e9)) == 0
        every = find_circuit(model, pairs, method="acdc", level=level, tau=0.0)
        assert len(every) == len(every.names)


def visit(name):
    """Later layers first; MLP, queries, keys, values; later readers and later sources first."""
    source, target, channel = edge_parts(name)
    nodes = ["input", *(n for i in range(2) for n in [*(f"a{i}.h{h}" for h in range(4)), f"m{i}"])]
    layer = 9 if target == "logits" else int(target[1])
    head = int(target.split(".")[1][1:]) if "." in target else 0
    return -layer, ("in", "q", "k", "v").index(channel), -head, -nodes.index(source)


@pytest.mark.parametrize("level", ["node", "edge"])
@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
def test_equals_a_literal_greedy_loop(make, make_pairs, level, ablation):
    model, pairs, tau = make(), make_pairs(), 0.02 if level == "edge" else 0.1
    found = find_circuit(model, pairs, method="acdc", level=level, ablation=ablation, tau=tau, batch=2)
    part = masked(Setting.of(model, pairs, None, ablation, len(pairs)), level)
    batch = part.prepare(pairs)
    full = at_answer(batch.logits, pairs).softmax(-1)

    def loss(dropped):
        keep = torch.tensor([name not in dropped for name in part.names]).double()
        with torch.no_grad():
            other = at_answer(part.logits(batch, keep), pairs).softmax(-1)
        return float((full * (full / other).log()).sum(-1).mean())

    dropped: set[str] = set()
    order = reversed(part.names) if level == "node" else sorted(part.names, key=visit)
    for name in order:
        if loss(dropped | {name}) - loss(dropped) < tau:
            dropped.add(name)
    assert {name for name, kept in zip(found.names, found.kept.tolist(), strict=True) if not kept} == dropped
    assert 0 < len(dropped) < len(part.names)


@pytest.mark.parametrize("which", ["hard", "soft"])
def test_finds_the_active_edges_of_induction(which, request, induction):
    model = request.getfixturevalue(which)
    found = find_circuit(model, induction, method="acdc", tau=0.01)
    assert auroc(found, model.ground_truth) >= 0.95
    assert {edge_parts(n) for n in model.ground_truth.top(4).names} >= set(found.edges) & set(model.ground_truth.edges)
    assert set(model.ground_truth.edges) == set(found.edges)


def test_thresholds_give_a_ranking_that_agrees_with_single_runs(soft, induction):
    swept = find_circuit(soft, induction, method="acdc", taus=5)
    for tau in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        single = find_circuit(soft, induction, method="acdc", tau=tau)
        assert ((swept.scores >= tau * (1 - 1e-9)) | ~single.kept).all()
    assert auroc(swept, soft.ground_truth) == 1.0


def test_metric_objective_reports_the_fall_of_the_metric(soft, induction):
    by_metric = find_circuit(soft, induction, method="acdc", objective="metric", tau=0.05)
    assert set(by_metric.edges) == set(soft.ground_truth.edges)
    exact = find_circuit(soft, induction, method="patching")
    last = len(exact.names) - 1
    assert by_metric.columns["rise"][last] == pytest.approx(float(exact.scores[last]), abs=1e-5)


def test_places(soft, induction):
    found = find_circuit(soft, induction, method="acdc", positions="spans", level="node", tau=0.01)
    kept = {name for name, stay in zip(found.names, found.kept.tolist(), strict=True) if stay}
    assert kept >= {"a0.h1@SOURCE", "a1.h2@END"}
    assert set(found.nodes) == {"a0.h1", "a1.h2"}
    assert "a1.h2@SOURCE" not in kept


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"objective": "x"}, UnknownName),
        ({"tau": -1.0}, WorkbenchError),
        ({"tau": float("nan")}, WorkbenchError),
        ({"taus": 0}, WorkbenchError),
    ],
)
def test_refusals(soft, induction, options, error):
    with pytest.raises(error):
        find_circuit(soft, induction, method="acdc", **options)
