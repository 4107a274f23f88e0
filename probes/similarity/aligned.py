"""The real rows of a layer, some at a time, each sequence moved so that its first real token is row and column 0.

What compares rows, heads, layers or steps works on these, so padding never counts and a sequence gives the same numbers alone as
in a batch. Nothing of size Q x K is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.probes.padding import Padding, padding
from workbench.probes.sources import inner, maps_of, tokens_of
from workbench.probes.visibility import Visibility, visibility

CHUNK = 2**22
"""Numbers of all maps that are walked together that are held at a time."""


@dataclass(frozen=True)
class Aligned:
    """One layer. ``query_start key_start`` ``[B]``: the first real query and key of each sequence; ``queries keys`` ``[B]``: from
    there to the last real one. ``real_queries`` ``[B, Q]`` and ``real_keys`` ``[B, K]`` are aligned and False on padding."""

    name: int | str
    amap: AttentionMap
    seen: Visibility
    query_start: Tensor
    key_start: Tensor
    real_queries: Tensor
    real_keys: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sequences, heads, and the queries and keys of the longest sequence."""
        return (*self.amap.shape[:2], self.real_queries.shape[1], self.real_keys.shape[1])

    @property
    def padded(self) -> bool:
        """Whether anything is moved or left out."""
        return self.shape != self.amap.shape or not bool(self.real_queries.all() and self.real_keys.all())

    def rows(self, lo: int, hi: int) -> Tensor:
        """Aligned rows ``[lo, hi)``, ``[B, H, hi - lo, K]`` in float64 on the CPU; 0 on padding."""
        return self._moved(lo, hi, lambda a, z: self.amap.rows(a, z).detach().cpu().double(), 0.0)

    def visible(self, lo: int, hi: int) -> Tensor:
        """Which keys those rows may see, bool ``[B, H or 1, hi - lo, K]``."""
        batch = self.amap.shape[0]
        return self._moved(lo, hi, lambda a, z: self.seen.tile(a, z).expand(batch, -1, -1, -1), False)

    def step(self, copies: int = 1) -> int:
        """Rows that fit ``CHUNK`` with so many copies of them in work."""
        b, h, queries, keys = self.shape
        return max(1, min(queries, CHUNK // max(1, b * h * keys * copies)))

    def chunks(self, copies: int = 1) -> Iterator[tuple[int, int, Tensor]]:
        """All rows, some at a time: ``lo, hi, rows``."""
        step = self.step(copies)
        for lo in range(0, self.shape[2], step):
            hi = min(self.shape[2], lo + step)
            yield lo, hi, self.rows(lo, hi)

    def block_sums(self, size: int) -> Tensor:
        """Sums over blocks of ``size`` aligned queries and keys, ``[B, H, ceil(Q/size), ceil(K/size)]`` in float64."""
        if size < 1:
            raise WorkbenchError(f"a block has at least one token; got size={size}")
        if not self.padded:
            return self.amap.blocks(size, "sum").detach().cpu().double()
        b, h, queries, keys = self.shape
        out = torch.zeros(b, h, -(-queries // size), -(-keys // size), dtype=torch.float64)
        column = one_hot(torch.arange(keys) // size).double()
        for lo, hi, rows in self.chunks():
            out.index_add_(2, torch.arange(lo, hi) // size, rows @ column)
        return out

    def _moved(self, lo: int, hi: int, make: Callable[[int, int], Tensor], empty: float | bool) -> Tensor:
        last = self.amap.shape[2]
        starts = self.query_start.unique().tolist()
        if len(starts) == 1:
            part = _grown(make(lo + starts[0], min(last, hi + starts[0])), hi - lo, empty)
        else:
            found: dict[int, Tensor] = {}
            for start in starts:
                here = self.query_start == start
                rows = _grown(make(min(last, lo + start), min(last, hi + start))[here], hi - lo, empty)
                found |= dict(zip(here.nonzero()[:, 0].tolist(), rows, strict=True))
            part = torch.stack([found[b] for b in range(len(self.query_start))])
        width = self.real_keys.shape[1]
        if bool((self.key_start > 0).any()):
            at = (torch.arange(width) + self.key_start[:, None]).clamp(max=part.shape[-1] - 1)
            part = part.gather(-1, at[:, None, None].expand(*part.shape[:3], width))
        part = part[..., :width]
        if self.padded:
            real = self.real_queries[:, None, lo:hi, None] & self.real_keys[:, None, None]
            part = part.masked_fill(~real, empty)
        return part


def aligned(
    name: int | str, amap: AttentionMap, source: object, *, raw: bool = False, mask: Mask | None = None
) -> Aligned:
    """The layer ``name`` of ``source``. ``raw`` looks inside the gate of gated maps. Refuses gates that cannot be taken off."""
    asked = inner(name, amap, raw)
    b, _, queries, keys = amap.shape
    pad = padding(name, amap, tokens_of(source)) if amap.domain == "token" else Padding(b, None, None, ((),) * b)
    seen = visibility(amap, mask=mask, real=pad.queries, keys=pad.keys)
    query_start, real_queries = _placed(pad.queries, b, queries)
    key_start, real_keys = _placed(pad.keys, b, keys)
    return Aligned(name, asked, seen, query_start, key_start, real_queries, real_keys)


def aligned_layers(source: object, *, raw: bool = False, mask: Mask | None = None) -> dict[int | str, Aligned]:
    """All layers of a run or of maps."""
    return {name: aligned(name, amap, source, raw=raw, mask=mask) for name, amap in maps_of(source).items()}


def need_distributions(layers: Sequence[Aligned], what: str, instead: str) -> None:
    """Refuse signed maps, whose rows are no distributions."""
    for layer in layers:
        if layer.amap.sign == "signed":
            raise Refused(f"layer {layer.name!r}: {what} compares distributions, and this map is signed; {instead}")


def even(rows: Tensor, seen: Tensor) -> Tensor:
    """The rows with their weight spread evenly over what they may see: their mean over all shuffles of the visible keys."""
    return seen * (rows.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1))


def shuffled(rows: Tensor, seen: Tensor, lo: int, seed: int = 0) -> Tensor:
    """The rows, the first of which is row ``lo``, with the weights of the visible keys in another order, one for every query,
    head and ``seed``; the same however the rows are cut into chunks and whatever else is in the batch."""
    seen = seen.expand(rows.shape)
    heads, queries, keys = (torch.arange(n) for n in rows.shape[1:])
    noise = _hash(heads[:, None, None], queries[:, None] + lo, keys, seed)
    order = noise.expand(rows.shape).masked_fill(~seen, torch.iinfo(torch.int64).max).argsort(-1)
    place = (seen.cumsum(-1) - 1).clamp(min=0)
    return torch.where(seen, rows.gather(-1, order.gather(-1, place)), 0.0)


def entropy_bits(rows: Tensor) -> Tensor:
    """Entropy over the last axis in bits, rows scaled to sum 1; NaN for rows without weight."""
    total = rows.sum(-1)
    entropy = torch.special.entr(rows / total.clamp(min=1e-300)[..., None]).sum(-1) / math.log(2)
    return entropy.masked_fill(total <= 0, float("nan"))


def _placed(real: Tensor | None, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The first real place of each sequence, and what is real counted from there, as wide as the longest."""
    if real is None:
        return torch.zeros(batch, dtype=torch.long), torch.ones(batch, length, dtype=torch.bool)
    start = real.int().argmax(1)
    end = torch.where(real.any(1), length - real.flip(1).int().argmax(1), start)
    at = torch.arange(max(1, int((end - start).max()))) + start[:, None]
    return start, real.gather(1, at.clamp(max=length - 1)) & (at < length)


def _grown(rows: Tensor, length: int, empty: float | bool) -> Tensor:
    missing = length - rows.shape[2]
    if missing <= 0:
        return rows
    return torch.cat([rows, rows.new_full((*rows.shape[:2], missing, rows.shape[3]), empty)], 2)


def _hash(head: Tensor, query: Tensor, key: Tensor, seed: int) -> Tensor:
    """Numbers that look random, from integers alone (the finalizer of splitmix64, in wrapping int64)."""
    salt = (seed + 1) * 0x3C6EF372FE94F82B & 2**63 - 1
    x = head * 0x632BE59BD9B4E019 + query * 0x1E3779B97F4A7C15 + key * 0x2545F4914F6CDD1D + salt
    x = (x ^ (x >> 30)) * 0x3F58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x14D049BB133111EB
    return x ^ (x >> 31)
