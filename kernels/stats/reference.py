"""The formulas of ``attention_stats`` written out densely: the oracle of every faster form. Q x K memory; float64-able."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from workbench.kernels.scores import HIDDEN, Scores
from workbench.kernels.stats.request import Wanted, layout


def dense_attention(scores: Scores, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights ``[B, H, Q, K]`` and lse ``[B, H, Q]`` of a score description, in its working type; differentiable."""
    assert scores.scale is not None
    q, k = scores.q.to(scores.dtype), scores.k.to(scores.dtype)
    n, m = q.shape[2], k.shape[2]
    s = scores.scale * torch.einsum("bhqe,bhke->bhqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    if scores.bias is not None:
        bias = scores.bias_tile(slice(0, n), slice(0, m))
        s = s + torch.where(bias <= HIDDEN, float("-inf"), bias)
    allowed = scores.mask.tile(slice(0, n), slice(0, m), s.device)
    if allowed is not None:
        s = torch.where(allowed, s, float("-inf"))
    blind = torch.isneginf(s).all(-1)
    if lse is None:
        lse = torch.where(blind[..., None], 0.0, s).logsumexp(-1).masked_fill(blind, float("-inf"))
        if scores.sink is not None:
            lse = torch.logaddexp(lse, scores.sink.to(s)[None, :, None])
    lse = lse.to(s)
    hidden = torch.isneginf(s)
    weights = (torch.where(hidden, 0.0, s) - torch.where(torch.isneginf(lse), 0.0, lse)[..., None]).exp()
    return torch.where(hidden, 0.0, weights), lse


def reference_stats(scores: Scores, lse: Tensor | None, wanted: Wanted) -> list[Tensor]:
    _, _, n, m = scores.shape
    p, lse = dense_attention(scores, lse)
    if wanted.gate is not None:
        p = p * wanted.gate.to(p)[..., None]
    device = p.device
    rows = torch.arange(n, device=device)[:, None] + scores.mask.offset
    columns = torch.arange(m, device=device)[None, :]
    far = (rows - columns).abs().to(p)
    found = {"lse": lse}
    if wanted.block is not None:
        found |= {f"blocks {name}": pool(p, wanted.block, name) for name in wanted.reduce}
    makers = {
        "received": lambda: p.sum(2),
        "entropy": lambda: torch.special.entr(p).sum(-1),
        "distance": lambda: (p * far).sum(-1),
        "windowed": lambda: (p * far.clamp(max=wanted.window)).sum(-1),
        "distance2": lambda: (p * far.square()).sum(-1),
    }
    found |= {name: makers[name]() for name in wanted.stats if name != "top1"}
    for name, k in (("top1", 1), ("topk", wanted.topk)):
        if k is None or (name == "top1" and name not in wanted.stats):
            continue
        values, keys = p.sort(dim=-1, descending=True, stable=True)
        values, keys = values[..., :k], torch.where(values > 0, keys, -1)[..., :k]
        found |= {f"{name} values": values, f"{name} keys": keys}
        if name == "top1":
            found |= {"top1 values": values[..., 0], "top1 keys": keys[..., 0]}
    masses = [(p * w.to(p)[:, None, None, :]).sum(-1) for w in wanted.keys]
    for weight in wanted.pairs:
        masses.append((p * pair_weights(weight, pair_indices(scores, 0, n), p.dtype)).sum(-1))
    found |= {f"mass {i}": value for i, value in enumerate(masses)}
    return [found[name] for name in layout(wanted)]


def pair_indices(scores: Scores, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Example, head, absolute query position and key position of query rows ``[lo, hi)``, broadcastable to their scores."""
    b, h, _, k = (torch.arange(n, device=scores.q.device) for n in scores.shape)
    rows = torch.arange(lo, hi, device=scores.q.device) + scores.mask.offset
    return b[:, None, None, None], h[:, None, None], rows[:, None], k


def pair_weights(weight: Callable[..., Tensor], indices: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """A weight function on pairs, broadcastable to their common shape."""
    value = weight(*indices)
    full = torch.broadcast_shapes(*(part.shape for part in indices))
    fits = isinstance(value, Tensor) and value.ndim <= len(full)
    if not fits or any(n not in (1, m) for n, m in zip(value.shape[::-1], full[::-1], strict=False)):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"mass: a function of (b, h, q, k) returns what broadcasts to {list(full)}; got {got}")
    return value.to(dtype)


def reference_backward(
    scores: Scores, lse: Tensor | None, wanted: Wanted, gradients: dict[str, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, sink and a given lse, by torch's own differentiation of the dense formulas."""
    given = [scores.q, scores.k, scores.sink, lse]
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    with torch.enable_grad():
        q, k, sink, lse = leaves
        assert q is not None
        assert k is not None
        asked = Wanted(wanted.block, ("sum",) if wanted.block else (), ("received",), gate=wanted.gate)
        found = dict(zip(layout(asked), reference_stats(replace(scores, q=q, k=k, sink=sink), lse, asked), strict=True))
        names = {"d_lse": "lse", "d_blocks": "blocks sum", "d_received": "received"}
        known = [(found[names[name]], gradient) for name, gradient in gradients.items() if gradient is not None]
        terms = [(torch.where(torch.isinf(value), 0.0, value) * gradient).sum() for value, gradient in known]
        wanted_leaves = [t for t in leaves if t is not None]
        got = iter(torch.autograd.grad(sum(terms[1:], terms[0]), wanted_leaves, allow_unused=True))
    dq, dk, d_sink, d_lse = (None if t is None else next(got) for t in leaves)
    assert dq is not None
    assert dk is not None
    return dq, dk, d_sink, d_lse


def pool(p: Tensor, size: int, reduce: str) -> Tensor:
    """Square blocks of a dense map, one by one."""
    cell = {"sum": lambda c: c.sum((-2, -1)), "mean": lambda c: c.mean((-2, -1)), "max": lambda c: c.amax((-2, -1)),
            "abs": lambda c: c.abs().sum((-2, -1))}[reduce]  # fmt: skip
    rows = [[cell(c) for c in row.split(size, dim=3)] for row in p.split(size, dim=2)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
