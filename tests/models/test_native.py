"""The native model: its forward against plain torch, padding and cache."""

import pytest
import torch
from natives import DATA, VARIANTS, by_hand, make

import workbench as wb
from workbench.models.protocol import Tokens


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_maps_equal_plain_matrix_products(name: str) -> None:
    model = make(VARIANTS[name])
    run = model.run(DATA, maps=wb.capture())
    for b, ids in enumerate(DATA):
        logits, patterns = by_hand(model.net, ids)
        torch.testing.assert_close(run.logits[b], logits, rtol=1e-9, atol=1e-9)
        for layer, pattern in enumerate(patterns):
            torch.testing.assert_close(run.maps[layer].dense()[b], pattern, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_capture_leaves_logits_bit_identical(name: str, dtype: torch.dtype) -> None:
    model = make(VARIANTS[name], dtype)
    plain = model.run(DATA)
    seen = model.run(DATA, maps=wb.capture(blocks=3, stats=("received", "entropy", "distance", "top1")))
    assert torch.equal(plain.logits, seen.logits)
    assert torch.equal(plain.logits, model.net(DATA))
    assert plain.logits.dtype == dtype
    assert seen.provenance.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("explicit", [False, True])
def test_padding_changes_nothing_for_real_tokens(name: str, side: str, explicit: bool) -> None:
    model = make(VARIANTS[name])
    short, pad = 4, 3
    real = slice(pad, pad + short) if side == "left" else slice(0, short)
    ids, mask = torch.full((2, 7), 13), torch.ones(2, 7, dtype=torch.bool)
    ids[1, real], mask[1] = DATA[1, :short], False
    mask[1, real] = True
    ids[0] = DATA[0]
    read = [f"blocks.1.attn.hook_{kind}" for kind in ("z", "lse", "pattern", "attn_scores")]
    edit = {f"blocks.{layer}.attn.hook_attn_scores": lambda s: s for layer in range(2 if explicit else 0)}
    together = model.run(Tokens(ids, mask), read=read, edit=edit, maps=wb.capture())
    alone = model.run(DATA[1:, :short], read=read, maps=wb.capture())
    first = model.run(DATA[:1], maps=wb.capture())
    torch.testing.assert_close(together.logits[1, real], alone.logits[0])
    torch.testing.assert_close(together.logits[:1], first.logits)
    torch.testing.assert_close(together.maps[0].dense()[:1], first.maps[0].dense())
    padded = together.maps[1].dense()[1]
    torch.testing.assert_close(padded[:, real, real], alone.maps[1].dense()[0])
    assert (padded[:, ~mask[1]] == 0).all()
    assert (padded[:, :, ~mask[1]] == 0).all()
    torch.testing.assert_close(together.acts["blocks.1.attn.hook_z"][1, real], alone.acts["blocks.1.attn.hook_z"][0])
    assert (together.acts["blocks.1.attn.hook_z"][1, ~mask[1]] == 0).all()
    torch.testing.assert_close(
        together.acts["blocks.1.attn.hook_lse"][1][:, real], alone.acts["blocks.1.attn.hook_lse"][0]
    )
    last = model.run(Tokens(ids, mask), logits="last").logits
    torch.testing.assert_close(last[:, 0], torch.stack([first.logits[0, -1], alone.logits[0, -1]]))


@pytest.mark.parametrize("name", ["grouped", "gated", "learned", "bare"])
@pytest.mark.parametrize("steps", [[3, 1, 1, 2], [6, 1]])
def test_decoding_with_a_cache_equals_the_full_run(name: str, steps: list[int]) -> None:
    model = make(VARIANTS[name])
    full = model.run(DATA, maps=wb.capture())
    at, cache, logits = 0, True, []
    for step in steps:
        part = model.run(DATA[:, at : at + step], maps=wb.capture(), cache=cache)
        rows = part.maps[1].dense()
        torch.testing.assert_close(rows, full.maps[1].dense()[:, :, at : at + step, : at + step])
        assert part.maps[1].offset == at
        cache, at = part.cache, at + step
        logits.append(part.logits)
    torch.testing.assert_close(torch.cat(logits, 1), full.logits)
    assert cache.length == 7


def test_a_cache_is_not_changed_by_continuing_from_it() -> None:
    model = make()
    start = model.run(DATA[:, :4], cache=True).cache
    one, two = (model.run(DATA[:, 4:6], cache=start) for _ in range(2))
    assert torch.equal(one.logits, two.logits)
    assert start.length == 4
    assert one.cache.length == 6
    assert model.run(DATA).cache is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_after_a_padded_prompt(side: str) -> None:
    model = make()
    ids, mask = DATA[:, :5].clone(), torch.ones(2, 5, dtype=torch.bool)
    hidden = slice(0, 2) if side == "left" else slice(3, 5)
    mask[1, hidden] = False
    start = model.run(Tokens(ids, mask), cache=True).cache
    step = model.run(DATA[:, 5:], cache=start, maps=wb.capture())
    kept = torch.cat([ids[1, mask[1]], DATA[1, 5:]])[None]
    torch.testing.assert_close(step.logits[1], model.run(kept).logits[0, -2:])
    torch.testing.assert_close(step.logits[0], model.run(DATA[:1]).logits[0, -2:])
    assert (step.maps[0].dense()[1][:, :, hidden] == 0).all()
