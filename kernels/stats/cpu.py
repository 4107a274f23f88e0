"""``attention_stats`` in row chunks of plain torch: each chunk of query rows meets only the keys its mask span allows.

Per chunk, in base 2 (torch's exp2 is several times faster than exp on CPUs) and in two reused buffers:

    x = s log2(e) - m        m: row maximum, or the given lse
    e = 2^x,  l = sum e      p = e / l, never formed: the row factor w = 1 / l goes into the reductions
    blocks, received         w^T e, one matrix product per block of rows; largest weights are those of the largest x
    entropy                  ln 2 (log2(l) sum p - w sum e x): both terms of one sign, nothing cancels
    a gate g                 w = g / l and log2(l / g)

Chunks and their scores are those of ``kernels/pairs/chunks.py``: under a block mask only visible blocks are multiplied. With a
given lse and no top keys wanted, a row may come in pieces, whose sums add up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from workbench.kernels.pairs.chunks import LN2, Buffers, base_two, blank, chunks, key_length, unseen, whole
from workbench.kernels.pairs.picked import Picked
from workbench.kernels.pairs.span import LOG2E, Span
from workbench.kernels.scores import HIDDEN, Scores
from workbench.kernels.stats.reference import pair_weights
from workbench.kernels.stats.request import Wanted, block_cells, layout

_FAR = ("distance", "windowed", "distance2")


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
        self.sets = torch.stack([w.expand(b, -1) for w in wanted.keys], -1).to(like) if wanted.keys else None
        self.out: dict[str, Tensor] = {}
        for name in layout(wanted):
            if name == "lse" or name.startswith("blocks "):
                continue
            shape: tuple[int, ...] = (b, h, k) if name == "received" else row
            shape = (*row, wanted.topk or 0) if name.startswith("topk") else shape
            whole = name.endswith(" keys")
            self.out[name] = torch.full(shape, -1, device=like.device) if whole else like.new_zeros(shape)
        self.apart = bool({"entropy", *_FAR} & set(wanted.stats)) or bool(wanted.pairs)
        """Whether the scores are still needed, or their room, after they were exponentiated."""

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
    hidden_keys, hidden_rows = unseen(scores)
    queries = blank(scores.q, hidden_rows)
    keys = whole(blank(scores.k, hidden_keys).to(sums.lse), key_length(scores))
    spare = Buffers(keys)
    spread = lse is not None and not wanted.topk and "top1" not in wanted.stats
    for chunk in chunks(scores, wanted.block, whole_rows=not spread):
        x, _ = base_two(chunk, queries, keys, spare)
        _reduce(chunk, x, spare.take(1, chunk.flat) if sums.apart else x, lse is not None, wanted, sums)
    return sums.ordered(scores, wanted)


def _reduce(chunk: Span | Picked, x: Tensor, out: Tensor, known: bool, wanted: Wanted, sums: _Sums) -> None:
    """Everything that is wanted of one chunk of base-2 scores ``[C, R, M]``; ``x`` and ``out`` are overwritten."""
    found, sink = sums.out, chunk.sink()
    tops = chunk.tops(x, wanted.block) if sums.peak is not None and wanted.block is not None else None
    top = x if known else x.amax(-1) if tops is None else tops.amax(-1)
    key = top
    if "top1 keys" in found:
        top, key = _argmax(x)
    best = x.topk(min(wanted.topk, x.shape[-1])) if wanted.topk else None
    if known:
        base = chunk.take_rows(sums.lse) * LOG2E
        base = base.masked_fill(base.isinf(), -HIDDEN)
    else:
        base = top if sink is None else torch.maximum(top, sink)
        base = base.masked_fill(base <= HIDDEN / 2, 0.0)
    e = torch.exp2(x.sub_(base[..., None]), out=out)
    weight, rest = torch.ones_like(base), torch.zeros_like(base)
    total = weight if known and wanted.gate is None else e.sum(-1)  # read only where rest is not zero
    if not known:
        denominator = total if sink is None else total + torch.exp2(sink - base)
        chunk.put_rows(sums.lse, (base + denominator.log2()) * LN2)
        blind = denominator == 0
        rest = denominator.log2().masked_fill_(blind, 0.0)
        weight = denominator.reciprocal().masked_fill_(blind, 0.0)
    if wanted.gate is not None:
        gate = chunk.take_rows(wanted.gate).to(weight)
        weight = weight * gate
        rest = rest - gate.log2().masked_fill_(gate == 0, 0.0)
    if "top1 keys" in found:
        largest = torch.exp2(top - base).mul_(weight)
        chunk.put_rows(found["top1 values"], largest)
        chunk.put_rows(found["top1 keys"], torch.where(largest > 0, chunk.key_at(key), -1))
    if best is not None:
        largest = torch.exp2(best.values - base[..., None]).mul_(weight[..., None])
        positions = torch.where(largest > 0, chunk.key_at(best.indices), -1)
        chunk.put_rows(found["topk values"][..., : largest.shape[-1]], largest)
        chunk.put_rows(found["topk keys"][..., : largest.shape[-1]], positions)
    if sums.peak is not None and wanted.block is not None and tops is not None:
        chunk.raise_peak(sums.peak, torch.exp2(tops - base[..., None]).mul_(weight[..., None]), wanted.block)
    if sums.mass is not None or "received" in found:
        chunk.add_sums(e, weight, sums.mass, wanted.block, found.get("received"))
    if "entropy" in found:
        chunk.add_rows(found["entropy"], (rest * total - torch.mul(e, x, out=x).sum(-1)).mul_(weight * LN2))
    if sums.sets is not None:
        masses = (e.view(chunk.full) @ chunk.key_table(sums.sets)).view(*weight.shape, -1) * weight[..., None]
        for i, mass in enumerate(masses.unbind(-1)):
            chunk.add_rows(found[f"mass {i}"], mass)
    if wanted.pairs or any(name in found for name in _FAR):
        _weighted(chunk, e.view(chunk.full), x.view(chunk.full), weight, wanted, found)


def _weighted(
    chunk: Span | Picked, e: Tensor, spare: Tensor, weight: Tensor, wanted: Wanted, found: dict[str, Tensor]
) -> None:
    """Distances and masses of weight functions; ``spare`` is overwritten."""
    indices = chunk.indices()
    far = (indices[2] - indices[3]).abs().to(e)
    factors: dict[str, Callable[[], Tensor]] = {
        "distance": lambda: far,
        "windowed": lambda: far.clamp(max=wanted.window),
        "distance2": far.square,
    }
    makers: dict[str, Callable[[], Tensor]] = {name: factors[name] for name in _FAR if name in found}
    for i, pair in enumerate(wanted.pairs, len(wanted.keys)):
        makers[f"mass {i}"] = partial(pair_weights, pair, indices, e.dtype)
    for name, factor in makers.items():
        total = torch.mul(e, factor(), out=spare).sum(-1).view(weight.shape)
        chunk.add_rows(found[name], total.mul_(weight))


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
