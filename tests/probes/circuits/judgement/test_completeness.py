"""Completeness and minimality against every subset, and where a backup hides a part."""

import itertools

import pytest
import torch

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.pairs import logit_difference
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.completeness import completeness
from workbench.probes.circuits.judgement.faithfulness import faithfulness
from workbench.probes.circuits.judgement.minimality import minimality
from workbench.results import load_result


def kept_metric(model, names, kept, pairs, level="node"):
    """F of a kept set by way of faithfulness."""
    circuit = Circuit.of(level, names, kept)
    result = faithfulness(model, circuit, pairs, (1,), controls=0)
    return result.own * (result.full - result.empty) + result.empty


@pytest.fixture(scope="module")
def small(make, make_pairs):
    model, pairs = make(layers=1), make_pairs(n=4)
    exact = find_circuit(model, pairs, "patching", "node")
    return model, pairs, exact.top(3)


def test_gaps_are_differences_of_kept_sets(small):
    model, pairs, circuit = small
    result = completeness(model, circuit, pairs, random=4, seed=1)
    assert result.kinds[:5] == ("none", "random", "random", "random", "random")
    inside = set(circuit.nodes)
    for removed, own, whole in zip(result.removed, result.circuit.tolist(), result.model.tolist(), strict=True):
        assert set(removed) <= inside
        left = inside - set(removed)
        assert own == pytest.approx(kept_metric(model, circuit.names, left, pairs), abs=1e-9)
        rest = set(circuit.names) - set(removed)
        assert whole == pytest.approx(kept_metric(model, circuit.names, rest, pairs), abs=1e-9)
    assert result.full == pytest.approx(kept_metric(model, circuit.names, circuit.names, pairs), abs=1e-9)
    assert result.empty == pytest.approx(kept_metric(model, circuit.names, [], pairs), abs=1e-9)


def test_the_greedy_search_comes_near_the_worst_of_all_subsets(small):
    model, pairs, circuit = small
    result = completeness(model, circuit, pairs, random=0)
    worst = max(
        abs(
            kept_metric(model, circuit.names, set(circuit.nodes) - set(k), pairs)
            - kept_metric(model, circuit.names, set(circuit.names) - set(k), pairs)
        )
        for size in range(4)
        for k in itertools.combinations(circuit.nodes, size)
    )
    assert result.kinds.count("greedy") == 1  # with every part competing, all searches are one
    assert float(result.gap[-1]) >= max(result.gap[:-1])
    assert result.worst == pytest.approx(worst, abs=1e-9)


def test_the_whole_model_is_complete(make, make_pairs):
    model, pairs = make(), make_pairs()
    result = completeness(model, find_circuit(model, pairs), pairs, random=3, restarts=1, steps=1, tries=2)
    assert result.gap.tolist() == [0.0] * 5
    assert result.worst == 0


def test_roles_name_parts_whole_or_at_a_place(make, make_pairs):
    model, pairs = make(layers=1, heads=2, mlp_width=0), make_pairs(n=2)
    circuit = find_circuit(model, pairs, "patching", "node", positions="each").top(8)
    roles = {"first": ["a0.h0"], "one": ["a0.h1@5"]}
    result = completeness(model, circuit, pairs, roles=roles, random=0, restarts=0)
    assert result.kinds == ("none", "first", "one")
    kept = {name for name, flag in zip(circuit.names, circuit.kept.tolist(), strict=True) if flag}
    assert set(result.removed[1]) == {name for name in kept if name.startswith("a0.h0@")}
    assert set(result.removed[2]) == kept & {"a0.h1@5"}
    with pytest.raises(UnknownName, match=r"a9\.h0"):
        completeness(model, circuit, pairs, roles={"x": ["a9.h0"]})


@pytest.fixture(scope="module")
def backup(make, make_pairs):
    """One linear layer whose metric is capped: heads u and v both support the answer, and one of them is enough."""
    model, pairs = make(linear=True, layers=1), make_pairs(n=1, seed=3)
    exact = find_circuit(model, pairs, "patching", "node")
    effect = dict(zip(exact.names, exact.scores.tolist(), strict=True))
    u, v = sorted(effect, key=effect.get)[-2:]
    assert effect[u] > 0.01
    with torch.no_grad():
        cap = float(logit_difference(model.run(pairs.clean).logits, pairs)[0]) - effect[v]

    def capped(logits, pairs):
        return logit_difference(logits, pairs).clamp(max=cap)

    return model, pairs, capped, exact, (u, v), effect


