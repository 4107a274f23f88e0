"""Inputs beside plain token ids: embeddings, two stacks, caches of either."""

import builders as B
import pytest
import torch
import transformers as hf

from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.models.hf import HFModel
from workbench.models.protocol import Tokens


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_embeddings_run_as_their_tokens_do(name, side):
    case = B.hugging_face(name)
    embed = case.net.get_input_embeddings()
    at = torch.arange(11).expand(2, 11)
    real = at >= torch.tensor([[0], [4]]) if side == "left" else at < torch.tensor([[11], [7]])
    embedded = {"inputs_embeds": embed(case.inputs), "attention_mask": real.long()}
    ids = case.model.run(Tokens(case.inputs, real), maps=capture(), logits="last", cache=True)
    run = case.model.run(embedded, maps=capture(), logits="last", cache=True)
    assert torch.allclose(run.logits, ids.logits)
    assert torch.equal(run.maps[1].dense() > 0, ids.maps[1].dense() > 0)
    assert torch.allclose(run.maps[1].dense(), ids.maps[1].dense())
    step = case.inputs[:, :2]
    expected = case.model.run(step, cache=ids.cache).logits
    assert torch.allclose(case.model.run(step, cache=run.cache).logits, expected)
    assert torch.allclose(case.model.run({"inputs_embeds": embed(step)}, cache=ids.cache).logits, expected)


def test_embeddings_are_checked_as_ids_are():
    model = B.hugging_face("llama").model
    embeds = torch.zeros(2, 70, B.D, dtype=torch.float64)
    with pytest.raises(WorkbenchError, match="6 more than"):
        model.run({"inputs_embeds": embeds})
    with pytest.raises(WorkbenchError, match="no tokens"):
        model.run({"inputs_embeds": embeds[:, :0]})
    with pytest.raises(WorkbenchError, match="empty batch"):
        model.run(B.ids()[:0])
    with pytest.raises(WorkbenchError, match=r"attention_mask covers the new positions, \[2, 8\]; got \[2, 5\]"):
        model.run({"inputs_embeds": embeds[:, :8], "attention_mask": torch.ones(2, 5)})


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_with_a_cache_gives_the_same_rows(padded):
    case = B.hugging_face("t5")
    given, ids = {"input_ids": case.inputs["input_ids"]}, B.ids(2, 6)
    if padded:
        given["attention_mask"] = torch.arange(9).expand(2, 9) < torch.tensor([[9], [6]])
    whole = case.model.run({**given, "decoder_input_ids": ids}, maps=capture())
    run = case.model.run({**given, "decoder_input_ids": ids[:, :3]}, cache=True)
    for lo, hi in ((3, 4), (4, 6)):
        run = case.model.run({**given, "decoder_input_ids": ids[:, lo:hi]}, cache=run.cache, maps=capture())
        assert torch.allclose(run.logits, whole.logits[:, lo:hi], atol=1e-10)
        assert torch.allclose(run.maps["decoder.1"].dense(), whole.maps["decoder.1"].dense()[:, :, lo:hi, :hi])
        assert torch.allclose(run.maps["cross.1"].dense(), whole.maps["cross.1"].dense()[:, :, lo:hi])
        assert run.maps["decoder.1"].offset == lo


