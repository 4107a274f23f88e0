"""Landmark attention: two levels of softmax token by token, and the block map without the lower level."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.landmark import landmark_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int = 10) -> dict[str, Any]:
    return example_tensors(2, torch.float64, q=(2, 4, tokens, 4), k=(2, 2, tokens, 4), v=(2, 2, tokens, 3))


def by_hand(given: dict[str, Any], block: int) -> tuple[Tensor, Tensor]:
    """Weights ``[B, H, N, N]`` and landmark weights ``[B, H, N, blocks]``, query by query."""
    raised = (given["q"] @ given["k"].repeat_interleave(2, 1).transpose(-1, -2) / 2).exp()
    n = raised.shape[-1]
    weights, levels = torch.zeros_like(raised), raised.new_zeros(2, 4, n, -(-n // block))
    for i in range(n):
        here = i // block
        own = [j for j in range(here * block, i + 1) if j % block != block - 1]
        ends = [c * block + block - 1 for c in range(here)]
        total = raised[:, :, i, own + ends].sum(-1)
        for j in own:
            weights[:, :, i, j] = raised[:, :, i, j] / total
            levels[:, :, i, here] += weights[:, :, i, j]
        for c, end in enumerate(ends):
            levels[:, :, i, c] = raised[:, :, i, end] / total
            inside = list(range(c * block, end))
            for j in inside:
                share = raised[:, :, i, j] / raised[:, :, i, inside].sum(-1)
                weights[:, :, i, j] = levels[:, :, i, c] * share
    return weights, levels


def blocks_get_what_their_landmarks_got(op: Operator) -> None:
    """Rows sum to 1, a block's tokens to its landmark's weight, and both levels are those of a loop over queries."""
    given = drawn()
    out, found = op(**given, mask=Mask(causal=True), block=3)
    weights, levels = by_hand(given, 3)
    torch.testing.assert_close(found.dense(), weights)
    torch.testing.assert_close(out, weights @ given["v"].repeat_interleave(2, 1))
    torch.testing.assert_close(found.native().dense(), levels)
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 4, 10, dtype=torch.float64))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"landmark-attention": blocks_get_what_their_landmarks_got}


def test_landmarks_get_nothing_themselves() -> None:
    _, found = landmark_attention(**drawn(), mask=Mask(causal=True), block=3)
    assert bool((found.dense()[..., 2::3] == 0).all())
    assert found.native().domain == "block"


@pytest.mark.parametrize("tokens", [5, 64, 300])
@pytest.mark.parametrize("block", [2, 7, 64])
def test_the_block_map_comes_without_the_tokens(tokens: int, block: int) -> None:
    """Levels from landmarks and own blocks alone equal the sums of the rows, over several steps of queries."""
    _, found = landmark_attention(**drawn(tokens), mask=Mask(causal=True), block=block)
    dense = AttentionMap.from_dense(found.dense())
    torch.testing.assert_close(found.blocks(block), dense.blocks(block))
    torch.testing.assert_close(found.blocks(block, "mean"), dense.blocks(block, "mean"))
    short = -tokens % block
    sums = torch.nn.functional.pad(found.dense(), (0, short)).unflatten(-1, (-1, block)).sum(-1)
    torch.testing.assert_close(found.native().dense(), sums)
    torch.testing.assert_close(found.native().rows(2, 5), sums[:, :, 2:5])


def test_queries_after_a_cache() -> None:
    given = drawn()
    whole, rows = landmark_attention(**given, mask=Mask(causal=True), block=3)
    late, found = landmark_attention(**{**given, "q": given["q"][:, :, 7:]}, mask=Mask(causal=True, offset=7), block=3)
    torch.testing.assert_close(late, whole[:, :, 7:])
    torch.testing.assert_close(found.dense(), rows.rows(7, 10))
    torch.testing.assert_close(found.native().dense(), rows.native().rows(7, 10))


def test_hidden_keys_are_hidden_on_both_levels() -> None:
    """Without landmark 5 its block is not seen from later ones; without token 0 its block has one token left."""
    given = drawn()
    keys = torch.ones(2, 10, dtype=torch.bool)
    keys[:, [0, 5]] = False
    out, found = landmark_attention(**given, mask=Mask(causal=True, keys=keys), block=3)
    dense = found.dense()
    assert bool((dense[:, :, 6:, 3:6] == 0).all())
    assert bool((dense[:, :, 0] == 0).all())
    assert found.row_sum == "<=1"
    torch.testing.assert_close(dense[:, :, 1:].sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
    torch.testing.assert_close(found.native().dense().sum(-1), dense.sum(-1))
    torch.testing.assert_close(found.matvec(given["v"]), out)
    torch.testing.assert_close(found.blocks(3), AttentionMap.from_dense(dense).blocks(3))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"block": 1}, "block is a landmark"),
        ({"mask": Mask()}, "mask is causal"),
        ({"block": True}, "block is a landmark"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(WorkbenchError, match=told):
        landmark_attention(**{**drawn(), "mask": Mask(causal=True), "block": 3, **changed})
