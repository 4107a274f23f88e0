"""Windows of images against dense softmax under their rule, written pair by pair, with biases looked up pair by pair."""

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
from workbench.mixers import vision_windows

Operator = Callable[..., tuple[Tensor, AttentionMap]]
Cell = tuple[int, int]


def drawn(rows: int, columns: int, bias: int = 0) -> dict[str, Any]:
    n = rows * columns
    given = example_tensors(4, torch.float64, q=(1, 4, n, 6), k=(1, 2, n, 6), v=(1, 2, n, 3))
    table = example_tensors(5, torch.float64, table=(4, bias)) if bias else {}
    return {**given, **table, "grid": (rows, columns)}


def agrees(
    found: tuple[Tensor, AttentionMap],
    given: dict[str, Any],
    together: Callable[[Cell, Cell], bool],
    place: Callable[[Cell, Cell], int] | None = None,
) -> None:
    """``together`` says which pairs see each other, ``place`` which entry of the table is added."""
    rows, columns = given["grid"]
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    pairs = torch.tensor([[together(p, y) for y in cells] for p in cells])
    s = given["q"] @ given["k"].repeat_interleave(2, 1).mT / 6**0.5
    if place is not None:
        at = torch.tensor([[place(p, y) if together(p, y) else 0 for y in cells] for p in cells])
        s = s + given["table"][:, at]
    want = s.masked_fill(~pairs, -torch.inf).softmax(-1)
    torch.testing.assert_close(found[1].dense(), want)
    torch.testing.assert_close(found[0], want @ given["v"].repeat_interleave(2, 1))
    torch.testing.assert_close(found[1].row_sums(), torch.ones(want.shape[:3], dtype=torch.float64))


