"""Attention maps: the coefficients of the values, answered lazily from whatever describes them.

A map M has shape ``[B, H, Q, K]`` with o_i = sum_j M_ij v_j, everything else held fixed. Subclasses say how to make rows;
everything else follows by walking over row chunks, and a subclass overrides what it can do faster. No method but ``dense``
builds Q x K numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.capture import REDUCTIONS, Capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.mods import Mod

DENSE_LIMIT = 2**28
"""``dense()`` refuses above this many numbers (B*H*Q*K): 1 GiB in float32."""
_CHUNK = 2**24


class TopK(NamedTuple):
    """The largest weights of every row and their keys, both ``[B, H, Q, k]``, in descending order."""

    values: Tensor
    indices: Tensor


class AttentionMap(ABC):
    """Base of all attention maps.

    Metadata (see the class attributes): ``domain`` in ``token | block | agent | channel | frequency``; ``sign`` in
    ``nonnegative | signed``; ``row_sum`` in ``"1" | "<=1" | "gate" | "free" | "columns"``; ``value_space``: what the
    coefficients multiply; ``exactness`` in ``exact | jacobian | approximation``. ``offset`` is the absolute position
    of query 0 (keys start at 0). ``kv_heads`` is the number of value heads G that ``matvec`` takes.
    """

    domain: str = "token"
    sign: str = "nonnegative"
    row_sum: str = "1"
    value_space: str = "raw V"
    exactness: str = "exact"

    def __init__(self, shape: tuple[int, int, int, int], *, kv_heads: int | None = None, offset: int = 0) -> None:
        self.shape = shape
        self.kv_heads = shape[1] if kv_heads is None else kv_heads
        self.offset = offset
        self._memo: dict[Any, Any] = {}

    @abstractmethod
    def rows(self, lo: int, hi: int) -> Tensor:
        """Rows ``[lo, hi)`` of the map, ``[B, H, hi - lo, K]``."""

    @staticmethod
    def from_dense(weights: Tensor, *, offset: int | None = None, kv_heads: int | None = None, **metadata: str) -> AttentionMap:
        """The map with the given weights ``[B, H, Q, K]``; sign and row-sum contract are read off unless given."""
        return DenseMap(weights, offset=offset, kv_heads=kv_heads, **metadata)

    # ------------------------------------------------------------------ pieces

    def _span(self, lo: int, hi: int, length: int, name: str) -> tuple[int, int]:
        if not 0 <= lo <= hi <= length:
            raise WorkbenchError(f"{name} [{lo}, {hi}) outside of this map's {length}")
        return lo, hi

    def _chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        b, h, q, k = self.shape
        step = max(1, min(q, _CHUNK // max(1, b * h * k)))
        for lo in range(0, q, step):
            hi = min(q, lo + step)
            yield lo, hi, self.rows(lo, hi)

    def tile(self, q: slice, k: slice) -> Tensor:
        """The exact part ``M[:, :, q, k]``."""
        q_lo, q_hi, _ = q.indices(self.shape[2])
        k_lo, k_hi, _ = k.indices(self.shape[3])
        return self.rows(q_lo, max(q_lo, q_hi))[..., k_lo : max(k_lo, k_hi)]

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The whole map. Refuses above ``limit`` numbers: use ``blocks``, ``tile`` or ``rows`` there."""
        b, h, q, k = self.shape
        if b * h * q * k > limit:
            raise Refused(
                f"dense() of {[b, h, q, k]} is {b * h * q * k:,} numbers, over the limit of {limit:,}; "
                "use blocks(size), tile(q, k) or rows(lo, hi), or raise limit"
            )
        return self.rows(0, q)

    def native(self) -> Any:
        """The map in its own domain; for token maps the map itself."""
        return self

    # -------------------------------------------------------------- reductions

    def blocks(self, size: int, reduce: str = "sum") -> Tensor:
        """Block map ``[B, H, ceil(Q/size), ceil(K/size)]``: ``sum``, ``mean`` (over the block's cells), ``max`` or ``abs``
        (sum of absolute values). Blocks at the edges hold what is there."""
        if reduce not in REDUCTIONS:
            raise UnknownName("block reduction", reduce, REDUCTIONS)
        if size < 1:
            raise WorkbenchError(f"a block has at least one token; got size={size}")
        return self._remember(("blocks", size, reduce), lambda: self._blocks(size, reduce))

    def received(self) -> Tensor:
        """Mass received by each key: column sums ``[B, H, K]``."""
        return self._remember(("received",), self._received)

    def entropy(self) -> Tensor:
        """Row entropy -sum p ln p in nats, ``[B, H, Q]``; refused where rows are not (sub-)distributions."""
        if self.sign != "nonnegative" or self.row_sum not in ("1", "<=1", "gate"):
            raise Refused(f"rows of a {self.sign} map with row sum {self.row_sum!r} are no distribution: entropy is undefined")
        return self._remember(("entropy",), self._entropy)

    def distance(self, window: int | None = None) -> Tensor:
        """Mean attended distance sum_j M_ij |i - j| (or ``min(|i - j|, window)``), ``[B, H, Q]``, in tokens."""
        return self._remember(("distance", window), lambda: self._distance(window))

    def topk(self, k: int = 1) -> TopK:
        """The ``k`` largest weights of every row and their keys."""
        if not 1 <= k <= self.shape[3]:
            raise WorkbenchError(f"topk wants 1 <= k <= {self.shape[3]} keys; got {k}")
        return self._remember(("topk", k), lambda: self._topk(k))

    def mass(self, mod: Mod) -> Tensor:
        """sum_j M_ij mod(b, h, i, j), ``[B, H, Q]``: the mass each query puts on a set of keys."""
        return torch.cat([(rows * self._mod(mod, lo, hi, rows)).sum(-1) for lo, hi, rows in self._chunks()], dim=2)

    def row_sums(self) -> Tensor:
        """sum_j M_ij, ``[B, H, Q]``."""
        return self._remember(("row_sums",), lambda: torch.cat([rows.sum(-1) for _, _, rows in self._chunks()], dim=2))

    # --------------------------------------------------------------- operators

    def matvec(self, v: Tensor) -> Tensor:
        """M v: values ``[B, G, K, E]`` to outputs ``[B, H, Q, E]``."""
        b, h, _, k = self.shape
        if v.ndim != 4 or v.shape[:3] != (b, self.kv_heads, k):
            raise WorkbenchError(f"matvec takes values [B, G, K, E] = {[b, self.kv_heads, k, 'E']}; got {list(v.shape)}")
        v = v.repeat_interleave(h // self.kv_heads, dim=1)
        return torch.cat([rows.to(v.dtype) @ v for _, _, rows in self._chunks()], dim=2)

    def rmatvec(self, y: Tensor) -> Tensor:
        """The adjoint: ``[B, H, Q, E]`` to ``[B, G, K, E]``, summed over the query heads that share a value head."""
        b, h, q, k = self.shape
        if y.ndim != 4 or y.shape[:3] != (b, h, q):
            raise WorkbenchError(f"rmatvec takes [B, H, Q, E] = {[b, h, q, 'E']}; got {list(y.shape)}")
        out = y.new_zeros(b, h, k, y.shape[-1])
        for lo, hi, rows in self._chunks():
            out += rows.to(y.dtype).transpose(-1, -2) @ y[:, :, lo:hi]
        return out.unflatten(1, (self.kv_heads, h // self.kv_heads)).sum(2)

    # -------------------------------------------------- generic implementations

    def precompute(self, request: Capture) -> AttentionMap:
        """Compute and remember what ``request`` names, in one pass where the family has one. Returns self."""
        if request.blocks is not None:
            for reduce in request.reduce:
                self.blocks(request.blocks, reduce)
        calls = {"received": self.received, "entropy": self.entropy, "distance": self.distance, "top1": lambda: self.topk(1)}
        for name in request.stats:
            calls[name]()
        return self

    def _remember(self, key: Any, make: Any) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _mod(self, mod: Mod, lo: int, hi: int, like: Tensor) -> Tensor:
        b, h, _, k = self.shape
        device = like.device
        index = (
            torch.arange(b, device=device)[:, None, None, None],
            torch.arange(h, device=device)[None, :, None, None],
            torch.arange(lo, hi, device=device)[None, None, :, None] + self.offset,
            torch.arange(k, device=device)[None, None, None, :],
        )
        return mod(*index).to(like.dtype)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        b, h, q, k = self.shape
        nq, nk = -(-q // size), -(-k // size)
        out: Tensor | None = None
        for lo, hi, rows in self._chunks():
            values = rows.abs() if reduce == "abs" else rows
            if out is None:
                out = values.new_full((b, h, nq, nk), float("-inf") if reduce == "max" else 0.0)
            at = (torch.arange(lo, hi, device=rows.device) // size).expand(b, h, nk, hi - lo).transpose(-1, -2)
            pad = nk * size - k
            if reduce == "max":
                values = torch.nn.functional.pad(values, (0, pad), value=float("-inf")).unflatten(-1, (nk, size)).amax(-1)
                out.scatter_reduce_(2, at, values, "amax")
            else:
                values = torch.nn.functional.pad(values, (0, pad)).unflatten(-1, (nk, size)).sum(-1)
                out.scatter_add_(2, at, values)
        assert out is not None
        if reduce == "mean":
            out = out / _cells(q, size, out)[:, None] / _cells(k, size, out)
        return out

    def _received(self) -> Tensor:
        total: Tensor | None = None
        for _, _, rows in self._chunks():
            total = rows.sum(2) if total is None else total + rows.sum(2)
        assert total is not None
        return total

    def _entropy(self) -> Tensor:
        return torch.cat([torch.special.entr(rows).sum(-1) for _, _, rows in self._chunks()], dim=2)

    def _distance(self, window: int | None) -> Tensor:
        from workbench.mods import distance

        return self.mass(distance(window))

    def _topk(self, k: int) -> TopK:
        parts = [rows.topk(k, dim=-1) for _, _, rows in self._chunks()]
        return TopK(torch.cat([p.values for p in parts], 2), torch.cat([p.indices for p in parts], 2))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.domain}, {self.sign}, row sum {self.row_sum!r}, {self.exactness})"


class DenseMap(AttentionMap):
    """A map given as numbers. Made by ``AttentionMap.from_dense``."""

    def __init__(self, weights: Tensor, *, offset: int | None = None, kv_heads: int | None = None, **metadata: str) -> None:
        if weights.ndim != 4:
            raise WorkbenchError(f"weights are [B, H, Q, K]; got {list(weights.shape)}")
        if not weights.is_floating_point():
            raise WorkbenchError(f"weights are floating point; got {weights.dtype}")
        if not torch.isfinite(weights).all():
            raise WorkbenchError("weights hold NaN or infinity")
        b, h, q, k = weights.shape
        super().__init__((b, h, q, k), kv_heads=kv_heads, offset=max(0, k - q) if offset is None else offset)
        self.weights = weights
        sums = weights.double().sum(-1)
        tolerance = 64 * torch.finfo(weights.dtype).eps * max(1, k) ** 0.5
        self.sign = "signed" if (weights < 0).any() else "nonnegative"
        if self.sign == "nonnegative" and ((sums - 1).abs() <= tolerance).all():
            self.row_sum = "1"
        elif self.sign == "nonnegative" and (sums <= 1 + tolerance).all():
            self.row_sum = "<=1"
        else:
            self.row_sum = "free"
        for name, value in metadata.items():
            if name not in ("domain", "sign", "row_sum", "value_space", "exactness"):
                raise UnknownName("map metadata", name, ("domain", "sign", "row_sum", "value_space", "exactness"))
            setattr(self, name, value)

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self.weights[:, :, lo:hi]


class GatedMap(AttentionMap):
    """Effective map of an attention whose head outputs are scaled per token: rows g_i M_ij.

    ``raw`` is the inner map, ``gate`` ``[B, H, Q]`` the factor (head-wise gated attention, arXiv 2505.06708).
    """

    row_sum = "gate"

    def __init__(self, raw: AttentionMap, gate: Tensor) -> None:
        if tuple(gate.shape) != tuple(raw.shape[:3]):
            raise WorkbenchError(f"a gate is [B, H, Q] = {list(raw.shape[:3])}; got {list(gate.shape)}")
        super().__init__(raw.shape, kv_heads=raw.kv_heads, offset=raw.offset)
        self.raw = raw
        self.gate = gate
        self.sign = "signed" if raw.sign == "signed" or bool((gate < 0).any()) else "nonnegative"
        self.value_space, self.exactness, self.domain = raw.value_space, raw.exactness, raw.domain

    def rows(self, lo: int, hi: int) -> Tensor:
        rows = self.raw.rows(lo, hi)
        return rows * self.gate[:, :, lo:hi, None].to(rows.dtype)


def _cells(length: int, size: int, like: Tensor) -> Tensor:
    """Number of tokens in each block."""
    count = -(-length // size)
    return torch.tensor([min(size, length - i * size) for i in range(count)], dtype=like.dtype, device=like.device)
