"""The formulas of ``attention_stats`` written out densely: the oracle of every faster form. Q x K memory; float64-able."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.attention_stats import AttentionStats, Wanted
from workbench.kernels.scores import HIDDEN, Scores


def dense_attention(scores: Scores, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights ``[B, H, Q, K]`` and lse ``[B, H, Q]`` of a score description, in its working type."""
    assert scores.scale is not None
    q, k = scores.q.to(scores.dtype), scores.k.to(scores.dtype)
    n, m = q.shape[2], k.shape[2]
    s = scores.scale * torch.einsum("bhqe,bhke->bhqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    if scores.bias is not None:
        bias = scores.bias if isinstance(scores.bias, Tensor) else scores.bias(0, n)
        s = s + torch.where(bias.to(s) <= HIDDEN, float("-inf"), bias.to(s))
    allowed = scores.mask.tile(slice(0, n), slice(0, m), s.device)
    if allowed is not None:
        s = torch.where(allowed, s, float("-inf"))
    if lse is None:
        lse = s.logsumexp(-1)
        if scores.sink is not None:
            lse = torch.logaddexp(lse, scores.sink.to(s)[None, :, None])
    lse = lse.to(s)
    weights = (s - lse[..., None]).exp()
    return torch.where(torch.isneginf(s), 0.0, weights), lse


def reference_stats(scores: Scores, lse: Tensor | None, wanted: Wanted) -> AttentionStats:
    p, lse = dense_attention(scores, lse)
    if wanted.gate is not None:
        p = p * wanted.gate.to(p)[..., None]
    rows = torch.arange(p.shape[2], device=p.device)[:, None] + scores.mask.offset
    columns = torch.arange(p.shape[3], device=p.device)[None, :]
    far = (rows - columns).abs()
    if wanted.window is not None:
        far = far.clamp(max=wanted.window)
    values, indices = p.max(-1)
    return AttentionStats(
        lse=lse,
        blocks={name: pool(p, wanted.block, name) for name in wanted.reduce} if wanted.block is not None else {},
        received=p.sum(2) if "received" in wanted.stats else None,
        entropy=torch.special.entr(p).sum(-1) if "entropy" in wanted.stats else None,
        distance=(p * far).sum(-1) if "distance" in wanted.stats else None,
        top1=(values, torch.where(values > 0, indices, -1)) if "top1" in wanted.stats else None,
        impl="reference",
    )


def pool(p: Tensor, size: int, reduce: str) -> Tensor:
    """Square blocks of a dense map, one by one."""
    cell = {"sum": lambda c: c.sum((-2, -1)), "mean": lambda c: c.mean((-2, -1)), "max": lambda c: c.amax((-2, -1)),
            "abs": lambda c: c.abs().sum((-2, -1))}[reduce]  # fmt: skip
    rows = [[cell(c) for c in row.split(size, dim=3)] for row in p.split(size, dim=2)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
