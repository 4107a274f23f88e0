"""Decay between tokens, and recurrences whose state decays per channel. Plain differentiable torch.

    M_ij = scale sum_r q_ir k_jr exp(a_{j+1,r} + ... + a_{i,r})   for j <= i, else 0            a = log_decay <= 0
    S_t  = diag(exp(a_t)) S_{t-1} + k_t v_t^T,   o_i = scale S_i^T q_i = sum_j M_ij v_j

With a ``diagonal`` d the row reads the state before its own token instead, and its own token through d alone:

    M_ij = scale sum_r q_ir k_jr exp(a_{j+1,r} + ... + a_{i-1,r})   for j < i,   M_ii = d_i

Every exponent is a sum of the decays in between: a pair is anchored at a place between its two tokens, where both factors are at
most 1. Nothing overflows, strong decay loses no digits, and -inf (forget everything) is a number like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

PIECE = 16
"""Side of the squares whose pairs are formed channel by channel, N * PIECE * R numbers a head."""
CHUNK = 64
"""Tokens that a recurrence takes at a time."""


def inside(a: Tensor) -> Tensor:
    """a_{j+1} + ... + a_i for i > j, else 0: ``[..., L]`` to ``[..., L, L]``."""
    below = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).tril(-1)
    return torch.where(below, a[..., :, None], 0.0).cumsum(-2)


def after(a: Tensor) -> Tensor:
    """Sum of what follows, a_{j+1} + ... + a_L, along the axis before the last: 0 in its last place."""
    return pad(a[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def decay_tile(a: Tensor, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
    """exp(a_{j+1} + ... + a_i) of queries ``[q_lo, q_hi)`` and keys ``[k_lo, k_hi)``, 0 for j > i; ``a`` is ``[..., N]``."""
    rise = a[..., q_lo:q_hi].double()
    parts = []
    edge = max(k_lo, min(k_hi, q_lo))
    if edge > k_lo:
        fall = after(a[..., k_lo:q_lo, None].double())[..., : edge - k_lo, 0]
        parts.append((rise.cumsum(-1)[..., :, None] + fall[..., None, :]).exp().to(a.dtype))
    if k_hi > edge:
        own = inside(rise).exp().tril()[..., max(0, edge - q_lo) :].to(a.dtype)
        own = own[..., : k_hi - edge]
        parts.append(pad(own, (0, k_hi - edge - own.shape[-1])))
    if not parts:
        return a.new_zeros(*a.shape[:-1], q_hi - q_lo, 0)
    return torch.cat(parts, -1)


def channel_square(q: Tensor, k: Tensor, a: Tensor) -> Tensor:
    """Pairs of L tokens with themselves, lower triangle: ``[..., L, R]`` each to ``[..., L, L]``."""
    n = q.shape[-2]
    if n <= PIECE:
        gaps = inside(a.transpose(-1, -2)).exp()
        return torch.einsum("...ir,...jr,...rij->...ij", q, k, gaps).tril()
    half = PIECE
    while 2 * half < n:
        half *= 2
    short = 2 * half - n
    q, k, a = (pad(x, (0, 0, 0, short)).unflatten(-2, (2, half)) for x in (q, k, a))
    own = channel_square(q, k, a)
    late, early = q[..., 1, :, :] * a[..., 1, :, :].cumsum(-2).exp(), k[..., 0, :, :] * after(a[..., 0, :, :]).exp()
    upper = pad(own[..., 0, :, :], (0, half))
    lower = torch.cat([late @ early.transpose(-1, -2), own[..., 1, :, :]], -1)
    return torch.cat([upper, lower], -2)[..., :n, :n]


def channel_square_before(q: Tensor, k: Tensor, a: Tensor) -> Tensor:
    """As ``channel_square`` with rows that read the state before their own token: zero on the diagonal."""
    return pad(channel_square(q[..., 1:, :], k[..., :-1, :], a[..., :-1, :]), (0, 1, 1, 0))


def channel_tile(q: Tensor, k: Tensor, a: Tensor, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
    """``[..., q_hi - q_lo, k_hi - k_lo]`` of the map of q, k, a ``[..., N, R]``, which includes the own token."""
    rows, rise = q[..., q_lo:q_hi, :], a[..., q_lo:q_hi, :].double()
    edge = max(k_lo, min(k_hi, q_lo))
    parts = []
    if edge > k_lo:
        fall = after(a[..., k_lo:q_lo, :].double())[..., : edge - k_lo, :].exp().to(q.dtype)
        early = k[..., k_lo:edge, :] * fall
        parts.append((rows * rise.cumsum(-2).exp().to(q.dtype)) @ early.transpose(-1, -2))
    if k_hi > edge:
        own = channel_square(rows, k[..., q_lo:q_hi, :], a[..., q_lo:q_hi, :])[..., max(0, edge - q_lo) :]
        own = own[..., : k_hi - edge]
        parts.append(pad(own, (0, k_hi - edge - own.shape[-1])))
    if not parts:
        return q.new_zeros(*q.shape[:-2], q_hi - q_lo, 0)
    return torch.cat(parts, -1)


def channel_scan(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, *, scale: float = 1.0, diagonal: Tensor | None = None
) -> Tensor:
    """M v in chunks, linear in N: q, k, a ``[B, H, N, R]``, v ``[B, H, N, E]`` of one type, diagonal ``[B, H, N]``."""
    n = q.shape[2]
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    parts = []
    for lo in range(0, n, CHUNK):
        at = slice(lo, min(n, lo + CHUNK))
        here, keys, values, log = q[:, :, at] * scale, k[:, :, at], v[:, :, at], a[:, :, at]
        rise = log.cumsum(2)
        if diagonal is None:
            out = channel_square(here, keys, log) @ values + (here * rise.exp()) @ state
        else:
            own = channel_square_before(here, keys, log) @ values + diagonal[:, :, at, None] * values
            out = own + (here * pad(rise[:, :, :-1], (0, 0, 1, 0)).exp()) @ state
        parts.append(out)
        fall = keys * after(log).exp()
        state = rise[:, :, -1, :, None].exp() * state + fall.transpose(-1, -2) @ values
    return torch.cat(parts, 2)


def channel_scan_back(
    q: Tensor, k: Tensor, y: Tensor, a: Tensor, *, scale: float = 1.0, diagonal: Tensor | None = None
) -> Tensor:
    """M^T y, ``[B, H, N, E]``: the recurrence from the last token to the first, where q and k change places."""
    if diagonal is None:
        a = pad(a[:, :, 1:].flip(2), (0, 0, 1, 0))  # what decays on the way from i down to j is a_{j+1} .. a_i
        return channel_scan(k.flip(2), q.flip(2), y.flip(2), a, scale=scale).flip(2)
    back = (x.flip(2) for x in (k, q, y, a))
    return channel_scan(*back, scale=scale, diagonal=diagonal.flip(2)).flip(2)
