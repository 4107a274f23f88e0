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

from workbench.kernels.mask import Mask
from workbench.kernels.scores import HIDDEN, Scores
from workbench.kernels.stats.reference import pair_weights
from workbench.kernels.stats.request import Wanted, block_cells, layout

CHUNK = 2**20
"""Scores per chunk, raised to 64 rows of the longest inputs but never above ``4 * CHUNK``. At 2**20 the two buffers are 4 MiB
each in float32 and stay in a last-level cache."""
_LOG2E = math.log2(math.e)
_LN2 = math.log(2.0)


class _Sums:
    """Accumulators of one call: ``out`` by the names of ``layout``, what a row finds or the cells of the grid."""

    def __init__(self, scores: Scores, wanted: Wanted) -> None:
        b, h, q, k = scores.shape
        like = scores.q.new_empty(0, dtype=scores.dtype)
        row = (b, h, q)
        size = wanted.block or 1
        grid = (b, h, -(-q // size), -(-k // size))
        self.lse = like.new_full(row, float("-inf"))
        if scores.sink is not None:
            self.lse.copy_(scores.sink.to(like)[None, :, None].expand(row))
        self.mass = like.new_zeros(grid) if {"sum", "mean", "abs"} & set(wanted.reduce) else None
        self.peak = like.new_zeros(grid) if "max" in wanted.reduce else None
        self.out: dict[str, Tensor] = {}
        for name in layout(wanted):
            if name == "lse" or name.startswith("blocks "):
                continue
            shape: tuple[int, ...] = (b, h, k) if name == "received" else row
            shape = (*row, wanted.topk or 0) if name.startswith("topk") else shape
            whole = name.endswith(" keys")
            self.out[name] = torch.full(shape, -1, device=like.device) if whole else like.new_zeros(shape)
        self.extra = bool({"distance", "windowed", "distance2"} & set(wanted.stats)) or bool(wanted.pairs)

    def ordered(self, scores: Scores, wanted: Wanted) -> list[Tensor]:
        _, _, q, k = scores.shape
        found = {"lse": self.lse, **self.out}
        for name in wanted.reduce:
            assert wanted.block is not None
            part = self.peak if name == "max" else self.mass
            assert part is not None
            if name == "mean":
                part = part / block_cells(q, k, wanted.block, part)
            found[f"blocks {name}"] = part.clone() if any(part is other for other in found.values()) else part
        return [found[name] for name in layout(wanted)]


def blocked_stats(scores: Scores, lse: Tensor | None, wanted: Wanted) -> list[Tensor]:
    sums = _Sums(scores, wanted)
    if lse is not None:
        sums.lse.copy_(lse)
    for batch, groups in _slabs(scores):
        _slab(scores, lse is not None, wanted, sums, batch, groups)
    return sums.ordered(scores, wanted)


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
        apart = "entropy" in sums.out or sums.extra
        other = spare.take(1, (nb, nh, n, m)) if apart else x
        _reduce(x, other, sink, known, wanted, sums, (batch, heads, rows, columns), scores)


def _reduce(
    x: Tensor,
    out: Tensor,
    sink: Tensor | None,
    known: bool,
    wanted: Wanted,
    sums: _Sums,
    place: tuple[slice, slice, slice, slice],
    scores: Scores,
) -> None:
    """Everything that is wanted of one chunk of base-2 scores; ``x`` and ``out`` are overwritten."""
    batch, heads, rows, columns = place
    at = (batch, heads, rows)
    out_of = sums.out
    top = x if known else x.amax(-1)
    key = top
    if "top1 keys" in out_of:
        top, key = _argmax(x)
    best = x.topk(min(wanted.topk, x.shape[-1])) if wanted.topk else None
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
    if "top1 keys" in out_of:
        largest = torch.exp2(top - base).mul_(weight)
        out_of["top1 values"][at] = largest
        out_of["top1 keys"][at] = torch.where(largest > 0, key + columns.start, -1)
    if best is not None:
        held = best.values.shape[-1]
        largest = torch.exp2(best.values - base[..., None]).mul_(weight[..., None])
        out_of["topk values"][at][..., :held] = largest
        out_of["topk keys"][at][..., :held] = torch.where(largest > 0, best.indices + columns.start, -1)
    if sums.peak is not None:
        e.mul_(weight[..., None])
        total, weight = total * weight, torch.ones_like(weight)
        grid = _grid(e, wanted.block)
        part = sums.peak[batch, heads][_window(place, grid, wanted.block)]
        torch.maximum(part, _pool(grid.amax(3), wanted.block).amax(-1), out=part)
    if sums.mass is not None or "received" in out_of:
        grid = _grid(e, wanted.block)
        by_key = (weight.view(*grid.shape[:3], 1, grid.shape[3]) @ grid).squeeze(3)
        if "received" in out_of:
            out_of["received"][batch, heads, columns] += by_key.sum(2)
        if sums.mass is not None:
            sums.mass[batch, heads][_window(place, grid, wanted.block)] += _pool(by_key, wanted.block).sum(-1)
    if "entropy" in out_of:
        out_of["entropy"][at] = (rest * total - torch.mul(e, x, out=x).sum(-1)).mul_(weight * _LN2)
    if wanted.keys:
        sets = torch.stack(
            [w[batch if len(w) > 1 else slice(None)][:, columns].expand(len(e), -1) for w in wanted.keys], -1
        )
        masses = (e @ sets[:, None]).mul_(weight[..., None])
        for i in range(len(wanted.keys)):
            out_of[f"mass {i}"][at] = masses[..., i]
    if sums.extra:
        _far_sums(e, x, weight, wanted, out_of, at, _far(rows, columns, scores.mask.offset, e))
    for i, pair in enumerate(wanted.pairs, len(wanted.keys)):
        w = pair_weights(pair, scores, rows.start, rows.stop, columns)
        w = w[batch] if w.ndim == 4 and w.shape[0] > 1 else w
        w = w[:, heads] if w.ndim == 4 and w.shape[1] > 1 else w[heads] if w.ndim == 3 and w.shape[0] > 1 else w
        out_of[f"mass {i}"][at] = torch.mul(e, w, out=x).sum(-1).mul_(weight)


def _far_sums(
    e: Tensor,
    spare: Tensor,
    weight: Tensor,
    wanted: Wanted,
    out: dict[str, Tensor],
    at: tuple[slice, slice, slice],
    far: Tensor,
) -> None:
    """Weighted distances; ``spare`` is overwritten."""
    for name in ("distance", "windowed", "distance2"):
        if name in out:
            by = far.clamp(max=wanted.window) if name == "windowed" else far.square() if name == "distance2" else far
            out[name][at] = torch.mul(e, by, out=spare).sum(-1).mul_(weight)


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


def _far(rows: slice, columns: slice, offset: int, like: Tensor) -> Tensor:
    at = torch.arange(rows.start + offset, rows.stop + offset, dtype=like.dtype, device=like.device)
    return (at[:, None] - torch.arange(columns.start, columns.stop, dtype=like.dtype, device=like.device)).abs_()


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