def by_window(w: Cell, shift: Cell = (0, 0)) -> Callable[[Cell, Cell], bool]:
    return lambda p, y: all((a - s) // n == (b - s) // n for a, b, n, s in zip(p, y, w, shift, strict=True))


def in_table(w: Cell, step: Cell = (1, 1)) -> Callable[[Cell, Cell], int]:
    def place(p: Cell, y: Cell) -> int:
        down, right = (a // s - b // s + n - 1 for a, b, n, s in zip(p, y, w, step, strict=True))
        return down * (2 * w[1] - 1) + right

    return place


def shifted(op: Operator) -> None:
    """Rolling, cutting into windows and hiding what does not belong together, as released, on a grid of whole windows; a
    window of the image is full attention; ragged grids follow the rule."""
    given = drawn(4, 6, bias=15)
    out, found = op(**given, window=(2, 3), shift=(1, 1))
    agrees((out, found), given, by_window((2, 3), (1, 1)), in_table((2, 3)))
    region = torch.zeros(4, 6, dtype=torch.int64)
    region[-1:] += 2  # what was rolled over the border
    region[:, -1:] += 1
    rolled = torch.arange(24).view(4, 6).roll((-1, -1), (0, 1))
    windows = (
        rolled.view(2, 2, 2, 3).transpose(1, 2).reshape(4, 6),
        region.view(2, 2, 2, 3).transpose(1, 2).reshape(4, 6),
    )
    for tokens, parts in zip(*windows, strict=True):
        inside = found.dense()[:, :, tokens][..., tokens]
        assert bool((inside[..., parts[:, None] != parts] == 0).all())
        torch.testing.assert_close(inside.sum(-1), torch.ones(1, 4, 6, dtype=torch.float64))
    given = drawn(5, 4, bias=9)
    agrees(op(**given, window=(2, 2), shift=(0, 1)), given, by_window((2, 2), (0, 1)), in_table((2, 2)))
    given = drawn(3, 4)
    agrees(op(**given, window=(3, 4), shift=(0, 0)), given, lambda p, y: True)


def blocks(op: Operator) -> None:
    """P x P blocks; P = image is full attention."""
    given = drawn(4, 6, bias=15)
    agrees(op(**given, window=(2, 3)), given, by_window((2, 3)), in_table((2, 3)))
    given = drawn(3, 4)
    agrees(op(**given, window=(3, 4)), given, lambda p, y: True)


def spread(op: Operator) -> None:
    """Tokens with equal (row mod H / G, column mod W / G); G = image is full attention; blocks, then grid, reach everything."""
    given = drawn(4, 6, bias=9)
    out = op(**given, cells=(2, 2))
    agrees(out, given, lambda p, y: p[0] % 2 == y[0] % 2 and p[1] % 3 == y[1] % 3, in_table((2, 2), (2, 3)))
    _, near = vision_windows.maxvit_block_attention(**drawn(4, 6), window=(2, 3))
    assert bool((out[1].dense() @ near.dense() > 0).all())
    given = drawn(3, 4)
    agrees(op(**given, cells=(3, 4)), given, lambda p, y: True)


def whole_or_windows(op: Operator) -> None:
    """The whole image, or windows of it, each with its own table."""
    given = drawn(3, 4, bias=35)
    agrees(op(**given), given, lambda p, y: True, in_table((3, 4)))
    given = drawn(5, 4, bias=9)
    agrees(op(**given, window=(2, 2)), given, by_window((2, 2)), in_table((2, 2)))


def local_branch(op: Operator) -> None:
    """Shifted and plain windows; a small image is one window, whatever the layer."""
    given = drawn(5, 7, bias=25)
    agrees(op(**given, window=3, shifted=True), given, by_window((3, 3), (1, 1)), in_table((3, 3)))
    agrees(op(**given, window=3, shifted=False), given, by_window((3, 3)), in_table((3, 3)))
    given = drawn(2, 3, bias=25)
    agrees(op(**given, window=3, shifted=True), given, lambda p, y: True, in_table((3, 3)))


def four_windows_on_a_torus(op: Operator) -> None:
    """Roll, cut into two by two windows, attend without a mask, roll back."""
    given = drawn(8, 10)
    for quarters in range(4):
        moves = (4 // 4 * quarters, 5 // 4 * quarters)

        def together(p: Cell, y: Cell, moves: Cell = moves) -> bool:
            ends = zip(p, y, moves, (8, 10), strict=True)
            return all((a - s) % n // (n // 2) == (b - s) % n // (n // 2) for a, b, s, n in ends)

        out = op(**given, quarters=quarters)
        agrees(out, given, together)
        assert bool((out[1].dense()[0, 0] > 0).sum(-1).eq(20).all())
    given = drawn(1, 1)
    agrees(op(**given, quarters=3), given, lambda p, y: True)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "swin-attention": shifted,
    "maxvit-block-attention": blocks,
    "maxvit-grid-attention": spread,
    "moat-attention": whole_or_windows,
    "lamamba-local-attention": local_branch,
    "hidiffusion-msw-msa": four_windows_on_a_torus,
}


def test_an_image_of_many_windows_keeps_the_memory_of_its_windows() -> None:
    n = 56 * 56
    given = example_tensors(0, torch.float32, q=(1, 2, n, 8), k=(1, 2, n, 8), v=(1, 2, n, 8))
    out, found = vision_windows.swin_attention(**given, grid=(56, 56), window=(7, 7), shift=(3, 3))
    assert isinstance(found, vision_windows.SparseMap)
    assert found.weights.numel() == 2 * n * 49
    torch.testing.assert_close(found.matvec(given["v"]), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.received().sum(-1), torch.full((1, 2), float(n)), rtol=1e-4, atol=0)
    assert math.isclose(float(found.blocks(56).sum()), 2 * n, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("operator", "options", "words"),
    [
        (vision_windows.swin_attention, {"window": (2, 2), "shift": (2, 0)}, "shift is from 0"),
        (vision_windows.swin_attention, {"window": (2,), "shift": (0, 0)}, "window has a whole number"),
        (
            vision_windows.maxvit_block_attention,
            {"window": (2, 2), "table": torch.zeros(4, 8)},
            r"table is \[4 or 1, 9\]",
        ),
        (vision_windows.maxvit_grid_attention, {"cells": (0, 2)}, "cells has a whole number"),
        (vision_windows.hidiffusion_attention, {"quarters": 4}, "are 0, 1, 2 or 3; got 4"),
        (vision_windows.moat_attention, {"grid": (3, 5)}, "q holds the 15 tokens"),
    ],
)
def test_wrong_options_are_named(operator: Operator, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**{**drawn(3, 4), **options})
