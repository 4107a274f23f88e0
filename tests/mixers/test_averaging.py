"""Token-aware average pooling against explicit averaging matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.averaging import attention_diversification, token_aware_pooling_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def averaging(mix: Tensor, grid: tuple[int, int]) -> Tensor:
    """T ``[B, N, N]``, one cell at a time."""
    b, n, scales = mix.shape
    out = torch.zeros(b, n, n, dtype=mix.dtype)
    for i in range(n):
        row, column = divmod(i, grid[1])
        out[:, i, i] += mix[:, i, 0]
        for s in range(1, scales):
            for down in (-s, 0, s):
                for across in (-s, 0, s):
                    if 0 <= row + down < grid[0] and 0 <= column + across < grid[1]:
                        out[:, i, (row + down) * grid[1] + column + across] += mix[:, i, s] / 9
    return out


def softmax_of_averages_times_averaging(op: Operator) -> None:
    given = variants()["token-aware-average-pooling"].example(3, 12, torch.float64)
    q, k, v = given["q"], given["k"].repeat_interleave(2, 1), given["v"].repeat_interleave(2, 1)
    t = averaging(given["mix"], given["grid"])[:, None]
    pattern = ((t @ q) @ (t @ k).transpose(-1, -2) * q.shape[3] ** -0.5).softmax(-1)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), pattern @ t)
    torch.testing.assert_close(out, pattern @ t @ v)
    untouched = torch.zeros_like(given["mix"])
    untouched[..., 0] = 1
    out, found = op(**{**given, "mix": untouched})
    plain = (q @ k.transpose(-1, -2) * q.shape[3] ** -0.5).softmax(-1)
    torch.testing.assert_close(found.dense(), plain)
    torch.testing.assert_close(out, plain @ v)


IDENTITIES: dict[str, Callable[[Operator], None]] = {"token-aware-average-pooling": softmax_of_averages_times_averaging}


def example(tokens: int = 12) -> dict[str, Any]:
    return variants()["token-aware-average-pooling"].example(0, tokens, torch.float64)


def test_the_factors_are_attention_and_averaging() -> None:
    given = example()
    _, found = token_aware_pooling_attention(**given)
    attention, average = found.native()
    assert attention.row_sum == "1"
    assert average.row_sum == found.row_sum == "<=1"
    torch.testing.assert_close(average.dense()[:, 2], averaging(given["mix"], given["grid"]))


def test_diversification_is_the_mean_cosine_with_the_mean_row() -> None:
    row = torch.tensor([0.6, 0.4, 0.0, 0.0], dtype=torch.float64)
    same = AttentionMap.from_dense(row.expand(2, 3, 4, 4))
    torch.testing.assert_close(attention_diversification(same, 1.0), torch.ones(2, dtype=torch.float64))
    uniform = AttentionMap.from_dense(torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64))
    assert attention_diversification(uniform).item() == 0
    weights = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    mean = weights.mean(1)
    wanted = []
    for b in range(2):
        middle = mean[b].mean(0)
        middle = torch.where(middle > 1.2 / 7, middle, 0.0)
        rows = [torch.where(row > 1.2 / 7, row, 0.0) for row in mean[b]]
        wanted.append(sum(float(r @ middle) / max(float(r.norm() * middle.norm()), 1e-12) for r in rows) / 5)
    got = attention_diversification(AttentionMap.from_dense(weights), 1.2)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example()
    for name, value, message in (
        ("grid", (5, 2), r"rows \* columns = 12; got \(5, 2\)"),
        ("mix", given["mix"][0], r"mix is floating point \[2, 12, S\]"),
        ("k", given["k"][..., :3], r"k is \[B, G, K, E\]"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            token_aware_pooling_attention(**{**given, name: value})
    with pytest.raises(WorkbenchError, match="threshold is not negative"):
        attention_diversification(AttentionMap.from_dense(torch.ones(1, 1, 2, 2)), -1)
