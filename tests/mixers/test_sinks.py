"""Sinks that have no key and capped scores: against literal sums, and against plain softmax where they make no difference."""

import math
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
from workbench.mixers import sinks

Operator = Callable[..., tuple[Tensor, AttentionMap]]
MASK = Mask(causal=True)


def drawn() -> dict[str, Any]:
    return example_tensors(2, torch.float64, q=(2, 4, 6, 4), k=(2, 2, 6, 4), v=(2, 2, 6, 3))


def plain(given: dict[str, Any]) -> Tensor:
    return scaled_dot_product_attention(given["q"], given["k"], given["v"], is_causal=True, enable_gqa=True)


def exponentials(given: dict[str, Any]) -> Tensor:
    scores = given["q"] @ given["k"].repeat_interleave(2, 1).transpose(-1, -2) / 2
    return scores.exp().tril()


def one_more_column(op: Operator) -> None:
    """The sink is a softmax over one more column that is then dropped; at -inf there is none."""
    given = drawn()
    sink = torch.tensor([0.5, -1.0, 2.0, -math.inf], dtype=torch.float64)
    out, found = op(**given, sink=sink, mask=MASK)
    grown = torch.cat([exponentials(given), sink.exp()[None, :, None, None].expand(2, 4, 6, 1)], -1)
    wanted = (grown / grown.sum(-1, keepdim=True))[..., :-1]
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"].repeat_interleave(2, 1))
    torch.testing.assert_close(out[:, 3], plain(given)[:, 3])


def one_in_the_denominator(op: Operator) -> None:
    """exp(s) / (1 + sum exp(s)): a row of scores that are all very low gives almost nothing."""
    given = drawn()
    out, found = op(**given, mask=MASK)
    weights = exponentials(given)
    weights = weights / (1 + weights.sum(-1, keepdim=True))
    torch.testing.assert_close(found.dense(), weights)
    torch.testing.assert_close(out, weights @ given["v"].repeat_interleave(2, 1))


def scores_stay_under_the_cap(op: Operator) -> None:
    """Softmax of c tanh(s / c); a wide cap changes nothing."""
    given = drawn()
    out, found = op(**given, softcap=0.7, mask=MASK)
    scores = 0.7 * (given["q"] @ given["k"].repeat_interleave(2, 1).transpose(-1, -2) / 2 / 0.7).tanh()
    wanted = scores.exp().tril()
    wanted = wanted / wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"].repeat_interleave(2, 1))
    torch.testing.assert_close(op(**given, softcap=1e6, mask=MASK)[0], plain(given))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "sink-logits": one_more_column,
    "softmax-off-by-one": one_in_the_denominator,
    "softcapped-attention": scores_stay_under_the_cap,
}


def test_the_missing_mass_is_the_sinks() -> None:
    given = drawn()
    sink = torch.full((4,), 1.5, dtype=torch.float64)
    _, found = sinks.sink_attention(**given, sink=sink, mask=MASK)
    total = exponentials(given).sum(-1)
    torch.testing.assert_close(1 - found.row_sums(), math.exp(1.5) / (total + math.exp(1.5)))
    assert found.row_sum == "<=1"


def test_rows_that_see_nothing_are_zero() -> None:
    given = drawn()
    mask = Mask(queries=torch.tensor([[True] * 5 + [False]]))
    out, found = sinks.off_by_one_attention(**given, mask=mask)
    assert bool((out[:, :, 5] == 0).all())
    assert bool((found.rows(5, 6) == 0).all())


def test_wrong_sinks_and_caps_are_named() -> None:
    with pytest.raises(WorkbenchError, match="sink is floating point"):
        sinks.sink_attention(**drawn(), sink=torch.zeros(3), mask=MASK)
    with pytest.raises(WorkbenchError, match="softcap is a positive"):
        sinks.softcapped_attention(**drawn(), softcap=0.0, mask=MASK)
