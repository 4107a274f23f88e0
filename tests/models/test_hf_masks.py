"""Masks of Hugging Face attention travel as rules, checked against the tensors the models get."""

import builders as B
import pytest
import torch

from workbench.captures import capture
from workbench.errors import Refused
from workbench.models.protocol import Tokens


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_masks_of_windows_and_padding_travel_as_a_rule():
    tokens = Tokens(B.ids(), torch.arange(11).expand(2, 11) >= torch.tensor([[0], [4]]))
    for name in ("mistral", "gemma3", "llama", "gpt2", "bloom", "mpt", "falcon"):
        maps = B.hugging_face(name).model.run(tokens, maps=capture()).maps
        for found in maps.values():
            assert found.mask.dense is None, name
            assert found.mask.keys is not None, name
    assert maps[0].mask.causal


def test_a_mask_without_a_rule_is_kept_when_short_and_refused_when_long(monkeypatch):
    from workbench.models import masking

    case = B.hugging_face("llama")
    odd = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    odd |= torch.eye(11, dtype=torch.bool)
    given = {"input_ids": case.inputs, "attention_mask": odd}
    run = case.model.run(given, maps=capture(), read=["blocks.0.attn.hook_z", "blocks.0.attn.hook_v"])
    assert torch.equal(run.maps[0].dense() > 0, odd.expand(2, 4, 11, 11))
    monkeypatch.setattr(masking, "DENSE_MASK_LIMIT", 100)
    with pytest.raises(Refused, match=r"layer 0 of LlamaForCausalLM: its mask over 11 x 11"):
        case.model.run(given, maps=capture())


def test_documents_and_chunks_travel_as_a_rule():
    from transformers.masking_utils import chunked_causal_mask_function

    from workbench.models.masking import rule

    built = {"mask_function": chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)), "q_offset": 0,
             "kv_offset": 0, "kv_length": 10, "q_length": 10, "attention_mask": None}  # fmt: skip
    mask = rule(built)
    tile = mask.tile(slice(0, 10), slice(0, 10))
    expected = torch.tensor([[q // 4 == k // 4 and k <= q for k in range(10)] for q in range(10)])
    assert torch.equal(tile[0, 0], expected)
    case = B.hugging_face("llama")
    packed = {"input_ids": case.inputs, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]]).expand(2, 11)}
    run = case.model.run(packed, maps=capture())
    assert run.maps[0].mask.documents is not None
    assert (run.maps[0].dense()[:, :, 4:9, :4] == 0).all()


def test_rules_that_say_more_than_one_mask_can_are_no_rules():
    from transformers import masking_utils as hf

    from workbench.models.masking import rule

    packed = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    chunks = hf.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))

    class Custom:
        def __call__(self, b, h, q, k):
            return k <= q

    size = {"q_offset": 0, "kv_offset": 0, "kv_length": 10, "q_length": 10, "attention_mask": None}
    for function in (hf.and_masks(hf.packed_sequence_mask_function(packed), chunks), Custom()):
        assert rule({**size, "mask_function": function}) is None


def test_flash_attention_tells_documents_apart_and_looks_both_ways_in_a_window():
    """Without flash attention here: what its functions in transformers make of the same arguments."""
    from workbench.models.masking import Masks

    case = B.hugging_face("llama")
    layer = case.model._layers[0]
    q = torch.zeros(1, 4, 6, 8)
    options = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "is_causal": True, "sliding_window": None}
    mask, _ = Masks("Llama").resolve(layer, None, q, q, "flash_attention_2", options)
    documents = torch.tensor([[k <= q and q // 3 == k // 3 for k in range(6)] for q in range(6)])
    assert torch.equal(mask.tile(slice(0, 6), slice(0, 6))[0, 0], documents)
    options = {"position_ids": torch.arange(3, 9)[None], "is_causal": False, "sliding_window": 2}
    mask, _ = Masks("Llama").resolve(layer, None, q, q, "flash_attention_2", options)
    near = torch.tensor([[abs(q - k) < 2 for k in range(6)] for q in range(6)])
    assert torch.equal(mask.tile(slice(0, 6), slice(0, 6))[0, 0], near)
