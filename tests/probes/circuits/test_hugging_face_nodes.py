"""Node circuits on Hugging Face models, against hooks on their own modules."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from workbench.errors import Refused
from workbench.models.load import load
from workbench.pairs import logit_difference
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.faithfulness import faithfulness


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=4, initializer_range=0.4)
    return GPT2LMHeadModel(config).double().eval()


def llama():
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
    return LlamaForCausalLM(config).double().eval()


PLACES = {
    "gpt2": (gpt2, lambda m, l: m.transformer.h[l].attn.c_proj, lambda m, l: m.transformer.h[l].mlp),
    "llama": (llama, lambda m, l: m.model.layers[l].self_attn.o_proj, lambda m, l: m.model.layers[l].mlp),
}


def replaced(module, pairs, place, head):
    """Logit difference with the input slice of one head's projection, or an MLP's output, taken from the corrupted run."""
    seen = []

    def keep(_, inputs, output=None):
        seen.append(output if output is not None else inputs[0])

    def swap(_, inputs, output=None):
        if output is not None:
            return seen[0]
        value = inputs[0].clone()
        value[..., 4 * head : 4 * head + 4] = seen[0][..., 4 * head : 4 * head + 4]
        return (value,)

    register = place.register_forward_hook if head is None else place.register_forward_pre_hook
    with torch.no_grad():
        handle = register(keep)
        module(pairs.corrupt)
        handle.remove()
        handle = register(swap)
        try:
            return float(logit_difference(module(pairs.clean).logits, pairs).mean())
        finally:
            handle.remove()


@pytest.mark.parametrize("family", sorted(PLACES))
def test_node_patching_equals_hooks_on_the_modules(family, make_pairs):
    build, attention, mlp = PLACES[family]
    module, pairs = build(), make_pairs()
    circuit = find_circuit(load(module), pairs, "patching", "node", batch=2)
    with torch.no_grad():
        clean = float(logit_difference(module(pairs.clean).logits, pairs).mean())
    expected = {}
    for layer in range(2):
        expected |= {f"a{layer}.h{h}": clean - replaced(module, pairs, attention(module, layer), h) for h in range(4)}
        expected[f"m{layer}"] = clean - replaced(module, pairs, mlp(module, layer), None)
    assert circuit.names == tuple(expected)
    torch.testing.assert_close(circuit.scores, torch.tensor(list(expected.values()), dtype=torch.float64))
    assert circuit.scores.abs().min() > 0


@pytest.mark.parametrize("family", sorted(PLACES))
def test_gradient_scores_are_the_slope_of_the_exact_effect(family, make_pairs):
    """Central difference in the head's scale: replacing by zero is the step from 1 to 0, its slope the first-order effect."""
    module, pairs = PLACES[family][0](), make_pairs()
    model = load(module)
    found = find_circuit(model, pairs, "eap", "node", "zero")
    step, metric = 3e-3, []
    with torch.no_grad():
        for scale in (1 + step, 1 - step):
            edited = model.run(pairs.clean, edit={"blocks.0.attn.hook_z[2]": lambda z, scale=scale: scale * z})
            metric.append(float(logit_difference(edited.logits, pairs).mean()))
    slope = (metric[0] - metric[1]) / (2 * step)
    assert float(found.scores[found.names.index("a0.h2")]) == pytest.approx(slope, rel=3e-3)


def test_all_node_methods_and_faithfulness_run(make_pairs):
    module, pairs = llama(), make_pairs(n=6)
    model = load(module)
    for method in ("patching", "eap", "eap-ig"):
        circuit = find_circuit(model, pairs, method, "node")
        table = faithfulness(model, circuit, pairs, (0, 0.5, 1), controls=1).frame()
        assert table.faithfulness.tolist()[::2] == pytest.approx([0, 1], abs=1e-9)
    sae = find_circuit(model, pairs, "discrete-sae", features=8, epochs=5, trials=1, examples=3, pooling="mean")
    assert sae.names == tuple(f"a{layer}.h{head}" for layer in range(2) for head in range(4))
    assert all(parameter.grad is None for parameter in module.parameters())


def test_edges_are_refused_and_point_to_nodes(make_pairs):
    with pytest.raises(Refused, match=r"hook_q_input.*level='node'"):
        find_circuit(load(gpt2()), make_pairs())


def test_training_mode_is_refused(make_pairs):
    with pytest.raises(Refused, match="training mode"):
        find_circuit(load(gpt2().train()), make_pairs(), level="node")
