"""Capture while generating: the same text, and the same rows as one forward pass over it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from builders import NETS, L, bridged, hugging_face, ids, native
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import workbench as wb
from workbench import mods
from workbench.maps import AttentionMap
from workbench.models import steps
from workbench.models.hf import HFModel
from workbench.patterns import softmax

FAMILIES = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt2", "phi3", "deepseek_v3", "opt")
STEPS = 9
REQUEST = wb.capture(stats=("received", "entropy", "distance2"), window=3, topk=2, mass={"sink": mods.sink()})


def model(name: str) -> Any:
    if name.startswith("native"):
        return native(mixer="gated-softmax" if name == "native-gated" else "softmax").model
    if name.startswith("bridge-"):
        return bridged(name.removeprefix("bridge-")).model
    return hugging_face(name, dtype=torch.float32 if name == "gemma2" else torch.float64).model


def plain(found: Any, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The text and the logits without this package's part in generating them."""
    if isinstance(found, HFModel):
        out = found.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return out.sequences, torch.stack(out.logits, 1)
    text, cache, rows = prompt, True, []
    with torch.no_grad():
        for step in range(count):
            run = found.run(text[:, 0 if step == 0 else -1 :], cache=cache)
            cache = run.cache
            rows.append(run.logits[:, -1])
            text = torch.cat([text, rows[-1].argmax(-1)[:, None]], 1)
    return text, torch.stack(rows, 1)


def compare(found: wb.Generation, source: Any) -> None:
    """Every row and every statistic against one forward pass over the final text."""
    text = found.tokens
    with torch.no_grad():
        whole = source.run(wb.Tokens(text.ids[:, :-1], text.mask[:, :-1]), maps=wb.capture())
    last = text.ids.shape[1] - 1
    for key, amap in found.maps.items():
        rows = whole.maps[key].rows(found.prompt - 1, last)
        want = AttentionMap.from_dense(rows.double(), offset=found.prompt - 1)
        want.precompute(REQUEST)
        assert amap.offset == found.prompt - 1
        near = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(amap.dense().double(), rows.double(), **near)
        for call in (
            lambda m: m.received(), lambda m: m.entropy(), lambda m: m.distance(3), lambda m: m.mass("sink"),
            lambda m: m.distance(moment=2) / 100, lambda m: m.topk(2).values, lambda m: m.blocks(4, "max"),
        ):  # fmt: skip
            torch.testing.assert_close(call(amap).double(), call(want), **near)


@pytest.mark.parametrize("length", [11, 3, 1])
@pytest.mark.parametrize("name", [*FAMILIES, "native", "native-gated", "bridge-llama", "bridge-mistral"])
def test_text_and_logits_are_unchanged_and_rows_are_those_of_a_forward_pass(name: str, length: int) -> None:
    source, prompt = model(name), ids()[:, :length]
    found = wb.generate(source, prompt, STEPS, REQUEST, logits=True, eos_token_id=None)
    text, logits = plain(source, prompt, STEPS)
    assert torch.equal(found.tokens.ids, text)
    if isinstance(source, HFModel):
        assert torch.equal(found.logits, logits)
    else:  # these have no generate of their own
        assert torch.equal(found.logits, wb.generate(source, prompt, STEPS, logits=True, eos_token_id=None).logits)
        torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.new, text[:, length:])
    assert found.prompt == length
    assert tuple(found.maps) == tuple(range(L))
    assert all(m.shape[2:] == (STEPS, length + STEPS - 1) for m in found.maps.values())
    assert found.provenance.kernel == ("" if name.startswith("bridge") else "cpu")
    compare(found, source)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_windows_shorter_than_the_text_are_found(implementation: str) -> None:
    source = HFModel(NETS["mistral"](implementation), name="mistral")
    for length in (2, 8):
        found = wb.generate(source, ids()[:, :length], STEPS, REQUEST, eos_token_id=None)
        assert [m.mask.window for m in found.maps.values()] == [4, 4]
        compare(found, source)


@pytest.mark.parametrize("name", ["llama", "mistral", "native", "bridge-llama"])
def test_rows_that_end_early_and_prompts_of_different_lengths(name: str) -> None:
    source = model(name)
    prompt, mask = ids(3), torch.ones(3, 11, dtype=torch.bool)
    mask[1, 7:] = False
    given = wb.Tokens(prompt, mask)
    free = wb.generate(source, given, STEPS, eos_token_id=None)
    end = int(free.new[0, 3])
    found = wb.generate(source, given, STEPS, REQUEST, eos_token_id=end)
    first = [row.index(end) if end in row else STEPS for row in free.new.tolist()]
    assert first[0] <= 3
    for b, at in enumerate(first):
        alive = [True] * min(at + 1, STEPS) + [False] * (STEPS - at - 1)
        assert found.tokens.mask[b, 11:].tolist() == alive[: found.new.shape[1]]
        assert torch.equal(found.new[b, : at + 1], free.new[b, : at + 1])
    assert found.tokens.mask[1, :11].tolist() == [False] * 4 + [True] * 7, "padding stands on the left"
    assert torch.equal(found.tokens.ids[1, 4:11], prompt[1, :7])
    compare(found, source)
    for amap in found.maps.values():
        dead = ~found.tokens.mask[:, 10:-1]
        assert dead.any()
        assert (amap.dense().transpose(1, 2)[dead] == 0).all()


