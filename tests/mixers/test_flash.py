"""FlashAttention and ring attention against dense softmax; unions of masks against the dense mask of the union."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.attention_map import AttentionMap
from workbench.captures import capture
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative
from workbench.mixers.flash import (
    flash_attention,
    merge_partial,
    partial_attention,
    ring_attention,
    union_attention,
    with_rows,
)

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int = 9) -> dict[str, Any]:
    return example_tensors(5, torch.float64, q=(2, 4, tokens, 6), k=(2, 2, tokens, 6), v=(2, 2, tokens, 3))


def scores(given: dict[str, Any], allowed: Tensor) -> Tensor:
    return (given["q"] @ given["k"].repeat_interleave(2, 1).mT / 6**0.5).masked_fill(~allowed, -torch.inf)


def weights(given: dict[str, Any], allowed: Tensor) -> Tensor:
    return scores(given, allowed).softmax(-1).nan_to_num()


def tiles_from_the_lse(op: Operator) -> None:
    """Output and every tile are those of dense softmax; the lse is that of the dense scores."""
    given = drawn()
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    out, found = op(**given, mask=Mask(causal=True))
    want = weights(given, allowed)
    v = given["v"].repeat_interleave(2, 1)
    torch.testing.assert_close(
        out, scaled_dot_product_attention(given["q"], given["k"].repeat_interleave(2, 1), v, allowed)
    )
    for q in (slice(0, 4), slice(3, 9)):
        for k in (slice(0, 2), slice(2, 9)):
            torch.testing.assert_close(found.tile(q, k), want[:, :, q, k])
    torch.testing.assert_close(found.lse, scores(given, allowed).logsumexp(-1))


def a_split_over_ranks_changes_nothing(op: Operator) -> None:
    """Every number of ranks gives the unsplit attention; the native map is the mass on each rank's keys."""
    given = drawn()
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    want = weights(given, allowed)
    for ranks in (1, 2, 4, 9, 11):
        out, found = op(**given, ranks=ranks, mask=Mask(causal=True))
        torch.testing.assert_close(found.dense(), want)
        torch.testing.assert_close(out, want @ given["v"].repeat_interleave(2, 1))
        shares = torch.stack([part.sum(-1) for part in want.tensor_split(ranks, -1)], -1)
        torch.testing.assert_close(found.native(), shares)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "flash-attention": tiles_from_the_lse,
    "ring-attention": a_split_over_ranks_changes_nothing,
}


def union() -> tuple[list[Mask], Tensor]:
    """First two tokens, a window of three, and one row that sees what is left; row 6 sees nothing."""
    first = torch.arange(9)[None] < 2
    rows = torch.arange(9)[None] != 6
    last = torch.arange(9)[None] == 8
    masks = [
        Mask(causal=True, keys=first, queries=rows),
        Mask(causal=True, window=3, keys=~first, queries=rows),
        Mask(keys=torch.tensor([[False] * 2 + [True] * 3 + [False] * 4]), queries=last),
    ]
    i, j = torch.arange(9)[:, None], torch.arange(9)
    near = (i - j < 3) & (j >= 2)
    return masks, (((j < 2) | near) & (j <= i) | ((i == 8) & (j >= 2) & (j < 5))) & (i != 6)


