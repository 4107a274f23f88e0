"""Maps made of maps: sums, products, and heads, keys or queries side by side.

Each answers from its parts' answers where the operation is linear in them, and by rows where it is not (entropy, maxima).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from workbench import attention_map
from workbench.attention_map import METADATA, AttentionMap, block_cells
from workbench.errors import WorkbenchError
from workbench.maps import head_index, state_metadata
from workbench.mods import Mod


def block_sums(amap: AttentionMap, size: int, reduce: str, like: Tensor) -> Tensor:
    """Block sums or means of a map whose products are fast: which key is in which block goes through as values, and rows are
    never made. ``like`` has the type and device of the answer."""
    b, h, q, k = amap.shape
    number, blocks = torch.arange(k, device=like.device) // size, -(-k // size)
    step = max(1, min(blocks, attention_map.CHUNK // (b * h * max(q, k))))
    parts = []
    for lo in range(0, blocks, step):
        inside = (number[:, None] - lo == torch.arange(min(step, blocks - lo), device=like.device)).to(like.dtype)
        mass = amap.matvec(inside.expand(b, amap.kv_heads, -1, -1))
        parts.append(torch.nn.functional.pad(mass, (0, 0, 0, -q % size)).unflatten(2, (-1, size)).sum(3))
    sums = torch.cat(parts, -1)
    return sums / block_cells(q, k, size, sums) if reduce == "mean" else sums


class _Joined(AttentionMap):
    """Parts of which the whole takes over domain, value space and the weakest exactness, unless told otherwise."""

    def __init__(
        self, maps: Sequence[AttentionMap], shape: tuple[int, int, int, int], kv_heads: int, metadata: dict[str, str]
    ) -> None:
        super().__init__(shape, kv_heads=kv_heads, offset=maps[0].offset)
        self.maps = tuple(maps)
        ranks = ("exact", "jacobian", "approximation")
        self.exactness = max((m.exactness for m in maps), key=ranks.index)
        self.domain, self.value_space = maps[0].domain, maps[0].value_space
        self.sign = "signed" if any(m.sign == "signed" for m in maps) else "nonnegative"
        self.channelwise = any(m.channelwise for m in maps)
        self.row_sum = "free"
        state_metadata(self, metadata)

    def parts(self) -> dict[str, Any] | None:
        return {"maps": self.maps}

    @classmethod
    def of_parts(cls, **parts: Any) -> AttentionMap:
        return cls(*parts["maps"])

    def _told(self) -> dict[str, str]:
        """What some heads of this map have in common with all of them."""
        return {name: getattr(self, name) for name in METADATA}


class SumMap(_Joined):
    """The sum of maps of one shape: mixtures, once each part is a ``GatedMap``, and skip connections.

    The row-sum contract is ``"free"`` unless told: only the caller knows whether the gates of the parts add up to 1.
    """

    def __init__(self, *maps: AttentionMap, **metadata: str) -> None:
        _same(maps, "shapes", [(m.shape, m.kv_heads, m.offset) for m in maps])
        super().__init__(maps, maps[0].shape, maps[0].kv_heads, metadata)

    def rows(self, lo: int, hi: int) -> Tensor:
        return sum_of(m.rows(lo, hi) for m in self.maps)

    def heads(self, indices: Sequence[int]) -> SumMap:
        return SumMap(*(m.heads(indices) for m in self.maps), **self._told())

    def native(self) -> Any:
        """The parts."""
        return self.maps

    def row_sums(self) -> Tensor:
        return sum_of(m.row_sums() for m in self.maps)

    def matvec(self, v: Tensor) -> Tensor:
        return sum_of(m.matvec(v) for m in self.maps)

    def rmatvec(self, y: Tensor) -> Tensor:
        return sum_of(m.rmatvec(y) for m in self.maps)

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return sum_of(m._tile(q_lo, q_hi, k_lo, k_hi) for m in self.maps)

    def _received(self) -> Tensor:
        return sum_of(m.received() for m in self.maps)

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        return sum_of(m._mass(mod) for m in self.maps)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        if reduce in ("sum", "mean") or (reduce == "abs" and self.sign == "nonnegative"):
            return sum_of(m.blocks(size, reduce) for m in self.maps)
        return super()._blocks(size, reduce)


class ProductMap(_Joined):
    """M = L R: ``left`` ``[B, H, Q, A]`` with a value head per query head, ``right`` ``[B, H, A, K]``.

    Two-stage attention through A agents, pooled keys, or a convolution of the values. Rows sum to 1 where those of both do.
    ``native()`` is the pair of factors.
    """

    def __init__(self, left: AttentionMap, right: AttentionMap, **metadata: str) -> None:
        (b, h, q, a), (b2, h2, a2, k) = left.shape, right.shape
        if (b, h, a) != (b2, h2, a2) or left.kv_heads != h:
            raise WorkbenchError(
                f"a product takes [B, H, Q, A] with H value heads and [B, H, A, K]; got {[b, h, q, a]} with "
                f"{left.kv_heads} and {[b2, h2, a2, k]}"
            )
        sums = {left.row_sum, right.row_sum}
        contract = "1" if sums == {"1"} else "<=1" if sums <= {"1", "<=1"} else "free"
        super().__init__((left, right), (b, h, q, k), right.kv_heads, {})
        self.row_sum = contract
        self.value_space, self.domain = right.value_space, left.domain
        state_metadata(self, metadata)
        self.left, self.right = left, right
        self._each: AttentionMap | None = None  # the right factor with a value head per query head

    def rows(self, lo: int, hi: int) -> Tensor:
        return self._through(self.left.rows(lo, hi))

    def heads(self, indices: Sequence[int]) -> ProductMap:
        return ProductMap(self.left.heads(indices), self.right.heads(indices), **self._told())

    def native(self) -> Any:
        """The two factors."""
        return self.left, self.right

    def row_sums(self) -> Tensor:
        return self.left.matvec(self.right.row_sums()[..., None]).squeeze(-1)

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        return self.left.matvec(self.right.matvec(v))

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        return self.right.rmatvec(self.left.rmatvec(y))

    def _through(self, weights: Tensor) -> Tensor:
        """``weights`` ``[B, H, R, A]`` times the right factor."""
        if self.channelwise:
            return sum_of(weights[..., lo:hi].to(part.dtype) @ part for lo, hi, part in self.right._chunks())
        if self._each is None:
            shared = self.right.kv_heads != self.shape[1]
            self._each = self.right.heads(range(self.shape[1])) if shared else self.right
        return self._each.rmatvec(weights.transpose(-1, -2)).transpose(-1, -2)

    def _received(self) -> Tensor:
        return self._through(self.left.received()[:, :, None]).squeeze(2)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        linear = reduce in ("sum", "mean") or (reduce == "abs" and self.sign == "nonnegative")
        if self.channelwise or not linear:
            return super()._blocks(size, reduce)
        like = self.left.rows(0, 1)[..., :1] * self.right.rows(0, 1)[..., :1]
        return block_sums(self, size, "mean" if reduce == "mean" else "sum", like)

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        if isinstance(mod, Tensor):
            return self.left.matvec(self.right._mass(mod)[..., None]).squeeze(-1)
        return super()._mass(mod)


class HeadsMap(_Joined):
    """Heads side by side: maps of one batch size, Q and K. Values are split as the parts' value heads."""

    def __init__(self, *maps: AttentionMap, **metadata: str) -> None:
        _same(maps, "batch, queries and keys", [(m.shape[0], m.shape[2:], m.offset) for m in maps])
        b, _, q, k = maps[0].shape
        super().__init__(maps, (b, sum(m.shape[1] for m in maps), q, k), sum(m.kv_heads for m in maps), {})
        self.row_sum = _weakest(maps)
        state_metadata(self, metadata)

    def rows(self, lo: int, hi: int) -> Tensor:
        return torch.cat([m.rows(lo, hi) for m in self.maps], 1)

    def heads(self, indices: Sequence[int]) -> HeadsMap:
        places = [(part, head) for part, m in enumerate(self.maps) for head in range(m.shape[1])]
        chosen = [places[i] for i in head_index(indices, self.shape[1])]
        return HeadsMap(*(self.maps[part].heads([head]) for part, head in chosen), **self._told())

    def native(self) -> Any:
        """The parts."""
        return self.maps

    def row_sums(self) -> Tensor:
        return torch.cat([m.row_sums() for m in self.maps], 1)

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        parts = v.split([m.kv_heads for m in self.maps], 1)
        return torch.cat([m.matvec(part) for m, part in zip(self.maps, parts, strict=True)], 1)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        parts = y.split([m.shape[1] for m in self.maps], 1)
        return torch.cat([m.rmatvec(part) for m, part in zip(self.maps, parts, strict=True)], 1)

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return torch.cat([m._tile(q_lo, q_hi, k_lo, k_hi) for m in self.maps], 1)

    def _received(self) -> Tensor:
        return torch.cat([m.received() for m in self.maps], 1)

    def _entropy(self) -> Tensor:
        return torch.cat([m.entropy() for m in self.maps], 1)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        return torch.cat([m.blocks(size, reduce) for m in self.maps], 1)


