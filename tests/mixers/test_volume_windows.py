"""Windows of volumes against dense softmax under their rule, pair by pair."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers.volume_windows import dit3d_attention, tesa_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]
GRID = (5, 2, 3)
CELLS = list(itertools.product(range(5), range(2), range(3)))


def drawn() -> dict[str, Any]:
    return {**example_tensors(4, torch.float64, q=(1, 4, 30, 6), k=(1, 2, 30, 6), v=(1, 2, 30, 3)), "grid": GRID}


def agrees(found: tuple[Tensor, AttentionMap], given: dict[str, Any], pairs: list[list[bool]], bias: Tensor) -> None:
    s = given["q"] @ given["k"].repeat_interleave(2, 1).mT / 6**0.5 + bias
    want = s.masked_fill(~torch.tensor(pairs), -torch.inf).softmax(-1)
    torch.testing.assert_close(found[1].dense(), want)
    torch.testing.assert_close(found[0], want @ given["v"].repeat_interleave(2, 1))


def cubes(op: Operator) -> None:
    """Cubes of two voxels a side, a query-dependent bias per axis from unscaled queries; one cube is full attention."""
    given = drawn()
    tables = example_tensors(6, torch.float64, x_table=(3, 6), y_table=(3, 6), z_table=(3, 6))
    pairs = [[all(a // 2 == b // 2 for a, b in zip(p, y, strict=True)) for y in CELLS] for p in CELLS]
    bias = torch.zeros(1, 4, 30, 30, dtype=torch.float64)
    for i, p in enumerate(CELLS):
        for j, y in enumerate(CELLS):
            if pairs[i][j]:
                vector = sum(t[a - b + 1] for t, a, b in zip(tables.values(), p, y, strict=True))
                bias[0, :, i, j] = given["q"][0, :, i] @ vector
    agrees(op(**given, **tables, window=2), given, pairs, bias)
    agrees(op(**given, window=2), given, pairs, torch.zeros(()))
    agrees(op(**given, window=5), given, [[True] * 30] * 30, torch.zeros(()))


def frames_of_few_pixels(op: Operator) -> None:
    """Windows along time; every second layer they move by half a window of frames and nothing else."""
    given = drawn()
    for shifted, move in ((False, 0), (True, 2)):
        pairs = [
            [(p[0] - move) // 4 == (y[0] - move) // 4 and p[1] == y[1] and p[2] // 2 == y[2] // 2 for y in CELLS]
            for p in CELLS
        ]
        agrees(op(**given, window=(4, 1, 2), shifted=shifted), given, pairs, torch.zeros(()))
    agrees(op(**given, window=GRID, shifted=False), given, [[True] * 30] * 30, torch.zeros(()))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "dit-3d-window-attention": cubes,
    "lingen-tesa": frames_of_few_pixels,
}


def test_wrong_options_are_named() -> None:
    with pytest.raises(WorkbenchError, match=r"_table is \[3, 6\]"):
        dit3d_attention(**drawn(), window=2, x_table=torch.zeros(2, 6, dtype=torch.float64))
    with pytest.raises(WorkbenchError, match="window has a whole number"):
        tesa_attention(**drawn(), window=(2, 1), shifted=True)
