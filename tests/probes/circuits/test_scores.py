import copy

import pytest
import torch

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.pairs import logit_difference
from workbench.probes.circuits.components import INPUT
from workbench.probes.circuits.find import find_circuit, methods
from workbench.sites import Site

GRADIENT = ("eap", "eap-ig")


def scores(circuit):
    return dict(zip(circuit.names, circuit.scores.tolist(), strict=True))


def pearson(a, b):
    return float(torch.corrcoef(torch.stack([a.scores, b.scores]))[0, 1])


def by_hand(model, pairs, source, reader, index, instead):
    """Metric drop when one reader's input swaps one writer's output, with torch hooks written out."""
    net = model.net
    seen = {}

    def keep(site):
        return lambda value: seen.__setitem__(site, value) or value

    model.run(pairs.clean, edit={source.whole: keep(source.whole)})
    clean = seen[source.whole] if source.head is None else seen[source.whole][:, :, source.head]
    change = instead - clean

    def edit(value):
        value = value.clone()
        part = value if value.ndim == 3 else value[:, :, index]
        part += change
        return value

    with torch.no_grad():
        before = logit_difference(net(pairs.clean), pairs).mean()
        after = logit_difference(model.run(pairs.clean, edit={reader: edit}).logits, pairs).mean()
    return float(before - after)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_patching_finds_exactly_the_active_edges(mode, induction, request):
    model = request.getfixturevalue(mode)
    circuit = find_circuit(model, induction, method="patching", batch=4)
    assert set(circuit.threshold(1e-3).edges) == set(model.ground_truth.edges)
    assert circuit.threshold(1).edges == model.ground_truth.edges


def test_eap_misses_the_saturated_key_edges_and_eap_ig_does_not(hard, induction):
    exact = find_circuit(hard, induction, method="patching")
    eap, ig = (find_circuit(hard, induction, method=name) for name in GRADIENT)
    for edge in ("a0.h1->a1.h2<k>", "input->a0.h1<v>"):
        assert scores(exact)[edge] > 4
        assert abs(scores(eap)[edge]) < 1e-3
        assert scores(ig)[edge] > 0.5
    assert pearson(exact, ig) > pearson(exact, eap) + 0.02
    assert pearson(exact, find_circuit(hard, induction, method="eap-ig", steps=30)) > 0.98


def test_on_soft_attention_the_gradient_suffices(soft, induction):
    exact = find_circuit(soft, induction, method="patching")
    for name in GRADIENT:
        assert pearson(exact, find_circuit(soft, induction, method=name)) > 0.9


@pytest.mark.parametrize("level", ["edge", "node"])
@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
def test_on_a_linear_model_all_methods_agree(make, make_pairs, level, ablation):
    model, pairs = make(linear=True), make_pairs()
    exact = find_circuit(model, pairs, "patching", level, ablation)
    assert exact.scores.abs().max() > 0.1
    for name in GRADIENT:
        found = find_circuit(model, pairs, name, level, ablation)
        assert found.names == exact.names
        torch.testing.assert_close(found.scores, exact.scores, atol=1e-5, rtol=0)


def test_edge_patching_equals_hooks_by_hand_with_groups_norms_and_mlps(make, make_pairs):
    model, pairs = make(), make_pairs()
    found = scores(find_circuit(model, pairs, "patching", batch=3))
    with torch.no_grad():
        corrupt = model.run(pairs.corrupt, read=[INPUT, Site("result", 0), Site("mlp_out", 0)]).acts
    cases = {
        "input->a0.h3<q>": (INPUT, Site("q_input", 0), 3),
        "a0.h2->a1.g1<k>": (Site("result", 0, 2), Site("k_input", 1), 1),
        "m0->a1.g0<v>": (Site("mlp_out", 0), Site("v_input", 1), 0),
        "a0.h0->m0": (Site("result", 0, 0), Site("mlp_in", 0), 0),
        "m0->logits": (Site("mlp_out", 0), Site("resid_post", 1), 0),
    }
    for edge, (source, reader, index) in cases.items():
        expected = by_hand(model, pairs, source, reader, index, corrupt[source])
        assert abs(expected) > 1e-4
        assert found[edge] == pytest.approx(expected, abs=1e-9), edge


