"""Softmax over listed keys against a loop over the queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.mixers.local import grouped_softmax, local_softmax


def tensors(
    seed: int, b: int = 2, h: int = 4, g: int = 2, q: int = 7, k: int = 9, e: int = 5, v: int = 3
) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = ((b, h, q, e), (b, g, k, e), (b, g, k, v))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def by_loop(q: Tensor, k: Tensor, indices: Tensor, scale: float, bias: Tensor, zeros: bool) -> Tensor:
    """Dense weights, one query at a time."""
    b, h, n, _ = q.shape
    out = q.new_zeros(b, h, n, k.shape[2])
    for bi in range(b):
        for hi in range(h):
            for i in range(n):
                listed = indices[bi % indices.shape[0], hi % indices.shape[1], i].tolist()
                slots = [s for s, j in enumerate(listed) if j >= 0 or zeros]
                if not slots:
                    continue
                key = k[bi, hi // (h // k.shape[1])]
                logits = torch.stack(
                    [
                        (scale * q[bi, hi, i] @ key[listed[s]] if listed[s] >= 0 else 0.0) + bias[bi, hi, i, s]
                        for s in slots
                    ]
                )
                for s, p in zip(slots, logits.softmax(0), strict=True):
                    if listed[s] >= 0:
                        out[bi, hi, i, listed[s]] += p
    return out


@pytest.mark.parametrize("axes", [(1, 1), (1, 4), (2, 1), (2, 4)])
@pytest.mark.parametrize("zeros", [False, True])
def test_local_softmax_is_the_loop(axes: tuple[int, int], zeros: bool) -> None:
    q, k, v = tensors(0)
    indices = torch.randint(-1, 9, (*axes, 7, 4), generator=torch.Generator().manual_seed(1))
    indices[:, :, 3] = -1
    bias = torch.randn(2, 4, 7, 4, dtype=torch.float64)
    out, found = local_softmax(q, k, v, indices, scale=0.7, bias=bias, zero_padding=zeros)
    with torch.no_grad():
        want = by_loop(q, k, indices, 0.7, bias, zeros)
    torch.testing.assert_close(found.dense(), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(out, want @ v.repeat_interleave(2, 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(out, found.matvec(v.detach()), atol=1e-12, rtol=0)
    assert found.row_sum == "<=1"
    assert bool((out[:, :, 3] == 0).all())
    assert all(bool(g.isfinite().all()) and bool((g != 0).any()) for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_groups_are_lists_that_queries_share() -> None:
    q, k, v = tensors(2)
    queries = torch.tensor([[4, 0, 6], [1, 2, -1], [5, 3, -1]])[None, None]
    keys = torch.tensor([[0, 1, 2, 8], [3, 4, -1, -1], [1, 8, 7, 5]])[None, None]
    allowed = torch.rand(1, 4, 3, 3, 4, generator=torch.Generator().manual_seed(0)) > 0.3
    bias = torch.randn(4, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    out, found = grouped_softmax(q, k, v, queries, keys, bias=bias, allowed=allowed)
    rows = torch.tensor([0, 1, 1, 2, 0, 2, 0]), torch.tensor([1, 0, 1, 1, 0, 0, 2])
    listed = torch.where(allowed[0][:, rows[0], rows[1]], keys[0, 0, rows[0]], -1)[None]
    each = bias[None].expand(2, 4, 3, 3, 4)[:, :, rows[0], rows[1]]
    want, single = local_softmax(q, k, v, listed, bias=each)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(found.dense(), single.dense())
    assert bool(torch.autograd.grad(out.square().sum(), bias)[0].isfinite().all())


def test_groups_may_differ_between_heads_and_examples() -> None:
    q, k, v = tensors(3, g=4, q=6, k=6)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(s)) for s in range(8)])
    groups = order.view(2, 4, 3, 2)
    out, found = grouped_softmax(q, k, v, groups, groups)
    dense = found.dense()
    for b in range(2):
        for h in range(4):
            same = torch.zeros(6, 6, dtype=torch.bool)
            for group in groups[b, h]:
                same[group[:, None], group[None]] = True
            s = (q[b, h] @ k[b, h].T * 5**-0.5).masked_fill(~same, -torch.inf)
            torch.testing.assert_close(dense[b, h], s.softmax(-1).detach())
            torch.testing.assert_close(out[b, h], s.softmax(-1) @ v[b, h])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"indices": torch.zeros(1, 1, 6, 2, dtype=torch.int64)}, "Q = 7"),
        ({"indices": torch.full((1, 1, 7, 2), 9)}, "0 .. 8"),
        ({"indices": torch.zeros(1, 3, 7, 2, dtype=torch.int64)}, "4 or 1"),
        ({"bias": torch.zeros(2, 4, 7, 3)}, "bias broadcasts"),
        ({"v": torch.zeros(2, 2, 8, 3, dtype=torch.float64)}, "v is"),
        ({"k": torch.zeros(2, 3, 9, 5, dtype=torch.float64)}, "divisor of 4"),
    ],
)
def test_misfits_are_named(change: dict[str, Tensor], words: str) -> None:
    q, k, v = tensors(4)
    call = {"q": q, "k": k, "v": v, "indices": torch.zeros(1, 1, 7, 2, dtype=torch.int64), **change}
    with pytest.raises(WorkbenchError, match=words):
        local_softmax(**call)


def test_a_query_in_two_groups_is_refused() -> None:
    q, k, v = tensors(5, q=3)
    groups = torch.tensor([[0, 1], [1, 2]])[None, None]
    with pytest.raises(WorkbenchError, match="exactly one group"):
        grouped_softmax(q, k, v, groups, groups)
