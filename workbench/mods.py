"""Conditions on (batch, head, query, key): FlexAttention's mask signature, used for masks and for weighted mass alike.

A mod is a function ``mod(b, h, q, k)`` of index tensors that broadcast against each other; it returns a bool (membership) or a
float (weight). ``q`` and ``k`` are absolute positions. ``AttentionMap.mass(mod)`` sums a row's weights under a mod.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.mask import in_window

Mod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal() -> Mod:
    """Keys at or before the query."""
    return lambda b, h, q, k: k <= q


def full() -> Mod:
    """Every key."""
    return lambda b, h, q, k: (q == q) & (k == k)


def window(size: int) -> Mod:
    """The last ``size`` keys including the query's own: ``0 <= q - k < size``."""
    if size < 1:
        raise WorkbenchError(f"a window keeps at least one key; got {size}")
    return lambda b, h, q, k: in_window(q, k, size)


def prefix(length: int) -> Mod:
    """The first ``length`` keys."""
    return lambda b, h, q, k: (k < length) & (q == q)


def sink(keys: int = 1) -> Mod:
    """The first ``keys`` keys, for queries after them: mass a query gives away to the start of the text."""
    if keys < 1:
        raise WorkbenchError(f"a sink has at least one key; got {keys}")
    return lambda b, h, q, k: (k < keys) & (q >= keys)


def previous(step: int = 1) -> Mod:
    """The key ``step`` positions before the query."""
    return lambda b, h, q, k: q - k == step


def diagonal() -> Mod:
    """The query's own position."""
    return previous(0)


def span(lo: int, hi: int) -> Mod:
    """Keys in ``[lo, hi)``."""
    if not 0 <= lo < hi:
        raise WorkbenchError(f"a span [lo, hi) holds at least one key; got [{lo}, {hi})")
    return lambda b, h, q, k: (k >= lo) & (k < hi) & (q == q)


def spans(ranges: Tensor) -> Mod:
    """Keys in the example's own ``[lo, hi)``: ``ranges`` is ``[B, 2]``, as in ``Pairs.spans`` (a needle, a name). A range that
    is absent (-1) holds no key."""
    if ranges.ndim != 2 or ranges.shape[1] != 2:
        raise WorkbenchError(f"spans are [B, 2]; got {list(ranges.shape)}")

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if int(b.max()) >= len(ranges):
            raise WorkbenchError(f"spans of {len(ranges)} examples, asked for example {int(b.max())}")
        lo, hi = ranges.to(b.device)[b].unbind(-1)
        return (k >= lo) & (k < hi) & (q == q)

    return mod


def document(ids: Tensor) -> Mod:
    """Keys of the query's own document; ``ids`` is ``[B, T]`` or ``[T]``, one number per token."""
    table = _table(ids)
    return lambda b, h, q, k: _at(table, b, q) == _at(table, b, k)


def same_token(ids: Tensor) -> Mod:
    """Earlier keys with the query's token, what a duplicate-token head looks at; ``ids`` is ``[B, T]`` or ``[T]``."""
    table = _table(ids)
    return lambda b, h, q, k: (_at(table, b, q) == _at(table, b, k)) & (k < q)


def induction(ids: Tensor) -> Mod:
    """Keys right after an earlier occurrence of the query's token, what an induction head looks at; ``ids`` is ``[B, T]`` or
    ``[T]``."""
    table = _table(ids)
    return lambda b, h, q, k: (k >= 1) & (_at(table, b, (k - 1).clamp(min=0)) == _at(table, b, q)) & (k <= q)


def distance(limit: int | None = None) -> Mod:
    """Weight ``|q - k|``, cut at ``limit``: its mass is the expected attention distance."""
    if limit is not None and limit < 1:
        raise WorkbenchError(f"a distance is cut at one token or more; got {limit}")

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        far = (q - k).abs()
        return far if limit is None else far.clamp(max=limit)

    return mod


def both(*mods: Mod) -> Mod:
    """The product of mods: conjunction of conditions, weights multiplied."""
    if not mods:
        raise WorkbenchError("both() takes at least one mod")

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        out = mods[0](b, h, q, k)
        for other in mods[1:]:
            value = other(b, h, q, k)
            out = out & value if out.dtype == value.dtype == torch.bool else out * value
        return out

    return mod


def _table(ids: Tensor) -> Tensor:
    table = ids[None] if ids.ndim == 1 else ids
    if table.ndim != 2 or table.is_floating_point():
        raise WorkbenchError(f"ids are integers [B, T] or [T]; got {ids.dtype} {list(ids.shape)}")
    return table


def _at(table: Tensor, b: Tensor, position: Tensor) -> Tensor:
    """``table[b, position]``; a table of one row serves every example."""
    rows, length = table.shape
    if int(position.max()) >= length:
        raise WorkbenchError(f"ids for {length} positions, asked for position {int(position.max())}")
    if rows > 1 and int(b.max()) >= rows:
        raise WorkbenchError(f"ids of {rows} examples, asked for example {int(b.max())}")
    return table.to(position.device)[b if rows > 1 else torch.zeros_like(b), position]
