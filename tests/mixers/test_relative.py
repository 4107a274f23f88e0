"""Relative positions: each score against a literal loop, the skewing trick, complex rotations, and the tables' buckets."""

import cmath
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers import relative

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int = 7, heads: int = 2, groups: int = 1, width: int = 4, **more: tuple[int, ...]) -> dict[str, Any]:
    shapes = {"q": (2, heads, tokens, width), "k": (2, groups, tokens, width), "v": (2, groups, tokens, 3), **more}
    return example_tensors(5, torch.float64, **shapes)


def check(
    op: Operator, given: dict[str, Any], mask: Mask, score: Callable[[int, int, int, int], Tensor | float]
) -> None:
    """Output and map of ``op`` against a softmax over scores made one by one: ``score(b, h, i, j)``."""
    q, v = given["q"], given["v"]
    b, h, n, _ = q.shape
    m = v.shape[2]
    allowed = mask.tile(slice(0, n), slice(0, m))
    scores = torch.full((b, h, n, m), -math.inf, dtype=torch.float64)
    for at in torch.cartesian_prod(*(torch.arange(size) for size in (b, h, n, m))).tolist():
        if allowed is None or bool(allowed[0, 0, at[2], at[3]]):
            scores[tuple(at)] = score(*at)
    wanted = scores.softmax(-1)
    out, found = op(**given, mask=mask)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ v.repeat_interleave(h // v.shape[1], 1))


def skewing_is_gathering(op: Operator) -> None:
    """Relative logits by the paper's pad, reshape and slice equal the vector of each pair's distance."""
    n = 7
    given = drawn(n, relative=(2, n, 4))
    q, k, e = given["q"], given["k"], given["relative"]
    padded = torch.nn.functional.pad(q @ e.transpose(-1, -2), (1, 0))
    skewed = padded.reshape(2, 2, n + 1, n)[:, :, 1:]
    check(op, given, Mask(causal=True), lambda b, h, i, j: (q[b, h, i] @ k[b, 0, j] + skewed[b, h, i, j]) / 2)


def content_and_place(op: Operator) -> None:
    """The four terms of Transformer-XL's score, one by one."""
    given = drawn(6, relative=(2, 6, 4), content_bias=(2, 4), position_bias=(2, 4))
    q, k, r, u, w = (given[name] for name in ("q", "k", "relative", "content_bias", "position_bias"))

    def score(b: int, h: int, i: int, j: int) -> Tensor:
        key, place = k[b, 0, j], r[h, j - i + 5]
        return (q[b, h, i] @ key + q[b, h, i] @ place + u[h] @ key + w[h] @ place) / 2

    check(op, given, Mask(causal=True), score)


def bucketed_bias(op: Operator) -> None:
    """T5: unscaled scores plus the number of the bucket, which a loop over the definition finds."""
    given = drawn(9, table=(2, 8))

    def bucket(distance: int) -> int:  # 8 buckets for the past, 4 of them one token wide, log-spaced up to 12 tokens
        back = max(-distance, 0)
        return back if back < 4 else min(7, 4 + int(math.log(back / 4) / math.log(12 / 4) * 4))

    q, k, table = given["q"], given["k"], given["table"]
    check(
        lambda **known: op(**known, max_distance=12),
        given,
        Mask(causal=True),
        lambda b, h, i, j: q[b, h, i] @ k[b, 0, j] + table[h, bucket(j - i)],
    )


def linear_penalty(op: Operator) -> None:
    """ALiBi with two heads: slopes 1/16 and 1/256 per token of distance."""
    given = drawn()
    q, k = given["q"], given["k"]
    check(
        op,
        given,
        Mask(causal=True),
        lambda b, h, i, j: q[b, h, i] @ k[b, 0, j] / 2 - (2**-4, 2**-8)[h] * (i - j),
    )


def turns_by_the_distance(op: Operator) -> None:
    """Rotary scores as complex products: only the distance turns them."""
    given = drawn()
    q, k = given["q"], given["k"]

    def score(b: int, h: int, i: int, j: int) -> float:
        total = 0.0
        for r in range(2):
            one = complex(q[b, h, i, r], q[b, h, i, r + 2])
            other = complex(k[b, 0, j, r], k[b, 0, j, r + 2])
            total += (one * other.conjugate() * cmath.exp(1j * (i - j) * 10000 ** (-r / 2))).real
        return total / 2

    check(op, given, Mask(causal=True), score)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "music-transformer": skewing_is_gathering,
    "transformer-xl": content_and_place,
    "t5-relative-bias": bucketed_bias,
    "alibi": linear_penalty,
    "rotary-attention": turns_by_the_distance,
}


def test_distances_beyond_the_table_take_its_end() -> None:
    given = drawn(9, relative=(1, 4, 4))
    q, k, e = given["q"], given["k"], given["relative"]

    def score(b: int, h: int, i: int, j: int) -> Tensor:
        return (q[b, h, i] @ k[b, 0, j] + q[b, h, i] @ e[0, min(max(j - i + 2, 0), 3)]) / 2

    music = relative.music_transformer_attention
    check(lambda **known: music(**known, first=-2), given, Mask(), score)


