"""Row chunks of attention in plain torch: which query rows meet which keys, and their base-2 scores, without Q x K memory.

A ``Span`` is a run of query rows of some heads against a run of keys; the heads that share a key head are folded into the rows of
one product. With ``mask.blocks`` a chunk is ``Picked`` instead: block rows that see equally many key blocks, each against its own
visible blocks, gathered; what the block mask hides is never multiplied. Both offer the same few moves, in ``C`` products of
``R`` rows by ``M`` keys, so that forward and backward are written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.kernels.mask import Mask, in_window
from workbench.kernels.scores import HIDDEN, Scores

CHUNK = 2**20
"""Scores per chunk, raised to 64 rows of the longest inputs but never above ``4 * CHUNK``, so that buffers stay in cache."""
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


def unseen(scores: Scores) -> tuple[Tensor | None, Tensor | None]:
    """Keys ``[B or 1, K]`` that no query sees and queries ``[B or 1, Q]`` that ``mask.queries`` empties; None if there are none.

    Such positions are memory that perhaps nobody wrote, and NaN times a weight of zero is NaN.
    """
    mask, (_, _, q, k) = scores.mask, scores.shape
    parts = [] if mask.keys is None else [~mask.keys]
    if mask.dense is not None:
        parts.append(~mask.dense.any(2).any(1))
    if mask.blocks is not None and mask.side is not None:
        parts.append(~mask.blocks.any(2).any(1).repeat_interleave(mask.side, 1)[:, :k])
    low, high = replace(mask, documents=None, keys=None, blocks=None, side=None).span(0, q, k)
    if (low, high) != (0, k):
        at = torch.arange(k, device=scores.q.device)[None]
        parts.append((at < low) | (at >= high))
    keys = None
    for part in parts:
        part = part.to(scores.q.device)
        keys = part if keys is None else keys | part
    return keys, None if mask.queries is None else ~mask.queries.to(scores.q.device)


def blank(tensor: Tensor, hidden: Tensor | None) -> Tensor:
    """``tensor`` ``[B, heads, tokens, E]`` with zeros where ``hidden`` ``[B or 1, tokens]``."""
    return tensor if hidden is None else tensor.masked_fill(hidden[:, None, :, None], 0.0)


@dataclass(frozen=True, eq=False)
class Span:
    """Query rows ``rows`` against keys ``columns`` of some examples and key heads."""

    scores: Scores
    mask: Mask
    batch: slice
    groups: slice
    rows: slice
    columns: slice

    @property
    def heads(self) -> slice:
        fold = self.scores.shape[1] // self.scores.k.shape[1]
        return slice(self.groups.start * fold, self.groups.stop * fold)

    @property
    def full(self) -> tuple[int, int, int, int]:
        """Shape of the scores with examples, heads and rows apart."""
        lengths = [part.stop - part.start for part in (self.batch, self.heads, self.rows, self.columns)]
        return lengths[0], lengths[1], lengths[2], lengths[3]

    @property
    def flat(self) -> tuple[int, int, int]:
        """Shape of the scores as ``C`` products."""
        b, h, n, m = self.full
        groups = self.groups.stop - self.groups.start
        return b * groups, h // groups * n, m

    def take_rows(self, tensor: Tensor) -> Tensor:
        """``[B, H, Q, ...]`` to ``[C, R, ...]``."""
        return tensor[self.batch, self.heads, self.rows].reshape(*self.flat[:2], *tensor.shape[3:])

    def put_rows(self, tensor: Tensor, value: Tensor) -> None:
        tensor[self.batch, self.heads, self.rows] = value.view(*self.full[:3], *tensor.shape[3:]).to(tensor.dtype)

    def take_keys(self, tensor: Tensor) -> Tensor:
        """``[B, G, K, E]`` to ``[C, M, E]``."""
        return tensor[self.batch, self.groups, self.columns].flatten(0, 1)

    def add_keys(self, tensor: Tensor, value: Tensor) -> None:
        part = tensor[self.batch, self.groups, self.columns]
        part += value.view(part.shape)

    def along_keys(self, tensor: Tensor) -> Tensor:
        """``[B, H, K]`` broadcastable to ``full``."""
        return tensor[self.batch, self.heads, None, self.columns]

    def sink(self) -> Tensor | None:
        """``[C, R]``, base 2."""
        logits = self.scores.sink_logits()
        if logits is None:
            return None
        return (logits[:, self.heads] * LOG2E).expand(self.full[:3]).reshape(self.flat[:2])

    def bias(self) -> Tensor:
        return self.scores.bias_tile(self.rows, self.columns, self.batch, self.heads)

    def hide(self, x: Tensor) -> None:
        """Push hidden scores to ``HIDDEN``. A minimum with a float tile is many times faster than masked_fill on CPUs."""
        rows, columns = self.rows, self.columns
        start, stop = self.mask.open(rows.start, rows.stop, columns.start, columns.stop)
        for part in (slice(columns.start, start), slice(stop, columns.stop)):
            if part.start < part.stop:
                allowed = self.mask.tile(rows, part, x.device)
                if allowed is not None:
                    view = x.view(self.full)[..., part.start - columns.start : part.stop - columns.start]
                    torch.minimum(view, _ceiling(allowed, x), out=view)

    def add_mass(self, blocks: Tensor, e: Tensor, weight: Tensor, block: int) -> None:
        """Add the block sums of ``weight`` ``[C, R]`` times ``e``."""
        grid = self._grid(e, block)
        by_key = (weight.view(*grid.shape[:3], 1, grid.shape[3]) @ grid).squeeze(3)
        self._blocks(blocks, grid, block).add_(_pool(by_key, block).sum(-1))

    def raise_peak(self, blocks: Tensor, p: Tensor, block: int) -> None:
        grid = self._grid(p, block)
        part = self._blocks(blocks, grid, block)
        torch.maximum(part, _pool(grid.amax(3), block).amax(-1), out=part)

    def spread(self, blocks: Tensor, block: int) -> Tensor:
        """A block map ``[B, H, I, J]`` at every pair, ``full``."""
        i = torch.arange(self.rows.start, self.rows.stop, device=blocks.device) // block
        j = torch.arange(self.columns.start, self.columns.stop, device=blocks.device) // block
        return blocks[self.batch, self.heads][..., j][:, :, i]

    def _grid(self, e: Tensor, block: int) -> Tensor:
        """``[B, H, row blocks, rows in one, M]``: a chunk is whole blocks of rows or lies inside one."""
        b, h, n, m = self.full
        size = block if n > block else n
        return e.view(b, h, n // size, size, m)

    def _blocks(self, blocks: Tensor, grid: Tensor, block: int) -> Tensor:
        i, j = self.rows.start // block, self.columns.start // block
        return blocks[self.batch, self.heads, i : i + grid.shape[2], j : j - (-grid.shape[4] // block)]


@dataclass(frozen=True, eq=False)
class Picked:
    """``C`` block rows, each of one example and head (``b``, ``h`` ``[C]``), against its own key blocks ``j`` ``[C, blocks]``."""

    scores: Scores
    b: Tensor
    h: Tensor
    j: Tensor
    positions: Tensor
    """Query rows, ``[C, R]``."""

    @property
    def side(self) -> int:
        assert self.scores.mask.side is not None
        return self.scores.mask.side

    @property
    def full(self) -> tuple[int, int, int, int]:
        c, n = self.positions.shape
        return c, 1, n, self.j.shape[1] * self.side

    @property
    def flat(self) -> tuple[int, int, int]:
        c, _, n, m = self.full
        return c, n, m

    @property
    def columns(self) -> Tensor:
        """Key positions ``[C, M]``; those of the last block may lie past the end."""
        return (self.j[..., None] * self.side + torch.arange(self.side, device=self.j.device)).flatten(1)

    def take_rows(self, tensor: Tensor) -> Tensor:
        return tensor[self.b[:, None], self.h[:, None], self.positions]

    def put_rows(self, tensor: Tensor, value: Tensor) -> None:
        tensor[self.b[:, None], self.h[:, None], self.positions] = value.to(tensor.dtype)

    def take_keys(self, tensor: Tensor) -> Tensor:
        c, _, _, m = self.full
        return self._by_block(tensor)[self._at(tensor)].view(c, m, tensor.shape[3])

    def add_keys(self, tensor: Tensor, value: Tensor) -> None:
        self._by_block(tensor).index_add_(0, self._at(tensor).flatten(), value.reshape(self.j.numel(), -1))

    def along_keys(self, tensor: Tensor) -> Tensor:
        columns = self.columns.clamp(max=tensor.shape[2] - 1)
        return tensor[self.b[:, None], self.h[:, None], columns][:, None, None]

    def sink(self) -> Tensor | None:
        logits = self.scores.sink_logits()
        return None if logits is None else (logits[0, self.h] * LOG2E).expand(self.positions.shape)

    def bias(self) -> Tensor:
        k = self.scores.shape[3]
        rows = []
        for b, h, lo, columns in zip(
            self.b.tolist(), self.h.tolist(), self.positions[:, 0].tolist(), self.columns, strict=True
        ):
            part = self.scores.bias_tile(
                slice(lo, lo + self.positions.shape[1]), slice(0, k), slice(b, b + 1), slice(h, h + 1)
            )
            rows.append(part.expand(1, 1, self.positions.shape[1], k)[0, ..., columns.clamp(max=k - 1)])
        return torch.stack(rows)

    def hide(self, x: Tensor) -> None:
        mask, k = self.scores.mask, self.scores.shape[3]
        rows, columns = self.positions[:, :, None], self.columns[:, None, :]
        allowed = (columns < k).expand(self.flat)
        places, columns = rows + mask.offset, columns.clamp(max=k - 1)
        near: Tensor | None = None
        if mask.window is not None:
            near = in_window(places, columns, mask.window)
            near = near if mask.causal else near | in_window(columns, places, mask.window)
        elif mask.causal:
            near = columns <= places
        if near is not None:
            allowed = allowed & (near | (columns < mask.prefix))
        b, h = self.b[:, None, None], self.h[:, None, None]
        if mask.documents is not None:
            numbers = mask.documents.to(x.device).expand(self.scores.shape[0], -1)
            allowed = allowed & (numbers[b, places] == numbers[b, columns])
        if mask.keys is not None:
            allowed = allowed & mask.keys.to(x.device).expand(self.scores.shape[0], -1)[b, columns]
        if mask.queries is not None:
            allowed = allowed & mask.queries.to(x.device).expand(self.scores.shape[0], -1)[b, rows]
        if mask.dense is not None:
            allowed = allowed & mask.dense.to(x.device).expand(self.scores.shape)[b, h, rows, columns]
        torch.minimum(x, _ceiling(allowed, x), out=x)

    def add_mass(self, blocks: Tensor, e: Tensor, weight: Tensor, block: int) -> None:
        cells = e.unflatten(2, (-1, math.gcd(self.side, block))).sum(-1) * weight[..., None]
        blocks.view(-1).index_add_(0, self._cells(blocks, block).flatten(), cells.flatten())

    def raise_peak(self, blocks: Tensor, p: Tensor, block: int) -> None:
        cells = p.unflatten(2, (-1, math.gcd(self.side, block))).amax(-1)
        blocks.view(-1).scatter_reduce_(0, self._cells(blocks, block).flatten(), cells.flatten(), "amax")

    def spread(self, blocks: Tensor, block: int) -> Tensor:
        i = self.positions[:, :, None] // block
        j = (self.columns // block).clamp(max=blocks.shape[3] - 1)[:, None, :]
        return blocks[self.b[:, None, None], self.h[:, None, None], i, j][:, None]

    def _cells(self, blocks: Tensor, block: int) -> Tensor:
        """Where the cells ``[C, R, M / cell]`` lie in a block map. A cell, the common measure of both sides, lies in one."""
        _, heads, rows, columns = blocks.shape
        j = (self.columns[:, :: math.gcd(self.side, block)] // block).clamp(max=columns - 1)
        at = (self.b * heads + self.h)[:, None] * rows + self.positions // block
        return at[:, :, None] * columns + j[:, None, :]

    def _by_block(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1, self.side * tensor.shape[3])

    def _at(self, tensor: Tensor) -> Tensor:
        group = self.h // (self.scores.shape[1] // tensor.shape[1])
        return ((self.b * tensor.shape[1] + group) * (tensor.shape[2] // self.side))[:, None] + self.j


def key_length(scores: Scores) -> int:
    """Keys that a tensor ``[B, G, K, E]`` must have for ``take_keys`` and ``add_keys``: whole blocks under a block mask."""
    side = scores.mask.side or 1
    return -(-scores.shape[3] // side) * side


def chunks(scores: Scores, block: int | None) -> Iterator[Span | Picked]:
    """All visible pairs once, every query row in one chunk at most; rows that are in none see nothing."""
    if scores.mask.blocks is not None:
        yield from _picked(scores)
        return
    b, h, q, k = scores.shape
    g = scores.k.shape[1]
    one = h // g * min(q, 64) * k
    groups = min(g, max(1, _budget(k) // one))
    examples = min(b, max(1, _budget(k) // (one * g))) if groups == g else 1
    for i in range(0, b, examples):
        for j in range(0, g, groups):
            whole = Span(
                scores,
                scores.mask,
                slice(i, min(b, i + examples)),
                slice(j, min(g, j + groups)),
                slice(0, q),
                slice(0, k),
            )
            mask = scores.mask.select(whole.batch, whole.heads)
            for lo, hi, first, last in _rows(mask, q, k, math.prod(whole.full[:2]), block):
                yield replace(whole, mask=mask, rows=slice(lo, hi), columns=slice(first, last))


def _budget(keys: int) -> int:
    return max(CHUNK, min(4 * CHUNK, 64 * keys))


def _rows(mask: Mask, q: int, k: int, heads: int, block: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Row ranges and their key spans. A range is whole blocks of rows or lies inside one; a span starts at a block."""
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


