import math

import pytest
import torch

from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.pairs import logit_difference
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.controls import random_circuits
from workbench.probes.circuits.judgement.performance import MEASURES, kept_performance
from workbench.results import load_result
from workbench.sites import Site


def by_hand(full, logits, pairs):
    """The four measures per example from logits, one example after the other."""
    rows = []
    for b, position in enumerate(pairs.position.tolist()):
        p, q = full[b, position].softmax(-1), logits[b, position].softmax(-1)
        best = int(logits[b, position].argmax())
        rows.append(
            [
                float((p * (p / q).log()).sum()),
                float(best in pairs.answer[b].tolist()),
                float(best == int(full[b, position].argmax())),
                float(logit_difference(logits[b : b + 1], pairs[b : b + 1])[0]),
            ]
        )
    return torch.tensor(rows, dtype=torch.float64).T


def test_measures_are_those_of_the_edited_run(make, make_pairs):
    model, pairs = make(), make_pairs()
    circuit = find_circuit(model, pairs, "patching", "node")
    circuit = Circuit("node", circuit.names, circuit.scores, torch.tensor([n != "a1.h2" for n in circuit.names]))
    site = Site("z", 1, 2)
    with torch.no_grad():
        full = model.run(pairs.clean).logits
        corrupt = model.run(pairs.corrupt, read=[site]).acts[site]
        edited = model.run(pairs.clean, edit={site: corrupt}).logits
    result = kept_performance(model, circuit, pairs, batch=2, controls=0)
    assert result.measures == MEASURES
    torch.testing.assert_close(result.values[0], by_hand(full, edited, pairs), atol=1e-10, rtol=0)
    assert float(result.of("circuit", "kl").min()) > 0


def test_everything_has_no_loss_and_nothing_answers_the_corrupted_prompt(make, make_pairs):
    model, pairs = make(), make_pairs()
    result = kept_performance(model, find_circuit(model, pairs).top(40), pairs, controls=0)
    with torch.no_grad():
        full, corrupt = model.run(pairs.clean).logits, model.run(pairs.corrupt).logits
    assert result.of("full", "kl").tolist() == [0.0] * 5
    assert result.of("full", "agrees").tolist() == [1.0] * 5
    torch.testing.assert_close(result.values[1], by_hand(full, full, pairs), atol=1e-12, rtol=0)
    torch.testing.assert_close(result.values[2], by_hand(full, corrupt, pairs), atol=1e-9, rtol=0)


def test_random_circuits_of_the_same_size_stand_beside(make, make_pairs):
    model, pairs = make(), make_pairs()
    circuit = find_circuit(model, pairs).top(30)
    result = kept_performance(model, circuit, pairs, controls=3, seed=4)
    for i, other in enumerate(random_circuits(circuit, 3, seed=4)):
        alone = kept_performance(model, other, pairs, controls=0)
        assert torch.equal(result.values[result.sets.index(f"random {i}")], alone.values[0])
    means = result.values.mean(2)
    worse = sum(float(means[3 + i, 0]) <= float(means[0, 0]) for i in range(3))
    assert result.chance["kl"] == (1 + worse) / 4
    assert all(math.isnan(p) for p in alone.chance.values())


def test_the_tail_and_the_worst_examples(make, make_pairs):
    model, pairs = make(), make_pairs(n=120)
    result = kept_performance(model, find_circuit(model, pairs, level="node").top(6), pairs, controls=1, batch=64)
    losses = sorted(result.of("circuit", "kl").tolist())
    row = result.frame().set_index("set").loc["circuit"]
    assert row.kl_max == losses[-1]
    assert losses[117] <= row.kl_99 <= losses[119]
    assert row.kl_median == pytest.approx((losses[59] + losses[60]) / 2)
    assert result.of("circuit", "kl")[result.worst(3)].tolist() == losses[:-4:-1]
    assert int(row.worst) == int(result.worst(1)[0])
    assert row.kl_low < row.kl < row.kl_high
    assert result.note == ""


def test_few_examples_have_no_percentile_and_a_whole_circuit_no_control(make, make_pairs):
    model, pairs = make(), make_pairs()
    result = kept_performance(model, find_circuit(model, pairs, level="node"), pairs)
    assert result.frame().kl_99.isna().all()
    assert "99th percentile" in result.note
    assert "the circuit itself" in result.note


def test_the_true_circuit_loses_nothing_and_random_ones_everything(soft, induction, tmp_path):
    truth = soft.ground_truth
    result = kept_performance(soft, truth, induction, controls=10)
    table = result.frame().set_index("set")
    assert table.loc["circuit", ["correct", "agrees"]].tolist() == [1, 1]
    assert abs(table.loc["circuit", "kl_max"]) < 1e-5
    assert table.loc["empty", "kl"] > 0.5
    assert result.chance["kl"] == pytest.approx(1 / 11)
    loaded = load_result(result.save(tmp_path / "p"))
    assert torch.equal(loaded.tensors["values"], result.values)
    assert len(result.plot().lines) == len(result.sets) - 1
    with pytest.raises(UnknownName, match="circuit, full, empty"):
        result.of("random 99", "kl")
    with pytest.raises(WorkbenchError, match="at least 20"):
        kept_performance(soft, truth, induction, draws=1)


def test_nothing_is_changed_by_judging(soft, induction):
    truth = soft.ground_truth
    kept, scores = truth.kept.clone(), truth.scores.clone()
    weights = {name: value.clone() for name, value in soft.net.state_dict().items()}
    kept_performance(soft, truth, induction, controls=1)
    assert torch.equal(truth.kept, kept)
    assert torch.equal(truth.scores, scores)
    assert all(torch.equal(value, weights[name]) for name, value in soft.net.state_dict().items())
    assert all(p.grad is None for p in soft.net.parameters())