def test_a_union_of_masks_is_the_dense_mask() -> None:
    given = {name: part.requires_grad_() for name, part in drawn().items()}
    masks, allowed = union()
    out, found = union_attention([(given["q"], given["k"], mask) for mask in masks], given["v"])
    want = weights(given, allowed)
    torch.testing.assert_close(found.dense(), want.detach())
    torch.testing.assert_close(out, want @ given["v"].repeat_interleave(2, 1))
    assert found.row_sum == "<=1"
    assert bool((out[:, :, 6] == 0).all())
    weight = torch.randn(out.shape, dtype=torch.float64)
    got = torch.autograd.grad((out * weight).sum(), list(given.values()))
    dense = torch.where(allowed, scores(given, allowed.new_ones(9, 9)).exp(), 0.0)
    dense = dense / dense.sum(-1, keepdim=True).clamp(min=1e-300)
    true = torch.autograd.grad((dense @ given["v"].repeat_interleave(2, 1) * weight).sum(), list(given.values()))
    for one, other in zip(got, true, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("request_all", [False, True])
def test_a_union_answers_from_its_tiles(request_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = drawn()
    masks, allowed = union()
    _, found = union_attention([(given["q"], given["k"], mask) for mask in masks], given["v"])
    monkeypatch.setattr(found, "rows", None)
    if request_all:
        stats = ("received", "entropy", "distance", "distance2")
        found.precompute(capture(blocks=4, reduce=("sum", "mean", "max", "abs"), stats=stats, topk=3, window=2))
    want = weights(given, allowed)
    gap = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    torch.testing.assert_close(found.received(), want.sum(2))
    torch.testing.assert_close(found.entropy(), torch.special.entr(want).sum(-1))
    torch.testing.assert_close(found.distance(), (want * gap).sum(-1))
    torch.testing.assert_close(found.distance(moment=2), (want * gap**2).sum(-1))
    torch.testing.assert_close(found.distance(2), (want * gap.clamp(max=2)).sum(-1))
    torch.testing.assert_close(found.blocks(4, "max")[:, :, 1, 0], want[:, :, 4:8, :4].amax((-2, -1)))
    torch.testing.assert_close(found.blocks(4)[:, :, 2, 1], want[:, :, 8:, 4:8].sum((-2, -1)))
    for k in (1, 3):
        values, keys = want.topk(k, -1)
        top = found.topk(k)
        torch.testing.assert_close(top.values, values)
        assert torch.equal(top.indices, keys.masked_fill(values == 0, -1))
    torch.testing.assert_close(found.heads([3, 1]).dense(), want[:, [3, 1]])
    torch.testing.assert_close(found.masses().sum(-1), want.sum(-1))


def test_merging_is_associative_and_knows_empty_rows() -> None:
    given = drawn()
    masks, _ = union()
    parts = [partial_attention(**given, mask=mask) for mask in masks]
    out, lse = merge_partial([p[0] for p in parts], [p[1] for p in parts])
    folded = merge_partial([p[0] for p in parts[:2]], [p[1] for p in parts[:2]])
    folded = merge_partial([parts[2][0], folded[0]], [parts[2][1], folded[1]])
    torch.testing.assert_close(folded[0], out)
    torch.testing.assert_close(folded[1], lse)
    assert bool(lse[:, :, 6].isneginf().all())


def test_a_ring_keeps_the_rest_of_the_mask() -> None:
    given = drawn()
    keys = torch.tensor([[True] * 5 + [False] * 4, [True] * 9])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    mask = Mask(causal=True, keys=keys, documents=documents)
    out, found = ring_attention(**given, ranks=3, mask=mask)
    want, whole = flash_attention(**given, mask=mask)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(found.dense(), whole.dense())


def test_a_learned_bias_gets_a_gradient() -> None:
    given = drawn()
    table = torch.randn(4, 17, dtype=torch.float64, requires_grad=True)
    out, _ = flash_attention(**given, mask=Mask(), bias=Relative(table, -8))
    distance = torch.arange(9) - torch.arange(9)[:, None] + 8
    s = scores(given, torch.ones(9, 9, dtype=torch.bool)) + table[:, distance]
    want = s.softmax(-1) @ given["v"].repeat_interleave(2, 1)
    torch.testing.assert_close(out, want)
    got, true = (torch.autograd.grad(o.square().sum(), table)[0] for o in (out, want))
    torch.testing.assert_close(got, true)


@pytest.mark.parametrize("ranks", [0, True, 2.0])
def test_wrong_ranks_are_named(ranks: Any) -> None:
    with pytest.raises(WorkbenchError, match="ranks is a number of devices, at least 1"):
        ring_attention(**drawn(), ranks=ranks)


def test_misfits_are_named() -> None:
    given = drawn()
    with pytest.raises(WorkbenchError, match="v is"):
        flash_attention(given["q"], given["k"], given["v"][:, :, 1:])
    with pytest.raises(WorkbenchError, match="mask"):
        flash_attention(**given, mask=Mask(keys=torch.ones(1, 4, dtype=torch.bool)))


def test_chosen_rows_hide_whole_blocks_of_others() -> None:
    rows = torch.zeros(1, 200, dtype=torch.bool)
    rows[:, 70:75] = True
    mask = with_rows(Mask(causal=True), rows, 150)
    assert mask.blocks is not None
    assert mask.blocks[0, 0, :, 0].tolist() == [False, True, False, False]
    allowed = mask.tile(slice(0, 200), slice(0, 150))
    assert allowed is not None
    assert torch.equal(allowed[0, 0], rows[0][:, None] & torch.ones(200, 150, dtype=torch.bool).tril())
    with pytest.raises(WorkbenchError, match="without blocks"):
        with_rows(mask, rows, 150)
