"""Decoding stores one attention row per step and nothing quadratic."""

import pytest
import torch
from copier import ASK, STOP, Copier, prompts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import workbench as wb
from workbench.errors import Refused
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.pairs import Pairs
from workbench.probes.retrieval.decoding import decode
from workbench.sites import Site

TOKENS = 1024
STEPS = 3


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned, by the storage behind it."""

    def __init__(self):
        super().__init__()
        self.numbers, self.shape = 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                stored = leaf.untyped_storage().nbytes() // leaf.element_size()
                if stored > self.numbers:
                    self.numbers, self.shape = stored, tuple(leaf.shape)
        return out


def llama(heads=4):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": heads}
    config = LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=2, max_position_embeddings=4 * TOKENS)
    return wb.load(LlamaForCausalLM(config).eval())


def native():
    torch.manual_seed(0)
    config = NativeConfig(layers=2, heads=4, width=32, head_width=8, vocab=64, context=4 * TOKENS)
    return NativeModel(NativeNet(config).eval())


@pytest.mark.parametrize("make", [llama, native])
@pytest.mark.parametrize("cache", [True, False])
def test_no_tensor_has_as_many_numbers_as_the_map(make, cache):
    """A retrieval sweep, from the prompt to the scores: no step returns, and nothing holds, N x N numbers of even one head."""

    def build(length, depth, seed):
        ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))
        span = torch.tensor([[100, 104]])
        return Pairs(ids, ids, ids[:, 100:104], -torch.ones(1, 1).long(), torch.tensor([length - 1]), {"NEEDLE": span})

    model = make()
    options = {"prompts": build, "max_new_tokens": STEPS, "cache": cache}
    wb.retrieval_heads(model, 64 + 64, (0.5,), **options)
    with Largest() as seen:
        result = wb.retrieval_heads(model, TOKENS, (0.5,), **options)
    assert result.copied.shape == (1, 2, 4)
    assert seen.numbers < TOKENS * TOKENS, seen.shape
    if cache:
        assert seen.numbers <= TOKENS * 64 * 3, seen.shape  # the widest activations of all tokens


def test_the_watch_sees_a_map():
    """An eager model makes one, and is noticed."""
    model = llama()
    ids = torch.randint(3, 64, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Largest() as seen:
        model.run(ids, read=["blocks.0.attn.hook_pattern"])
    assert seen.numbers >= TOKENS * TOKENS


def test_a_token_of_stop_is_counted_and_is_the_last():
    model = Copier(says=lambda needle: [*needle, 33, 33, 33, *needle, STOP])
    ids = prompts()(12, 0.5, 0).clean
    free, stopped = decode(model, ids, 20), decode(model, ids, 20, stop=(33,))
    assert free.alive.sum(1).tolist() == [9, 9]
    assert stopped.tokens[0].tolist() == [5, 6, 7, 33]
    assert stopped.alive.all()
    published = wb.retrieval_heads(model, 12, (0.5,), prompts=prompts(), form="published", stop=(33,))
    assert published.copied[:, 1, 0].tolist() == [1, 1]
    assert wb.retrieval_heads(model, 12, (0.5,), prompts=prompts(), form="published").copied[0, 1, 0] == 2


def test_edits_reach_the_answer_or_the_prompt_too():
    model, ids = native(), torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    off = {Site("z", 0, h): torch.zeros_like for h in range(4)}
    plain, answer, both = (
        decode(model, ids, 1, edit=edit, edit_prompt=prompt).first
        for edit, prompt in (({}, True), (off, False), (off, True))
    )
    whole = decode(model, ids, 1, edit=off, cache=False)
    torch.testing.assert_close(both, whole.first, atol=1e-5, rtol=1e-5)
    assert len({round(float(x[0, 0]), 4) for x in (plain, answer, both)}) == 3
    with pytest.raises(Refused, match="key-value cache"):
        decode(model, ids, 1, edit=off, edit_prompt=False, cache=False)


def test_looking_is_optional():
    model = Copier()
    ids = prompts()(12, 0.5, 0).clean
    decoded = decode(model, ids, 3, look=False)
    assert decoded.keys.numel() == 0
    assert model.captured == []
    assert decoded.tokens[0].tolist() == [5, 6, 7]
    assert ids[0, -1] == ASK
