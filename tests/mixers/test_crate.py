"""Subspace self-attention against a dense softmax with symmetric scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.crate import subspace_self_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def scores_are_symmetric(op: Operator) -> None:
    given = variants()["subspace-self-attention"].example(0, 8, torch.float64)
    w = given["w"]
    out, found = op(**given)
    pattern = found.dense()
    torch.testing.assert_close(out, (w @ w.transpose(-1, -2) * w.shape[3] ** -0.5).softmax(-1) @ w)
    around = torch.einsum("bhij,bhjk,bhki->bhijk", pattern, pattern, pattern)
    torch.testing.assert_close(around, around.transpose(2, 3))
    # log P_ij + log of the row's denominator is the score, which is its own transpose.
    scores = pattern.log() - pattern.diagonal(0, -2, -1).log()[..., None]
    scores = scores + (w.square().sum(-1) * w.shape[3] ** -0.5)[..., None]
    torch.testing.assert_close(scores, scores.transpose(-1, -2))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"subspace-self-attention": scores_are_symmetric}


def test_values_need_a_head_for_every_subspace() -> None:
    given = variants()["subspace-self-attention"].example(0, 5, torch.float64)
    with pytest.raises(WorkbenchError, match=r"v is floating point \[2, 4, 5, width\]; got torch.float64 \[2, 2, 5"):
        subspace_self_attention(given["w"], given["v"][:, :2])