def test_options_of_the_models_own_generate() -> None:
    source = model("llama")
    torch.manual_seed(0)
    want = source.model.generate(
        ids(1), attention_mask=torch.ones_like(ids(1)), max_new_tokens=5, do_sample=True, temperature=2.0,
        num_return_sequences=3, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    found = wb.generate(
        source, ids(1), 5, REQUEST, do_sample=True, temperature=2.0, num_return_sequences=3, eos_token_id=None
    )
    assert torch.equal(found.tokens.ids, want)
    assert len({tuple(row) for row in found.new.tolist()}) == 3
    compare(found, source)
    compare(wb.generate(source, ids(), 5, REQUEST, prefill_chunk_size=4, eos_token_id=None), source)


def test_greedy_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    source = model("llama")
    want = wb.generate(source, ids(), STEPS, eos_token_id=None).new
    monkeypatch.setattr(source.model.generation_config, "do_sample", True)
    monkeypatch.setattr(source.model.generation_config, "temperature", 5.0)
    assert torch.equal(wb.generate(source, ids(), STEPS, eos_token_id=None).new, want)
    assert not torch.equal(wb.generate(source, ids(), STEPS, eos_token_id=None, do_sample=True).new, want)


def test_a_step_keeps_its_rows_and_not_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, int]] = []
    plain = steps.LayerSteps.add

    def add(self: Any, *args: Any) -> None:
        plain(self, *args)
        kept.append((self.keys[-1].untyped_storage().nbytes(), self.keys[-1].nbytes))

    monkeypatch.setattr(steps.LayerSteps, "add", add)
    wb.generate(model("llama"), ids(), 4, wb.capture(), eos_token_id=None)
    assert len(kept) == 4 * L
    assert all(held == own for held, own in kept)


def test_a_step_computes_nothing_and_the_end_one_pass_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, kernel = [], softmax.attention_stats

    def watch(*args: Any, **options: Any) -> Any:
        calls.append(args[0].shape)
        return kernel(*args, **options)

    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(softmax, "attention_stats", watch)
    source = model("llama")

    def operations(count: int, request: Any) -> int:
        with Operations() as seen:
            wb.generate(source, ids(), count, request, eos_token_id=None)
        return seen.count

    def per_step(request: Any) -> float:
        return (operations(30, request) - operations(20, request)) / 10

    base, one, both = per_step(None), per_step(wb.capture(layers=1)), per_step(wb.capture())
    assert 0 < one - base <= 3, "a slice and a copy of the new key"
    assert both - base <= 2 * (one - base)
    calls.clear()
    found = wb.generate(source, ids(), STEPS, REQUEST, eos_token_id=None)
    assert calls == [(2, 4, STEPS, 8)] * L
    found.maps[0].topk(2), found.maps[1].mass("sink"), found.maps[0].distance(3)
    assert len(calls) == L
    small = wb.generate(source, ids(), STEPS, wb.capture(layers=1, topk=1, keep=False), eos_token_id=None)
    assert tuple(small.maps) == (1,)
    assert torch.equal(small.maps[1].topk(1).indices, found.maps[1].topk(1).indices)


def test_the_model_is_as_before_also_after_an_error() -> None:
    source = model("llama")
    before = source.model.config._attn_implementation_internal
    wb.generate(source, ids(), 2, wb.capture())

    def stop(ids: Any, scores: Any, **options: Any) -> bool:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        wb.generate(source, ids(), 5, wb.capture(), stopping_criteria=[stop])
    assert source.model.config._attn_implementation_internal is before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in source.model.modules())


def test_generating_again_and_again_keeps_nothing() -> None:
    source = model("mistral")

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    wb.generate(source, ids(), 4, REQUEST)
    before = alive()
    for _ in range(5):
        wb.generate(source, ids(), 4, REQUEST)
    assert alive() <= before


def shared_layer() -> HFModel:
    net = NETS["llama"]()
    net.model.layers[1].self_attn = net.model.layers[0].self_attn
    return HFModel(net, name="shared")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(num_beams=2), "beam search reorders"),
        (dict(assistant_model="self"), "assisted generation reorders or takes back"),
        (dict(prompt_lookup_num_tokens=2), "assisted generation reorders"),
        (dict(use_cache=False), "runs the whole text in every step"),
        (dict(cache_implementation="static"), "static cache"),
        (dict(max_new_tokens=3), "max_new_tokens is set by tokens, steps"),
        (dict(no_such_option=3), "no_such_option"),
        (dict(prompt=torch.zeros(1, 0, dtype=torch.long)), "the input has no tokens"),
        (dict(prompt=torch.zeros(1, 0, dtype=torch.long), model="native"), "the input has no tokens"),
        (dict(prompt=wb.Tokens.of(torch.tensor([99])), model="native"), "token ids lie in"),
        (dict(prompt=torch.tensor([[99]])), "token ids lie in"),
        (dict(steps=0), "steps is a number of tokens to generate, at least 1; got 0"),
        (dict(steps=60), "reach position 70, 6 more than the model's context of 64"),
        (dict(maps=wb.capture(layers=[7])), "no attention layer '7'"),
        (dict(model="bert"), "does not generate text"),
        (dict(model="t5"), "generates from token ids alone"),
        (dict(model="falcon"), "layer 0 of FalconForCausalLM: .* steps cannot be captured"),
        (dict(model="shared"), "layer 1: a step ran it on 11 positions: it runs more than once"),
        (dict(model="native", do_sample=True), "takes eos_token_id alone; got do_sample"),
    ],
)
def test_what_cannot_be_captured_is_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    options = {"steps": 3, "maps": wb.capture(), "eos_token_id": None, **options}
    name = options.pop("model", "llama")
    source = shared_layer() if name == "shared" else model(name)
    if options.get("assistant_model"):
        options["assistant_model"] = source.model
    with pytest.raises(wb.WorkbenchError, match=said) as caught:
        wb.generate(source, options.pop("prompt", ids()), options.pop("steps"), options.pop("maps"), **options)
    assert "\n" not in str(caught.value)
