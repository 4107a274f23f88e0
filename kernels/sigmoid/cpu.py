"""``sigmoid_attention`` in tiles of plain torch: a tile's weights are final, so outputs and sums are added up tile by tile.

Backward recomputes the weights of each tile. With d_ij = dO_i . v_j + d_block[I, J] + d_received_j + d_row_sums_i:

    ds = p (1 - p) d,   dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i p_ij dO_i

The heads that share a key head are folded into the rows of one product, so keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.scores import Scores
from workbench.kernels.sigmoid.reference import clear_padding
from workbench.kernels.sigmoid_attention import Wanted

ROWS, COLUMNS = 256, 1024
"""Sides of a tile. A tile of one key head is 1 MiB in float32, times the query heads that share it: it stays in cache."""


def tiled_forward(scores: Scores, v: Tensor, shift: float, wanted: Wanted) -> list[Tensor]:
    """Output and what is wanted, in the order of ``Wanted``."""
    b, h, n, m = scores.shape
    like = scores.q.new_empty(0, dtype=scores.dtype)
    block = wanted.block
    grid = (b, h, -(-n // block), -(-m // block)) if block is not None else ()
    output = like.new_zeros(b, h, n, v.shape[3])
    mass = like.new_zeros(grid) if wanted.mass else None
    peak = like.new_zeros(grid) if wanted.peak else None
    received = like.new_zeros(b, h, m) if wanted.received else None
    row_sums = like.new_zeros(b, h, n) if wanted.row_sums else None
    for slab in _slabs(scores, v, block):
        at = (slab.batch, slab.heads)
        for rows, spans in slab.tiles:
            out = output[at][:, :, rows]
            for columns in spans:
                p = slab.weights(rows, columns, shift)
                out += slab.unfold(slab.fold(p) @ slab.v[:, columns])
                if row_sums is not None:
                    row_sums[at][:, :, rows] += p.sum(-1)
                if received is not None:
                    received[at][:, :, columns] += p.sum(-2)
                if block is not None:
                    place = (..., _blocks(rows, block), _blocks(columns, block))
                    if mass is not None:
                        mass[at][place] += _pool(_pool(p, -2, block, "sum"), -1, block, "sum")
                    if peak is not None:
                        part = peak[at][place]
                        torch.maximum(part, _pool(_pool(p, -2, block, "max"), -1, block, "max"), out=part)
    return [output.to(v.dtype), *[found for found in (mass, peak, received, row_sums) if found is not None]]


def tiled_backward(
    scores: Scores,
    v: Tensor,
    shift: float,
    block: int | None,
    d_output: Tensor,
    d_mass: Tensor | None,
    d_received: Tensor | None,
    d_row_sums: Tensor | None,
) -> list[Tensor]:
    """Gradients of q, k and v."""
    assert scores.scale is not None
    dq, dk, dv = [torch.zeros(x.shape, dtype=scores.dtype, device=x.device) for x in (scores.q, scores.k, v)]
    d_output = d_output.to(scores.dtype)
    for slab in _slabs(scores, v, block):
        at, shared = (slab.batch, slab.heads), (slab.batch, slab.groups)
        for rows, spans in slab.tiles:
            queries, grads = slab.fold(slab.q[:, :, rows]), slab.fold(d_output[at][:, :, rows])
            for columns in spans:
                p = slab.weights(rows, columns, shift)
                dv[shared][:, :, columns] += (slab.fold(p).transpose(1, 2) @ grads).view(*slab.size, *_wide(columns, v))
                d = slab.unfold(grads @ slab.v[:, columns].transpose(1, 2))
                if d_mass is not None:
                    assert block is not None
                    i, j = (torch.arange(part.start, part.stop, device=v.device) // block for part in (rows, columns))
                    d += d_mass[at][:, :, i][..., j]
                if d_received is not None:
                    d += d_received[at][:, :, None, columns]
                if d_row_sums is not None:
                    d += d_row_sums[at][:, :, rows, None]
                ds = slab.fold(d.mul_(p).mul_(p.neg_().add_(1.0)).mul_(scores.scale))
                dq[at][:, :, rows] += slab.unfold(ds @ slab.k[:, columns])
                dk[shared][:, :, columns] += (ds.transpose(1, 2) @ queries).view(*slab.size, *_wide(columns, scores.k))
    return [dq.to(v.dtype), dk.to(v.dtype), dv.to(v.dtype)]


@dataclass(frozen=True, eq=False)
class _Slab:
    """Some examples and key heads, worked on together. ``q`` is ``[b, h, Q, E]``, ``k`` and ``v`` ``[b * g, K, ...]``."""

    scores: Scores
    batch: slice
    heads: slice
    groups: slice
    q: Tensor
    k: Tensor
    v: Tensor
    tiles: list[tuple[slice, list[slice]]]

    @property
    def size(self) -> tuple[int, int]:
        return self.q.shape[0], len(self.k) // self.q.shape[0]

    def fold(self, x: Tensor) -> Tensor:
        """``[b, h, n, ...]`` to ``[b * g, h / g * n, ...]``."""
        return x.reshape(len(self.k), -1, x.shape[3])

    def unfold(self, x: Tensor) -> Tensor:
        return x.view(*self.q.shape[:2], -1, x.shape[2])

    def weights(self, rows: slice, columns: slice, shift: float) -> Tensor:
        """p ``[b, h, rows, columns]``, a fresh tensor."""
        assert self.scores.scale is not None
        mask = self.scores.mask
        x = self.unfold((self.fold(self.q[:, :, rows]) * self.scores.scale) @ self.k[:, columns].transpose(1, 2))
        if self.scores.bias is not None:
            x += self.scores.bias_tile(rows, columns, self.batch, self.heads)
        p = x.add_(shift).sigmoid_()
        if mask.open(rows.start, rows.stop, columns.start, columns.stop) != (columns.start, columns.stop):
            allowed = mask.select(self.batch, self.heads).tile(rows, columns, p.device)
            if allowed is not None:
                p.masked_fill_(~allowed, 0.0)
        return p


def _slabs(scores: Scores, v: Tensor, block: int | None) -> Iterator[_Slab]:
    b, h, n, m = scores.shape
    g = scores.k.shape[1]
    q, k, v = (x.to(scores.dtype) for x in clear_padding(scores, v))
    tiles = []
    for rows in pieces(0, n, block, ROWS):
        first, last = scores.mask.span(rows.start, rows.stop, m)
        tiles.append((rows, pieces(first, last, block, COLUMNS)))
    together = max(1, ROWS * COLUMNS // (h // g * min(n, ROWS) * min(m, COLUMNS)))
    wide, many = min(g, together), max(1, together // g)
    for i in range(0, b, many):
        for j in range(0, g, wide):
            batch, groups = slice(i, min(b, i + many)), slice(j, min(g, j + wide))
            heads = slice(groups.start * h // g, groups.stop * h // g)
            keys, values = k[batch, groups].flatten(0, 1), v[batch, groups].flatten(0, 1)
            yield _Slab(scores, batch, heads, groups, q[batch, heads], keys, values, tiles)


def pieces(first: int, last: int, block: int | None, tile: int) -> list[slice]:
    """Ranges of at most ``tile`` positions that cover ``[first, last)``: whole blocks from the first on, or part of one block."""
    if block is None:
        return [slice(lo, min(last, lo + tile)) for lo in range(first, last, tile)]
    found = []
    lo = first
    while lo < last:
        edge = lo // block * block
        stop = edge + tile // block * block if block <= tile else min(edge + block, lo + tile)
        found.append(slice(lo if block > tile else edge, min(last, stop)))
        lo = stop
    return found


def _blocks(part: slice, block: int) -> slice:
    """Blocks that a piece lies in."""
    return slice(part.start // block, -(-part.stop // block))


def _pool(x: Tensor, axis: int, block: int, reduce: str) -> Tensor:
    """A piece pooled along a negative ``axis``; the last block may be short (weights are not negative: zeros fill it up)."""
    size = min(block, x.shape[axis])
    short = -x.shape[axis] % size
    if short:
        x = torch.nn.functional.pad(x, (0, 0) * (-axis - 1) + (0, short))
    x = x.unflatten(axis, (-1, size))
    return x.sum(axis) if reduce == "sum" else x.amax(axis)


def _wide(columns: slice, like: Tensor) -> tuple[int, int]:
    return columns.stop - columns.start, like.shape[3]
