"""Gradient scores against oracles: exact patching, the mask's gradient, finite differences through a model that is written
out edge by edge, the path integral, and TransformerLens's attribution patching."""

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from workbench.graph import edge_parts
from workbench.models.load import load
from workbench.pairs import logit_difference
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.masked import masked

CONSTANT = ("counterfactual", "zero", "mean")


def scores(circuit):
    return dict(zip(circuit.names, circuit.scores.tolist(), strict=True))


def pearson(a, b):
    return float(torch.corrcoef(torch.stack([a.scores, b.scores]))[0, 1])


def mask_gradient(model, pairs, level, ablation, positions="all"):
    """d metric / d share at all shares 1, mean over examples."""
    mask = masked(Setting.of(model, pairs, ablation=ablation, positions=positions), level)
    total = torch.zeros(len(mask.names), dtype=torch.float64)
    for chunk in mask.setting.chunks():
        keep = torch.ones(len(mask.names), dtype=torch.float64, requires_grad=True)
        batch = mask.prepare(chunk)
        total += torch.autograd.grad(mask.metric(batch, keep).sum(), keep)[0]
    return mask.names, total / len(pairs)


@pytest.mark.parametrize("level", ["edge", "node"])
@pytest.mark.parametrize("ablation", CONSTANT)
def test_on_a_linear_attention_free_model_eap_is_exact_patching_and_the_mask_gradient(
    make, make_pairs, level, ablation
):
    model, pairs = make(linear=True, layers=3), make_pairs()
    exact = find_circuit(model, pairs, "patching", level, ablation)
    eap = find_circuit(model, pairs, "eap", level, ablation)
    names, gradient = mask_gradient(model, pairs, level, ablation)
    assert names == eap.names == exact.names
    assert float(exact.scores.abs().max()) > 0.1
    assert float((eap.scores - exact.scores).abs().max()) < 1e-5
    assert float((eap.scores - gradient).abs().max()) < 1e-5


@pytest.mark.parametrize("level", ["edge", "node"])
@pytest.mark.parametrize("positions", ["all", "each"])
@pytest.mark.parametrize("ablation", CONSTANT)
def test_eap_is_the_mask_gradient_on_every_model(make, make_pairs, level, positions, ablation):
    """Grouped keys, norms, MLPs and softmax included: the first-order score is the gradient in the shares by definition."""
    model, pairs = make(), make_pairs()
    eap = find_circuit(model, pairs, "eap", level, ablation, positions=positions)
    names, gradient = mask_gradient(model, pairs, level, ablation, positions)
    assert names == eap.names
    assert float((eap.scores - gradient).abs().max()) < 1e-10 * max(1.0, float(gradient.abs().max()))


# ------------------------------------------------------------------ a model written out edge by edge


