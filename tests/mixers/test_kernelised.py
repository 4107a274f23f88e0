"""Kernelised attention with relative positions: the transform against sums over pairs."""

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
from workbench.mixers import kernelised

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int, features: int = 7) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 6), "k": (2, 2, tokens, 6), "v": (2, 2, tokens, 3), "bias": (4, 9)}
    return example_tensors(6, torch.float64, **shapes, directions=(features, 6))


def feature(x: Tensor, directions: Tensor) -> Tensor:
    unit = x / x.square().sum().sqrt()
    numbers = [math.exp(float(w @ unit) - 0.5) / len(directions) ** 0.5 for w in directions]
    return torch.tensor(numbers, dtype=torch.float64)


def transform_is_dense(op: Operator) -> None:
    """Biases of all distances, the far ones at the ends of the table; without biases a Performer."""
    n = 11
    given = drawn(n)
    w = given["directions"]
    products = torch.zeros(2, 4, n, n).double()
    for b in range(2):
        for h in range(4):
            rows = [feature(x, w) for x in given["q"][b, h]]
            columns = [feature(x, w) for x in given["k"][b, h // 2]]
            products[b, h] = torch.stack([torch.stack([x @ y for y in columns]) for x in rows])
    at = (torch.arange(n) - torch.arange(n)[:, None]).clamp(-4, 4) + 4
    for bias in (given["bias"], torch.zeros(4, 9).double()):
        raw = products * bias.exp()[:, at]
        for causal in (True, False):
            seen = raw.tril() if causal else raw
            wanted = seen / seen.sum(-1, keepdim=True)
            out, found = op(**{**given, "bias": bias}, causal=causal)
            torch.testing.assert_close(out, wanted @ given["v"].repeat_interleave(2, 1), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(found.dense(), wanted)


IDENTITIES: dict[str, Callable[[Operator], None]] = {"kernelised-attention-with-relative-positions": transform_is_dense}


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_circulant_holds_the_toeplitz_matrix(n: int) -> None:
    made = example_tensors(1, torch.float64, w=(3, 2 * n - 1), x=(3, n, 4))
    at = torch.arange(n) - torch.arange(n)[:, None] + n - 1
    torch.testing.assert_close(kernelised.toeplitz_product(made["w"], made["x"]), made["w"][:, at] @ made["x"])


def test_many_features_come_near_to_softmax_of_directions() -> None:
    given = drawn(6, features=40_000)
    _, found = kernelised.kernelised_attention(**{**given, "bias": torch.zeros(4, 1).double()}, causal=False)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (given["q"], given["k"].repeat_interleave(2, 1)))
    torch.testing.assert_close(found.dense(), (q @ k.transpose(-1, -2)).softmax(-1), rtol=0, atol=0.04)


def test_long_sequences_need_no_pairs() -> None:
    given = drawn(4000, features=4)
    out, found = kernelised.kernelised_attention(**given)
    wanted = found.rows(3998, 4000) @ given["v"].repeat_interleave(2, 1)
    torch.testing.assert_close(out[:, :, 3998:], wanted, rtol=1e-8, atol=1e-10)


def test_wrong_arguments_are_named() -> None:
    given = drawn(5)
    with pytest.raises(
        WorkbenchError, match="bias has a number for every distance and its opposite, and 0: odd; got 8"
    ):
        kernelised.kernelised_attention(**{**given, "bias": given["bias"][:, :8]})
    with pytest.raises(WorkbenchError, match=r"directions is floating point \[R, 6\]"):
        kernelised.kernelised_attention(**{**given, "directions": given["directions"][:, :3]})
    with pytest.raises(WorkbenchError, match="a key for every query"):
        kernelised.kernelised_attention(**{**given, "q": given["q"][:, :, :3]})