def test_node_patching_equals_hooks_by_hand(make, make_pairs):
    model, pairs = make(), make_pairs()
    found = scores(find_circuit(model, pairs, "patching", "node", batch=2))
    sites = [Site("z", 0), Site("z", 1), Site("mlp_out", 1)]
    with torch.no_grad():
        corrupt = model.run(pairs.corrupt, read=sites).acts
        before = logit_difference(model.run(pairs.clean).logits, pairs).mean()
        for name, site in {"a0.h1": Site("z", 0, 1), "a1.h3": Site("z", 1, 3), "m1": Site("mlp_out", 1)}.items():
            after = logit_difference(model.run(pairs.clean, edit={site: corrupt[site]}).logits, pairs).mean()
            assert found[name] == pytest.approx(float(before - after), abs=1e-9)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_node_replacements_are_what_they_say(make, make_pairs, ablation):
    model, pairs = make(), make_pairs()
    found = scores(find_circuit(model, pairs, "patching", "node", ablation, batch=2))
    site = Site("z", 1, 2)
    with torch.no_grad():
        clean = model.run(pairs.clean, read=[site])
        instead = torch.zeros(()) if ablation == "zero" else clean.acts[site].mean(0)
        after = logit_difference(model.run(pairs.clean, edit={site: lambda z: instead.expand_as(z)}).logits, pairs)
        expected = (logit_difference(clean.logits, pairs) - after).mean()
    assert found["a1.h2"] == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_gradient_scores_over_the_embedding_cut_equal_the_plain_gradient(make, make_pairs, steps):
    """Edges that leave the embeddings cut the graph: their scores sum to the integrated gradient of the embeddings."""
    model, pairs = make(), make_pairs()
    circuit = find_circuit(model, pairs, "eap-ig", steps=steps)
    total = sum(score for name, score in scores(circuit).items() if name.startswith("input->"))
    with torch.no_grad():
        clean, corrupt = (model.run(ids, read=[INPUT]).acts[INPUT] for ids in (pairs.clean, pairs.corrupt))
    expected = 0.0
    for k in range(steps):
        point = (corrupt + k / steps * (clean - corrupt)).requires_grad_()
        m = logit_difference(model.run(pairs.clean, edit={INPUT: point}).logits, pairs).sum()
        (grad,) = torch.autograd.grad(m, point)
        expected += float(((clean - corrupt) * grad).sum()) / steps / len(pairs)
    assert total == pytest.approx(expected, abs=1e-9)


def test_integrated_gradients_are_complete(soft, induction):
    circuit = find_circuit(soft, induction, "eap-ig", steps=40, rule="midpoint")
    total = sum(score for name, score in scores(circuit).items() if name.startswith("input->"))
    clean, corrupt = (
        logit_difference(soft.run(ids).logits, induction).mean() for ids in (induction.clean, induction.corrupt)
    )
    assert total == pytest.approx(float(clean - corrupt), rel=0.05)


@pytest.mark.parametrize("name", ["patching", "eap", "eap-ig"])
@pytest.mark.parametrize("level", ["edge", "node"])
def test_batches_and_repetition_do_not_change_scores(make, make_pairs, name, level):
    model, pairs = make(), make_pairs()
    whole = find_circuit(model, pairs, name, level, batch=16)
    parts = find_circuit(model, pairs, name, level, batch=2)
    torch.testing.assert_close(whole.scores, parts.scores, atol=1e-10, rtol=0)
    again = find_circuit(model, pairs, name, level, batch=2)
    assert torch.equal(parts.scores, again.scores)
    assert parts.provenance == again.provenance


def test_positive_means_that_the_clean_behaviour_is_supported(make, make_pairs):
    model, pairs = make(linear=True), make_pairs()
    circuit = find_circuit(model, pairs, "eap")
    flipped = find_circuit(model, pairs, "eap", metric=lambda logits, pairs: -logit_difference(logits, pairs))
    torch.testing.assert_close(flipped.scores, -circuit.scores)
    into_logits = sum(score for name, score in scores(circuit).items() if name.endswith("->logits"))
    with torch.no_grad():
        clean, corrupt = (logit_difference(model.run(ids).logits, pairs).mean() for ids in (pairs.clean, pairs.corrupt))
    assert into_logits == pytest.approx(float(clean - corrupt), abs=1e-9)


