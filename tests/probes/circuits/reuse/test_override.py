"""Forced attention against edits of the pattern, and bit-equality of everything it does not touch."""

import builders
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.load import load
from workbench.probes.circuits.reuse.override import attention_override
from workbench.sites import Site


def row(*weights):
    return torch.tensor(weights, dtype=torch.float64)


IDS = torch.tensor([[1, 4, 2, 7, 3, 5], [9, 8, 0, 2, 2, 6]])
FORCED = {
    "a0.h1": torch.stack([row(0.5, 0, 0.3, 0.2, 0, 0), row(0, 0, 0, 0, 0, 1)]),
    "a1.h0": row(0, 0.25, 0.25, 0.5, 0, 0),
    "a1.h3": torch.tensor([False, True, False, True, False, False]),
}
QUERIES = torch.tensor([4, 5])


def through_the_pattern(model):
    """The same rows put into the patterns."""

    def at(layer):
        def edit(pattern):
            for name, target in FORCED.items():
                if name.startswith(f"a{layer}."):
                    weights = (target / target.sum(-1, keepdim=True)).expand(2, 6)
                    for b in range(2):
                        pattern[b, int(name[-1]), QUERIES[b]] = weights[b]
            return pattern

        return edit

    return model.run(IDS, edit={Site("pattern", layer): at(layer) for layer in range(2)})


def gpt2(implementation="eager"):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=4, initializer_range=0.4)
    config._attn_implementation = implementation
    return load(GPT2LMHeadModel(config).double().eval())


def llama(implementation="eager"):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=24, initializer_range=0.4, **sizes)
    config._attn_implementation = implementation
    return load(LlamaForCausalLM(config).double().eval())


@pytest.fixture
def build(make):
    made = {
        "native": make,
        "gated": lambda: make(mixer="gated-softmax", positions="rotary"),
        "gpt2": gpt2,
        "llama": llama,
        "gpt2-sdpa": lambda: gpt2("sdpa"),
        "llama-sdpa": lambda: llama("sdpa"),
    }
    return lambda name: made[name]()


@pytest.mark.parametrize("name", ["native", "gated", "gpt2", "llama"])
def test_it_is_an_edit_of_the_pattern(build, name):
    """Also across layers: the second layer mixes the values that it has once the first is forced."""
    model = build(name)
    with torch.no_grad():
        found = attention_override(model, IDS, FORCED, QUERIES).logits
        plain, expected = model.run(IDS).logits, through_the_pattern(model).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert (found - plain)[torch.arange(2), QUERIES].abs().min() > 1e-4


@pytest.mark.parametrize("name", ["native", "gated", "gpt2-sdpa", "llama-sdpa"])
def test_everything_else_keeps_its_bits(build, name):
    model = build(name)
    read = [Site(kind, layer) for layer in range(2) for kind in ("z", "v", "pattern", "resid_post")]
    forced = {"a1.h2": FORCED["a1.h0"]}
    with torch.no_grad():
        plain = model.run(IDS, read=read)
        found = attention_override(model, IDS, forced, QUERIES, read=read)
    for site in read:
        if site.layer == 0 or site.kind in ("v", "pattern"):
            assert torch.equal(found.acts[site], plain.acts[site])
    same = found.acts[Site("z", 1)] == plain.acts[Site("z", 1)]
    same = same.all(-1)
    touched = torch.zeros_like(same)
    touched[torch.arange(2), QUERIES, 2] = True
    assert torch.equal(same, ~touched)
    rows = torch.ones(2, 6, dtype=torch.bool)
    rows[torch.arange(2), QUERIES] = False
    assert torch.equal(found.logits[rows], plain.logits[rows])
    after = model.run(IDS).logits
    assert torch.equal(after.detach(), plain.logits)


def test_its_own_row_changes_nothing(build):
    model = build("llama")
    with torch.no_grad():
        plain = model.run(IDS, read=[Site("pattern", 1)])
        own = plain.acts[Site("pattern", 1)][torch.arange(2), 3, QUERIES]
        found = attention_override(model, IDS, {"a1.h3": own}, QUERIES)
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-10, atol=1e-12)


def test_the_last_real_token_is_the_query_unless_given(make):
    model = make()
    ids, mask = torch.cat([IDS, IDS[:, :2]], 1), torch.tensor([[1] * 5 + [0] * 3, [1] * 6 + [0] * 2])
    target = torch.tensor([True, True] + [False] * 6)
    with torch.no_grad():
        found = attention_override(model, {"input_ids": ids, "attention_mask": mask}, {"a1.h0": target})
        expected = attention_override(model, IDS, {"a1.h0": target[:6]}, QUERIES)
    for b, at in enumerate(QUERIES.tolist()):
        torch.testing.assert_close(found.logits[b, at], expected.logits[b, at], rtol=1e-9, atol=1e-9)


def test_a_bridge_is_forced_too():
    case = builders.bridged("llama")
    target = torch.zeros(case.inputs.shape[1], dtype=torch.bool)
    target[1] = True

    def put(pattern):
        pattern[:, 3, -1] = target.to(pattern)
        return pattern

    with torch.no_grad():
        found = attention_override(case.model, case.inputs, {"a1.h3": target}).logits
        expected = case.model.run(case.inputs, edit={Site("pattern", 1): put}).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_may_look_ahead(make):
    model = make(causal=False)
    target = row(0, 0, 0, 0, 0, 1)
    assert attention_override(model, IDS, {"a0.h0": target}, torch.tensor([0, 1])).logits.shape == (2, 6, 11)
    with pytest.raises(WorkbenchError, match="query 0 of prompt 0"):
        attention_override(make(), IDS, {"a0.h0": target}, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("forced", "match"),
    [
        ({"a5.h0": row(1, 0, 0, 0, 0, 0)}, "no head of random 'a5.h0'"),
        ({"m0": row(1, 0, 0, 0, 0, 0)}, "no head of random 'm0'"),
        ({"a0.h0": row(1, 1, 0, 0, 0, 0)}, "sum to 2"),
        ({"a0.h0": row(2, -1, 0, 0, 0, 0)}, "weights >= 0"),
        ({"a0.h0": torch.zeros(6, dtype=torch.bool)}, "no key in prompt 0"),
        ({"a0.h0": torch.tensor([0, 1, 2, 3, 4, 5])}, "distribution or a boolean"),
        ({"a0.h0": row(1, 0, 0)}, r"\[2, 6\] or \[6\]; got \[3\]"),
    ],
)
def test_mistakes_are_named(make, forced, match):
    with pytest.raises((WorkbenchError, UnknownName), match=match):
        attention_override(make(), IDS, forced)


def test_padding_is_no_target(make):
    inputs = {"input_ids": IDS, "attention_mask": torch.tensor([[0] + [1] * 5, [1] * 6])}
    with pytest.raises(WorkbenchError, match="prompt 0 does not see"):
        attention_override(make(), inputs, {"a0.h0": row(1, 0, 0, 0, 0, 0)})


def test_other_mixers_are_refused(make):
    with pytest.raises(Refused, match="linear.*only heads whose output is a softmax row"):
        attention_override(make(mixer="linear-attention"), IDS, {"a0.h0": row(1, 0, 0, 0, 0, 0)})
