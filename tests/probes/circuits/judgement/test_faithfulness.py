import math

import pytest
import torch

from workbench.circuits import Circuit, circuit_graph
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.pairs import logit_difference
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.faithfulness import FRACTIONS, faithfulness
from workbench.results import load_result

STEPS = (0, 0.05, 0.3, 0.6, 1)


def mean_metric(model, ids, pairs):
    with torch.no_grad():
        return float(logit_difference(model.run(ids).logits, pairs).mean())


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
def test_dropping_one_edge_costs_its_exact_effect(make, make_pairs, ablation):
    model, pairs = make(layers=2, heads=2, kv_heads=1), make_pairs(n=3)
    exact = find_circuit(model, pairs, "patching", "edge", ablation)
    for i in range(0, len(exact.names), 7):
        kept = torch.ones(len(exact.names), dtype=torch.bool)
        kept[i] = False
        circuit = Circuit("edge", exact.names, exact.scores, kept)
        result = faithfulness(model, circuit, pairs, (1,), ablation, controls=0)
        drop = (1 - result.own) * (result.full - result.empty)
        assert drop == pytest.approx(float(exact.scores[i]), abs=1e-9), exact.names[i]


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
def test_dropping_one_node_costs_its_exact_effect(make, make_pairs, ablation):
    model, pairs = make(), make_pairs()
    exact = find_circuit(model, pairs, "patching", "node", ablation)
    for i, name in enumerate(exact.names):
        kept = torch.ones(len(exact.names), dtype=torch.bool)
        kept[i] = False
        result = faithfulness(
            model, Circuit("node", exact.names, exact.scores, kept), pairs, (1,), ablation, controls=0
        )
        assert (1 - result.own) * (result.full - result.empty) == pytest.approx(float(exact.scores[i]), abs=1e-9), name


@pytest.mark.parametrize("level", ["edge", "node"])
def test_full_graph_is_faithful_and_empty_is_not(make, make_pairs, level):
    model, pairs = make(), make_pairs()
    circuit = find_circuit(model, pairs, level=level)
    table = faithfulness(model, circuit, pairs, (0, 0.5, 1)).frame()
    assert table.faithfulness.iloc[0] == 0
    assert table.faithfulness.iloc[-1] == pytest.approx(1, abs=1e-9)
    assert table.kept.tolist() == [0, len(circuit.names) // 2, len(circuit.names)]


def test_with_every_edge_dropped_the_model_answers_the_corrupted_prompt(make, make_pairs):
    model, pairs = make(), make_pairs()
    result = faithfulness(model, find_circuit(model, pairs), pairs, (1,), batch=2, controls=0)
    assert result.full == pytest.approx(mean_metric(model, pairs.clean, pairs), abs=1e-9)
    assert result.empty == pytest.approx(mean_metric(model, pairs.corrupt, pairs), abs=1e-9)


def test_a_kept_edge_carries_what_its_source_computes_inside_the_circuit(soft, induction):
    truth = soft.ground_truth
    result = faithfulness(soft, truth, induction, (0, 4 / 81, 1))
    assert result.faithfulness[1] == pytest.approx(1, abs=1e-4)
    without = Circuit.of("edge", truth.names, [name for name in truth.names if name != "input->a0.h1<v>"])
    broken = faithfulness(soft, without, induction, (1,), controls=0)
    upstream = find_circuit(soft, induction, "patching")
    effect = float(upstream.scores[upstream.names.index("input->a0.h1<v>")])
    assert broken.own == pytest.approx(1 - effect / (broken.full - broken.empty), abs=1e-4)


@pytest.mark.parametrize("method", ["patching", "eap", "eap-ig"])
@pytest.mark.parametrize("level", ["edge", "node"])
def test_reversed_ranking_is_worse_than_random_and_the_found_one_better(soft, induction, level, method):
    result = faithfulness(soft, find_circuit(soft, induction, method, level), induction, STEPS, controls=20)
    assert result.cpr > float(result.random_cpr.mean())
    assert result.cmd < float(result.random_cmd.mean())
    assert result.reversed_cpr < float(result.random_cpr.mean())
    assert result.reversed_cmd > float(result.random_cmd.mean())
    if level == "edge":
        assert result.cpr > float(result.random_cpr.max())
        assert result.cmd < float(result.random_cmd.min())


def test_reversed_keeps_the_smallest_absolute_scores(make, make_pairs):
    model, pairs = make(), make_pairs()
    exact = find_circuit(model, pairs, "patching", "node")
    result = faithfulness(model, exact, pairs, STEPS, controls=0)
    order = exact.scores.abs().argsort()
    for size, value in zip(result.kept.tolist(), result.reversed.tolist(), strict=True):
        kept = torch.zeros(len(exact.names), dtype=torch.bool)
        kept[order[:size]] = True
        own = faithfulness(model, Circuit("node", exact.names, exact.scores, kept), pairs, (1,), controls=0).own
        assert value == pytest.approx(own, abs=1e-9)


@pytest.mark.parametrize("level", ["edge", "node"])
def test_batches_do_not_change_the_numbers(make, make_pairs, level):
    model, pairs = make(), make_pairs(n=7)
    circuit = find_circuit(model, pairs, level=level)
    whole, parts = (faithfulness(model, circuit, pairs, STEPS, batch=batch, controls=1) for batch in (16, 3))
    for name in ("faithfulness", "signed", "reversed", "random", "low", "high", "cmd_interval", "own_interval"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), atol=1e-9, rtol=0)