@pytest.mark.parametrize("name", ["patching", "eap-ig"])
def test_nothing_of_the_model_changes(make, make_pairs, name):
    model, pairs = make(), make_pairs()
    before = copy.deepcopy(model.net.state_dict())
    logits = model.run(pairs.clean).logits
    for level in ("node", "edge"):
        find_circuit(model, pairs, name, level)
    assert torch.equal(model.run(pairs.clean).logits, logits)
    assert all(torch.equal(value, before[key]) for key, value in model.net.state_dict().items())
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("name", ["patching", "eap", "eap-ig"])
def test_hooks_are_gone_after_an_exception(make, make_pairs, name):
    model, pairs = make(), make_pairs()
    logits = model.run(pairs.clean).logits
    calls = []

    def fails(logits, pairs):
        calls.append(1)
        if len(calls) > (name == "patching"):
            raise RuntimeError("metric broke")
        return logit_difference(logits, pairs)

    with pytest.raises(RuntimeError, match="metric broke"):
        find_circuit(model, pairs, name, metric=fails)
    points = model.net.hook_dict.values()
    assert not any(point.fwd_hooks or point._forward_hooks for point in points)
    assert torch.equal(model.run(pairs.clean).logits, logits)


def test_works_inside_no_grad(make, make_pairs):
    model, pairs = make(), make_pairs()
    expected = find_circuit(model, pairs, "eap")
    with torch.no_grad():
        assert torch.equal(find_circuit(model, pairs, "eap").scores, expected.scores)
    assert not expected.scores.requires_grad


def test_methods_are_listed():
    listed = methods()
    assert {"patching", "eap", "eap-ig", "acdc", "discrete-sae"} <= set(listed)
    assert listed["eap-ig"].options == {"steps": 5, "rule": "left"}
    assert listed["patching"].levels == ("node", "edge")
    assert all(method.description and method.ablations for method in listed.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "adcc"}, UnknownName, "discrete-sae, discrete-sae-published, eap"),
        ({"level": "heads"}, UnknownName, "node, edge"),
        ({"ablation": "noise"}, UnknownName, "counterfactual, zero, mean"),
        ({"step": 3}, UnknownName, "steps, rule"),
        ({"steps": 0}, WorkbenchError, "at least 1"),
        ({"rule": "simpson"}, UnknownName, "left, midpoint"),
        ({"batch": 0}, WorkbenchError, "at least 1"),
        ({"method": "path-patching", "level": "edge"}, Refused, "has no edge level"),
        ({"method": "discrete-sae", "ablation": "zero"}, Refused, "cannot use ablation 'zero'"),
        ({"metric": lambda logits, pairs: logits.sum()}, WorkbenchError, "one number per example"),
        ({"metric": lambda logits, pairs: torch.zeros(len(pairs))}, Refused, "no gradient"),
    ],
)
def test_bad_requests_say_what_exists(make, make_pairs, options, error, message):
    with pytest.raises(error, match=message):
        find_circuit(make(), make_pairs(), **options)


def test_training_mode_is_refused(make, make_pairs):
    model = make()
    model.net.train()
    with pytest.raises(Refused, match="training mode"):
        find_circuit(model, make_pairs())


def test_prompts_of_unequal_length_are_refused(make, make_pairs):
    pairs = make_pairs()
    object.__setattr__(pairs, "corrupt", pairs.corrupt[:, :-1])
    with pytest.raises(WorkbenchError, match="one length"):
        find_circuit(make(), pairs)


def test_provenance_names_every_choice(make, make_pairs):
    circuit = find_circuit(make(), make_pairs(), "eap-ig", "node", "mean", steps=2)
    assert isinstance(circuit, Circuit)
    expected = {
        "method": "eap-ig",
        "level": "node",
        "ablation": "mean",
        "metric": "logit_difference",
        "model": "random",
    }
    assert expected.items() <= circuit.provenance.items()
    assert circuit.provenance["options"] == {"steps": 2, "rule": "left"}