class KeysMap(_Joined):
    """Keys side by side: maps of one batch size, H, Q and value heads. Memory tokens, distractors, prefixes.

    The row-sum contract is ``"free"`` unless told. Positions of the keys count through all parts.
    """

    def __init__(self, *maps: AttentionMap, **metadata: str) -> None:
        _same(maps, "batch, heads and queries", [(m.shape[:3], m.kv_heads) for m in maps])
        self._widths = [m.shape[3] for m in maps]
        super().__init__(maps, (*maps[0].shape[:3], sum(self._widths)), maps[0].kv_heads, metadata)

    def rows(self, lo: int, hi: int) -> Tensor:
        return torch.cat([m.rows(lo, hi) for m in self.maps], 3)

    def heads(self, indices: Sequence[int]) -> KeysMap:
        return KeysMap(*(m.heads(indices) for m in self.maps), **self._told())

    def native(self) -> Any:
        """The parts."""
        return self.maps

    def row_sums(self) -> Tensor:
        return sum_of(m.row_sums() for m in self.maps)

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        return sum_of(m.matvec(part) for m, part in zip(self.maps, v.split(self._widths, 2), strict=True))

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        return torch.cat([m.rmatvec(y) for m in self.maps], 2)

    def _received(self) -> Tensor:
        return torch.cat([m.received() for m in self.maps], 2)