def written_out(net, ids, shift=None, start=None):
    """The native net with every input formed as the sum of what its writers wrote, plus ``shift[reader, channel]``.

    Returns the logits and the writers' outputs by name. Loops over layers and heads; its own norm, rotation and softmax.
    """
    shift, c = shift or {}, net.config
    wrote = {"input": net.W_E[ids] if start is None else start}
    length = ids.shape[1]
    group = c.heads // (c.kv_heads or c.heads)
    letter = "h" if group == 1 else "g"

    def read(name, channel):
        return sum(wrote.values()) + shift.get((name, channel), 0.0)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turn(x):
        half = x.shape[-1] // 2
        angle = torch.arange(length, dtype=x.dtype)[:, None] * c.theta ** (-torch.arange(half, dtype=x.dtype) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    for layer, block in enumerate(net.blocks):
        new = {}
        for head in range(c.heads):
            kv = head // group
            q = turn(norm(read(f"a{layer}.h{head}", "q"), block.ln1.w) @ block.attn.W_Q[head])
            k = turn(norm(read(f"a{layer}.{letter}{kv}", "k"), block.ln1.w) @ block.attn.W_K[kv])
            v = norm(read(f"a{layer}.{letter}{kv}", "v"), block.ln1.w) @ block.attn.W_V[kv]
            s = q @ k.transpose(1, 2) / math.sqrt(c.head_width)
            s = s.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
            new[f"a{layer}.h{head}"] = s.softmax(-1) @ v @ block.attn.W_O[head]
        wrote |= new
        hidden = block.mlp.act(norm(read(f"m{layer}", "in"), block.ln2.w) @ block.mlp.W_in + block.mlp.b_in)
        wrote[f"m{layer}"] = hidden @ block.mlp.W_out + block.mlp.b_out
    return norm(read("logits", "in"), net.ln_final.w) @ net.W_U, wrote


def finite_differences(net, names, pairs, ts, step=1e-5):
    """Central differences of the metric along (clean - replacement) of every edge, at embeddings a share t of the way from
    the corrupted to the clean ones, mean over ``ts`` and examples."""
    with torch.no_grad():
        _, clean = written_out(net, pairs.clean)
        _, corrupt = written_out(net, pairs.corrupt)
        found = {}
        for name in names:
            source, reader, channel = edge_parts(name)
            change = clean[source] - corrupt[source]
            slope = 0.0
            for t in ts:
                start = corrupt["input"] + t * (clean["input"] - corrupt["input"])
                ends = [
                    written_out(net, pairs.clean, {(reader, channel): sign * step * change}, start)[0]
                    for sign in (1, -1)
                ]
                up, down = (float(logit_difference(logits, pairs).mean()) for logits in ends)
                slope += (up - down) / (2 * step) / len(ts)
            found[name] = slope
    return found


def test_the_written_out_model_is_the_model(make, make_pairs):
    model, pairs = make(), make_pairs()
    with torch.no_grad():
        torch.testing.assert_close(written_out(model.net, pairs.clean)[0], model.net(pairs.clean))


@pytest.mark.parametrize(
    ("method", "options", "ts"),
    [
        ("eap", {}, (1,)),
        ("eap-ig", {"steps": 3}, (0, 1 / 3, 2 / 3)),
        ("eap-ig", {"steps": 2, "rule": "midpoint"}, (0.25, 0.75)),
        ("clean-corrupted", {}, (0, 1)),
    ],
)
def test_every_edge_is_the_finite_difference_of_the_written_out_model(make, make_pairs, method, options, ts):
    model, pairs = make(), make_pairs(n=3, length=5)
    circuit = find_circuit(model, pairs, method, batch=2, **options)
    expected = finite_differences(model.net, circuit.names, pairs, ts)
    error = circuit.scores - torch.tensor([expected[name] for name in circuit.names], dtype=torch.float64)
    assert float(circuit.scores.abs().max()) > 0.1
    assert float(error.abs().max()) < 1e-6  # step^2 times the third derivative; measured 5e-7 at most


# ------------------------------------------------------------------ path integrals


def difference(model, pairs):
    with torch.no_grad():
        clean, corrupt = (logit_difference(model.run(ids).logits, pairs).mean() for ids in (pairs.clean, pairs.corrupt))
    return float(clean - corrupt)


def cut(circuit, start="", end=""):
    return sum(value for name, value in scores(circuit).items() if name.startswith(start) and name.endswith(end))


@pytest.mark.parametrize("seed", range(3))
def test_ig_scores_over_the_input_cut_sum_to_the_whole_effect(make, make_pairs, seed):
    """The edges that leave the input are a cut on which the path is straight, so their sum is the integral of the gradient,
    whatever norms, attention and MLPs lie behind."""
    model, pairs = make(seed), make_pairs(seed=seed)
    circuit = find_circuit(model, pairs, "eap-ig", steps=50, rule="midpoint")
    assert cut(circuit, start="input->") == pytest.approx(difference(model, pairs), rel=0.05)


def test_ig_scores_over_the_last_cut_are_complete_without_a_norm_behind_it(soft, induction):
    """Into the logits the path of the stream is curved. The metric is linear there without a last norm, and one step is
    complete; with a norm, sums over this cut miss what the norm bends."""
    circuit = find_circuit(soft, induction, "eap-ig", steps=1)
    assert cut(circuit, end="->logits") == pytest.approx(difference(soft, induction), rel=1e-5)
    assert abs(cut(circuit, start="input->") / difference(soft, induction) - 1) > 0.05


@pytest.mark.parametrize("level", ["edge", "node"])
def test_moving_one_site_integrates_to_the_exact_effect_of_replacing_it(make, make_pairs, level):
    model, pairs = make(), make_pairs()
    options = {"steps": 40, "rule": "midpoint", "average": "own"}
    circuit = find_circuit(model, pairs, "eap-ig-activations", level, **options)
    exact = scores(find_circuit(model, pairs, "patching", "node"))
    for name in ("m0", "m1"):
        found = scores(circuit)[name] if level == "node" else cut(circuit, start=f"{name}->")
        assert found == pytest.approx(exact[name], rel=2e-3)
    if level == "edge":
        assert cut(circuit, start="input->") == pytest.approx(difference(model, pairs), rel=0.05)


# ------------------------------------------------------------------ saturated attention


def test_saturated_heads_are_invisible_to_eap_and_seen_by_the_path(hard, induction):
    """Exact effects on exactly the active edges; the edge into the saturated keys and the value edge before it have no
    gradient at the clean run. The path crosses the jump of the softmax, and its fineness says how well the area is met."""
    exact, eap, ig = (find_circuit(hard, induction, name) for name in ("patching", "eap", "eap-ig"))
    fine = find_circuit(hard, induction, "eap-ig", steps=30)
    active = hard.ground_truth.edges
    saturated = ("a0.h1->a1.h2<k>", "input->a0.h1<v>")
    assert set(exact.threshold(1e-3).edges) == set(active)
    assert set(active) == {edge_parts(name) for name in (*saturated, "input->a1.h2<v>", "a1.h2->logits")}
    for edge in saturated:
        assert scores(exact)[edge] == pytest.approx(5, abs=0.01)
        assert abs(scores(eap)[edge]) < 1e-3 < 1 < scores(ig)[edge]
        assert scores(fine)[edge] == pytest.approx(5, abs=1)
    assert set(ig.threshold(1e-3).edges) == set(fine.threshold(1e-3).edges) == set(active)
    assert pearson(exact, fine) > 0.99 > pearson(exact, ig) > pearson(exact, eap) + 0.05


# ------------------------------------------------------------------ TransformerLens


@pytest.fixture(scope="module")
def bridge():
    sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
    try:
        import builders
        from transformer_lens.model_bridge import TransformerBridge
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(config).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.4)
    net.config.architectures = ["GPT2LMHeadModel"]
    return load(TransformerBridge.boot_transformers("gpt2", hf_model=net, tokenizer=builders.tokenizer()))


