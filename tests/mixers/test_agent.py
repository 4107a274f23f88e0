"""Agent attention against the product of two dense softmaxes and a convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.agent import agent_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def example(tokens: int = 12) -> dict[str, Any]:
    return variants()["agent-attention"].example(7, tokens, torch.float64)


def image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[B, H*E, rows, columns]``."""
    return x.transpose(2, 3).flatten(1, 2).unflatten(2, grid)


def agents_hand_on_what_they_gather(op: Operator) -> None:
    given = example()
    q, k, v, grid = given["q"], given["k"], given["v"], given["grid"]
    middle = torch.stack(  # 3 x 4 tokens to 2 x 2 agents: rows 0-1 and 1-2, columns 0-1 and 2-3
        [
            image(q, grid)[:, :, r : r + 2, c : c + 2].mean((-2, -1)).view(2, 3, 4)
            for r, c in ((0, 0), (0, 2), (1, 0), (1, 2))
        ],
        2,
    )
    left = (q @ middle.transpose(-1, -2) / 2 + given["query_bias"]).softmax(-1)
    right = (middle @ k.transpose(-1, -2) / 2 + given["key_bias"]).softmax(-1)
    weights = given["kernel"].flatten(0, 1)[:, None]
    convolved = torch.nn.functional.conv2d(image(v, grid), weights, padding=1, groups=12)
    out, found = op(**given)
    torch.testing.assert_close(out, left @ right @ v + convolved.flatten(2).unflatten(1, (3, 4)).transpose(2, 3))
    factors = found.native()
    torch.testing.assert_close(factors[0].dense(), left)
    torch.testing.assert_close(factors[1].dense(), right)
    out, found = op(**{**given, "kernel": torch.zeros_like(given["kernel"])})
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 3, 12, dtype=torch.float64))
    assert (torch.linalg.matrix_rank(found.dense(), tol=1e-10) <= 4).all()
    torch.testing.assert_close(out, left @ right @ v)


IDENTITIES: dict[str, Callable[[Operator], None]] = {"agent-attention": agents_hand_on_what_they_gather}


def test_parts_of_the_map() -> None:
    given = example()
    out, found = agent_attention(**given)
    assert found.channelwise
    assert found.attention.row_sum == "1"
    torch.testing.assert_close(found.attention.matvec(given["v"]) + found.band.matvec(given["v"]), out)
    assert (torch.linalg.matrix_rank(found.attention.dense(), tol=1e-10) <= 4).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example()
    for name, value, message in (
        ("agents", (0, 2), "agents is"),
        ("query_bias", given["key_bias"], r"query_bias is floating point \[3, 12, 4\]"),
        ("kernel", given["kernel"][:, :2], r"kernel is \[H, E, size, size\]"),
        ("k", given["k"][:, :1], r"k is floating point \[2, 3, 12, 4\]"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            agent_attention(**{**given, name: value})
