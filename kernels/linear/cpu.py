"""``linear_attention`` chunk by chunk in plain torch; its gradients in a second pass from the last chunk to the first.

With S the state before a chunk, P the gradient of the state after it, rise_i = exp(sum of a from its start to i) and
fall_j = exp(sum of a from j + 1 to its end), everything inside a chunk is

    o_i  = scale (sum_j D_ij (q_i . k_j) v_j + rise_i S^T q_i)          D_ij = exp(a_{j+1} + ... + a_i) for j <= i
    dq_i = scale (sum_j D_ij (dO_i . v_j) k_j + rise_i S dO_i)
    dk_j = scale sum_i D_ij (dO_i . v_j) q_i + fall_j P v_j
    dv_j = scale sum_i D_ij (q_i . k_j) dO_i + fall_j P^T k_j
    da_t = sum over pairs j < t <= i of M_ij (dO_i . v_j), split by whether i and j lie in the chunk of t: sums, no differences
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.scores import working_dtype
from workbench.kernels.sigmoid.cpu import pieces

CHUNK = 128
TILE = 256
"""Side of the tiles of the pass over pairs; several heads share a pass while they have at most 16 tiles' pairs."""


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Everything in the working type, query heads split into ``[B, G, F]``: q ``[B, G, F, N, E]``, k and v ``[B, G, 1, N, ..]``,
    ``log`` ``[B, G, F, N]`` or None, bounded below where its exponential is zero already."""

    q: Tensor
    k: Tensor
    v: Tensor
    log: Tensor | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> _Inputs:
        kind = working_dtype(q.dtype)
        b, h, n, e = q.shape
        g = k.shape[1]
        log = None
        if log_decay is not None:
            log = log_decay.double().clamp(min=2 * _nothing(kind)).reshape(b, g, h // g, n)
        return cls(q.to(kind).reshape(b, g, h // g, n, e), k.to(kind)[:, :, None], v.to(kind)[:, :, None], log)

    def chunks(self) -> list[slice]:
        n = self.q.shape[3]
        return [slice(lo, min(n, lo + CHUNK)) for lo in range(0, n, CHUNK)]

    def decays(self, at: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """D, rise, fall and the whole decay of a chunk, broadcastable to ``[B, G, F, i, j]``, ``[.., i, 1]``, ``[.., j, 1]`` and
        ``[.., 1, 1]``."""
        n = at.stop - at.start
        if self.log is None:
            one = self.q.new_ones(1)
            return self.q.new_ones(n, n).tril_(), one, one, one
        c = self.log[..., at].cumsum(-1)
        pairs = (c[..., :, None] - c[..., None, :]).to(self.q.dtype).clamp_(max=0.0).exp_().tril_()
        rise, fall = c.exp(), (c[..., -1:] - c).exp()
        return pairs, rise[..., None].to(self.q), fall[..., None].to(self.q), rise[..., -1:, None].to(self.q)

    def first_state(self, state: Tensor | None) -> Tensor:
        shape = (*self.q.shape[:3], self.q.shape[4], self.v.shape[4])
        return self.q.new_zeros(shape) if state is None else state.to(self.q).reshape(shape)


def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
    block: int | None,
    with_abs: bool,
    with_max: bool,
) -> list[Tensor]:
    """Output, final state, and the maps asked for."""
    x = _Inputs.of(q, k, v, log_decay)
    now = x.first_state(state)
    output = torch.empty(*q.shape[:3], v.shape[3], dtype=x.q.dtype, device=q.device)
    out = output.view(*x.q.shape[:4], v.shape[3])
    for at in x.chunks():
        pairs, rise, fall, whole = x.decays(at)
        here, keys, values = x.q[..., at, :] * scale, x.k[..., at, :], x.v[..., at, :]
        out[..., at, :] = (here @ keys.transpose(-1, -2) * pairs) @ values + (here * rise) @ now
        now = whole * now + keys.transpose(-1, -2) @ (values * fall)
    found = [output.to(v.dtype), now.reshape(*q.shape[:2], *now.shape[3:])]
    return found if block is None else found + _maps(x, scale, block, with_abs, with_max)


def chunked_backward(
    d_output: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, and of log_decay and the initial state where they are given."""
    x = _Inputs.of(q, k, v, log_decay)
    now = x.first_state(state)
    before = []
    for at in x.chunks():
        before.append(now)
        _, _, fall, whole = x.decays(at)
        now = whole * now + x.k[..., at, :].transpose(-1, -2) @ (x.v[..., at, :] * fall)
    dq, d_log = torch.empty_like(x.q), x.q.new_empty(x.q.shape[:4])
    dk, dv = torch.empty_like(x.k[:, :, 0]), torch.empty_like(x.v[:, :, 0])
    grads = d_output.to(x.q.dtype).reshape(*x.q.shape[:4], -1)
    later = x.first_state(d_state)
    for at, now in zip(reversed(x.chunks()), reversed(before), strict=True):
        pairs, rise, fall, whole = x.decays(at)
        here, keys, values, grad = x.q[..., at, :], x.k[..., at, :], x.v[..., at, :], grads[..., at, :]
        weights = pairs * scale
        products = (grad @ values.transpose(-1, -2)) * weights
        m = (here @ keys.transpose(-1, -2)) * weights
        past = (grad @ now.transpose(-1, -2)) * (rise * scale)
        future = (values @ later.transpose(-1, -2)) * fall
        dq[..., at, :] = products @ keys + past
        dk[..., at, :] = (products.transpose(-1, -2) @ here + future).sum(2)
        dv[..., at, :] = (m.transpose(-1, -2) @ grad + (keys @ later) * fall).sum(2)
        if x.log is not None:
            inner = m * (grad @ values.transpose(-1, -2))
            crossing = _shift(inner.cumsum(-1)).tril_().sum(-2)
            left = (here * past).sum(-1).flip(-1).cumsum(-1).flip(-1)
            right = _shift((keys * future).sum(-1).cumsum(-1))
            over = (whole * later * now).sum((-2, -1))[..., None]
            d_log[..., at] = crossing + left + right + over
        later = whole * later + here.transpose(-1, -2) @ (grad * (rise * scale))
    found = [dq.view(q.shape).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)]
    if log_decay is not None:
        found.append(d_log.view(log_decay.shape).to(log_decay.dtype))
    if state is not None:
        found.append(later.reshape(state.shape).to(state.dtype))
    return found


