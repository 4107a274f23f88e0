"""The soft causal mask against the released formula: softmax over everything, then times the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers.causal_vit import soft_causal_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn() -> dict[str, Any]:
    return example_tensors(2, torch.float64, q=(2, 4, 9, 6), k=(2, 2, 9, 6), v=(2, 2, 9, 3))


def softmax_times_mask(op: Operator) -> None:
    """1 is bidirectional attention; 0 has no weight above the diagonal and the bidirectional weights below."""
    given = drawn()
    k, v = (given[name].repeat_interleave(2, 1) for name in ("k", "v"))
    whole = (given["q"] @ k.mT / 6**0.5).softmax(-1)
    lower = torch.ones(9, 9, dtype=torch.float64).tril()
    for soft in (0.0, 0.3, 1.0):
        out, found = op(**given, soft=soft)
        want = whole * (soft * torch.ones_like(lower) + (1 - soft) * lower)
        torch.testing.assert_close(found.dense(), want)
        torch.testing.assert_close(out, want @ v)
        torch.testing.assert_close(found.row_sums(), want.sum(-1))
        torch.testing.assert_close(found.received(), want.sum(2))
        torch.testing.assert_close(found.entropy(), torch.special.entr(want).sum(-1))
    torch.testing.assert_close(op(**given, soft=1.0)[0], scaled_dot_product_attention(given["q"], k, v))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"illama-soft-causal-attention": softmax_times_mask}


def test_the_last_row_is_the_class_tokens_saliency() -> None:
    """The last row sums to 1 at every soft factor; the future counts in the denominators of all others."""
    _, found = soft_causal_attention(**drawn(), soft=0.0)
    sums = found.row_sums()
    torch.testing.assert_close(sums[:, :, -1], torch.ones(2, 4, dtype=torch.float64))
    assert bool((sums[:, :, :-1] < 1).all())
    assert found.row_sum == "<=1"


def test_a_factor_out_of_range_is_named() -> None:
    with pytest.raises(WorkbenchError, match="from 0 to 1; got 1.5"):
        soft_causal_attention(**drawn(), soft=1.5)
