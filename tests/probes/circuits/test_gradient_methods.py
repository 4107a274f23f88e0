"""Methods by gradient against literal loops: EAP-IG over activations, AtP and AtP*, RelP."""

import pytest
import torch

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.pairs import logit_difference
from workbench.probes.circuits.components import INPUT
from workbench.probes.circuits.find import find_circuit
from workbench.sites import Site


def scores(circuit):
    return dict(zip(circuit.names, circuit.scores.tolist(), strict=True))


def reads(model, ids, sites):
    with torch.no_grad():
        return model.run(ids, read=sites).acts


def gradient(model, pairs, at, held, drop=None):
    """dm/dvalue at ``at`` with outputs held at given values; sublayers of layer ``drop`` hand no gradient on."""
    seen = {}

    def edit(site):
        def act(value):
            value = held.get(site, value)
            if site == at:
                value = seen["x"] = value * 1.0 if value.requires_grad else value.detach().requires_grad_()
            return value.detach() if site.layer == drop and site.kind in ("z", "mlp_out") else value

        return act

    sites = {*held, at, *([Site("z", drop), Site("mlp_out", drop)] if drop is not None else [])}
    start = held.get(INPUT, reads(model, pairs.clean, [INPUT])[INPUT]).clone().requires_grad_()
    run = model.run(pairs.clean, edit={INPUT: lambda _: start, **{site: edit(site) for site in sites if site != INPUT}})
    value = seen["x"]
    grad = torch.autograd.grad(logit_difference(run.logits, pairs).sum(), value, allow_unused=True)[0]
    return torch.zeros_like(value) if grad is None else grad


OUTPUTS = [INPUT, *(Site(kind, layer) for layer in range(2) for kind in ("z", "mlp_out"))]


@pytest.mark.parametrize("average", ["all", "own"])
def test_ig_over_activations_is_the_loop_over_sites_and_steps(make, make_pairs, average):
    model, pairs, steps = make(), make_pairs(), 2
    found = find_circuit(model, pairs, "eap-ig-activations", "node", steps=steps, average=average)
    clean, corrupt = (reads(model, ids, OUTPUTS) for ids in (pairs.clean, pairs.corrupt))
    for name, at, head in (("a0.h1", OUTPUTS[1], 1), ("m0", OUTPUTS[2], None), ("a1.h3", OUTPUTS[3], 3)):
        total = 0.0
        moved = OUTPUTS if average == "all" else [at]
        for site in moved:
            for k in range(steps):
                held = {site: corrupt[site] + (k + 1) / steps * (clean[site] - corrupt[site])}
                grad = gradient(model, pairs, at, held)
                product = (clean[at] - corrupt[at]) * grad
                total += float((product if head is None else product[:, :, head]).sum()) / (steps * len(moved))
        assert scores(found)[name] == pytest.approx(total / len(pairs), abs=1e-9)


def test_edges_of_ig_over_activations_sum_to_their_node_when_the_node_moves_alone(make, make_pairs):
    """An output's gradient is the sum of those of the inputs that read it."""
    model, pairs = make(mlp_width=8), make_pairs()
    for method, options in (
        ("eap-ig-activations", {"average": "own"}),
        ("eap", {}),
        ("eap-ig", {}),
        ("clean-corrupted", {}),
    ):
        edges = scores(find_circuit(model, pairs, method, "edge", **options))
        for name, value in scores(find_circuit(model, pairs, method, "node", **options)).items():
            out = sum(score for edge, score in edges.items() if edge.startswith(f"{name}->"))
            assert value == pytest.approx(out, abs=1e-9), (method, name)


def test_clean_corrupted_is_the_mean_of_two_attributions(make, make_pairs):
    """The gradient on the corrupted prompt, with the clean answers, is that of eap with the prompts exchanged."""
    model, pairs = make(), make_pairs()
    turned = type(pairs)(pairs.corrupt, pairs.clean, pairs.answer, pairs.wrong, pairs.position)
    both = [find_circuit(model, one, "eap") for one in (pairs, turned)]
    found = find_circuit(model, pairs, "clean-corrupted")
    torch.testing.assert_close(found.scores, (both[0].scores - both[1].scores) / 2)
    assert float((found.scores - both[0].scores).abs().max()) > 1e-3


