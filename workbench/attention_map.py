"""Attention maps: the coefficients of the values, answered lazily from whatever describes them.

A map M has shape ``[B, H, Q, K]`` with o_i = sum_j M_ij v_j, everything else held fixed. Subclasses say how to make rows;
everything else follows by walking over row chunks, and a subclass overrides what it can do faster. No method but ``dense``
builds Q x K numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench import mods
from workbench.captures import REDUCTIONS, Capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mods import Mod

DENSE_LIMIT = 2**28
"""``dense()`` refuses above this many numbers (B*H*Q*K): 1 GiB in float32."""
CHUNK = 2**21
"""Numbers of a map that generic reductions hold at a time: 8 MiB in float32."""
METADATA = {
    "domain": ("token", "block", "agent", "channel", "frequency"),
    "sign": ("nonnegative", "signed"),
    "row_sum": ("1", "<=1", "gate", "free", "columns"),
    "value_space": None,
    "exactness": ("exact", "jacobian", "approximation"),
}


class TopK(NamedTuple):
    """The largest weights of every row and their keys, both ``[B, H, Q, k]``, in descending order.

    Where a row of a non-negative map has no weight left (it sees fewer than ``k`` keys), the value is 0 and the key -1.
    """

    values: Tensor
    indices: Tensor


class AttentionMap(ABC):
    """Base of all attention maps.

    Metadata: ``domain`` in ``token | block | agent | channel | frequency``; ``sign`` in ``nonnegative | signed``;
    ``row_sum`` in ``"1" | "<=1" | "gate" | "free" | "columns"``; ``value_space``: what the coefficients multiply;
    ``exactness`` in ``exact | jacobian | approximation``. ``offset`` is the absolute position of query 0 (keys start
    at 0). ``kv_heads`` is the number of value heads G that ``matvec`` takes. ``channelwise`` maps have coefficients of their own
    for every channel of a value: their rows are the mean over channels, their ``matvec`` uses each channel's own. ``order`` is 3
    where weights belong to pairs of keys and the map is what they make of single keys.

    Statistics are sums over the weights as they are. Where a row sums to less than 1 (a sink logit, a gate, a row that sees
    nothing), the missing mass is not part of them and nothing is renormalised. Answers are float32 or float64, kept
    after the first call and shared between calls: do not write into them.
    """

    domain: str = "token"
    sign: str = "nonnegative"
    row_sum: str = "1"
    value_space: str = "raw V"
    exactness: str = "exact"
    channelwise: bool = False
    order: int = 2

    def __init__(self, shape: tuple[int, int, int, int], *, kv_heads: int | None = None, offset: int = 0) -> None:
        self.shape = shape
        self.kv_heads = shape[1] if kv_heads is None else kv_heads
        self.offset = offset
        self._memo: dict[Any, Any] = {}

    @abstractmethod
    def rows(self, lo: int, hi: int) -> Tensor:
        """Rows ``[lo, hi)`` of the map, ``[B, H, hi - lo, K]``."""

    @staticmethod
    def from_dense(
        weights: Tensor,
        *,
        offset: int | None = None,
        kv_heads: int | None = None,
        mask: Mask | None = None,
        **metadata: str,
    ) -> AttentionMap:
        """The map with the given weights ``[B, H, Q, K]``; sign and row-sum contract are read off unless given.

        ``mask`` tells who may see whom; without one a map with no weight behind its queries counts as causal.
        """
        from workbench.maps import DenseMap

        return DenseMap(weights, offset=offset, kv_heads=kv_heads, mask=mask, **metadata)

    # ------------------------------------------------------------------ pieces

    def _span(self, lo: int, hi: int, length: int, name: str) -> tuple[int, int]:
        if not 0 <= lo <= hi <= length:
            raise WorkbenchError(f"{name} [{lo}, {hi}) outside of this map's {length}")
        return lo, hi

    def _chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """The rows in their working type, some at a time."""
        b, h, q, k = self.shape
        step = max(1, min(q, CHUNK // (b * h * k)))
        for lo in range(0, q, step):
            hi = min(q, lo + step)
            rows = self.rows(lo, hi)
            yield lo, hi, rows.to(working_dtype(rows.dtype))

    def tile(self, q: slice, k: slice) -> Tensor:
        """The exact part ``M[:, :, q, k]``."""
        (q_lo, q_hi), (k_lo, k_hi) = _bounds(q, self.shape[2], "queries"), _bounds(k, self.shape[3], "keys")
        return self._tile(q_lo, q_hi, k_lo, k_hi)

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

    def parts(self) -> dict[str, Any] | None:
        """What ``of_parts`` makes the map again from, or None if it cannot be stored.

        Values are tensors, maps, tuples of either, types, and plain JSON values. Metadata, ``offset`` and remembered answers are
        stored beside them. A subclass that holds more than its base is not stored by the base's parts (``stored_as``)."""
        return None

    @classmethod
    def of_parts(cls, **parts: Any) -> AttentionMap:
        """The map with these parts, which are keyword arguments of the class unless it says otherwise."""
        return cls(**parts)

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
        """Row entropy -sum_j M_ij ln M_ij in nats, ``[B, H, Q]``; refused where rows are not (sub-)distributions.

        A row that sums to less than 1 is taken as it is: no term for the missing mass, no renormalisation."""
        if self.sign != "nonnegative" or self.row_sum not in ("1", "<=1", "gate"):
            raise Refused(
                f"rows of a {self.sign} map with row sum {self.row_sum!r} are no distribution: entropy is undefined"
            )
        return self._remember(("entropy",), self._entropy)

    def distance(self, window: int | None = None, moment: int = 1) -> Tensor:
        """Attended distance sum_j M_ij |i - j| (or ``min(|i - j|, window)``), ``[B, H, Q]``, in tokens; with ``moment=2``
        sum_j M_ij |i - j|^2 in tokens squared, from which the spread of the distance follows.

        It is the mean (of the square) where the row sums to 1; missing mass counts as distance 0."""
        if window is not None and window < 1:
            raise WorkbenchError(f"a distance is cut at one token or more; got window={window}")
        if moment not in (1, 2) or (moment == 2 and window is not None):
            raise WorkbenchError(
                f"distance takes moment 1, or 2 without a window; got moment={moment} with window={window}"
            )
        if moment == 2:
            return self._remember(("distance2",), self._distance2)
        return self._remember(("distance", window), lambda: self._distance(window))

    def topk(self, k: int = 1) -> TopK:
        """The ``k`` largest weights of every row and their keys; among equals, ``topk(1)`` takes the first key."""
        self._check_topk(k)
        return self._remember(("topk", k), lambda: self._topk(k))

    def mass(self, mod: Mod | Tensor | str) -> Tensor:
        """sum_j M_ij w_ij, ``[B, H, Q]``: the mass each query puts on a set of keys.

        ``mod`` gives the weights: a function w(b, h, i, j), a tensor of one weight (or bool) per key ``[K]`` or ``[B, K]``, or
        the name of a mass that was asked for in ``capture(mass={name: ...})``. Only named masses are kept."""
        if isinstance(mod, str):
            if ("mass", mod) not in self._memo:
                raise UnknownName("named mass of this map", mod, [key[1] for key in self._memo if key[0] == "mass"])
            return self._memo["mass", mod]
        return self._mass(self._key_weights(mod))

    def row_sums(self) -> Tensor:
        """sum_j M_ij, ``[B, H, Q]``."""
        return self._remember(("row_sums",), lambda: torch.cat([rows.sum(-1) for _, _, rows in self._chunks()], dim=2))

    # --------------------------------------------------------------- operators

    def matvec(self, v: Tensor) -> Tensor:
        """M v: values ``[B, G, K, E]`` to outputs ``[B, H, Q, E]``, of v's dtype."""
        self._check_values(v)
        b, h, _, k = self.shape
        g = self.kv_heads
        parts = []
        for lo, hi, rows in self._chunks():
            work = torch.promote_types(rows.dtype, v.dtype)
            out = rows.to(work).reshape(b, g, h // g * (hi - lo), k) @ v.to(work)
            parts.append(out.view(b, h, hi - lo, v.shape[3]).to(v.dtype))
        return torch.cat(parts, dim=2)

    def rmatvec(self, y: Tensor) -> Tensor:
        """The adjoint: ``[B, H, Q, E]`` to ``[B, G, K, E]``, summed over the query heads that share a value head."""
        self._check_outputs(y)
        b, h, _, k = self.shape
        g, width = self.kv_heads, y.shape[3]
        out = y.new_zeros(b, g, k, width, dtype=working_dtype(y.dtype))
        for lo, hi, rows in self._chunks():
            out = out.to(torch.promote_types(rows.dtype, out.dtype))
            part = y[:, :, lo:hi].to(out.dtype).reshape(b, g, h // g * (hi - lo), width)
            out += rows.to(out.dtype).reshape(b, g, h // g * (hi - lo), k).transpose(-1, -2) @ part
        return out.to(y.dtype)

    def _check_values(self, v: Tensor) -> None:
        b, _, _, k = self.shape
        if v.ndim != 4 or v.shape[:3] != (b, self.kv_heads, k):
            raise WorkbenchError(
                f"matvec takes values [B, G, K, E] = {[b, self.kv_heads, k, 'E']}; got {list(v.shape)}"
            )

    def _check_outputs(self, y: Tensor) -> None:
        b, h, q, _ = self.shape
        if y.ndim != 4 or y.shape[:3] != (b, h, q):
            raise WorkbenchError(f"rmatvec takes [B, H, Q, E] = {[b, h, q, 'E']}; got {list(y.shape)}")

    # -------------------------------------------------- generic implementations

    def precompute(self, request: Capture) -> AttentionMap:
        """Compute and remember what ``request`` names, in one pass where the family has one.

        Returns this map; with ``request.keep`` false a ``SummaryMap`` that answers only that and holds nothing else.
        Use the returned map."""
        self._precompute(request)
        return self if request.keep else self._summary(request)

    def heads(self, indices: Sequence[int]) -> AttentionMap:
        """The map of some heads, in that order; each has a value head of its own."""
        from workbench.patterns.arranged import SomeHeadsMap

        return SomeHeadsMap(self, indices)

    def _precompute(self, request: Capture) -> None:
        if request.blocks is not None:
            for reduce in request.reduce:
                self.blocks(request.blocks, reduce)
        calls: dict[str, Callable[[], object]] = {
            "received": self.received, "entropy": self.entropy, "distance": self.distance,
            "distance2": lambda: self.distance(moment=2), "top1": lambda: self.topk(1),
        }  # fmt: skip
        for name in request.stats:
            calls[name]()
        if request.window is not None:
            self.distance(request.window)
        if request.topk is not None:
            self.topk(request.topk)
        for name, weights in request.mass:
            self._memo["mass", name] = self.mass(weights)

    def _summary(self, request: Capture) -> AttentionMap:
        from workbench.maps import SummaryMap

        return SummaryMap(self)

    def _scaled(self, gate: Tensor) -> AttentionMap | None:
        """The map with rows g_i M_ij, for ``gate >= 0``, where the family answers it faster than by rows."""
        return None

    def _check_topk(self, k: int) -> None:
        if not 1 <= k <= self.shape[3]:
            raise WorkbenchError(f"topk wants 1 <= k <= {self.shape[3]} keys; got {k}")

    def _learn(self, scaled: AttentionMap) -> None:  # noqa: B027
        """Take over what a pass over the map with scaled rows has found out about this one."""

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return self.rows(q_lo, q_hi)[..., k_lo:k_hi]

    def _remember(self, key: Any, make: Any) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _key_weights(self, mod: Mod | Tensor) -> Mod | Tensor:
        """A function as it is; weights of keys as ``[B or 1, K]``."""
        b, _, _, k = self.shape
        if not isinstance(mod, Tensor):
            if not callable(mod):
                raise WorkbenchError(f"mass takes a function, a tensor of keys or a name; got a {type(mod).__name__}")
            return mod
        table = mod[None] if mod.ndim == 1 else mod
        if table.ndim != 2 or table.shape[0] not in (1, b) or table.shape[1] != k:
            raise WorkbenchError(f"weights of keys are [K] = {[k]} or [B, K] = {[b, k]}; got {list(mod.shape)}")
        return table

    def _mod(self, mod: Mod | Tensor, lo: int, hi: int, like: Tensor) -> Tensor:
        if isinstance(mod, Tensor):
            return mod.to(like)[:, None, None, :]
        b, h, _, k = self.shape
        device = like.device
        value = mod(
            torch.arange(b, device=device)[:, None, None, None],
            torch.arange(h, device=device)[None, :, None, None],
            torch.arange(lo, hi, device=device)[None, None, :, None] + self.offset,
            torch.arange(k, device=device)[None, None, None, :],
        )
        fits = isinstance(value, Tensor) and value.ndim <= 4
        full = (b, h, hi - lo, k)
        if not fits or any(n not in (1, m) for n, m in zip(value.shape[::-1], full[::-1], strict=False)):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise WorkbenchError(f"a mod returns a tensor that broadcasts to {list(full)}; got {got}")
        return value.to(like.dtype)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        b, h, q, k = self.shape
        nq, nk = -(-q // size), -(-k // size)
        empty = float("-inf") if reduce == "max" else 0.0
        out: Tensor | None = None
        for lo, hi, rows in self._chunks():
            values = rows.abs() if reduce == "abs" else rows
            if out is None:
                out = values.new_full((b, h, nq, nk), empty)
            values = torch.nn.functional.pad(values, (0, nk * size - k), value=empty).unflatten(-1, (nk, size))
            values = values.amax(-1) if reduce == "max" else values.sum(-1)
            for i in range(lo // size, -(-hi // size)):
                part = values[:, :, max(0, i * size - lo) : (i + 1) * size - lo]
                if reduce == "max":
                    out[:, :, i] = torch.maximum(out[:, :, i], part.amax(2))
                else:
                    out[:, :, i] += part.sum(2)
        assert out is not None
        return out / block_cells(q, k, size, out) if reduce == "mean" else out

    def _received(self) -> Tensor:
        total: Tensor | None = None
        for _, _, rows in self._chunks():
            total = rows.sum(2) if total is None else total + rows.sum(2)
        assert total is not None
        return total

    def _entropy(self) -> Tensor:
        return torch.cat([torch.special.entr(rows).sum(-1) for _, _, rows in self._chunks()], dim=2)

    def _distance(self, window: int | None) -> Tensor:
        return self._mass(mods.distance(window))

    def _distance2(self) -> Tensor:
        return self._mass(lambda b, h, q, k: (q - k).square())

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        return torch.cat([(rows * self._mod(mod, lo, hi, rows)).sum(-1) for lo, hi, rows in self._chunks()], dim=2)

    def _topk(self, k: int) -> TopK:
        parts = []
        for _, _, rows in self._chunks():
            values, keys = rows.max(-1, keepdim=True) if k == 1 else rows.topk(k, dim=-1)
            parts.append((values, keys if self.sign == "signed" else keys.masked_fill(values == 0, -1)))
        return TopK(torch.cat([values for values, _ in parts], 2), torch.cat([keys for _, keys in parts], 2))

    def __repr__(self) -> str:
        told = f"{self.domain}, {self.sign}, row sum {self.row_sum!r}, {self.exactness}"
        return f"{type(self).__name__}({list(self.shape)}, {told})"

    def _repr_html_(self) -> str:
        from workbench.summaries import map_html

        return map_html(self)


def block_cells(queries: int, keys: int, size: int, like: Tensor) -> Tensor:
    """Number of cells in each block, ``[Q/size, K/size]`` rounded up."""
    rows, columns = (
        (n - torch.arange(0, n, size, dtype=like.dtype, device=like.device)).clamp(max=size) for n in (queries, keys)
    )
    return rows[:, None] * columns


def _bounds(part: slice, length: int, name: str) -> tuple[int, int]:
    if not isinstance(part, slice) or part.step not in (None, 1):
        raise WorkbenchError(f"a tile takes slices of {name} without a step; got {part!r}")
    lo, hi, _ = part.indices(length)
    return lo, max(lo, hi)