def test_padding_of_a_decoder_gives_nothing_and_is_not_last():
    case = B.hugging_face("t5")
    real = torch.arange(5).expand(2, 5) < torch.tensor([[5], [3]])
    given = {**case.inputs, "decoder_attention_mask": real.long()}
    run = case.model.run(given, maps=capture())
    for key in ("decoder.0", "cross.1"):
        assert (run.maps[key].dense()[1, :, 3:] == 0).all()
        assert (run.maps[key].dense()[1, :, :3].sum(-1) > 0.99).all()
    last = case.model.run(given, logits="last").logits
    assert torch.allclose(last[:, 0], torch.stack([run.logits[0, 4], run.logits[1, 2]]))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_windows_padding_and_caches_together(implementation, kind):
    """Keys count from position 0 although the cache of a layer with a window has dropped the first ones."""
    case = B.hugging_face("gemma3", implementation, torch.float32)
    real = torch.arange(11).expand(2, 11) >= torch.tensor([[0], [4]])
    whole = case.model.run(Tokens(case.inputs, real), maps=capture())
    cache = hf.StaticCache(config=case.net.config, max_cache_len=16) if kind == "static" else True
    at = 0
    for end in (6, 7, 9, 11):
        part = Tokens(case.inputs[:, at:end], real[:, at:end])
        run = case.model.run(part, cache=cache, maps=capture())
        assert torch.allclose(run.logits[real[:, at:end]], whole.logits[:, at:end][real[:, at:end]], atol=1e-4)
        for key, found in run.maps.items():
            weights = found.dense()
            assert found.offset == at
            assert torch.allclose(weights[..., :end], whole.maps[key].dense()[:, :, at:end, :end], atol=1e-5)
            assert (weights[..., end:] == 0).all()
        at, cache = end, run.cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_edited_pattern_after_a_cache_is_the_map(kind):
    case = B.hugging_face("mistral", "eager", torch.float32)
    start = hf.StaticCache(config=case.net.config, max_cache_len=16) if kind == "static" else True
    cache = case.model.run(case.inputs[:, :8], cache=start).cache
    plain = case.model.run(case.inputs[:, 8:], cache=cache, maps=capture())
    seen, site = [], "blocks.0.attn.hook_pattern"

    def look(pattern):
        seen.append(pattern)
        return pattern

    run = case.model.run(case.inputs[:, 8:], cache=cache, maps=capture(), edit={site: look}, read=[site])
    edited = run.maps[0]
    assert edited.shape == plain.maps[0].shape == run.acts[site].shape == seen[0].shape == (2, 4, 3, 11)
    assert edited.offset == plain.maps[0].offset == 8
    assert torch.allclose(edited.dense(), plain.maps[0].dense(), atol=1e-5)
    assert torch.allclose(run.logits, plain.logits, atol=1e-4)


def test_classifiers_of_two_stacks_make_their_decoders_input_themselves():
    config = hf.BartConfig(
        vocab_size=B.V, d_model=B.D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, eos_token_id=2,
        decoder_attention_heads=4, encoder_ffn_dim=B.F, decoder_ffn_dim=B.F, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    net = B.net(hf.BartForSequenceClassification, config)
    ids = torch.cat([B.ids()[:, :8], torch.full((2, 1), 2)], 1)
    run = HFModel(net).run(ids, maps=capture())
    assert torch.equal(run.logits, net(ids).logits)
    assert run.maps["cross.0"].shape == (2, 4, 9, 9)


def test_a_cache_that_a_model_does_not_keep_is_refused():
    net = B.net(hf.BertModel, hf.BertConfig(**B._BERT))
    with pytest.raises(Refused, match="BertModel keeps no key-value cache"):
        HFModel(net).run(B.ids(), cache=True)
    with pytest.raises(WorkbenchError, match="keeps no key-value cache"):
        B.native(causal=False).model.run(B.ids(), cache=True)


def test_a_mask_of_another_length_is_refused():
    for name in ("hf-llama", "native-softmax"):
        model = B.BUILDERS[name]().model
        with pytest.raises(WorkbenchError, match=r"token mask is bool \[2, 11\]; got torch\.bool \[2, 9\]"):
            model.run({"input_ids": B.ids(), "attention_mask": torch.ones(2, 9)})


def test_what_is_no_cache_and_no_token_of_the_decoder_is_refused():
    for name in ("hf-llama", "bridge-llama", "native-softmax"):
        case = B.BUILDERS[name]()
        with pytest.raises(WorkbenchError, match="cache is True, .* got str"):
            case.model.run(case.inputs, cache="yes")
    case = B.hugging_face("whisper")
    with pytest.raises(WorkbenchError, match=r"token ids lie in \[0, 61\)"):
        case.model.run({**case.inputs, "decoder_input_ids": torch.full((2, 3), 99)})
