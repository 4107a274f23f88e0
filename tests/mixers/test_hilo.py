"""HiLo attention against dense softmaxes inside windows and over averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.hilo import hilo_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def example(tokens: int = 12) -> dict[str, Any]:
    return variants()["hilo-attention"].example(8, tokens, torch.float64)


def literal(given: dict[str, Any], side: int, high: int) -> Tensor:
    q, k = given["q"], given["k"]
    rows, columns = given["grid"]
    n, across = rows * columns, -(-columns // side)
    window = torch.tensor([(i // columns // side) * across + i % columns // side for i in range(n)])
    scores = q[:, :high] @ k[:, :high].transpose(-1, -2) * q.shape[3] ** -0.5
    inside = scores.masked_fill(window[:, None] != window, float("-inf")).softmax(-1)
    average = torch.stack([(window == w).double() / (window == w).sum() for w in range(int(window.max()) + 1)])
    pooled = (q[:, high:] @ (average @ k[:, high:]).transpose(-1, -2) * q.shape[3] ** -0.5).softmax(-1)
    return torch.cat([inside, pooled @ average], 1)


def windows_and_averages_of_windows(op: Operator) -> None:
    given = example(16)
    for grid, tokens in (((4, 4), 16), ((3, 5), 15)):
        part = {name: given[name][:, :, :tokens] for name in ("q", "k", "v")} | {"grid": grid}
        wanted = literal(part, 2, 2)
        out, found = op(**part)
        torch.testing.assert_close(found.dense(), wanted)
        torch.testing.assert_close(out, wanted @ part["v"])
    out, found = op(**given, window=1)
    plain = (given["q"] @ given["k"].transpose(-1, -2) * 6**-0.5).softmax(-1)
    torch.testing.assert_close(found.dense(), plain)
    torch.testing.assert_close(out, plain @ given["v"])


IDENTITIES: dict[str, Callable[[Operator], None]] = {"hilo-attention": windows_and_averages_of_windows}


@pytest.mark.parametrize(("alpha", "high"), [(0.0, 4), (0.3, 3), (0.9, 1), (1.0, 0)])
def test_heads_are_split_as_told(alpha: float, high: int) -> None:
    given = example()
    out, found = hilo_attention(**given, alpha=alpha, window=3)
    wanted = literal(given, 3, high)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"])
    assert found.row_sum == "1"
    assert len(found.native()) == (1 if high in (0, 4) else 2)


def test_options_and_shapes_that_do_not_fit_are_refused() -> None:
    given = example()
    for name, value, message in (
        ("alpha", 1.5, "alpha a share"),
        ("window", 0, "window is at least 1"),
        ("v", given["v"][:, :2], r"v is floating point \[2, 4, 12, V\]"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            hilo_attention(**{**given, name: value})
