"""What every gradient-based method keeps: places sum up, runs repeat bit for bit, models stay untouched, memory stays linear in
nodes; and information flow routes against loops."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.errors import Refused
from workbench.models.load import load
from workbench.pairs import logit_difference
from workbench.probes.circuits.components import INPUT
from workbench.probes.circuits.find import find_circuit, methods
from workbench.sites import Site

METHODS = ("eap", "eap-ig", "clean-corrupted", "eap-ig-activations", "atp", "atp-star", "relp", "ifr")
WAYS = [(name, level) for name in METHODS for level in methods()[name].levels]
ADDITIVE = [(name, level) for name, level in WAYS if name != "atp-star"]


def scores(circuit):
    return dict(zip(circuit.names, circuit.scores.tolist(), strict=True))


@pytest.mark.parametrize(("name", "level"), ADDITIVE)
def test_places_sum_to_the_whole(make, make_pairs, name, level):
    model, pairs = make(), make_pairs()
    whole = find_circuit(model, pairs, name, level)
    each = find_circuit(model, pairs, name, level, positions="each", batch=2)
    assert len(each.names) == len(whole.names) * pairs.clean.shape[1]
    torch.testing.assert_close(each.over_positions().scores, whole.scores, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("name", "level"), WAYS)
def test_twice_is_bit_identical_and_nothing_of_the_model_changes(make, make_pairs, name, level):
    model, pairs = make(), make_pairs()
    before, logits = copy.deepcopy(model.net.state_dict()), model.run(pairs.clean).logits
    torch.manual_seed(5)
    first = find_circuit(model, pairs, name, level, batch=2)
    with torch.no_grad():
        second = find_circuit(model, pairs, name, level, batch=2)
    assert torch.equal(first.scores, second.scores)
    assert not first.scores.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.net.state_dict().items())
    assert all(parameter.grad is None for parameter in model.net.parameters())
    assert torch.equal(model.run(pairs.clean).logits, logits)
    torch.testing.assert_close(find_circuit(model, pairs, name, level).scores, first.scores, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("name", "level"), [way for way in WAYS if way[0] != "ifr"])
def test_hooks_are_gone_after_an_exception(make, make_pairs, name, level):
    model, pairs = make(), make_pairs()
    logits = model.run(pairs.clean).logits

    def fails(logits, pairs):
        raise RuntimeError("metric broke")

    with pytest.raises(RuntimeError, match="metric broke"):
        find_circuit(model, pairs, name, level, metric=fails)
    assert not any(point.fwd_hooks or point._forward_hooks for point in model.net.hook_dict.values())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.net.modules())
    assert torch.equal(model.run(pairs.clean).logits, logits)
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize(("name", "level"), WAYS)
def test_frozen_parameters_change_nothing(make, make_pairs, name, level):
    model, pairs = make(), make_pairs()
    expected = find_circuit(model, pairs, name, level)
    model.net.requires_grad_(False)
    torch.testing.assert_close(find_circuit(model, pairs, name, level).scores, expected.scores, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mixer", ["gated-softmax", "sliding-window-attention", "linear-attention", "mamba-2", "hyena"])
def test_native_mixers_have_first_order_scores_at_both_levels(make, make_pairs, mixer):
    model, pairs = make(mixer=mixer, kv_heads=None, positions="none"), make_pairs()
    for name in ("eap", "eap-ig", "clean-corrupted", "eap-ig-activations"):
        node, edge = (find_circuit(model, pairs, name, level) for level in ("node", "edge"))
        assert float(node.scores.abs().min()) >= 0
        assert float(edge.scores.abs().max()) > 1e-3
    assert find_circuit(model, pairs, "ifr", "edge").scores.max() == 1


def test_nodes_of_hugging_face_models(make_pairs):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    model, pairs = load(LlamaForCausalLM(config).double().eval()), make_pairs()
    for name in METHODS:
        circuit = find_circuit(model, pairs, name, "node", batch=2)
        assert circuit.names[:5] == ("a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0")
        assert float(circuit.scores.abs().max()) > 1e-3
    own = find_circuit(model, pairs, "eap-ig-activations", "node", average="own", steps=30, rule="midpoint")
    exact = find_circuit(model, pairs, "patching", "node")
    assert scores(own)["m1"] == pytest.approx(scores(exact)["m1"], rel=0.01)


# ------------------------------------------------------------------ memory


class Largest(TorchDispatchMode):
    """The most numbers that one tensor has, by what it was made by."""

    def __init__(self):
        super().__init__()
        self.numbers, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # A view that repeats numbers holds no more than its storage.
            held = (
                min(leaf.numel(), leaf.untyped_storage().nbytes() // leaf.element_size())
                if isinstance(leaf, torch.Tensor)
                else 0
            )
            if held > self.numbers:
                self.numbers, self.what = held, str(func)
        return out


@pytest.mark.parametrize("name", ["eap", "eap-ig", "clean-corrupted", "eap-ig-activations", "relp", "ifr"])
def test_no_tensor_has_an_entry_for_every_pair_of_nodes_and_channel(make, make_pairs, name):
    """The largest tensor holds the outputs of all writers, [writers, B, T, D]: linear in nodes, B and D apart."""
    layers, heads, width = 6, 8, 16
    model = make(layers=layers, heads=heads, kv_heads=heads, width=width, head_width=2)
    pairs = make_pairs(n=4, length=6)
    options = {"steps": 2} if "ig" in name else {}
    with Largest() as seen:
        find_circuit(model, pairs, name, "edge", batch=4, **options)
    writers, rows = 1 + layers * (heads + 1), 4 * 6
    assert seen.numbers <= 1.1 * writers * rows * width * (2 if name == "clean-corrupted" else 1), seen.what
    assert seen.numbers < writers * writers * rows * width / 20


# ------------------------------------------------------------------ information flow routes


def near(whole, part):
    return max(0.0, float(whole.abs().sum() - (whole - part).abs().sum()))


@torch.no_grad()
def test_routes_into_inputs_are_shares_of_proximity(make, make_pairs):
    model, pairs = make(), make_pairs(n=2, length=4)
    found = find_circuit(model, pairs, "ifr", "edge")
    sites = [
        INPUT,
        *(Site(kind, layer) for layer in range(2) for kind in ("result", "mlp_out", "mlp_in", "resid_post")),
    ]
    acts = model.run(pairs.clean, read=[*sites, Site("resid_pre", 1)]).acts
    heads = [acts[Site("result", layer)] for layer in range(2)]
    first = [acts[INPUT], *heads[0].unbind(2), acts[Site("mlp_out", 0)]]
    names = ["input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "a1.h0", "a1.h1", "a1.h2", "a1.h3", "m1"]
    cases = {
        "a1.h2<q>": (acts[Site("resid_pre", 1)], first),
        "m1": (acts[Site("mlp_in", 1)], [*first, *heads[1].unbind(2)]),
        "logits": (acts[Site("resid_post", 1)], [*first, *heads[1].unbind(2), acts[Site("mlp_out", 1)]]),
    }
    for reader, (whole, parts) in cases.items():
        expected = torch.zeros(len(parts))
        for b in range(2):
            for t in range(4):
                each = torch.tensor([near(whole[b, t], part[b, t]) for part in parts])
                expected += each / each.sum() / 8
        for name, value in zip(names, expected.tolist(), strict=False):
            assert scores(found)[f"{name}->{reader}"] == pytest.approx(value, abs=1e-6)
    same = [scores(found)[f"a0.h1->a1.{reader}"] for reader in ("h0<q>", "h3<q>", "g0<k>", "g1<v>")]
    assert len(set(same)) == 1
    assert found.provenance["ablation"] == found.provenance["metric"] == "none"


@torch.no_grad()
def test_routes_of_heads_go_through_every_token_they_attend_to(make, make_pairs):
    model, pairs = make(), make_pairs(n=2, length=4)
    found = scores(find_circuit(model, pairs, "ifr", "node"))
    kinds = ("resid_pre", "v", "pattern", "resid_mid", "mlp_out", "resid_post")
    acts = model.run(pairs.clean, read=[Site(kind, 1) for kind in kinds]).acts
    x, v, pattern, mid, mlp, post = (acts[Site(kind, 1)] for kind in kinds)
    heads, block = torch.zeros(4, dtype=torch.float64), 0.0
    for b in range(2):
        for i in range(4):
            each = [
                [
                    near(mid[b, i], pattern[b, h, i, j] * v[b, j, h // 2] @ model.net.blocks[1].attn.W_O[h])
                    for j in range(4)
                ]
                for h in range(4)
            ]
            each = torch.tensor(each, dtype=torch.float64)
            heads += each.sum(1) / (each.sum() + near(mid[b, i], x[b, i])) / 8
            own, rest = near(post[b, i], mlp[b, i]), near(post[b, i], mid[b, i])
            block += own / (own + rest) / 8
    for head in range(4):
        assert found[f"a1.h{head}"] == pytest.approx(float(heads[head]), abs=1e-6)
    assert found["m1"] == pytest.approx(block, abs=1e-6)


def test_routes_ignore_the_corrupted_prompt_and_the_metric(make, make_pairs):
    model, pairs = make(), make_pairs()
    other = type(pairs)(pairs.clean, pairs.clean.flip(0), pairs.wrong, pairs.answer, pairs.position)
    for level in ("node", "edge"):
        assert torch.equal(
            find_circuit(model, pairs, "ifr", level).scores,
            find_circuit(model, other, "ifr", level, "zero", metric=lambda a, b: 3 * logit_difference(a, b)).scores,
        )


def test_heads_without_values_have_no_routes(make, make_pairs):
    with pytest.raises(Refused, match="taken apart|does not serve"):
        find_circuit(make(mixer="hyena", kv_heads=None, positions="none"), make_pairs(), "ifr", "node")
