"""The cached context against the merge written out, and against full attention where nothing is stale."""

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
from workbench.mixers.flash_block import flash_block_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn() -> dict[str, Any]:
    shapes = {"q": (2, 4, 5, 6), "cached_q": (2, 4, 5, 6), "k": (2, 2, 12, 6), "v": (2, 2, 12, 3)}
    return example_tensors(2, torch.float64, **shapes)


def stale_context(op: Operator) -> None:
    """Weights exp(lse_x - lse) on two softmaxes; a cache of this very step is full attention."""
    given = drawn()
    out, found = op(**given)
    k, v = (given[name].repeat_interleave(2, 1) for name in ("k", "v"))
    outside = given["cached_q"] @ k[:, :, :7].mT / 6**0.5
    inside = given["q"] @ k[:, :, 7:].mT / 6**0.5
    lse = torch.stack([outside.logsumexp(-1), inside.logsumexp(-1)], -1)
    share = lse.softmax(-1)[..., None, :]
    want = torch.cat([outside.softmax(-1) * share[..., 0], inside.softmax(-1) * share[..., 1]], -1)
    torch.testing.assert_close(found.dense(), want)
    torch.testing.assert_close(out, want @ v)
    torch.testing.assert_close(found.masses(), share.squeeze(-2))
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 4, 5, dtype=torch.float64))
    assert found.offset == 7
    fresh, whole = op(**{**given, "cached_q": given["q"]})
    torch.testing.assert_close(fresh, scaled_dot_product_attention(given["q"], k, v))
    torch.testing.assert_close(whole.dense(), (given["q"] @ k.mT / 6**0.5).softmax(-1))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"flashblock-attention": stale_context}


def test_misfits_are_named() -> None:
    given = drawn()
    with pytest.raises(WorkbenchError, match="cached_q is"):
        flash_block_attention(**{**given, "cached_q": given["cached_q"][:, :, 1:]})
    with pytest.raises(WorkbenchError, match="at least 5 tokens"):
        flash_block_attention(**{**given, "k": given["k"][:, :, :4], "v": given["v"][:, :, :4]})


def test_a_block_without_context_attends_to_itself() -> None:
    given = drawn()
    small = {**given, "k": given["k"][:, :, 7:], "v": given["v"][:, :, 7:]}
    out, found = flash_block_attention(**small)
    k, v = (small[name].repeat_interleave(2, 1) for name in ("k", "v"))
    torch.testing.assert_close(out, scaled_dot_product_attention(given["q"], k, v))
    assert found.row_sum == "1"
