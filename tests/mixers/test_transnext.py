"""Aggregated attention against a loop over pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.transnext import aggregated_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def example(tokens: int = 12) -> dict[str, Any]:
    return variants()["aggregated-attention"].example(2, tokens, torch.float64)


def literal(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The softmax part and the signed part of the map, ``[B, H, N, N + P]``."""
    b, h, n, _ = given["q"].shape
    rows, columns = given["grid"]
    soft = torch.zeros(b, h, n, given["k"].shape[2], dtype=torch.float64)
    signed = torch.zeros_like(soft)
    unit = given["q"] / given["q"].norm(dim=-1, keepdim=True)
    keys = given["k"] / given["k"].norm(dim=-1, keepdim=True)
    for bi in range(b):
        for hi in range(h):
            sharpness = math.log1p(math.exp(float(given["temperature"][hi])))
            for i in range(n):
                near = {}
                for tap in range(9):
                    row, column = i // columns + tap // 3 - 1, i % columns + tap % 3 - 1
                    if 0 <= row < rows and 0 <= column < columns:
                        near[tap] = row * columns + column
                pool = range(n, given["k"].shape[2])
                query = unit[bi, hi, i] + given["query_embedding"][hi]
                query = query * sharpness * math.log(len(near) + len(pool))
                logits = [query @ keys[bi, hi, j] + given["local_bias"][hi, tap] for tap, j in near.items()]
                logits += [query @ keys[bi, hi, j] + given["pool_bias"][hi, i, j - n] for j in pool]
                soft[bi, hi, i, [*near.values(), *pool]] = torch.stack(logits).softmax(0)
                for tap, j in near.items():
                    added = unit[bi, hi, i] @ given["tokens"][hi, :, tap] + given["token_bias"][hi, tap]
                    signed[bi, hi, i, j] = added
    return soft, signed


def one_softmax_and_signed_neighbours(op: Operator) -> None:
    given = example()
    soft, signed = literal(given)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), soft + signed)
    torch.testing.assert_close(out, (soft + signed) @ given["v"])
    none = {name: torch.zeros_like(given[name]) for name in ("tokens", "token_bias")}
    out, found = op(**{**given, **none})
    torch.testing.assert_close(found.dense(), soft)
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 3, 12, dtype=torch.float64))
    torch.testing.assert_close(out, soft @ given["v"])


IDENTITIES: dict[str, Callable[[Operator], None]] = {"aggregated-attention": one_softmax_and_signed_neighbours}


def test_without_learned_tokens_rows_are_distributions() -> None:
    given = example()
    bare = {name: given[name] for name in ("q", "k", "v", "temperature", "grid")}
    _, found = aggregated_attention(**bare)
    assert (found.sign, found.row_sum) == ("nonnegative", "1")
    local, pool = found.native()
    torch.testing.assert_close(local.row_sums() + pool.row_sums(), torch.ones(2, 3, 12, dtype=torch.float64))
    assert pool.shape == (2, 3, 12, 2)


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example()
    for name, value, message in (
        ("k", given["k"][:, :, :12], "after them the pooled keys; got 12"),
        ("tokens", given["tokens"][..., :4], r"tokens is floating point \[3, 4, 9\]"),
        ("pool_bias", given["pool_bias"][:, :2], r"pool_bias is floating point \[3, 12, 2\]"),
        ("size", 4, "odd side"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            aggregated_attention(**{**given, name: value})
