"""``attention_stats`` in row chunks of plain torch: each chunk of query rows meets only the keys its mask span allows.

Per chunk, in base 2 (torch's exp2 is several times faster than exp on CPUs) and in two reused buffers:

    x = s log2(e) - m        m: row maximum, or the given lse
    e = 2^x,  l = sum e      p = e / l, never formed: the row factor w = 1 / l goes into the reductions
    blocks, received         w^T e, one matrix product per block of rows
    entropy                  ln 2 (log2(l) sum p - w sum e x): both terms of one sign, nothing cancels
    a gate g                 w = g / l and log2(l / g)

The heads that share a key head are folded into the rows of one product, so keys are never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.kernels.attention_stats import AttentionStats, Wanted
from workbench.kernels.mask import Mask
from workbench.kernels.scores import HIDDEN, Scores

CHUNK = 2**20
"""Scores per chunk, raised to 64 rows of the longest inputs but never above ``4 * CHUNK``. At 2**20 the two buffers are 4 MiB
each in float32 and stay in a last-level cache."""
_LOG2E = math.log2(math.e)
_LN2 = math.log(2.0)


class _Sums:
    """Accumulators of one call, in the shapes of ``AttentionStats``."""

    def __init__(self, scores: Scores, wanted: Wanted) -> None:
        b, h, q, k = scores.shape
        like = scores.q.new_empty(0, dtype=scores.dtype)
        row = (b, h, q)
        size = wanted.block
        self.lse = like.new_full(row, float("-inf"))
        if scores.sink is not None:
            self.lse.copy_(scores.sink.to(like)[None, :, None].expand(row))
        grid = None if size is None else (b, h, -(-q // size), -(-k // size))
        linear = {"sum", "mean", "abs"} & set(wanted.reduce)
        self.mass = like.new_zeros(grid) if grid and linear else None
        self.peak = like.new_zeros(grid) if grid and "max" in wanted.reduce else None
        self.received = like.new_zeros((b, h, k)) if "received" in wanted.stats else None
        self.entropy = like.new_zeros(row) if "entropy" in wanted.stats else None
        self.distance = like.new_zeros(row) if "distance" in wanted.stats else None
        self.top = like.new_zeros(row) if "top1" in wanted.stats else None
        self.index = torch.full(row, -1, device=scores.q.device) if "top1" in wanted.stats else None


def blocked_stats(scores: Scores, lse: Tensor | None, wanted: Wanted) -> AttentionStats:
    _, _, q, k = scores.shape
    sums = _Sums(scores, wanted)
    if lse is not None:
        sums.lse.copy_(lse)
    for batch, groups in _slabs(scores):
        _slab(scores, lse is not None, wanted, sums, batch, groups)
    blocks: dict[str, Tensor] = {}
    for name in wanted.reduce if wanted.block is not None else ():
        assert wanted.block is not None
        if name == "max":
            assert sums.peak is not None
            blocks[name] = sums.peak
        else:
            assert sums.mass is not None
            cells = _lengths(q, wanted.block, sums.mass)[:, None] * _lengths(k, wanted.block, sums.mass)
            blocks[name] = sums.mass / cells if name == "mean" else sums.mass
    top1 = None if sums.top is None or sums.index is None else (sums.top, sums.index)
    return AttentionStats(sums.lse, blocks, sums.received, sums.entropy, sums.distance, top1, "cpu")


def _budget(keys: int) -> int:
    return max(CHUNK, min(4 * CHUNK, 64 * keys))


def _slabs(scores: Scores) -> Iterator[tuple[slice, slice]]:
    """Examples and key heads that are worked on together: as many as fill a chunk with 64 rows each."""
    b, h, q, k = scores.shape
    g = scores.k.shape[1]
    one = h // g * min(q, 64) * k
    heads = min(g, max(1, _budget(k) // one))
    examples = min(b, max(1, _budget(k) // (one * g))) if heads == g else 1
    for i in range(0, b, examples):
        for j in range(0, g, heads):
            yield slice(i, min(b, i + examples)), slice(j, min(g, j + heads))


def _chunks(mask: Mask, q: int, k: int, heads: int, block: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Row chunks and their key spans. A chunk is whole blocks of rows or lies inside one; a span starts at a block."""
    lo, step = 0, q
    while lo < q:
        step = min(q - lo, 2 * step)
        while True:
            first, last = mask.span(lo, lo + step, k)
            if heads * step * (last - first) <= _budget(k) or step == 1:
                break
            step = max(1, min(step - 1, max(step // 2, _budget(k) // (heads * (last - first)))))
        hi = lo + step
        if block is not None:
            if hi < q or step > block:
                hi = hi // block * block if hi // block * block > lo else hi
            if lo % block:
                hi = min(hi, lo // block * block + block)
        first, last = mask.span(lo, hi, k)
        if last > first:
            yield lo, hi, first if block is None else first // block * block, last
        lo = hi


def _slab(scores: Scores, known: bool, wanted: Wanted, sums: _Sums, batch: slice, groups: slice) -> None:
    assert scores.scale is not None
    _, h, q, k = scores.shape
    fold = h // scores.k.shape[1]
    heads = slice(groups.start * fold, groups.stop * fold)
    mask = scores.mask.select(batch, heads)
    keys, queries = scores.k[batch, groups].to(scores.dtype), scores.q[batch, heads]
    # What padding positions hold may be NaN or infinite, which a minimum with the ceiling of the mask would let through.
    if mask.keys is not None:
        keys = keys.masked_fill(~mask.keys.to(keys.device)[:, None, :, None], 0.0)
    if mask.queries is not None:
        queries = queries.masked_fill(~mask.queries.to(queries.device)[:, None, :, None], 0.0)
    keys = keys.flatten(0, 1)
    nb, nh, _, width = queries.shape
    sink = None if scores.sink is None else scores.sink[heads].to(keys)[None, :, None] * _LOG2E
    before = scores.scale * (_LOG2E if scores.softcap is None else 1.0)
    spare = _Buffers(keys)
    for lo, hi, first, last in _chunks(mask, q, k, nb * nh, wanted.block):
        rows, columns = slice(lo, hi), slice(first, last)
        n, m = hi - lo, last - first
        x = spare.take(0, (nb, nh, n, m))
        part = (queries[:, :, rows].to(keys.dtype) * before).reshape(len(keys), fold * n, width)
        torch.bmm(part, keys[:, columns].transpose(1, 2), out=x.view(len(keys), fold * n, m))
        if scores.softcap is not None:
            x.div_(scores.softcap).tanh_().mul_(scores.softcap * _LOG2E)
        if scores.bias is not None:
            x.add_(scores.bias_tile(rows, columns, batch, heads), alpha=_LOG2E).clamp_(min=HIDDEN)
        _hide(x, mask, rows, columns)
        other = x if sums.entropy is None else spare.take(1, (nb, nh, n, m))
        _reduce(x, other, sink, known, wanted, sums, (batch, heads, rows, columns), mask.offset)


def _reduce(
    x: Tensor,
    out: Tensor,
    sink: Tensor | None,
    known: bool,
    wanted: Wanted,
    sums: _Sums,
    place: tuple[slice, slice, slice, slice],
    offset: int,
) -> None:
    """Everything that is wanted of one chunk of base-2 scores; ``x`` and ``out`` are overwritten."""
    batch, heads, rows, columns = place
    at = (batch, heads, rows)
    top = x if known else x.amax(-1)
    key = top
    if sums.index is not None:
        top, key = _argmax(x)
    if known:
        base = sums.lse[at] * _LOG2E
        base = base.masked_fill(base.isinf(), -HIDDEN)
    else:
        base = top if sink is None else torch.maximum(top, sink)
        base = base.masked_fill(base <= HIDDEN / 2, 0.0)
    e = torch.exp2(x.sub_(base[..., None]), out=out)
    total = e.sum(-1)
    weight, rest = torch.ones_like(base), torch.zeros_like(base)
    if not known:
        denominator = total if sink is None else total + torch.exp2(sink - base)
        sums.lse[at] = (base + denominator.log2()) * _LN2
        blind = denominator == 0
        rest = denominator.log2().masked_fill_(blind, 0.0)
        weight = denominator.reciprocal().masked_fill_(blind, 0.0)
    if wanted.gate is not None:
        gate = wanted.gate[at].to(weight)
        weight = weight * gate
        rest = rest - gate.log2().masked_fill_(gate == 0, 0.0)
    if sums.top is not None and sums.index is not None:
        best = torch.exp2(top - base).mul_(weight)
        sums.top[at] = best
        sums.index[at] = torch.where(best > 0, key + columns.start, -1)
    if sums.peak is not None:
        e.mul_(weight[..., None])
        total, weight = total * weight, torch.ones_like(weight)
        grid = _grid(e, wanted.block)
        part = sums.peak[batch, heads][_window(place, grid, wanted.block)]
        torch.maximum(part, _pool(grid.amax(3), wanted.block).amax(-1), out=part)
    if sums.mass is not None or sums.received is not None:
        grid = _grid(e, wanted.block)
        by_key = (weight.view(*grid.shape[:3], 1, grid.shape[3]) @ grid).squeeze(3)
        if sums.received is not None:
            sums.received[batch, heads, columns] += by_key.sum(2)
        if sums.mass is not None:
            sums.mass[batch, heads][_window(place, grid, wanted.block)] += _pool(by_key, wanted.block).sum(-1)
    if sums.entropy is not None:
        sums.entropy[at] = (rest * total - torch.mul(e, x, out=x).sum(-1)).mul_(weight * _LN2)
    if sums.distance is not None:
        sums.distance[at] = e.mul_(_far(rows, columns, offset, wanted.window, e)).sum(-1).mul_(weight)


def _hide(x: Tensor, mask: Mask, rows: slice, columns: slice) -> None:
    """Push hidden scores to ``HIDDEN``. A minimum with a float tile is many times faster than masked_fill on CPUs."""
    start, stop = mask.open(rows.start, rows.stop, columns.start, columns.stop)
    for part in (slice(columns.start, start), slice(stop, columns.stop)):
        if part.start < part.stop:
            allowed = mask.tile(rows, part, x.device)
            if allowed is not None:
                ceiling = allowed.to(x.dtype).sub_(0.5).mul_(float("inf")).clamp_(min=HIDDEN)
                view = x[..., part.start - columns.start : part.stop - columns.start]
                torch.minimum(view, ceiling, out=view)


def _argmax(x: Tensor, size: int = 128) -> tuple[Tensor, Tensor]:
    """Largest value of each row and its first place: maxima of column blocks, then a search inside the best block."""
    m = x.shape[-1]
    if m <= 2 * size:
        found = x.max(-1)
        return found.values, found.indices
    whole = m // size * size
    tops = x[..., :whole].unflatten(-1, (-1, size)).amax(-1)
    if whole < m:
        tops = torch.cat([tops, x[..., whole:].amax(-1, keepdim=True)], -1)
    top, block = tops.max(-1)
    inside = (block[..., None] * size + torch.arange(size, device=x.device)).clamp_(max=m - 1)
    return top, block * size + x.gather(-1, inside).argmax(-1)


def _grid(e: Tensor, block: int | None) -> Tensor:
    """``[B, H, rows, K]`` to ``[B, H, row blocks, rows in one, K]``."""
    n = e.shape[2]
    size = block if block is not None and n > block else n
    return e.view(*e.shape[:2], n // size, size, e.shape[3])


def _pool(values: Tensor, block: int | None) -> Tensor:
    """``[..., K]`` to ``[..., key blocks, block]``; the last block is filled up with zeros (weights are not negative)."""
    assert block is not None
    pad = -values.shape[-1] % block
    return torch.nn.functional.pad(values, (0, pad)).unflatten(-1, (-1, block))


def _window(place: tuple[slice, ...], grid: Tensor, block: int | None) -> tuple[slice, slice, slice, slice]:
    """Where a chunk's blocks lie in the block map."""
    assert block is not None
    i, j = place[2].start // block, place[3].start // block
    return slice(None), slice(None), slice(i, i + grid.shape[2]), slice(j, j - (-grid.shape[4] // block))


def _far(rows: slice, columns: slice, offset: int, window: int | None, like: Tensor) -> Tensor:
    at = torch.arange(rows.start + offset, rows.stop + offset, dtype=like.dtype, device=like.device)
    far = (at[:, None] - torch.arange(columns.start, columns.stop, dtype=like.dtype, device=like.device)).abs_()
    return far if window is None else far.clamp_(max=window)


def _lengths(length: int, size: int, like: Tensor) -> Tensor:
    """Tokens in each block."""
    edges = torch.arange(0, length, size, device=like.device, dtype=like.dtype)
    return (length - edges).clamp(max=size)


class _Buffers:
    """Scratch that lives as long as a slab; grown when a chunk needs more."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.held: list[Tensor] = [like.new_empty(0), like.new_empty(0)]

    def take(self, which: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self.held[which].numel() < size:
            self.held[which] = self.like.new_empty(0)
            self.held[which] = self.like.new_empty(size)
        return self.held[which][:size].view(shape)
