"""Sigmoid attention: weights that do not know of each other, and a map whose sums come from the kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.captures import Capture
from workbench.catalogue import example_tensors
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative
from workbench.mixers.sigmoid import sigmoid_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int = 7) -> dict[str, Any]:
    return example_tensors(4, torch.float64, q=(2, 4, tokens, 4), k=(2, 2, tokens, 4), v=(2, 2, tokens, 3))


def deleting_a_key_leaves_the_rest(op: Operator) -> None:
    """Weights are logistic functions of their own scores: without key 2 the others weigh what they weighed."""
    given = drawn()
    out, found = op(**given, mask=Mask(causal=True), shift=-0.3)
    scores = given["q"] @ given["k"].repeat_interleave(2, 1).transpose(-1, -2) / 2 - 0.3
    wanted = (1 / (1 + (-scores).exp())).tril()
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"].repeat_interleave(2, 1))
    left = torch.tensor([0, 1, 3, 4, 5, 6])
    fewer = {**given, "k": given["k"][:, :, left], "v": given["v"][:, :, left]}
    less, smaller = op(**fewer, mask=Mask(dense=torch.ones(7, 7).tril().bool()[None, None][..., left]), shift=-0.3)
    torch.testing.assert_close(smaller.dense(), wanted[..., left])
    torch.testing.assert_close(less + wanted[..., 2:3] * given["v"].repeat_interleave(2, 1)[:, :, 2:3], out)


IDENTITIES: dict[str, Callable[[Operator], None]] = {"sigmoid-attention": deleting_a_key_leaves_the_rest}


@pytest.mark.parametrize("biased", ["no", "tensor", "relative"])
def test_sums_of_the_kernel_are_sums_of_the_rows(biased: str) -> None:
    given = drawn(37)
    more = example_tensors(9, torch.float64, table=(4, 73), grown=(4, 37, 37))
    bias = {"no": None, "tensor": more["grown"], "relative": Relative(more["table"], -36)}[biased]
    _, found = sigmoid_attention(**given, mask=Mask(causal=True, window=9), bias=bias)
    dense = AttentionMap.from_dense(found.dense())
    for reduce in ("sum", "mean", "max", "abs"):
        torch.testing.assert_close(found.blocks(8, reduce), dense.blocks(8, reduce))
    torch.testing.assert_close(found.received(), dense.received())
    torch.testing.assert_close(found.row_sums(), dense.row_sums())
    torch.testing.assert_close(found.heads([3, 0]).dense(), found.dense()[:, [3, 0]])
    torch.testing.assert_close(found.heads([3]).blocks(8), found.blocks(8)[:, 3:])


def test_one_request_is_one_pass_and_stays_after_the_tensors() -> None:
    given = drawn(20)
    _, found = sigmoid_attention(**given, mask=Mask(causal=True))
    kept = found.precompute(Capture(blocks=4, reduce=("sum", "max"), stats=("received", "distance"), keep=False))
    torch.testing.assert_close(kept.blocks(4, "max"), AttentionMap.from_dense(found.dense()).blocks(4, "max"))
    torch.testing.assert_close(kept.received(), found.dense().sum(2))
    with pytest.raises(Refused, match="no distribution"):
        found.entropy()


def test_rows_sum_to_about_one_without_training() -> None:
    """The default shift: with scores near 0 every row of K keys sums to about 1."""
    given = drawn(64)
    given["q"] = given["q"] * 0.01
    _, found = sigmoid_attention(**given, mask=Mask())
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 4, 64, dtype=torch.float64), atol=0.05, rtol=0)


def test_a_bias_gets_its_gradient() -> None:
    given = drawn()
    table = torch.zeros(4, 13, dtype=torch.float64, requires_grad=True)
    out, found = sigmoid_attention(**given, mask=Mask(causal=True), bias=Relative(table, -6))
    out.square().sum().backward()
    assert table.grad is not None
    assert bool((table.grad[:, 7:] == 0).all())
    assert bool(table.grad[:, :7].abs().min() > 0)
    assert not found.dense().requires_grad


def test_wrong_arguments_are_named() -> None:
    given = drawn()
    with pytest.raises(WorkbenchError, match="shift is a finite"):
        sigmoid_attention(**given, mask=Mask(), shift=float("inf"))
    with pytest.raises(WorkbenchError, match="bias"):
        sigmoid_attention(**given, mask=Mask(), bias=torch.zeros(3, 7, 7))
