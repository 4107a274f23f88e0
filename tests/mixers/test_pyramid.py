"""Pyramid sparse attention against the pooled form, and the levels that a quota gives."""

from __future__ import annotations

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
from workbench.mixers.pyramid import QUOTA, pyramid_attention, pyramid_levels

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N = 13


def drawn() -> dict[str, Tensor]:
    return example_tensors(6, torch.float64, q=(2, 4, N, 6), k=(2, 2, N, 6), v=(2, 2, N, 5))


def pooled(
    given: dict[str, Tensor], levels: Tensor, sides: tuple[int, int], causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output over pooled keys and values with ln |P|, and its lift to tokens, one row at a time."""
    out, lift = torch.zeros(2, 4, N, 5, dtype=torch.float64), torch.zeros(2, 4, N, N, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            key, value = given["k"][b, h // 2], given["v"][b, h // 2]
            for i in range(N):
                pools: list[list[int]] = []
                for block in range(levels.shape[3]):
                    level = int(levels[b, h, i // sides[0], block])
                    members = list(range(block * sides[1], min(N, (block + 1) * sides[1])))
                    if level:
                        pools += [members[x : x + level] for x in range(0, len(members), level)]
                if causal:
                    pools = [pool for pool in pools if pool[-1] <= i]
                if not pools:
                    continue
                means = torch.stack([key[pool].mean(0) for pool in pools])
                sizes = torch.tensor([len(pool) for pool in pools], dtype=torch.float64)
                weights = (means @ given["q"][b, h, i] / math.sqrt(6) + sizes.log()).softmax(0)
                out[b, h, i] = weights @ torch.stack([value[pool].mean(0) for pool in pools])
                for weight, pool in zip(weights, pools, strict=True):
                    lift[b, h, i, pool] = weight / len(pool)
    return out, lift


def some_levels(rows: int = 5, blocks: int = 4) -> Tensor:
    draw = torch.randint(0, 4, (2, 4, rows, blocks), generator=torch.Generator().manual_seed(0))
    return torch.tensor([0, 1, 2, 4])[draw]


def pools_and_their_lift(op: Operator) -> None:
    """Pooled keys and values with ln |P|, lifted; level 1 everywhere is full attention; equal keys inside of pools make every
    level exact."""
    given, levels = drawn(), some_levels()
    out, found = op(**given, levels=levels, query_side=3, key_side=4)
    wanted, lift = pooled(given, levels, (3, 4))
    torch.testing.assert_close(found.dense(), lift)
    torch.testing.assert_close(out, wanted)
    plain = (given["q"] @ given["k"].repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(6)).softmax(-1)
    out, found = op(**given, levels=torch.ones_like(levels), query_side=3, key_side=4)
    torch.testing.assert_close(found.dense(), plain)
    torch.testing.assert_close(out, plain @ given["v"].repeat_interleave(2, 1))
    level = levels.clamp(min=1)
    given["k"] = given["k"][:, :, ::4].repeat_interleave(4, 2)[:, :, :N]
    exact = (given["q"] @ given["k"].repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(6)).softmax(-1)
    out, found = op(**given, levels=level, query_side=3, key_side=4)
    torch.testing.assert_close(found.dense(), exact)
    torch.testing.assert_close(out, exact @ given["v"].repeat_interleave(2, 1))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"pyramid-sparse-attention": pools_and_their_lift}


def test_causal_pools_never_cross_the_query() -> None:
    given, levels = drawn(), some_levels()
    out, found = pyramid_attention(**given, levels=levels, query_side=3, key_side=4, mask=Mask(causal=True))
    executed = found.native()
    ends = (torch.arange(4) + 1) * 4 - 1
    assert bool((executed[..., ends > 12] <= 1).all())
    assert bool((executed[:, :, 0] <= 1).all())
    wanted, lift = pooled(given, executed, (3, 4), causal=True)
    torch.testing.assert_close(found.dense(), lift)
    torch.testing.assert_close(out, wanted)
    late = {**given, "q": given["q"][:, :, 9:]}
    mask = Mask(causal=True, offset=9)
    step, rows = pyramid_attention(**late, levels=levels[:, :, 3:], query_side=3, key_side=4, mask=mask)
    torch.testing.assert_close(step, out[:, :, 9:])
    torch.testing.assert_close(rows.dense(), found.dense()[:, :, 9:])


def test_row_sums_are_told_as_they_are() -> None:
    given = drawn()
    levels = torch.ones(1, 1, 5, 4, dtype=torch.int64)
    assert pyramid_attention(**given, levels=levels, query_side=3, key_side=4)[1].row_sum == "1"
    levels[:, :, 2] = 0
    out, found = pyramid_attention(**given, levels=levels, query_side=3, key_side=4)
    assert found.row_sum == "<=1"
    assert not out[:, :, 6:9].any()


def test_a_quota_ranks_blocks() -> None:
    importance = torch.rand(1, 2, 3, 40, generator=torch.Generator().manual_seed(1))
    levels = pyramid_levels(importance)
    counts = [int((levels[0, 0, 0] == level).sum()) for level in (1, 2, 4, 8, 0)]
    assert counts == [4, 2, 0, 8, 26]
    assert float(importance[levels == 1].min()) >= float(importance[:, :, :, :][levels == 8].min())
    order = importance[0, 1, 2].sort(descending=True).indices
    assert levels[0, 1, 2, order[:4]].tolist() == [1] * 4
    assert levels[0, 1, 2, order[4:6]].tolist() == [2] * 2
    assert pyramid_levels(torch.rand(1, 1, 1, 3), QUOTA)[0, 0, 0].tolist().count(1) == 1
    with pytest.raises(WorkbenchError, match="quota gives levels"):
        pyramid_levels(importance, {3: 0.1})
    with pytest.raises(WorkbenchError, match="importance is floating point"):
        pyramid_levels(importance[0])


def test_long_videos_are_answered_in_row_chunks() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4096, 8) for _ in range(3))
    levels = pyramid_levels(torch.rand(1, 1, 32, 64))
    with torch.no_grad():
        out, found = pyramid_attention(q, k, v, levels)
    torch.testing.assert_close(found.received().sum(), torch.tensor(4096.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.rows(4000, 4096) @ v, out[:, :, 4000:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"levels": some_levels(4)}, "levels are int64"),
        ({"levels": some_levels() + 2}, "levels are 0 or of"),
        ({"key_side": 3, "levels": some_levels(5, 5)}, "divide key_side"),
        ({"query_side": 0}, "query_side is a positive"),
        ({"mask": Mask(causal=True, window=3)}, "mask is causal or empty"),
    ],
)
def test_misfits_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        pyramid_attention(**{**drawn(), "levels": some_levels(), "query_side": 3, "key_side": 4, **change})
