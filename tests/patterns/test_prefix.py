"""Prefix softmax maps against sums over the past, one pair at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import GatedMap
from workbench.patterns.prefix import PrefixSoftmaxMap, prefix_softmax


def literal(s: Tensor, w: Tensor | None, u: Tensor | None) -> Tensor:
    b, h, n = s.shape
    m = torch.zeros(b, h, n, n, dtype=torch.float64)
    for head in range(h):
        rate, own = (0.0 if x is None else float(x[head]) for x in (w, u))
        for i in range(n):
            gaps = torch.tensor([i - 1 - j for j in range(i)] + [0.0], dtype=torch.float64)
            logits = s[:, head, : i + 1] - rate * gaps
            logits[:, -1] += own
            m[:, head, i, : i + 1] = logits.softmax(-1)
    return m


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("kind", ["plain", "fading", "strong"])
def test_every_answer_is_that_of_the_literal_map(n: int, kind: str) -> None:
    made = example_tensors(3, torch.float64, s=(2, 4, n), w=(4,), u=(4,), v=(2, 2, n, 3), y=(2, 4, n, 2))
    s = made["s"] * (500 if kind == "strong" else 1)
    w = None if kind == "plain" else made["w"].abs() * (50 if kind == "strong" else 0.1)
    u = None if kind == "plain" else made["u"]
    dense = literal(s, w, u)
    found = PrefixSoftmaxMap(s, w, u, kv_heads=2)
    out, lse = prefix_softmax(s, made["v"].repeat_interleave(2, 1), w, u)
    close(out, dense @ made["v"].repeat_interleave(2, 1))
    close(found.matvec(made["v"]), out)
    close(found.lse, lse)
    close(found.dense(), dense)
    close(found.tile(slice(n // 2, n), slice(n // 3, n)), dense[:, :, n // 2 :, n // 3 :])
    close(found.tile(slice(0, n), slice(n - 1, n)), dense[..., n - 1 :])
    back = dense.transpose(-1, -2) @ made["y"]
    close(found.rmatvec(made["y"]), back.unflatten(1, (2, 2)).sum(2))
    close(found.received(), dense.sum(2))
    close(found.row_sums(), dense.sum(-1))
    close(found.mass(torch.arange(n)), dense @ torch.arange(n, dtype=torch.float64))
    close(found.mass(lambda b, h, q, k: k < 2), dense[..., :2].sum(-1))
    close(found.heads([3, 1]).dense(), dense[:, [3, 1]])
    plain = AttentionMap.from_dense(dense)
    gate = torch.linspace(0, 1, n, dtype=torch.float64).expand(2, 4, n)
    gated, gated_plain = GatedMap(found, gate), GatedMap(plain, gate)
    close(gated.received(), gated_plain.received())
    close(gated.dense(), gated_plain.dense())
    for size in (1, 4, 65, 200):
        for reduce in ("sum", "mean", "abs", "max"):
            close(found.blocks(size, reduce), plain.blocks(size, reduce))
        close(gated.blocks(size), gated_plain.blocks(size))
    assert found.native() is found.scores
    assert found._scaled(gate).heads([2]).row_sums().equal(gate[:, [2]])


def test_gradients_are_those_of_the_softmax() -> None:
    made = example_tensors(3, torch.float64, s=(1, 2, 70), w=(2,), u=(2,), v=(1, 2, 70, 2))
    s, w, u, v = (x.requires_grad_() for x in made.values())
    at = torch.arange(70)
    gap = at[:, None] - 1 - at
    logits = s[:, :, None] - w.abs()[:, None, None] * gap.clamp(min=0) + u[:, None, None] * (gap == -1)
    dense = logits.masked_fill(gap < -1, -torch.inf).softmax(-1)
    wanted = torch.autograd.grad((dense @ v).square().sum(), (s, w, u, v))
    out, _ = prefix_softmax(s, v, w.abs(), u)
    for got, want in zip(torch.autograd.grad(out.square().sum(), (s, w, u, v)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_long_sequences_stay_linear() -> None:
    s = 30 * example_tensors(0, torch.float32, s=(1, 2, 30000))["s"]
    found = PrefixSoftmaxMap(s, torch.tensor([0.0, 1e-3]))
    torch.testing.assert_close(found.received().sum(-1), torch.full((1, 2), 30000.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.blocks(3000).sum((-1, -2)), torch.full((1, 2), 30000.0), rtol=1e-3, atol=0)
    assert not any(x.numel() > s.numel() * 10 for x in found._memo.values() if isinstance(x, Tensor))


def test_wrong_arguments_are_named() -> None:
    s = torch.zeros(1, 2, 3)
    with pytest.raises(WorkbenchError, match="scores are floating point"):
        PrefixSoftmaxMap(s[0])
    with pytest.raises(WorkbenchError, match=r"bonus is \[H\] = \[2\]"):
        PrefixSoftmaxMap(s, None, torch.zeros(3))
    with pytest.raises(WorkbenchError, match="decay is a rate"):
        PrefixSoftmaxMap(s, -torch.ones(2))
    with pytest.raises(UnknownName, match="map domain"):
        PrefixSoftmaxMap(s, domain="word")
