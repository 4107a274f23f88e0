"""Windows over the border against literal zero padding, and against dense softmax where zeros are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers.halo import halo_attention, msa_convolution

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(rows: int, columns: int, heads: int = 2) -> dict[str, Any]:
    n = rows * columns
    shapes = {"q": (2, heads, n, 6), "k": (2, 1, n, 6), "v": (2, 1, n, 3)}
    return {**example_tensors(4, torch.float64, **shapes), "grid": (rows, columns)}


def image(x: Tensor, rows: int, columns: int) -> Tensor:
    return x.unflatten(2, (rows, columns))


def blocks_in_a_padded_image(op: Operator) -> None:
    """Pad keys and values by the halo, cut windows out, attend with relative positions; the map has the weights of the pixels."""
    given = drawn(4, 6)
    tables = example_tensors(5, torch.float64, row_table=(7, 6), column_table=(7, 6))
    out, found = op(**given, **tables, block=2, halo=1, zero_padding=True)
    q = image(given["q"], 4, 6)
    k, v = (pad(image(given[name], 4, 6), (0, 0, 1, 1, 1, 1))[:, 0] for name in ("k", "v"))
    want = torch.zeros(2, 2, 4, 6, 3, dtype=torch.float64)
    sums = torch.zeros(2, 2, 4, 6, dtype=torch.float64)
    for r in range(4):
        for c in range(6):
            top, left = r // 2 * 2, c // 2 * 2
            keys, values = (part[:, top : top + 4, left : left + 4].flatten(1, 2) for part in (k, v))
            place = [(y, x) for y in range(4) for x in range(4)]
            added = torch.stack(
                [tables["row_table"][y - r % 2 + 3] + tables["column_table"][x - c % 2 + 3] for y, x in place]
            )
            s = q[:, :, r, c] @ keys.mT / 6**0.5 + q[:, :, r, c] @ added.T
            p = s.softmax(-1)
            want[:, :, r, c] = p @ values
            real = torch.tensor([0 < top + y <= 4 and 0 < left + x <= 6 for y, x in place])
            sums[:, :, r, c] = p[..., real].sum(-1)
    torch.testing.assert_close(out, want.flatten(2, 3))
    torch.testing.assert_close(found.row_sums(), sums.flatten(2))
    torch.testing.assert_close(found.dense() @ given["v"], out)
    inner = image(found.dense().sum(-1)[..., None], 4, 6)
    assert bool((inner < 1 - 1e-6).all()), "no block of this image is in its interior"
    masked = op(**given, block=4, halo=6, zero_padding=False)
    full = (given["q"] @ given["k"].mT / 6**0.5).softmax(-1)
    torch.testing.assert_close(masked[1].dense(), full)


def softmax_in_a_convolution(op: Operator) -> None:
    """Unfold keys and values with zero padding, softmax over the kernel, sum; rolled images roll back."""
    given = drawn(4, 5, heads=1)
    for gap, shift in (((1, 1), (0, 0)), ((2, 1), (0, 0)), ((1, 1), (1, -2))):
        q, k, v = (image(given[name], 4, 5)[:, 0].permute(0, 3, 1, 2) for name in ("q", "k", "v"))
        q, k, v = (part.roll((-shift[0], -shift[1]), (2, 3)) for part in (q, k, v))
        keys, values = (unfold(part, 3, gap, gap).view(2, part.shape[1], 9, 20) for part in (k, v))
        p = ((q.flatten(2)[:, :, None] * keys).sum(1) / 6**0.5).softmax(1)
        want = (values * p[:, None]).sum(2).view(2, 3, 4, 5).roll(shift, (2, 3)).flatten(2).mT
        out, found = op(**given, kernel=(3, 3), dilation=gap, shift=shift)
        torch.testing.assert_close(out[:, 0], want)
        torch.testing.assert_close(found.dense() @ given["v"], out)
    assert found.row_sum == "<=1"


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "halonet-attention": blocks_in_a_padded_image,
    "tic-msa-convolution": softmax_in_a_convolution,
}


def test_a_block_in_the_interior_has_rows_that_sum_to_one() -> None:
    _, found = halo_attention(**drawn(6, 6), block=2, halo=2)
    sums = found.row_sums().view(2, 2, 6, 6)
    torch.testing.assert_close(sums[:, :, 2:4, 2:4], torch.ones(2, 2, 2, 2, dtype=torch.float64))
    assert bool((sums[:, :, :2] < 1).all())


def test_masked_rows_sum_to_one_on_ragged_images_too() -> None:
    for rows, columns in ((5, 3), (1, 1), (3, 7)):
        _, found = halo_attention(**drawn(rows, columns), block=2, halo=1, zero_padding=False)
        torch.testing.assert_close(found.row_sums(), torch.ones(2, 2, rows * columns, dtype=torch.float64))
        _, found = msa_convolution(**drawn(rows, columns), kernel=(3, 3), zero_padding=False)
        torch.testing.assert_close(found.row_sums(), torch.ones(2, 2, rows * columns, dtype=torch.float64))


@pytest.mark.parametrize(
    ("operator", "options", "words"),
    [
        (halo_attention, {"block": 0, "halo": 1}, "block is"),
        (halo_attention, {"block": 2, "halo": -1}, "halo is"),
        (halo_attention, {"block": 2, "halo": 1, "row_table": torch.zeros(3, 6)}, r"row_table is \[7, 6\]"),
        (halo_attention, {"block": 2, "halo": 1, "grid": (12,)}, "grid is"),
        (msa_convolution, {"kernel": (3,)}, "kernel has"),
        (msa_convolution, {"kernel": (3, 3), "shift": (1,)}, "shift has"),
    ],
)
def test_wrong_options_are_named(operator: Operator, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**{**drawn(3, 4), **options})
