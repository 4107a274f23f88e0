"""Outlook attention against loops over windows and against torch's unfold and fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.outlook import outlook_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def example(tokens: int = 12) -> dict[str, Any]:
    return variants()["outlook-attention"].example(5, tokens, torch.float64)


def literal(logits: Tensor, grid: tuple[int, int], scale: float, size: int = 3, stride: int = 1) -> Tensor:
    b, h = logits.shape[:2]
    rows, columns = grid
    out = torch.zeros(b, h, rows * columns, rows * columns, dtype=torch.float64)
    half, window = size // 2, 0
    for top in range(0, rows, stride):
        for left in range(0, columns, stride):
            places = [(top + s, left + t) for s in range(-half, half + 1) for t in range(-half, half + 1)]
            weights = (logits[:, :, window].view(b, h, size**2, size**2) * scale).softmax(-1)
            for s, (r, c) in enumerate(places):
                for t, (u, d) in enumerate(places):
                    if 0 <= r < rows and 0 <= c < columns and 0 <= u < rows and 0 <= d < columns:
                        out[:, :, r * columns + c, u * columns + d] += weights[:, :, s, t]
            window += 1
    return out


def windows_are_written_and_overlap(op: Operator) -> None:
    given = example()
    wanted = literal(given["logits"], given["grid"], 4**-0.5)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"])
    # Alike weights: the sum over windows that hold the token of the windows' means, zeros outside, as unfold and fold make it.
    even = torch.zeros_like(given["logits"])
    out, _ = op(**{**given, "logits": even})
    planes = given["v"].transpose(2, 3).reshape(2, 12, *given["grid"])
    unfolded = torch.nn.functional.unfold(planes, 3, padding=1).view(2, 12, 9, 12)
    means = unfolded.mean(2, keepdim=True).expand(-1, -1, 9, -1).reshape(2, 108, 12)
    folded = torch.nn.functional.fold(means, given["grid"], 3, padding=1)
    torch.testing.assert_close(out, folded.flatten(2).view(2, 3, 4, 12).transpose(2, 3))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"outlook-attention": windows_are_written_and_overlap}


@pytest.mark.parametrize(("grid", "size", "stride"), [((5, 4), 3, 2), ((4, 6), 5, 2), ((3, 3), 3, 3), ((1, 4), 1, 1)])
def test_other_strides_and_sizes(grid: tuple[int, int], size: int, stride: int) -> None:
    windows = -(-grid[0] // stride) * -(-grid[1] // stride)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, windows, size**4, generator=generator, dtype=torch.float64)
    v = torch.randn(1, 2, grid[0] * grid[1], 3, generator=generator, dtype=torch.float64)
    out, found = outlook_attention(logits, v, grid=grid, size=size, stride=stride, scale=0.7)
    wanted = literal(logits, grid, 0.7, size, stride)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ v)


def test_row_sums_count_windows_away_from_the_edge() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 1, 25, 81, generator=generator, dtype=torch.float64)
    v = torch.randn(1, 1, 25, 2, generator=generator, dtype=torch.float64)
    _, found = outlook_attention(logits, v, grid=(5, 5))
    sums = found.row_sums()[0, 0].view(5, 5)
    torch.testing.assert_close(sums[2, 2], torch.tensor(9.0, dtype=torch.float64))
    assert sums[0, 0] < 4
    band = found.dense()[0, 0, 0].view(5, 5)
    assert (band[3:] == 0).all()
    assert (band[:, 3:] == 0).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example()
    for name, value, message in (
        ("logits", given["logits"][..., :9], r"logits is floating point \[2, 3, 12, 81\]"),
        ("stride", 2, r"logits is floating point \[2, 3, 4, 81\]"),
        ("size", 2, "odd side"),
        ("grid", (12,), "rows, columns"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            outlook_attention(**{**given, name: value})