class QueriesMap(_Joined):
    """Query rows one below the other: maps of one batch size, H, K and value heads."""

    def __init__(self, *maps: AttentionMap, **metadata: str) -> None:
        _same(maps, "batch, heads and keys", [(m.shape[:2], m.shape[3], m.kv_heads) for m in maps])
        (b, h, _, k), self._heights = maps[0].shape, [m.shape[2] for m in maps]
        super().__init__(maps, (b, h, sum(self._heights), k), maps[0].kv_heads, {})
        self.row_sum = _weakest(maps)
        state_metadata(self, metadata)

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        parts, start = [], 0
        for m, height in zip(self.maps, self._heights, strict=True):
            first, last = max(lo - start, 0), min(hi - start, height)
            if first < last:
                parts.append(m.rows(first, last))
            start += height
        return torch.cat(parts, 2) if parts else self.maps[0].rows(0, 0)

    def native(self) -> Any:
        """The parts."""
        return self.maps

    def row_sums(self) -> Tensor:
        return torch.cat([m.row_sums() for m in self.maps], 2)

    def matvec(self, v: Tensor) -> Tensor:
        return torch.cat([m.matvec(v) for m in self.maps], 2)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        return sum_of(m.rmatvec(part) for m, part in zip(self.maps, y.split(self._heights, 2), strict=True))

    def _received(self) -> Tensor:
        return sum_of(m.received() for m in self.maps)


def sum_of(parts: Any) -> Tensor:
    """The sum of one or more tensors, which may be made one at a time; none of them is written into."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    assert total is not None
    return total


def _same(maps: Sequence[AttentionMap], what: str, seen: Sequence[Any]) -> None:
    if not maps:
        raise WorkbenchError("no maps to join")
    for one, other in pairwise(seen):
        if one != other:
            raise WorkbenchError(f"maps to be joined share {what}; got {one} and {other}")


def _weakest(maps: Sequence[AttentionMap]) -> str:
    """The row-sum contract that all rows of all maps keep."""
    sums = {m.row_sum for m in maps}
    return sums.pop() if len(sums) == 1 else "<=1" if sums <= {"1", "<=1"} else "free"
