"""URPE: a softmax with relative bias times a Toeplitz matrix, which may be negative."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.urpe import urpe_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N = 6


def drawn() -> dict[str, Any]:
    shapes = {"q": (2, 4, N, 4), "k": (2, 2, N, 4), "v": (2, 2, N, 3), "bias": (4, N), "factor": (4, N)}
    return example_tensors(6, torch.float64, **shapes)


def toeplitz(table: Tensor) -> Tensor:
    """``[H, N, N]`` with the number of distance j - i, 0 above the diagonal, filled in a loop."""
    out = torch.zeros(table.shape[0], N, N, dtype=table.dtype)
    for i in range(N):
        for j in range(i + 1):
            out[:, i, j] = table[:, j - i + N - 1]
    return out


def factors_of_one_are_a_relative_bias(op: Operator) -> None:
    """With c = 1 it is softmax attention with the bias as a mask; any c multiplies those weights, one per distance."""
    given = drawn()
    hidden = toeplitz(given["bias"]).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    out, found = op(**{**given, "factor": torch.ones_like(given["factor"])}, mask=Mask(causal=True))
    wanted = scaled_dot_product_attention(given["q"], given["k"], given["v"], attn_mask=hidden, enable_gqa=True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 4, N, dtype=torch.float64))
    scores = given["q"] @ given["k"].repeat_interleave(2, 1).transpose(-1, -2) / 2 + hidden
    weights = scores.softmax(-1) * toeplitz(given["factor"])
    out, found = op(**given, mask=Mask(causal=True))
    torch.testing.assert_close(found.dense(), weights)
    torch.testing.assert_close(out, weights @ given["v"].repeat_interleave(2, 1))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"urpe-attention": factors_of_one_are_a_relative_bias}


def test_the_softmax_before_is_kept_and_signs_are_told() -> None:
    given = drawn()
    _, found = urpe_attention(**given, mask=Mask(causal=True))
    assert found.sign == "signed"
    torch.testing.assert_close(found.softmax.row_sums(), torch.ones(2, 4, N, dtype=torch.float64))
    _, found = urpe_attention(**{**given, "factor": given["factor"].abs()}, mask=Mask(causal=True))
    assert found.sign == "nonnegative"


def test_one_table_for_all_heads_and_rows_after_a_cache() -> None:
    given = drawn()
    given |= {"bias": given["bias"][:1, 3:], "factor": given["factor"][:1, 3:]}
    whole, found = urpe_attention(**given, mask=Mask(causal=True))
    late, rows = urpe_attention(**{**given, "q": given["q"][:, :, 4:]}, mask=Mask(causal=True, offset=4))
    torch.testing.assert_close(late, whole[:, :, 4:])
    torch.testing.assert_close(rows.dense(), found.rows(4, 6))


def test_a_factor_of_another_length_is_refused() -> None:
    given = drawn()
    with pytest.raises(WorkbenchError, match=r"factor is floating point \[4, 6\]"):
        urpe_attention(**{**given, "factor": given["factor"][:, 1:]}, mask=Mask(causal=True))
