"""Multi-head, grouped-query and multi-query attention against torch's own, and against repeated heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.softmax import multi_head_attention, multi_query_attention, softmax_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def shared_heads(groups: int) -> Callable[[Operator], None]:
    """The operator on G heads is torch's attention on those heads repeated, and the map its softmax."""

    def check(op: Operator) -> None:
        given = example_tensors(3, torch.float64, q=(2, 4, 5, 6), k=(2, groups, 7, 6), v=(2, groups, 7, 3))
        q, k, v = given["q"], *(given[name].repeat_interleave(4 // groups, 1) for name in ("k", "v"))
        out, found = op(**given, mask=Mask(causal=True, offset=2))
        hidden = torch.ones(5, 7, dtype=torch.bool).tril(2)
        torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, attn_mask=hidden))
        weights = (q @ k.mT / 6**0.5).masked_fill(~hidden, -torch.inf).softmax(-1)
        torch.testing.assert_close(found.dense(), weights)
        torch.testing.assert_close(found.row_sums(), torch.ones(2, 4, 5, dtype=torch.float64))

    return check


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "multi-head-attention": shared_heads(4),
    "grouped-query-attention": shared_heads(2),
    "multi-query-attention": shared_heads(1),
}


def test_the_identity_probe_reads_the_map() -> None:
    """Values of one-hot rows make the output the map."""
    given = example_tensors(0, torch.float64, q=(1, 4, 6, 5), k=(1, 2, 6, 5))
    eye = torch.eye(6, dtype=torch.float64).expand(1, 2, 6, 6)
    out, found = softmax_attention(**given, v=eye, mask=Mask(causal=True))
    torch.testing.assert_close(out, found.dense())


def test_head_counts_are_named() -> None:
    given = example_tensors(0, torch.float64, q=(1, 4, 6, 5), k=(1, 2, 6, 5), v=(1, 2, 6, 5))
    with pytest.raises(WorkbenchError, match="has the 4 heads of q"):
        multi_head_attention(**given, mask=Mask())
    with pytest.raises(WorkbenchError, match="has one head"):
        multi_query_attention(**given, mask=Mask())