def _picked(scores: Scores) -> Iterator[Picked]:
    mask, (b, h, q, k) = scores.mask, scores.shape
    assert mask.blocks is not None
    assert mask.side is not None
    side, rest = mask.side, replace(mask, blocks=None, side=None)
    visible = mask.blocks.to(scores.q.device).expand(b, h, -1, -1).clone()
    for i in range(visible.shape[2]):
        first, last = rest.span(i * side, min(q, i * side + side), k)
        visible[:, :, i, : first // side] = False
        visible[:, :, i, -(-last // side) :] = False
    counts = visible.sum(-1)
    short = torch.arange(visible.shape[2], device=counts.device) == q // side  # the last block row, if it is not whole
    for count in counts.unique().tolist():
        for tail in (False, True):
            at = ((counts == count) & (short == tail)).nonzero() if count else counts.new_empty(0, 3)
            height = q % side if tail else side
            step = max(1, min(height, CHUNK // max(1, count * side)))
            some = max(1, CHUNK // (step * max(1, count * side)))
            for part in at.split(some) if len(at) else ():
                ib, ih, i = part.unbind(1)
                j = visible[ib, ih, i].nonzero()[:, 1].view(len(part), count)
                for lo in range(0, height, step):
                    rows = torch.arange(lo, min(height, lo + step), device=i.device)
                    yield Picked(scores, ib, ih, j, i[:, None] * side + rows)


def _ceiling(allowed: Tensor, like: Tensor) -> Tensor:
    return allowed.to(like.dtype).sub_(0.5).mul_(float("inf")).clamp_(min=HIDDEN)


def _pool(values: Tensor, block: int) -> Tensor:
    """``[..., M]`` to ``[..., key blocks, block]``; the last block is filled up with zeros (weights are not negative)."""
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % block)).unflatten(-1, (-1, block))


class Buffers:
    """Scratch that lives as long as a call; grown when a chunk needs more."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.held: dict[int, Tensor] = {}

    def take(self, which: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if which not in self.held or self.held[which].numel() < size:
            self.held.pop(which, None)
            self.held[which] = self.like.new_empty(size)
        return self.held[which][:size].view(shape)
