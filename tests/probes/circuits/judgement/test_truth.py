"""Truth by effect, and the order of methods against it."""

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.pairs import logit_difference
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.compare import compare_circuits
from workbench.probes.circuits.judgement.faithfulness import faithfulness
from workbench.probes.circuits.judgement.labels import auroc
from workbench.probes.circuits.judgement.truth import effect_truth


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_the_compiled_truth_is_the_truth_by_effect(mode, induction, request):
    model = request.getfixturevalue(mode)
    for found in (effect_truth(model, induction, tolerance=1e-3), effect_truth(model, induction)):
        assert found.edges == model.ground_truth.edges
        assert found.provenance["method"] == "patching"
    nodes = effect_truth(model, induction, "node")
    assert nodes.nodes == ("a0.h1", "a1.h2")


@pytest.mark.parametrize("level", ["node", "edge"])
def test_a_share_is_of_the_difference_between_clean_and_corrupted(make, make_pairs, level):
    model, pairs = make(), make_pairs()
    exact = find_circuit(model, pairs, "patching", level)
    with torch.no_grad():
        clean, corrupt = (
            float(logit_difference(model.run(ids).logits, pairs).mean()) for ids in (pairs.clean, pairs.corrupt)
        )
    truth = effect_truth(model, pairs, level, share=0.2, batch=2)
    limit = 0.2 * abs(clean - corrupt)
    assert truth.provenance["threshold"] == pytest.approx(limit, abs=1e-9)
    assert torch.equal(truth.kept, exact.scores.abs() >= limit)
    assert 0 < len(truth) < len(truth.names)
    assert torch.allclose(truth.scores, exact.scores)
    places = effect_truth(model, pairs, level, tolerance=0.01, positions="each")
    assert len(places.names) == 6 * len(truth.names)


def test_impossible_limits(soft, induction):
    with pytest.raises(WorkbenchError, match="one of them"):
        effect_truth(soft, induction, share=0.1, tolerance=0.1)
    for options in ({"share": 0.0}, {"share": 1.5}, {"tolerance": -1.0}):
        with pytest.raises(WorkbenchError, match="above 0|at least 0"):
            effect_truth(soft, induction, **options)
    same = type(induction)(induction.clean, induction.clean, induction.answer, induction.wrong, induction.position)
    with pytest.raises(Refused, match="give tolerance="):
        effect_truth(soft, same)
    assert len(effect_truth(soft, same, tolerance=1e-6)) == 0


def test_on_a_trained_model_exact_eap_ig_eap_and_random_come_in_this_order():
    model = wb.load("tiny-softmax")
    pairs = wb.task("induction", length=12).build(seed=0, tokenizer=model.tokenizer, n=4)
    truth = exact = effect_truth(model, pairs)
    noise = torch.rand(len(exact.names), generator=torch.Generator().manual_seed(0))
    rankings = [exact, find_circuit(model, pairs, "eap-ig"), find_circuit(model, pairs, "eap"), exact.rescored(noise)]
    curves = [faithfulness(model, circuit, pairs, controls=0, draws=20) for circuit in rankings]
    for figures in (
        [auroc(circuit, truth) for circuit in rankings],
        [float(torch.corrcoef(torch.stack([exact.scores, circuit.scores]))[0, 1]) for circuit in rankings],
        [-curve.cmd for curve in curves],
        [curve.cpr for curve in curves],
    ):
        assert figures == sorted(figures, reverse=True), figures
    for curve in curves[:3]:
        assert curve.reversed_cmd > curves[3].cmd - 0.01  # nothing is kept of the behaviour, as by a random ranking
        assert curve.reversed_cpr <= curves[3].cpr + 0.01


def test_on_random_weights_first_order_scores_beat_random(make, make_pairs):
    figures = {"eap-ig": [], "eap": [], "random": []}
    for seed in range(6):
        model, pairs = make(seed, layers=2, heads=2, kv_heads=2), make_pairs(seed=seed)
        exact = find_circuit(model, pairs, "patching")
        noise = torch.rand(len(exact.names), generator=torch.Generator().manual_seed(seed))
        found = {name: find_circuit(model, pairs, name) for name in ("eap-ig", "eap")}
        found["random"] = exact.rescored(noise)
        for name, circuit in found.items():
            figures[name].append(compare_circuits(exact, circuit).spearman)
    means = {name: sum(values) / 6 for name, values in figures.items()}
    assert min(means["eap-ig"], means["eap"]) > means["random"] + 0.3, means


def test_on_the_soft_compiled_model_all_methods_beat_random(soft, induction):
    for method in ("patching", "eap-ig", "eap"):
        circuit = find_circuit(soft, induction, method)
        assert auroc(circuit, soft.ground_truth) >= 0.99
        result = faithfulness(soft, circuit, induction)
        assert result.cmd < float(result.random_cmd.mean()) - 0.2
