"""Row chunks of attention in plain torch: which query rows meet which keys, and their base-2 scores, without Q x K memory.

A chunk is a ``Span``, or ``Picked`` under a block mask; both offer the same moves, so that statistics, forward and backward are
each written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from workbench.kernels.mask import Mask
from workbench.kernels.pairs.picked import Picked
from workbench.kernels.pairs.span import LOG2E, Span
from workbench.kernels.scores import HIDDEN, Scores

CHUNK = 2**20
"""Scores per chunk, raised to 64 rows of the longest inputs but never above ``4 * CHUNK``, so that buffers stay in cache."""
TILE = (1024, 1024)
"""Rows, those of the heads of a group together, and keys of a chunk that need not hold whole rows: 4 MiB of float32."""
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


def key_length(scores: Scores) -> int:
    """Keys that a tensor ``[B, G, K, E]`` must have for ``take_keys`` and ``add_keys``: whole blocks under a block mask."""
    side = scores.mask.side or 1
    return -(-scores.shape[3] // side) * side


def chunks(scores: Scores, block: int | None, whole_rows: bool = True) -> Iterator[Span | Picked]:
    """All visible pairs once; query rows that are in no chunk see nothing.

    With ``whole_rows`` a row is in one chunk at most. Without, a chunk is a ``TILE``: squarer, which matrix products like, and
    small enough to stay in caches; a row is then spread over several.
    """
    if scores.mask.blocks is not None:
        yield from _picked(scores)
        return
    b, h, q, k = scores.shape
    g = scores.k.shape[1]
    if whole_rows:
        budget, height, width = _budget(k), q, k
        one = h // g * min(q, 64) * k
    else:
        height, width = max(1, TILE[0] // (h // g)), TILE[1]
        one = h // g * min(q, height) * min(k, width)
        budget = max(one, TILE[0] * TILE[1])
    groups = min(g, max(1, budget // one))
    examples = min(b, max(1, budget // (one * g))) if groups == g else 1
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
            heads = math.prod(whole.full[:2])
            for lo, hi, first, last in _rows(mask, q, k, heads, block, budget, height, width):
                step = width if block is None or width >= k else max(1, width // block) * block
                for start in range(first, last, step):
                    yield replace(whole, mask=mask, rows=slice(lo, hi), columns=slice(start, min(last, start + step)))


def _budget(keys: int) -> int:
    return max(CHUNK, min(4 * CHUNK, 64 * keys))


def _rows(
    mask: Mask, q: int, k: int, heads: int, block: int | None, budget: int, height: int, width: int
) -> Iterator[tuple[int, int, int, int]]:
    """Row ranges of at most ``height`` and their key spans, of which ``width`` keys at a time stay within the budget. A range is
    whole blocks of rows or lies inside one; a span starts at a block."""
    lo, step = 0, q
    while lo < q:
        step = min(q - lo, 2 * step, height)
        while True:
            first, last = mask.span(lo, lo + step, k)
            keys = min(width, last - first)
            if heads * step * keys <= budget or step == 1:
                break
            step = max(1, min(step - 1, max(step // 2, budget // (heads * keys))))
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


def base_two(chunk: Span | Picked, queries: Tensor, keys: Tensor, spare: Buffers) -> tuple[Tensor, Tensor | None]:
    """Base-2 scores ``[C, R, M]`` in buffer 0, ``HIDDEN`` or less where hidden; under a softcap also the tanh, in buffer 2."""
    scores = chunk.scores
    assert scores.scale is not None
    x = spare.take(0, chunk.flat)
    cap = scores.softcap
    part = chunk.take_rows(queries).to(x.dtype) * (scores.scale * LOG2E if cap is None else scores.scale / cap)
    product(part, chunk.take_keys(keys).transpose(1, 2), x)
    bent = None
    if cap is not None:
        bent = spare.take(2, chunk.flat)
        torch.tanh(x, out=bent)
        torch.mul(bent, cap * LOG2E, out=x)
    if scores.bias is not None:
        x.view(chunk.full).add_(chunk.bias(), alpha=LOG2E).clamp_(min=HIDDEN)
    chunk.hide(x)
    return x, bent


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` of ``C`` matrices. A single one goes through ``mm``, which on CPUs is up to a quarter faster."""
    if len(a) > 1:
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    return torch.mm(a[0], b[0])[None] if out is None else torch.mm(a[0], b[0], out=out[0])[None]


def whole(tensor: Tensor, length: int) -> Tensor:
    """``[B, G, K, E]`` filled up with zeros to ``length`` keys, contiguous."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[2])).contiguous()
