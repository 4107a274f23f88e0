"""Block sums of the map of ``linear_attention`` without its pairs, differentiable plain torch, the same for every fast form.

A block below the diagonal factors: with tokens i of block I and j of block J < I,

    sum M_ij = scale (sum_i exp(a_start(I) + ... + a_i) q_i) . (sum_j exp(a_{j+1} + ... + a_end(J)) k_j) exp(sum of a in between)

A block on the diagonal is cut into pieces, where the same holds, and only the pieces on the diagonal are formed. All exponents
are sums of the decays in between, never differences: gradients of ``log_decay`` do not cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.scores import working_dtype

PIECE = 32
"""Side of the pieces on the diagonal whose pairs are formed, N * PIECE numbers a head."""


def block_sums(q: Tensor, k: Tensor, log_decay: Tensor | None, scale: float, block: int) -> Tensor:
    """``[B, H, N/block, N/block]`` in the working type."""
    kind = working_dtype(q.dtype)
    b, h, n, e = q.shape
    g = k.shape[1]
    queries = _cut(q.to(kind).reshape(b, g, h // g, n, e) * scale, block, -2)
    keys = _cut(k.to(kind), block, -2)
    decay = None if log_decay is None else _cut(log_decay.reshape(b, g, h // g, n), block, -1)
    sums = _between(queries, keys, decay) + torch.diag_embed(_within(queries, keys, decay))
    return sums.flatten(1, 2)


def _within(q: Tensor, k: Tensor, a: Tensor | None) -> Tensor:
    """Sums over the lower triangles of blocks ``[B, G, F, blocks]``. q ``[B, G, F, blocks, L, E]``, a without E, k without F."""
    if q.shape[4] <= PIECE:
        m = torch.einsum("bgfnie,bgnje->bgfnij", q, k)
        return (m.tril() if a is None else m * _inside(a).exp().tril()).sum((-2, -1))
    q, k, a = _cut(q, PIECE, -2), _cut(k, PIECE, -2), None if a is None else _cut(a, PIECE, -1)
    blocks = q.shape[3:5]
    q, k, a = q.flatten(3, 4), k.flatten(2, 3), None if a is None else a.flatten(3, 4)
    return (_within(q, k, a).unflatten(3, blocks) + _between(q, k, a, blocks).sum(-1)).sum(-1)


def _between(q: Tensor, k: Tensor, a: Tensor | None, blocks: tuple[int, ...] = ()) -> Tensor:
    """Sums of every block below the diagonal, 0 elsewhere: ``[B, G, F, n, n]``; of each of ``blocks[0]`` runs of ``blocks[1]``
    blocks on their own, if given."""
    runs = blocks or (1, q.shape[3])
    if a is None:
        rows, keys, gap = q.sum(4), k.sum(3)[:, :, None].expand(*q.shape[:4], q.shape[5]), None
    else:
        rows = torch.einsum("bgfnie,bgfni->bgfne", q, a.cumsum(-1).exp())
        later = a[..., 1:].flip(-1).cumsum(-1).flip(-1)
        keys = torch.einsum("bgnje,bgfnj->bgfne", k, torch.nn.functional.pad(later, (0, 1)).exp())
        total = a.sum(-1).unflatten(3, runs)
        gap = torch.nn.functional.pad(_inside(total)[..., :-1, :], (0, 0, 1, 0)).exp()
    sums = rows.unflatten(3, runs) @ keys.unflatten(3, runs).transpose(-1, -2)
    sums = (sums if gap is None else sums * gap).tril(-1)
    return sums if blocks else sums.squeeze(3)


def _inside(a: Tensor) -> Tensor:
    """a_{j+1} + ... + a_i for i > j, else 0: ``[..., L, L]``."""
    below = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).tril(-1)
    return torch.where(below, a[..., :, None], 0.0).cumsum(-2)


def _cut(x: Tensor, size: int, axis: int) -> Tensor:
    """A negative axis cut into parts of ``size``, zeros at the end."""
    short = -x.shape[axis] % size
    if short:
        x = torch.nn.functional.pad(x, (0, 0) * (-axis - 1) + (0, short))
    return x.unflatten(axis, (-1, size))
