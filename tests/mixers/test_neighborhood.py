"""Neighborhoods against the rule pair by pair, and against what they become at their limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers.neighborhood import neighborhood_attention, neighborhood_indices

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def sees(p: int, y: int, length: int, kernel: int, dilation: int, stride: int, causal: bool) -> bool:
    """The rule for one axis, in words of NATTEN's mask."""
    if p % dilation != y % dilation:
        return False
    x, key = p // dilation, y // dilation
    size = len(range(p % dilation, length, dilation))
    kernel = min(kernel, size) if not causal else kernel
    if causal:
        leader = min(x // stride * stride + stride - 1, size - 1)
        return key <= x and leader - key < kernel
    leader = min(x // stride * stride + stride // 2, size - 1)
    left, right = kernel // 2, kernel // 2 + kernel % 2 - 1
    centre = min(max(leader, left), size - 1 - right)
    return centre - left <= key <= centre + right


def allowed(grid: tuple[int, ...], *options: tuple[Any, ...]) -> Tensor:
    """All pairs of a grid; options are kernel, dilation, stride and causal flags per axis."""
    cells = list(itertools.product(*map(range, grid)))
    return torch.tensor(
        [[all(itertools.starmap(sees, zip(p, y, grid, *options, strict=True))) for y in cells] for p in cells]
    )


def drawn(grid: tuple[int, ...]) -> dict[str, Any]:
    n = math.prod(grid)
    return {**example_tensors(4, torch.float64, q=(1, 4, n, 6), k=(1, 2, n, 6), v=(1, 2, n, 3)), "grid": grid}


def agrees(
    found: tuple[Tensor, AttentionMap], given: dict[str, Any], pairs: Tensor, bias: float | Tensor = 0.0
) -> None:
    s = given["q"] @ given["k"].repeat_interleave(2, 1).mT / 6**0.5 + bias
    want = s.masked_fill(~pairs, -torch.inf).softmax(-1)
    torch.testing.assert_close(found[1].dense(), want)
    torch.testing.assert_close(found[0], want @ given["v"].repeat_interleave(2, 1))
    torch.testing.assert_close(found[1].row_sums(), torch.ones(want.shape[:3], dtype=torch.float64))


def sliding(op: Operator) -> None:
    """Exactly K x K keys everywhere; a kernel of the grid's size is full attention; the bias goes by relative position."""
    given = drawn((5, 4))
    pairs = allowed((5, 4), (3, 3), (1, 1), (1, 1), (False, False))
    assert bool((pairs.sum(1) == 9).all())
    agrees(op(**given, kernel=(3, 3)), given, pairs)
    agrees(op(**given, kernel=(5, 4)), given, torch.ones(20, 20, dtype=torch.bool))
    table = example_tensors(0, torch.float64, table=(4, 5, 5))["table"]
    bias = torch.zeros(4, 20, 20, dtype=torch.float64)
    for p, y in itertools.product(range(20), range(20)):
        rows, columns = y // 4 - p // 4, y % 4 - p % 4
        if abs(rows) < 3 and abs(columns) < 3:
            bias[:, p, y] = table[:, rows + 2, columns + 2]
    agrees(op(**given, kernel=(3, 3), table=table.flatten(1)), given, pairs, bias)


def dilated(op: Operator) -> None:
    """Neighbours in the token's own residue class, ragged ones too; a dilation of 1 is the plain neighborhood."""
    given = drawn((7, 5))
    for gaps in ((2, 1), (3, 2), (1, 1)):
        agrees(op(**given, kernel=(2, 2), dilation=gaps), given, allowed((7, 5), (2, 2), gaps, (1, 1), (False,) * 2))


def strided(op: Operator) -> None:
    """The rule in three dimensions; stride 1 is the sliding window, stride = kernel blocked attention."""
    given = drawn((3, 4, 4))
    for kernel, stride in (((2, 3, 2), (1, 2, 2)), ((3, 2, 2), (1, 1, 1)), ((1, 3, 4), (1, 3, 2))):
        pairs = allowed((3, 4, 4), kernel, (1, 1, 1), stride, (False,) * 3)
        agrees(op(**given, kernel=kernel, stride=stride), given, pairs)
    block = torch.tensor(
        [[p // 16 == y // 16 and p // 8 == y // 8 and p % 4 // 2 == y % 4 // 2 for y in range(48)] for p in range(48)]
    )
    agrees(op(**given, kernel=(1, 2, 2), stride=(1, 2, 2)), given, block)
    mixed = allowed((3, 4, 4), (2, 3, 2), (1, 2, 1), (2, 1, 1), (True, False, True))
    agrees(
        op(**given, kernel=(2, 3, 2), dilation=(1, 2, 1), stride=(2, 1, 1), causal=(True, False, True)), given, mixed
    )


def causal(op: Operator) -> None:
    """On a line the causal sliding window, on an image causal along both axes."""
    given = drawn((11,))
    agrees(op(**given, kernel=(4,)), given, torch.tensor([[0 <= p - y < 4 for y in range(11)] for p in range(11)]))
    given = drawn((3, 4))
    agrees(op(**given, kernel=(2, 3)), given, allowed((3, 4), (2, 3), (1, 1), (1, 1), (True, True)))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "neighborhood-attention": sliding,
    "dilated-neighborhood-attention": dilated,
    "generalized-neighborhood-attention": strided,
    "causal-neighborhood-attention": causal,
}


@pytest.mark.parametrize("seed", range(30))
def test_the_table_is_the_rule(seed: int) -> None:
    """Random options: the listed keys are those of the rule, each once, and exactly K where nothing is causal and all fits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    axes = draw(1, 3)
    grid = tuple(draw(1, 6) for _ in range(axes))
    kernel = tuple(draw(1, 4) for _ in grid)
    dilation = tuple(draw(1, 3) for _ in grid)
    stride = tuple(draw(1, size) for size in kernel)
    flags = tuple(bool(draw(0, 1)) for _ in grid)
    indices = neighborhood_indices(grid, kernel, dilation=dilation, stride=stride, causal=flags)
    assert indices.shape == (math.prod(grid), math.prod(kernel))
    pairs = allowed(grid, kernel, dilation, stride, flags)
    for p, row in enumerate(indices.tolist()):
        listed = [j for j in row if j >= 0]
        assert sorted(listed) == pairs[p].nonzero().flatten().tolist()
        if not any(flags) and all(k <= n // d for k, n, d in zip(kernel, grid, dilation, strict=True)):
            assert len(listed) == math.prod(kernel)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": (3, 5), "kernel": (3, 3)}, r"12 tokens|15 tokens of the grid"),
        ({"grid": (3, 4), "kernel": (3,)}, "kernel has a whole number"),
        ({"grid": (3, 4), "kernel": (3, 3), "stride": (1, 4)}, "stride is at most the kernel"),
        ({"grid": (3, 4), "kernel": (3, 3), "dilation": (0, 1)}, "dilation has"),
        ({"grid": (3, 4), "kernel": (3, 3), "causal": (True,)}, "causal has one flag"),
        ({"grid": (1, 1, 3, 4), "kernel": (3, 3, 3, 3)}, "one to three axes"),
        ({"grid": (3, 4), "kernel": (3, 3), "table": torch.zeros(4, 9)}, r"table is \[4 or 1, 25\]"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    given = drawn((3, 4)) | options
    with pytest.raises(WorkbenchError, match=words):
        neighborhood_attention(**given)
