"""Mixtures of heads: all heads routed is plain attention; which heads run, and what they weigh, token by token."""

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
from workbench.mixers.head_mixture import norm_routed_heads, softmax_routed_heads
from workbench.mixers.relative import rotate

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(**more: tuple[int, ...]) -> dict[str, Any]:
    return example_tensors(7, torch.float64, q=(2, 4, 5, 4), k=(2, 2, 5, 4), v=(2, 2, 5, 3), **more)


def plain(given: dict[str, Any]) -> Tensor:
    return scaled_dot_product_attention(given["q"], given["k"], given["v"], is_causal=True, enable_gqa=True)


def all_heads_routed_is_plain_attention(op: Operator) -> None:
    """With every head chosen it is softmax attention; with one of two, the head with the shorter query gives zeros."""
    given, mask = drawn(), Mask(causal=True)
    out, found = op(**given, mask=mask, shared=2, routed=2)
    torch.testing.assert_close(out, plain(given))
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 4, 5, dtype=torch.float64))
    wanted = plain(given)
    for b in range(2):
        for i in range(5):
            lengths = [math.sqrt(sum(float(x) ** 2 for x in given["q"][b, h, i])) for h in (2, 3)]
            wanted[b, 2 if lengths[0] < lengths[1] else 3, i] = 0
    out, found = op(**given, mask=mask, shared=2, routed=1)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(found.row_sums(), (wanted != 0).any(-1).double())


def weights_of_heads_add_up(op: Operator) -> None:
    """Even logits give every head weight 1 and plain attention; others weigh the heads as computed token by token."""
    given, mask = drawn(router=(2, 4, 5), balance=(2, 2, 5)), Mask(causal=True)
    even = {name: torch.zeros_like(given[name]) for name in ("router", "balance")}
    out, _ = op(**{**given, **even}, mask=mask, shared=2, routed=2)
    torch.testing.assert_close(out, plain(given))
    weights = torch.zeros(2, 4, 5, dtype=torch.float64)
    for b in range(2):
        for i in range(5):
            logits, (first, second) = given["router"][b, :, i], given["balance"][b, :, i].softmax(0) * 2
            weights[b, :1, i] = first
            likely = logits[1:].softmax(0)
            best = sorted(range(3), key=lambda h: -float(likely[h]))[:2]
            for h in best:
                weights[b, 1 + h, i] = second * 2 * likely[h] / (likely[best[0]] + likely[best[1]])
    out, found = op(**given, mask=mask, shared=1, routed=2)
    torch.testing.assert_close(out, plain(given) * weights[..., None])
    torch.testing.assert_close(found.dense().sum(-1), weights)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "mixture-of-heads-llama": all_heads_routed_is_plain_attention,
    "mixture-of-heads-vit": weights_of_heads_add_up,
}


def test_rotary_positions_do_not_change_the_choice() -> None:
    given = drawn()
    turned = {**given, "q": rotate(given["q"], torch.arange(5))}
    _, one = norm_routed_heads(**given, mask=Mask(causal=True), shared=1, routed=1)
    _, other = norm_routed_heads(**turned, mask=Mask(causal=True), shared=1, routed=1)
    assert torch.equal(one.gate, other.gate)
    assert one.gate.sum(1).unique().tolist() == [2.0]


@pytest.mark.parametrize(("shared", "routed"), [(4, 0), (0, 2), (0, 4)])
def test_one_part_alone_is_not_balanced(shared: int, routed: int) -> None:
    """Only shared or only routed heads: the weights of a token sum to the number of heads that run."""
    given = drawn(router=(2, 4, 5), balance=(2, 2, 5))
    _, found = softmax_routed_heads(**given, mask=Mask(causal=True), shared=shared, routed=routed)
    torch.testing.assert_close(found.gate.sum(1), torch.full((2, 5), float(shared + routed), dtype=torch.float64))
    assert bool(((found.gate > 0).sum(1) == shared + routed).all())


def test_gradients_reach_the_router() -> None:
    given = drawn(router=(2, 4, 5), balance=(2, 2, 5))
    leaves = [given[name].requires_grad_() for name in ("router", "balance")]
    out, _ = softmax_routed_heads(**given, mask=Mask(causal=True), shared=1, routed=2)
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert bool((grad != 0).any())


@pytest.mark.parametrize(("shared", "routed"), [(2, 0), (3, 2), (0, 0), (-1, 3), (1, True)])
def test_wrong_counts_are_refused(shared: int, routed: int) -> None:
    with pytest.raises(WorkbenchError, match="shared and routed count heads"):
        norm_routed_heads(**drawn(), mask=Mask(causal=True), shared=shared, routed=routed)