def test_a_missing_backup_shows_only_once_the_primary_is_gone(backup):
    model, pairs, capped, exact, (u, v), effect = backup
    circuit = Circuit.of("node", exact.names, set(exact.names) - {v})
    result = completeness(model, circuit, pairs, metric=capped, random=0)
    assert result.gap[0] == pytest.approx(0, abs=1e-9)
    worst = int(result.gap.argmax())
    assert result.kinds[worst] == "greedy"
    assert u in result.removed[worst]
    assert result.worst >= effect[u] - 1e-9
    assert result.low.isnan().all()  # one example says nothing about the next


def test_a_part_with_a_backup_is_needed_once_the_backup_is_gone(backup):
    model, pairs, capped, exact, (u, v), effect = backup
    circuit = exact.top(len(exact.names))
    alone = minimality(model, circuit, pairs, metric=capped, steps=0)
    assert float(alone.effect[alone.names.index(u)]) == pytest.approx(0, abs=1e-9)
    assert u in alone.needless
    searched = minimality(model, circuit, pairs, metric=capped)
    at = searched.names.index(u)
    assert searched.removed[at] == (v,)
    assert float(searched.effect[at]) == pytest.approx(effect[u], abs=1e-9)
    assert u not in searched.needless


@pytest.mark.parametrize("level", ["node", "edge"])
def test_minimality_is_the_difference_of_two_kept_sets(small, level):
    model, pairs, _ = small
    circuit = find_circuit(model, pairs, "patching", level).top(5)
    kept = {name for name, flag in zip(circuit.names, circuit.kept.tolist(), strict=True) if flag}
    result = minimality(model, circuit, pairs, threshold=0.5, steps=2)
    assert set(result.names) == kept
    for name, k, effect in zip(result.names, result.removed, result.effect.tolist(), strict=True):
        left = kept - set(k)
        before = kept_metric(model, circuit.names, left, pairs, level)
        after = kept_metric(model, circuit.names, left - {name}, pairs, level)
        assert effect == pytest.approx(before - after, abs=1e-9), name
    assert result.share.tolist() == pytest.approx([abs(e) / abs(result.full) for e in result.effect.tolist()])


def test_the_true_circuit_is_complete_and_minimal_and_less_or_more_is_not(soft, induction, tmp_path):
    truth = soft.ground_truth
    whole = completeness(soft, truth, induction, random=5)
    assert whole.worst < 1e-3
    assert minimality(soft, truth, induction).needless == ()
    missing = Circuit.of("edge", truth.names, [n for n, k in zip(truth.names, truth.kept, strict=True) if k][1:])
    assert completeness(soft, missing, induction, random=0).worst > 3
    more = truth | Circuit.of("edge", truth.names, ["a0.h0->a1.h1<q>"])
    found = minimality(soft, more, induction)
    assert found.needless == ("a0.h0->a1.h1<q>",)
    for name, result in (("c", whole), ("m", found)):
        loaded = load_result(result.save(tmp_path / name))
        assert loaded.frame().equals(result.frame())
        assert result.plot().get_title()


def test_budgets_and_empty_circuits(soft, induction):
    truth = soft.ground_truth
    result = completeness(soft, truth, induction, random=1, restarts=2, steps=2, tries=2)
    assert result.kinds == ("none", "random", "greedy", "greedy")
    assert result.evaluated <= 2 * (1 + 1 + 2 * 2 * 2) + 2
    again = completeness(soft, truth, induction, random=1, restarts=2, steps=2, tries=2)
    assert result.removed == again.removed
    assert torch.equal(result.circuit, again.circuit)
    for judge in (completeness, minimality):
        with pytest.raises(Refused, match="keeps nothing"):
            judge(soft, truth.top(0), induction)
        with pytest.raises(WorkbenchError, match="tries"):
            judge(soft, truth, induction, tries=0)
    with pytest.raises(WorkbenchError, match="between 0 and 1"):
        minimality(soft, truth, induction, threshold=2.0)
