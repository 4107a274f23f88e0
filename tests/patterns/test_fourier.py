"""The map of Fourier mixing against the sums written out."""

from __future__ import annotations

import cmath

import pytest
import torch

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.patterns.fourier import FourierMap


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_every_answer_is_that_of_the_numbers(n: int) -> None:
    found = FourierMap(2, 3, n, scale=0.5, dtype=torch.float64)
    roots = [[cmath.exp(-2j * cmath.pi * i * j / n) for j in range(n)] for i in range(n)]
    row = [[0.5 * z.real for z in roots[i]] + [-0.5 * z.imag for z in roots[i]] for i in range(n)]
    dense = torch.tensor(row, dtype=torch.float64).expand(2, 3, n, 2 * n)
    wanted = AttentionMap.from_dense(dense, offset=0)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, 3, 2 * n, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64)
    for got, right in (
        (found.dense(), dense),
        (found.tile(slice(0, 2), slice(n - 1, n + 1)), dense[:, :, :2, n - 1 : n + 1]),
        (found.matvec(v), dense @ v),
        (found.rmatvec(y), dense.mT @ y),
        (found.received(), dense.sum(2)),
        (found.row_sums(), dense.sum(3)),
        (found.blocks(3), wanted.blocks(3)),
        (found.heads([2]).dense(), dense[:, :1]),
    ):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


def test_far_rows_keep_their_digits() -> None:
    n = 100_003
    row = FourierMap(1, 1, n).rows(n - 1, n)[0, 0, 0]
    j = torch.arange(n, dtype=torch.float64)
    torch.testing.assert_close(row[:n].double(), (2 * torch.pi * j / n).cos(), atol=1e-5, rtol=0)


def test_refusals() -> None:
    with pytest.raises(WorkbenchError, match="at least one example, head and token"):
        FourierMap(1, 0, 5)
