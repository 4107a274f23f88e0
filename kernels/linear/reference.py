"""The formulas of ``linear_attention`` written out densely: the oracle of every faster form. N x N memory; float64-able."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.scores import working_dtype
from workbench.kernels.stats.reference import pool


def dense_decay(log_decay: Tensor) -> Tensor:
    """exp(a_{j+1} + ... + a_i) ``[B, H, N, N]``, 0 for j > i. Sums of the numbers in between, so that -inf is a number too."""
    n = log_decay.shape[2]
    one = torch.ones(n, n, dtype=torch.bool, device=log_decay.device)
    between = torch.where(one.tril(-1), log_decay[..., :, None], 0.0).cumsum(2)
    return torch.where(one.tril(), between.exp(), 0.0)


def dense_map(q: Tensor, k: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    """M ``[B, H, N, N]`` in the working type."""
    kind = working_dtype(q.dtype)
    k = k.to(kind).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    m = scale * torch.einsum("bhie,bhje->bhij", q.to(kind), k)
    return m.tril() if log_decay is None else m * dense_decay(log_decay)


def dense_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
    block: int | None,
    maps: list[str],
) -> list[Tensor]:
    """Output, final state, and the block maps of the names given, in their order."""
    m = dense_map(q, k, log_decay, scale)
    fold = q.shape[1] // k.shape[1]
    keys, values = (x.to(m).repeat_interleave(fold, dim=1) for x in (k, v))
    fall = m.new_ones(m.shape[:3]) if log_decay is None else dense_decay(log_decay)[:, :, -1]
    output = torch.einsum("bhij,bhjv->bhiv", m, values)
    last = torch.einsum("bhj,bhje,bhjv->bhev", fall, keys, values)
    if state is not None:
        rise = m.new_ones(m.shape[:3]) if log_decay is None else log_decay.cumsum(2).exp()
        output = output + scale * torch.einsum("bhi,bhie,bhev->bhiv", rise, q.to(m), state)
        last = last + rise[:, :, -1, None, None] * state
    found = [output.to(v.dtype), last]
    return found + [pool(m, block, name) for name in maps] if block is not None else found