# ------------------------------------------------------------------ AtP and AtP*


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
def test_atp_is_eap_at_the_nodes_and_has_no_edges(make, make_pairs, ablation):
    model, pairs = make(), make_pairs()
    atp = find_circuit(model, pairs, "atp", ablation=ablation)
    assert atp.level == "node"
    assert torch.equal(atp.scores, find_circuit(model, pairs, "eap", "node", ablation).scores)
    with pytest.raises(Refused, match="no edge level"):
        find_circuit(model, pairs, "atp", "edge")


def star_by_hand(model, pairs, head, layer, places):
    """(A - A_patched) . dm/dA for queries and keys and A (v - v') . dm/dz for values, pattern by pattern, with loops."""
    c = model.net.config
    kinds = ("q", "k", "v", "rot_q", "rot_k")
    clean, corrupt = (reads(model, ids, [Site(kind, layer) for kind in kinds]) for ids in (pairs.clean, pairs.corrupt))
    kv, length = head // (c.heads // c.kv_heads), pairs.clean.shape[1]
    hidden = torch.ones(length, length).triu(1).bool()

    def pattern(q, k):
        return (q @ k.transpose(1, 2) * c.head_width**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)

    def part(acts, kind):
        return acts[Site(kind, layer)][:, :, head if kind.endswith("q") else kv]

    q, k, v = part(clean, "rot_q"), part(clean, "rot_k"), part(clean, "v")
    a = pattern(q, k)

    def of(grad):
        g = grad[:, :, head]
        by_pattern = torch.einsum("bqe,bke->bqk", g, v)
        found = {}
        for place, here in places.items():
            swap = lambda own, other, here=here: torch.where(here[None, :, None], other, own)  # noqa: E731
            new_q, new_k = swap(q, part(corrupt, "rot_q")), swap(k, part(corrupt, "rot_k"))
            found["q", place] = ((a - pattern(new_q, k)) * by_pattern).sum((1, 2))
            found["k", place] = ((a - pattern(q, new_k)) * by_pattern).sum((1, 2))
            found["v", place] = ((a @ (v - swap(v, part(corrupt, "v")))) * g).sum((1, 2))
        return found

    return of


@pytest.mark.parametrize("positions", ["all", "each"])
def test_atp_star_is_the_pattern_formula_with_the_gradient_dropped_layer_by_layer(make, make_pairs, positions):
    model, pairs = make(layers=3), make_pairs()
    found = find_circuit(model, pairs, "atp-star", positions=positions, batch=2)
    length = pairs.clean.shape[1]
    at = torch.arange(length)
    places = {"": torch.ones(length).bool()} if positions == "all" else {f"@{i}": at == i for i in range(length)}
    for layer, head in ((0, 1), (1, 2), (2, 3)):
        of = star_by_hand(model, pairs, head, layer, places)
        grads = [gradient(model, pairs, Site("z", layer), {}, drop) for drop in range(3)]
        plain = of(gradient(model, pairs, Site("z", layer), {}))
        sizes = [of(grad) for grad in grads]
        assert not grads[layer].any()
        for place in places:
            number = found.names.index(f"a{layer}.h{head}{place}")
            expected = {c: sum(float(s[c, place].abs().mean()) for s in sizes) / 2 for c in "qkv"}
            for channel, value in expected.items():
                assert float(found.columns[channel][number]) == pytest.approx(value, abs=1e-9)
            assert float(found.scores[number]) == pytest.approx(sum(expected.values()), abs=1e-9)
            signed = sum(float(plain[c, place].mean()) for c in "qkv")
            assert float(found.columns["signed"][number]) == pytest.approx(signed, abs=1e-9)


def test_atp_star_of_an_mlp_is_its_first_order_effect_and_has_no_channels(make, make_pairs):
    model, pairs = make(), make_pairs()
    star, atp = find_circuit(model, pairs, "atp-star", drop=False), scores(find_circuit(model, pairs, "atp"))
    for number, name in enumerate(star.names):
        if name.startswith("m"):
            assert float(star.scores[number]) == pytest.approx(atp[name], abs=1e-9)
            assert star.columns["q"][number].isnan()
    assert torch.equal(star.scores, star.columns["signed"])


def test_the_qk_fix_sees_what_a_saturated_pattern_hides(hard, induction):
    """The key effect of the induction head is the exact effect of its key edge; plain AtP gives the earlier head 0."""
    star = find_circuit(hard, induction, "atp-star")
    exact = scores(find_circuit(hard, induction, "patching"))
    at = star.names.index("a1.h2")
    assert float(star.columns["k"][at]) == pytest.approx(exact["a0.h1->a1.h2<k>"], rel=1e-3)
    assert abs(scores(find_circuit(hard, induction, "atp"))["a0.h1"]) < 1e-3