def test_intervals_draw_the_examples_for_all_means_together(make, make_pairs):
    model, pairs = make(), make_pairs(n=12)
    circuit = find_circuit(model, pairs, "patching", "node").top(5)
    result = faithfulness(model, circuit, pairs, STEPS, controls=0, draws=400, seed=3)
    one_by_one = [faithfulness(model, circuit, pairs[i : i + 1], STEPS, controls=0) for i in range(12)]
    full = torch.tensor([each.full for each in one_by_one])
    empty = torch.tensor([each.empty for each in one_by_one])
    m = torch.stack([each.faithfulness * (each.full - each.empty) + each.empty for each in one_by_one])
    signed = torch.stack([each.signed * (each.full - each.empty) + each.empty for each in one_by_one])
    picks = torch.randint(12, (400, 12), generator=torch.Generator().manual_seed(3))
    curves, areas = [], []
    for row in picks:
        gap = full[row].mean() - empty[row].mean()
        curves.append((m[row].mean(0) - empty[row].mean()) / gap)
        areas.append(torch.trapezoid((signed[row].mean(0) - empty[row].mean()) / gap, result.fractions))
    ends = torch.quantile(torch.stack(curves), torch.tensor([0.025, 0.975]).double(), dim=0)
    torch.testing.assert_close(torch.stack([result.low, result.high]), ends, atol=1e-6, rtol=1e-5)
    area = torch.quantile(torch.stack(areas), torch.tensor([0.025, 0.975]).double())
    torch.testing.assert_close(result.cpr_interval, area, atol=1e-6, rtol=1e-5)
    at_own = torch.tensor([each.own * (each.full - each.empty) + each.empty for each in one_by_one])
    own = [(at_own[row].mean() - empty[row].mean()) / (full[row].mean() - empty[row].mean()) for row in picks]
    ends = torch.quantile(torch.stack(own).double(), torch.tensor([0.025, 0.975]).double())
    torch.testing.assert_close(result.own_interval, ends, atol=1e-5, rtol=1e-4)
    alone = faithfulness(model, circuit, pairs[:1], STEPS, controls=0)
    assert alone.low.isnan().all()
    assert alone.cmd_interval.isnan().all()
    with pytest.raises(WorkbenchError, match="at least 20"):
        faithfulness(model, circuit, pairs, draws=1)


def test_signed_and_absolute_rankings_differ_where_scores_are_negative(make, make_pairs):
    model, pairs = make(), make_pairs()
    exact = find_circuit(model, pairs, "patching", "node")
    assert (exact.scores < 0).any()
    result = faithfulness(model, exact, pairs, STEPS, controls=0)
    sizes = result.kept.tolist()
    for curve, signed in ((result.faithfulness, False), (result.signed, True)):
        for size, value in zip(sizes, curve.tolist(), strict=True):
            own = faithfulness(model, exact.top(size, signed=signed), pairs, (1,), controls=0).own
            assert value == pytest.approx(own, abs=1e-9)
    assert not torch.allclose(result.faithfulness, result.signed)


def test_areas_are_trapezoids(make, make_pairs):
    model, pairs = make(), make_pairs()
    result = faithfulness(model, find_circuit(model, pairs, level="node"), pairs, (0.2, 0.5, 1), controls=2)
    x, f, s = result.fractions, result.faithfulness, result.signed
    assert result.cpr == pytest.approx(sum(float((x[i + 1] - x[i]) * (s[i] + s[i + 1]) / 2) for i in range(2)))
    d = (1 - f).abs()
    assert result.cmd == pytest.approx(sum(float((x[i + 1] - x[i]) * (d[i] + d[i + 1]) / 2) for i in range(2)))
    assert result.random_cpr.shape == result.random_cmd.shape == (2,)


