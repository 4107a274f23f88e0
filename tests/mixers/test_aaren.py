"""Aaren: the scan of (m, u, w), the recurrent cell and the matrix of prefixes are one operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers import aaren

Operator = Callable[..., tuple[Tensor, AttentionMap]]
Prefix = tuple[Tensor, Tensor, Tensor]


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def joined(one: Prefix, two: Prefix) -> Prefix:
    m = torch.maximum(one[0], two[0])
    a, b = (one[0] - m).exp(), (two[0] - m).exp()
    return m, a * one[1] + b * two[1], a[..., None] * one[2] + b[..., None] * two[2]


def scanned(leaves: list[Prefix]) -> list[Prefix]:
    """All prefixes by joining neighbours at distances 1, 2, 4 ..."""
    step = 1
    while step < len(leaves):
        leaves = leaves[:step] + [joined(leaves[i - step], leaves[i]) for i in range(step, len(leaves))]
        step *= 2
    return leaves


def the_scan_is_the_matrix(op: Operator) -> None:
    n = 11
    given = example_tensors(4, torch.float64, query=(4, 6), k=(2, 2, n, 6), v=(2, 2, n, 3))
    k, v = (given[name].repeat_interleave(2, 1) for name in ("k", "v"))
    s = torch.zeros(2, 4, n).double()
    for h in range(4):
        for j in range(n):
            s[:, h, j] = k[:, h, j] @ given["query"][h] / 6**0.5
    dense = torch.zeros(2, 4, n, n).double()
    for i in range(n):
        dense[:, :, i, : i + 1] = s[:, :, : i + 1].softmax(-1)
    leaves = [(s[:, :, i], torch.ones(2, 4).double(), v[:, :, i]) for i in range(n)]
    prefixes = scanned(leaves)
    out, found = op(**given)
    close(out, torch.stack([w / u[..., None] for _, u, w in prefixes], 2))
    cell = leaves[0]
    for i in range(1, n):
        cell = joined(cell, leaves[i])
        close(out[:, :, i], cell[2] / cell[1][..., None])
    close(found.dense(), dense)
    close(found.native(), s)
    assert torch.linalg.matrix_rank(found.dense()[0, 0, 6:, :6]) == 1


IDENTITIES: dict[str, Callable[[Operator], None]] = {"aaren": the_scan_is_the_matrix}


def test_a_prefix_is_unchanged_by_what_follows_and_scores_may_be_huge() -> None:
    given = example_tensors(4, torch.float64, query=(2, 6), k=(1, 2, 70, 6), v=(1, 2, 70, 3))
    out, _ = aaren.aaren_attention(1e4 * given["query"], given["k"], given["v"])
    short, _ = aaren.aaren_attention(1e4 * given["query"], given["k"][:, :, :65], given["v"][:, :, :65])
    assert torch.isfinite(out).all()
    close(short, out[:, :, :65])


def test_wrong_arguments_are_named() -> None:
    given = example_tensors(4, torch.float64, query=(4, 6), k=(2, 2, 5, 6), v=(2, 2, 5, 3))
    with pytest.raises(WorkbenchError, match="multiple of the 2 heads of k; got 3"):
        aaren.aaren_attention(given["query"][:3], given["k"], given["v"])
    with pytest.raises(WorkbenchError, match=r"query is floating point \[H, 6\]"):
        aaren.aaren_attention(given["query"][:, :3], given["k"], given["v"])
    with pytest.raises(WorkbenchError, match="v is"):
        aaren.aaren_attention(given["query"], given["k"], given["v"][:, :, :3])