def lens(bridge, pairs, granularity):
    """TransformerLens takes the gradient at its corrupted prompt and counts towards its clean one: the roles of ours
    exchanged, and the sign. Its nodes are single positions; edges stay at one."""
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    right, wrong = pairs.answer[:, 0], pairs.wrong[:, 0]
    found = {}
    for i in range(len(pairs)):
        result = attribution_patch(
            bridge.bridge,
            pairs.corrupt[i : i + 1],
            pairs.clean[i : i + 1],
            lambda logits, i=i: logits[0, -1, right[i]] - logits[0, -1, wrong[i]],
            config=EdgeAttributionConfig(granularity=granularity),
        )
        for key, value in (result.node_scores if granularity == "node" else result.edge_scores).items():
            name = named(key) if granularity == "node" else f"{named(key[0])}->{named(key[1])}"
            found[name] = found.get(name, 0.0) - value / len(pairs)
    return found


def named(node):
    heads = {"q_input": "<q>", "k_input": "<k>", "v_input": "<v>", "attn_head_out": ""}
    if node.kind in heads:
        return f"a{node.layer}.h{node.head}{heads[node.kind]}"
    return {"embed": "input", "logits": "logits"}.get(node.kind, f"m{node.layer}")


@pytest.mark.parametrize("level", ["node", "edge"])
def test_eap_is_the_attribution_patching_of_transformer_lens(bridge, make_pairs, level):
    pairs = make_pairs(n=3)
    ours, theirs = scores(find_circuit(bridge, pairs, "eap", level)), lens(bridge, pairs, level)
    assert set(theirs) - set(ours) <= {"input"}
    assert set(ours) <= set(theirs)
    assert max(map(abs, ours.values())) > 0.1
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], abs=2e-5), name


@pytest.mark.parametrize("method", ["eap", "eap-ig", "clean-corrupted", "eap-ig-activations", "ifr"])
def test_edges_of_a_bridge_are_served_by_every_gradient_method(bridge, make_pairs, method):
    pairs = make_pairs(n=3)
    before = bridge.run(pairs.clean).logits
    circuit = find_circuit(bridge, pairs, method, "edge", batch=2)
    assert circuit.names[0] == "input->a0.h0<q>"
    assert float(circuit.scores.abs().max()) > 0
    assert torch.equal(bridge.run(pairs.clean).logits, before)


def test_integrated_gradients_of_a_bridge_are_complete(bridge, make_pairs):
    pairs = make_pairs(n=3)
    circuit = find_circuit(bridge, pairs, "eap-ig", steps=50, rule="midpoint")
    assert cut(circuit, start="input->") == pytest.approx(difference(bridge, pairs), rel=0.05)