def test_a_single_size_has_no_area(make, make_pairs):
    model, pairs = make(), make_pairs()
    result = faithfulness(model, find_circuit(model, pairs), pairs, (0.5,), controls=1)
    assert math.isnan(result.cmd)
    assert math.isnan(result.cpr)
    assert result.random_cmd.isnan().all()
    result.plot()


def test_defaults_seeds_and_columns(soft, induction):
    circuit = find_circuit(soft, induction, level="node")
    first, again = (faithfulness(soft, circuit, induction) for _ in range(2))
    assert tuple(first.fractions.tolist()) == FRACTIONS
    assert list(first.frame().columns[:3]) == ["fraction", "kept", "faithfulness"]
    assert first.random.shape == (5, 10)
    assert torch.equal(first.random, again.random)
    assert not torch.equal(first.random, faithfulness(soft, circuit, induction, seed=1).random)
    assert first.provenance["circuit"]["method"] == "eap-ig"


def test_results_save_and_draw(soft, induction, tmp_path):
    result = faithfulness(soft, find_circuit(soft, induction, level="node"), induction, (0.5, 1))
    loaded = load_result(result.save(tmp_path / "f"))
    assert torch.equal(loaded.tensors["faithfulness"], result.faithfulness)
    assert loaded.frame().equals(result.frame())
    ax = result.plot()
    assert ax.lines[0].get_ydata().tolist() == result.faithfulness.tolist()
    assert "CMD" in ax.get_title()


def test_undefined_faithfulness_is_nan_with_a_reason(make, make_pairs):
    model, pairs = make(), make_pairs()
    same = type(pairs)(pairs.clean, pairs.clean, pairs.answer, pairs.wrong, pairs.position)
    result = faithfulness(model, find_circuit(model, pairs), same, (0.5, 1), controls=1)
    assert all(math.isnan(value) for value in result.faithfulness)
    assert "undefined" in result.note


def test_a_metric_that_falls_says_that_the_signed_ranking_is_upside_down(make, make_pairs):
    model, pairs = make(), make_pairs()
    rises = faithfulness(model, find_circuit(model, pairs), pairs, controls=0)
    if rises.full < rises.empty:  # of a random model and pair either may be larger
        pairs = type(pairs)(pairs.clean, pairs.corrupt, pairs.wrong, pairs.answer, pairs.position)
        rises = faithfulness(model, find_circuit(model, pairs), pairs, controls=0)
    assert rises.note == ""

    def loss(logits, pairs):
        return -logit_difference(logits, pairs)

    falls = faithfulness(model, find_circuit(model, pairs, metric=loss), pairs, metric=loss, controls=0)
    torch.testing.assert_close(falls.faithfulness, rises.faithfulness)
    assert falls.cmd == pytest.approx(rises.cmd)
    assert "CPR" in falls.note
    assert f"{falls.full:.4g} with everything" in falls.note


def test_a_circuit_of_heads_leaves_the_mlps_alone(make, make_pairs):
    model, pairs = make(), make_pairs()
    every = find_circuit(model, pairs, level="node")
    heads = [i for i, name in enumerate(every.names) if name.startswith("a")]
    circuit = Circuit(
        "node", tuple(every.names[i] for i in heads), every.scores[heads], torch.zeros(8, dtype=torch.bool)
    )
    result = faithfulness(model, circuit, pairs, (1,), controls=0)
    kept = torch.tensor([not name.startswith("a") for name in every.names])
    same = faithfulness(model, Circuit("node", every.names, every.scores, kept), pairs, (1,), controls=0)
    with_mlps = same.own * (same.full - same.empty) + same.empty
    assert result.empty == pytest.approx(with_mlps, abs=1e-9)


def test_wrong_circuits_and_fractions_are_refused(make, make_pairs):
    model, pairs = make(), make_pairs()
    edges = find_circuit(model, pairs)
    other = circuit_graph(3, 4, 2)
    with pytest.raises(UnknownName, match="edge of random"):
        faithfulness(model, Circuit.of("edge", other.edges, []), pairs)
    part = Circuit.of("edge", edges.names[:5], [])
    with pytest.raises(Refused, match="needs all of them"):
        faithfulness(model, part, pairs)
    with pytest.raises(UnknownName, match="a7.h0"):
        faithfulness(model, Circuit.of("node", ["a7.h0"], []), pairs)
    for fractions in ((), (0.5, 1.5), (-0.1,)):
        with pytest.raises(WorkbenchError, match="from 0 to 1"):
            faithfulness(model, edges, pairs, fractions)
    with pytest.raises(UnknownName, match="counterfactual, zero, mean"):
        faithfulness(model, edges, pairs, ablation="noise")
