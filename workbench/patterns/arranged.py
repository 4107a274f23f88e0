"""Maps whose rows, columns or heads are those of another map in another place: permuted tokens, a decoding step, some heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.attention_map import AttentionMap, block_cells
from workbench.errors import WorkbenchError
from workbench.maps import head_index, state_metadata
from workbench.patterns.algebra import block_sums

NEAR = 8
"""Rows that are wanted so close to each other are taken together, with those in between."""


def _runs(places: list[int], longest: int) -> list[tuple[int, int]]:
    """Spans ``[first, last)`` over ascending places, each at most ``longest`` long."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and place - runs[-1][1] < NEAR and place - runs[-1][0] < longest:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs


class PermutedMap(AttentionMap):
    """Row i is row ``queries[i]`` of ``inner``, column j its column ``keys[j]``; None leaves them in place.

    ``queries`` and ``keys`` are permutations, int64 ``[N]``, ``[1, 1, N]``, or ``[B or 1, H or 1, N]``. Keys that differ between
    heads need a value head per head.
    """

    def __init__(self, inner: AttentionMap, queries: Tensor | None, keys: Tensor | None, **metadata: str) -> None:
        super().__init__(inner.shape, kv_heads=inner.kv_heads, offset=inner.offset)
        self.inner = inner
        self.queries = self._checked("queries", queries, inner.shape[2])
        self.keys = self._checked("keys", keys, inner.shape[3])
        if self.keys is not None and self.keys.shape[1] != 1 and inner.kv_heads != inner.shape[1]:
            raise WorkbenchError(
                f"keys that differ between heads need {inner.shape[1]} value heads; got {inner.kv_heads}"
            )
        for name in ("domain", "sign", "row_sum", "value_space", "exactness", "channelwise"):
            setattr(self, name, getattr(inner, name))
        state_metadata(self, metadata)

    def parts(self) -> dict[str, Any] | None:
        return {"inner": self.inner, "queries": self.queries, "keys": self.keys}

    def _checked(self, name: str, index: Tensor | None, length: int) -> Tensor | None:
        if index is None:
            return None
        b, h = self.shape[:2]
        full = index.view(*[1] * (3 - index.ndim), *index.shape) if index.ndim <= 3 else index
        if full.ndim != 3 or full.shape[0] not in (1, b) or full.shape[1] not in (1, h) or full.shape[2] != length:
            raise WorkbenchError(f"{name} are [N] or [B or 1, H or 1, N] with N = {length}; got {list(index.shape)}")
        if not torch.equal(full.sort(-1).values, torch.arange(length, device=full.device).expand_as(full)):
            raise WorkbenchError(f"{name} are a permutation of 0 .. {length - 1}")
        return full

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        if self.queries is None:
            return self._columns(self.inner.rows(lo, hi))
        wanted = self.queries[..., lo:hi]
        out: Tensor | None = None
        b, h, _, k = self.shape
        for first, last in _runs(wanted.unique().tolist(), max(1, hi - lo)):
            here = (wanted >= first) & (wanted < last)
            part = self.inner.rows(first, last)
            out = part.new_zeros(b, h, hi - lo, k) if out is None else out
            at = (wanted - first).clamp(0, last - first - 1).expand(b, h, -1)[..., None].expand(-1, -1, -1, k)
            out = torch.where(here.expand(b, h, -1)[..., None], part.gather(2, at), out)
        return self._columns(self.inner.rows(0, 0) if out is None else out)

    def _columns(self, rows: Tensor) -> Tensor:
        if self.keys is None:
            return rows
        return rows.gather(3, self.keys[:, :, None].expand(*rows.shape[:3], -1))

    def native(self) -> AttentionMap:
        """The map in its own order."""
        return self.inner

    def row_sums(self) -> Tensor:
        return _taken(self.inner.row_sums(), self.queries)

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        if self.keys is not None:
            v = _rows_taken(v, self.keys.argsort(-1))
        out = self.inner.matvec(v)
        return out if self.queries is None else _rows_taken(out, self.queries)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        if self.queries is not None:
            y = _rows_taken(y, self.queries.argsort(-1))
        out = self.inner.rmatvec(y)
        return out if self.keys is None else _rows_taken(out, self.keys)

    def _received(self) -> Tensor:
        return _taken(self.inner.received(), self.keys)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        """Sums by products of the inner map with block indicators; other reductions take every inner row once, where it is."""
        if reduce == "abs" and self.sign == "nonnegative":
            return self.blocks(size, "sum")
        if reduce in ("sum", "mean") and not self.channelwise:
            return block_sums(self, size, reduce, self.inner.rows(0, 1))
        b, h, q, k = self.shape
        nq, nk = -(-q // size), -(-k // size)
        target = None if self.queries is None else self.queries.argsort(-1)
        empty = float("-inf") if reduce == "max" else 0.0
        out: Tensor | None = None
        for lo, hi, rows in self.inner._chunks():
            values = self._columns(rows.abs() if reduce == "abs" else rows)
            values = pad(values, (0, nk * size - k), value=empty).unflatten(-1, (nk, size))
            values = values.amax(-1) if reduce == "max" else values.sum(-1)
            at = torch.arange(lo, hi, device=rows.device)[None, None] if target is None else target[..., lo:hi]
            out = values.new_full((b, h, nq, nk), empty) if out is None else out
            where = (at // size).expand(b, h, -1)[..., None].expand_as(values)
            out.scatter_reduce_(2, where, values, "amax" if reduce == "max" else "sum")
        assert out is not None
        return out / block_cells(q, k, size, out) if reduce == "mean" else out

    def _entropy(self) -> Tensor:
        return _taken(self.inner.entropy(), self.queries)


class LastRowsMap(AttentionMap):
    """Rows from ``lo`` on of a map: what the queries of a step see, with all keys."""

    def __init__(self, inner: AttentionMap, lo: int) -> None:
        b, h, q, k = inner.shape
        if not 0 <= lo < q:
            raise WorkbenchError(f"rows from {lo} on of a map with {q} rows")
        super().__init__((b, h, q - lo, k), kv_heads=inner.kv_heads, offset=inner.offset + lo)
        self.inner, self.lo = inner, lo
        for name in ("domain", "sign", "row_sum", "value_space", "exactness", "channelwise"):
            setattr(self, name, getattr(inner, name))

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self.inner.rows(lo + self.lo, hi + self.lo)

    def parts(self) -> dict[str, Any] | None:
        return {"inner": self.inner, "lo": self.lo}

    def heads(self, indices: Sequence[int]) -> LastRowsMap:
        return LastRowsMap(self.inner.heads(indices), self.lo)

    def native(self) -> AttentionMap:
        """The whole map."""
        return self.inner

    def matvec(self, v: Tensor) -> Tensor:
        return self.inner.matvec(v)[:, :, self.lo :]

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        return self.inner.rmatvec(torch.nn.functional.pad(y, (0, 0, self.lo, 0)))

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return self.inner._tile(q_lo + self.lo, q_hi + self.lo, k_lo, k_hi)


class BatchMap(AttentionMap):
    """One square map per example, spread over ``length`` positions: example b's tokens stand at ``places[b]``, in order; the
    other positions, padding, have empty rows and columns."""

    def __init__(self, maps: Sequence[AttentionMap], places: Sequence[Tensor], length: int) -> None:
        for one, at in zip(maps, places, strict=True):
            if one.shape[0] != 1 or one.shape[2:] != (len(at), len(at)):
                raise WorkbenchError(f"an example of {len(at)} tokens needs a map [1, H, N, N]; got {list(one.shape)}")
        first = maps[0]
        super().__init__((len(maps), first.shape[1], length, length), kv_heads=first.kv_heads)
        self.maps, self.places = tuple(maps), tuple(places)
        for name in ("domain", "value_space", "exactness", "channelwise"):
            setattr(self, name, getattr(first, name))
        self.sign = "signed" if any(m.sign == "signed" for m in maps) else "nonnegative"
        sums = {m.row_sum for m in maps}
        self.row_sum = "<=1" if sums <= {"1", "<=1"} else sums.pop() if len(sums) == 1 else "free"

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        parts = []
        for one, at in zip(self.maps, self.places, strict=True):
            first, last = int((at < lo).sum()), int((at < hi).sum())
            part = one.rows(first, last)
            wide = part.new_zeros(1, self.shape[1], hi - lo, self.shape[3])
            wide[:, :, (at[first:last] - lo)[:, None], at] = part
            parts.append(wide)
        return torch.cat(parts)

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        out = v.new_zeros(*self.shape[:3], v.shape[3])
        for b, (one, at) in enumerate(zip(self.maps, self.places, strict=True)):
            out[b, :, at] = one.matvec(v[b : b + 1, :, at])[0]
        return out

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        out = y.new_zeros(self.shape[0], self.kv_heads, self.shape[3], y.shape[3])
        for b, (one, at) in enumerate(zip(self.maps, self.places, strict=True)):
            out[b, :, at] = one.rmatvec(y[b : b + 1, :, at])[0]
        return out

    def parts(self) -> dict[str, Any] | None:
        return {"maps": self.maps, "places": self.places, "length": self.shape[2]}

    def native(self) -> tuple[AttentionMap, ...]:
        """The maps of the examples."""
        return self.maps


class SomeHeadsMap(AttentionMap):
    """Some heads of a map, by rows; each has a value head of its own."""

    def __init__(self, inner: AttentionMap, indices: Sequence[int]) -> None:
        self._chosen = head_index(indices, inner.shape[1])
        super().__init__((inner.shape[0], len(self._chosen), *inner.shape[2:]), offset=inner.offset)
        self.inner = inner
        for name in ("domain", "sign", "row_sum", "value_space", "exactness"):
            setattr(self, name, getattr(inner, name))

    def rows(self, lo: int, hi: int) -> Tensor:
        return self.inner.rows(lo, hi)[:, self._chosen]

    def parts(self) -> dict[str, Any] | None:
        return {"inner": self.inner, "indices": self._chosen}

    def heads(self, indices: Sequence[int]) -> AttentionMap:
        return self.inner.heads([self._chosen[i] for i in head_index(indices, self.shape[1])])

    def row_sums(self) -> Tensor:
        return self.inner.row_sums()[:, self._chosen]

    def _received(self) -> Tensor:
        return self.inner.received()[:, self._chosen]

    def _entropy(self) -> Tensor:
        return self.inner.entropy()[:, self._chosen]

    def _blocks(self, size: int, reduce: str) -> Tensor:
        return self.inner.blocks(size, reduce)[:, self._chosen]


def _taken(values: Tensor, index: Tensor | None) -> Tensor:
    """``values`` ``[B, H, N]`` in another order."""
    return values if index is None else values.gather(2, index.expand(*values.shape[:2], -1))


def _rows_taken(values: Tensor, index: Tensor) -> Tensor:
    """``values`` ``[B, H or G, N, E]`` in another order of the tokens."""
    b, h, _, e = values.shape
    return values.gather(2, index.expand(b, h, -1)[..., None].expand(-1, -1, -1, e))