def _maps(x: _Inputs, scale: float, block: int, with_abs: bool, with_max: bool) -> list[Tensor]:
    """The pass over pairs, tile by tile. Off the diagonal D factors through the first row of the tile."""
    if not with_abs and not with_max:
        return []
    b, g, f, n, _ = x.q.shape
    side = -(-n // block)
    mass = x.q.new_zeros(b, g, f, side, side) if with_abs else None
    peak = x.q.new_full((b, g, f, side, side), -math.inf).tril_() if with_max else None
    parts = pieces(0, n, block, TILE)
    tile = min(n, TILE)
    together = max(1, 16 * TILE**2 // (f * tile**2))
    nothing = _nothing(x.q.dtype)
    for one in range(b):
        for low in range(0, g, together):
            heads = (one, slice(low, low + together))
            q, k = x.q[heads] * scale, x.k[heads]
            c = None if x.log is None else x.log[heads].cumsum(-1)
            for i, rows in enumerate(parts):
                here = q[..., rows, :]
                if c is not None:
                    edge = c[..., rows.start, None]
                    here = here * (c[..., rows] - edge).to(q.dtype).exp_()[..., None]
                for columns in parts[:i]:
                    place = (*heads, ..., _blocks(rows, block), _blocks(columns, block))
                    fall = None if c is None else edge - c[..., columns]
                    if fall is not None and bool((fall[..., -1] < nothing).all()):
                        if peak is not None:
                            peak[place].clamp_(min=0.0)
                        continue
                    m = here @ k[..., columns, :].transpose(-1, -2)
                    if fall is not None:
                        m *= fall.to(m.dtype).exp_()[..., None, :]
                    _add(m, mass, peak, place, block)
                m = q[..., rows, :] @ k[..., rows, :].transpose(-1, -2)
                if c is not None:
                    m *= (c[..., rows, None] - c[..., None, rows]).to(m.dtype).clamp_(max=0.0).exp_()
                _add(m.tril_(), mass, peak, (*heads, ..., _blocks(rows, block), _blocks(rows, block)), block)
    return [found.flatten(1, 2) for found in (mass, peak) if found is not None]


def _add(m: Tensor, mass: Tensor | None, peak: Tensor | None, place: tuple, block: int) -> None:
    if peak is not None:
        part = peak[place]
        torch.maximum(part, _pool(_pool(m, -2, block, -math.inf).amax(-2), -1, block, -math.inf).amax(-1), out=part)
    if mass is not None:
        mass[place] += _pool(_pool(m.abs_(), -2, block, 0.0).sum(-2), -1, block, 0.0).sum(-1)


def _pool(x: Tensor, axis: int, block: int, fill: float) -> Tensor:
    """A piece cut along a negative ``axis`` into blocks, the last one filled up."""
    size = min(block, x.shape[axis])
    short = -x.shape[axis] % size
    if short:
        x = torch.nn.functional.pad(x, (0, 0) * (-axis - 1) + (0, short), value=fill)
    return x.unflatten(axis, (-1, size))


def _blocks(part: slice, block: int) -> slice:
    return slice(part.start // block, -(-part.stop // block))


def _shift(x: Tensor) -> Tensor:
    """Inclusive sums along the last axis made exclusive, without a difference."""
    return torch.nn.functional.pad(x[..., :-1], (1, 0))


def _nothing(kind: torch.dtype) -> float:
    """Exponents below this one give exactly 0."""
    return -746.0 if kind == torch.float64 else -104.0