def test_atp_star_is_for_softmax_and_more_than_one_layer(make, make_pairs):
    pairs = make_pairs()
    for mixer in ("sliding-window-attention", "alibi", "gated-softmax"):
        circuit = find_circuit(make(mixer=mixer, kv_heads=None), pairs, "atp-star")
        assert float(circuit.scores.max()) > 0
    for mixer in ("gated-deltanet", "mamba"):
        with pytest.raises(Refused, match=f"{mixer}.*method='atp'"):
            find_circuit(make(mixer=mixer, kv_heads=None, positions="none"), pairs, "atp-star")
    with pytest.raises(Refused, match="drop=False"):
        find_circuit(make(layers=1), pairs, "atp-star")
    assert float(find_circuit(make(layers=1), pairs, "atp-star", drop=False).scores.abs().max()) > 0


# ------------------------------------------------------------------ RelP


@pytest.mark.parametrize("level", ["node", "edge"])
def test_relevance_of_a_linear_model_is_its_gradient(make, make_pairs, level):
    model, pairs = make(linear=True), make_pairs()
    for rule in ("relp", "attnlrp"):
        if rule == "attnlrp" and level == "edge":
            continue  # half of the relevance goes to a pattern that no input makes
        found = find_circuit(model, pairs, "relp", level, rule="relp")
        torch.testing.assert_close(
            found.scores, find_circuit(model, pairs, "patching", level).scores, atol=1e-9, rtol=0
        )


@torch.no_grad()
def test_relp_takes_patterns_norms_and_slopes_as_given(make, make_pairs):
    """With pattern, norm size and activation secant frozen at the clean run the model is linear; here two edges through it."""
    model, pairs = make(), make_pairs()
    found = scores(find_circuit(model, pairs, "relp"))
    assert not any(value for name, value in found.items() if name.endswith(("<q>", "<k>")))
    net = model.net
    sites = [Site("mlp_out", 0), *(Site(kind, 1) for kind in ("mlp_out", "mlp_pre", "resid_mid", "resid_post"))]
    clean, corrupt = (reads(model, ids, sites) for ids in (pairs.clean, pairs.corrupt))
    change = clean[Site("mlp_out", 1)] - corrupt[Site("mlp_out", 1)]
    last = clean[Site("resid_post", 1)]
    size = (last.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    effect = logit_difference((change / size * net.ln_final.w) @ net.W_U, pairs).mean()
    assert found["m1->logits"] == pytest.approx(float(effect), abs=1e-9)
    mid, pre = clean[Site("resid_mid", 1)], clean[Site("mlp_pre", 1)]
    mlp, middle = net.blocks[1].mlp, (mid.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    moved = (clean[Site("mlp_out", 0)] - corrupt[Site("mlp_out", 0)]) / middle * net.blocks[1].ln2.w @ mlp.W_in
    through = (moved * mlp.act(pre) / pre) @ mlp.W_out / size * net.ln_final.w @ net.W_U
    assert found["m0->m1"] == pytest.approx(float(logit_difference(through, pairs).mean()), abs=1e-9)


def test_relp_with_attnlrp_reaches_queries_and_keys(make, make_pairs):
    found = scores(find_circuit(make(), make_pairs(), "relp", rule="attnlrp"))
    assert max(abs(value) for name, value in found.items() if name.endswith("<k>")) > 1e-4


def test_relp_refuses_what_has_no_rules(make, make_pairs):
    with pytest.raises(Refused, match="mixer 'mamba'"):
        find_circuit(make(mixer="mamba", kv_heads=None, positions="none"), make_pairs(), "relp")
    with pytest.raises(UnknownName, match="relp, attnlrp"):
        find_circuit(make(), make_pairs(), "relp", rule="gradient")


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("eap-ig-activations", {"steps": 0}, WorkbenchError, "at least 1"),
        ("eap-ig-activations", {"average": "some"}, UnknownName, "all, own"),
        ("eap-ig-activations", {"rule": "middle"}, UnknownName, "left, midpoint, right"),
        ("atp-star", {"drop": 1}, WorkbenchError, "drop"),
        ("atp-star", {"ablation": "optimal"}, Refused, "cannot use ablation"),
    ],
)
def test_bad_options_say_what_exists(make, make_pairs, method, options, error, message):
    with pytest.raises(error, match=message):
        find_circuit(make(), make_pairs(), method, **options)
