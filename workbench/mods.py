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
    return lambda b, h, q, k: (k < keys) & (q >= keys)


def previous(step: int = 1) -> Mod:
    """The key ``step`` positions before the query."""
    return lambda b, h, q, k: q - k == step


def diagonal() -> Mod:
    """The query's own position."""
    return previous(0)


def span(lo: int, hi: int) -> Mod:
    """Keys in ``[lo, hi)``."""
    return lambda b, h, q, k: (k >= lo) & (k < hi) & (q == q)


def document(ids: Tensor) -> Mod:
    """Keys of the query's own document; ``ids`` is ``[B, T]`` or ``[T]``."""
    table = ids if ids.ndim == 2 else ids[None]
    return lambda b, h, q, k: _at(table, b, q) == _at(table, b, k)


def same_token(ids: Tensor) -> Mod:
    """Earlier keys with the query's token: what a duplicate-token head looks at."""
    return lambda b, h, q, k: (_at(ids, b, q) == _at(ids, b, k)) & (k < q)


def induction(ids: Tensor) -> Mod:
    """Keys right after an earlier occurrence of the query's token: what an induction head looks at."""
    return lambda b, h, q, k: (k >= 1) & (_at(ids, b, (k - 1).clamp(min=0)) == _at(ids, b, q)) & (k <= q)


def distance(limit: int | None = None) -> Mod:
    """Weight ``|q - k|``, cut at ``limit``: its mass is the expected attention distance."""
    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        far = (q - k).abs()
        return far if limit is None else far.clamp(max=limit)

    return mod


def both(*mods: Mod) -> Mod:
    """The product of mods: conjunction of conditions, weights multiplied."""
    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        out = mods[0](b, h, q, k)
        for other in mods[1:]:
            value = other(b, h, q, k)
            out = out & value if out.dtype == value.dtype == torch.bool else out * value
        return out

    return mod


def _at(table: Tensor, b: Tensor, position: Tensor) -> Tensor:
    """``table[b, position]``; rows are shared if the table has one."""
    table = table.to(position.device)
    batch = b.clamp(max=table.shape[0] - 1) if table.shape[0] == 1 else b
    return table[batch, position.clamp(max=table.shape[1] - 1)]