@pytest.mark.parametrize("both_ways", [False, True])
def test_buckets_are_those_of_t5(both_ways: bool) -> None:
    """Fixed points of the scheme: 32 buckets, 128 tokens, as in the released models."""
    away = torch.tensor([0, -1, -7, -8, -15, -16, -127, -128, -5000, 1, 8, 128])
    found = relative.t5_buckets(away, 32, 128, both_ways).tolist()
    if both_ways:
        assert found == [0, 1, 7, 8, 9, 10, 15, 15, 15, 17, 24, 31]
    else:
        assert found == [0, 1, 7, 8, 15, 16, 31, 31, 31, 0, 0, 0]


def test_slopes_of_heads_that_are_no_power_of_two() -> None:
    wanted = [2 ** (-8 / 4 * i) for i in range(1, 5)] + [2**-1, 2**-3]
    torch.testing.assert_close(relative.alibi_slopes(6), torch.tensor(wanted, dtype=torch.float64))


def test_alibi_falls_on_both_sides_without_a_causal_mask() -> None:
    given = drawn(6)
    q, k = given["q"], given["k"]
    check(
        relative.alibi_attention,
        given,
        Mask(),
        lambda b, h, i, j: q[b, h, i] @ k[b, 0, j] / 2 - (2**-4, 2**-8)[h] * abs(i - j),
    )


@pytest.mark.parametrize("name", ["music", "xl", "t5", "alibi", "rotary"])
def test_queries_after_a_cache_are_rows_of_the_whole(name: str) -> None:
    """Two queries on the last two of nine keys see what the last two of nine queries see."""
    operators: dict[str, tuple[Operator, dict[str, tuple[int, ...]]]] = {
        "music": (relative.music_transformer_attention, {"relative": (2, 5, 4)}),
        "xl": (
            relative.transformer_xl_attention,
            {"relative": (2, 5, 4), "content_bias": (2, 4), "position_bias": (2, 4)},
        ),
        "t5": (relative.t5_attention, {"table": (2, 6)}),
        "alibi": (relative.alibi_attention, {}),
        "rotary": (relative.rotary_attention, {}),
    }
    op, more = operators[name]
    given = drawn(9, **more)
    whole, whole_map = op(**given, mask=Mask(causal=True))
    late, late_map = op(**{**given, "q": given["q"][:, :, 7:]}, mask=Mask(causal=True, offset=7))
    torch.testing.assert_close(late, whole[:, :, 7:])
    torch.testing.assert_close(late_map.dense(), whole_map.rows(7, 9))
    torch.testing.assert_close(late_map.heads([1]).dense(), late_map.dense()[:, 1:])


def test_maps_of_long_texts_hold_no_square() -> None:
    """Statistics of a relative map walk over rows: they agree with the dense ones, in blocks too."""
    given = drawn(70, relative=(2, 20, 4))
    _, found = relative.music_transformer_attention(**given, mask=Mask(causal=True))
    dense = AttentionMap.from_dense(found.dense())
    torch.testing.assert_close(found.blocks(16), dense.blocks(16))
    torch.testing.assert_close(found.received(), dense.received())
    torch.testing.assert_close(found.entropy(), dense.entropy())


def test_gradients_reach_tables_and_stay_out_of_the_maps() -> None:
    given = drawn(5, table=(2, 4))
    given["table"].requires_grad_()
    out, found = relative.t5_attention(**given, mask=Mask(causal=True))
    out.square().sum().backward()
    assert given["table"].grad is not None
    assert bool(given["table"].grad.abs().sum() > 0)
    assert not found.dense().requires_grad


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda g: relative.music_transformer_attention(**g, relative=g["q"], mask=Mask()),
            "relative is floating point",
        ),
        (lambda g: relative.t5_attention(**g, table=torch.zeros(3, 8), mask=Mask()), "table is floating point"),
        (lambda g: relative.t5_attention(**g, table=torch.zeros(2, 8), max_distance=1, mask=Mask()), "max_distance"),
        (lambda g: relative.alibi_attention(**g, slopes=torch.zeros(3), mask=Mask()), "slopes is floating point"),
        (lambda g: relative.rotary_attention(**g, width=3, mask=Mask()), "width is an even number"),
        (lambda g: relative.rotary_attention(**g, base=0.0, mask=Mask()), "base is a positive"),
        (lambda g: relative.rotary_attention(**{**g, "v": g["v"][:, :, 1:]}, mask=Mask()), "v is floating point"),
        (lambda g: relative.rotary_attention(**{**g, "k": g["k"].float()}, mask=Mask()), "k must have q's dtype"),
        (lambda g: relative.rotary_attention(**g, mask=Mask(keys=torch.ones(2, 3, dtype=torch.bool))), "mask.keys"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[dict[str, Any]], object], told: str) -> None:
    with pytest.raises(WorkbenchError, match=told):
        call(drawn(5))
