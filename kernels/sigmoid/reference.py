"""The formulas of ``sigmoid_attention`` written out densely: the oracle of every faster form. Q x K memory; float64-able."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.scores import HIDDEN, Scores
from workbench.kernels.sigmoid_attention import Wanted
from workbench.kernels.stats.reference import pool


def dense_weights(scores: Scores, shift: float) -> Tensor:
    """p ``[B, H, Q, K]`` in the working type."""
    assert scores.scale is not None
    q, k = scores.q.to(scores.dtype), scores.k.to(scores.dtype)
    rows, columns = slice(0, q.shape[2]), slice(0, k.shape[2])
    s = scores.scale * torch.einsum("bhqe,bhke->bhqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    if scores.bias is not None:
        bias = scores.bias_tile(rows, columns)
        s = s + torch.where(bias <= HIDDEN, float("-inf"), bias)
    p = torch.sigmoid(s + shift)
    allowed = scores.mask.tile(rows, columns, s.device)
    return p if allowed is None else torch.where(allowed, p, 0.0)


def dense_forward(scores: Scores, v: Tensor, shift: float, wanted: Wanted) -> list[Tensor]:
    """Output and what is wanted, in the order of ``Wanted``."""
    held = scores
    if scores.mask.keys is not None or scores.mask.queries is not None:
        q, k, v = clear_padding(scores, v)
        held = Scores(q, k, scores.mask, scores.scale, bias=scores.bias)
    p = dense_weights(held, shift)
    values = v.to(p).repeat_interleave(p.shape[1] // v.shape[1], dim=1)
    found = [torch.einsum("bhqk,bhkv->bhqv", p, values).to(v.dtype)]
    if wanted.block is not None:
        found += [pool(p, wanted.block, "sum")] if wanted.mass else []
        found += [pool(p, wanted.block, "max")] if wanted.peak else []
    found += [p.sum(2)] if wanted.received else []
    found += [p.sum(3)] if wanted.row_sums else []
    return found


def clear_padding(scores: Scores, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with zeros in the tokens that ``mask.queries`` and ``mask.keys`` hide: what padding holds may be NaN, which a
    product with a zero weight would let through."""
    q, k = scores.q, scores.k
    if scores.mask.keys is not None:
        hidden = ~scores.mask.keys.to(k.device)[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    if scores.mask.queries is not None:
        q = q.masked_fill(~scores.mask.queries.to(q.device)[:, None, :, None], 0.0)
    return q, k, v
