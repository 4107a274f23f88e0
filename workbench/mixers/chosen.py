"""Softmax attention over keys that a score has chosen: block means, the best of a row, and the maps that remember the choice.

    x_J = mean of x_j over the block J of ``side`` tokens           ``block_means``
    kept_iJ = whether J is among the ``top`` largest of row i       ``best``
    P_ij = softmax over the keys of the kept blocks                 ``chosen_softmax``, a ``RoutedMap``

The choice itself has no derivative: gradients reach the scores of the executed softmax alone. ``native()`` of a routed map is
what the choice was made by (gates, router weights, block scores).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


class RoutedMap(SoftmaxMap):
    """The executed softmax over chosen keys.

    ``router`` is what they were chosen by and ``kept`` the choice, bool like the router or over keys. A row that is sure to see
    itself (``whole``) sums to 1. It is stored as the softmax alone, without its router.
    """

    stored_as = "SoftmaxMap"

    def __init__(self, executed: SoftmaxMap, router: Any, kept: Tensor, *, whole: bool = False) -> None:
        s = executed.scores
        super().__init__(s.q, s.k, executed._lse, mask=s.mask, scale=s.scale, bias=s.bias)
        self.router = router.detach() if isinstance(router, Tensor) else router
        self.kept = kept
        self.row_sum = "1" if whole else "<=1"

    def native(self) -> Any:
        """What the keys were chosen by."""
        return self.router


class RoutedSparseMap(SparseMap):
    """A few weights per row, on keys chosen by ``router``, which is ``native()``."""

    def __init__(self, executed: SparseMap, router: Any) -> None:
        super().__init__(
            executed.indices,
            executed.weights,
            executed.shape[3],
            kv_heads=executed.kv_heads,
            offset=executed.offset,
            row_sum=executed.row_sum,
        )
        self.router = router.detach() if isinstance(router, Tensor) else router

    def native(self) -> Any:
        """What the keys were chosen by."""
        return self.router


def block_means(x: Tensor, side: int, real: Tensor | None = None) -> Tensor:
    """Means over blocks of ``side`` tokens: ``[B, H, N, E]`` to ``[B, H, N/side, E]`` (rounded up).

    Tokens that ``real`` ``[B or 1, N]`` denies are left out; a block without any is zero.
    """
    counted = x.new_ones(1, 1, x.shape[2], 1) if real is None else real[:, None, :, None].to(x)
    pad = (0, 0, 0, -x.shape[2] % side)
    total = F.pad(x * counted, pad).unflatten(2, (-1, side)).sum(3)
    return total / F.pad(counted, pad).unflatten(2, (-1, side)).sum(3).clamp(min=1)


def best(scores: Tensor, top: int, allowed: Tensor, forced: Tensor | None = None, name: str = "top") -> Tensor:
    """The ``top`` largest allowed entries of each row as bool; forced ones come first and are counted; ties go to the first."""
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise WorkbenchError(f"{name} is a positive number of choices; got {top!r}")
    ranked = scores.detach().masked_fill(~allowed, float("-inf"))
    if forced is not None:
        ranked = ranked.masked_fill(forced & allowed, float("inf"))
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :top]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, True) & allowed


def chosen_keys(kept: Tensor, width: int | None = None) -> Tensor:
    """Places of the True entries of each row, in order, padded with -1: bool ``[..., K]`` to int64 ``[..., S]``.

    S is the largest number in a row, or ``width``."""
    size = max(1, int(kept.sum(-1).max())) if width is None else width
    places = torch.arange(kept.shape[-1], device=kept.device).expand(kept.shape)
    return (
        places.masked_fill(~kept, kept.shape[-1])
        .sort(-1)
        .values[..., :size]
        .where(torch.arange(size, device=kept.device) < kept.sum(-1, keepdim=True), -1)
    )


def check_side(name: str, side: object) -> None:
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        raise WorkbenchError(f"{name} is a positive number of tokens; got {side!r}")


def positions(mask: Mask, queries: int, device: torch.device) -> Tensor:
    """Where the queries stand, ``[Q, 1]``."""
    return torch.arange(queries, device=device)[:, None] + mask.offset


def sees_itself(mask: Mask, queries: int, keys: int) -> bool:
    """Whether every query is sure to see its own key, so that a choice which holds its own block leaves no row empty."""
    return mask.keys is None and mask.offset + queries <= keys and mask.covers(queries, keys)


def hidden_outside(rows: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    """Additive bias that hides the keys which ``rows(lo, hi)`` (bool ``[B or 1, H or 1, hi - lo, K]``) denies."""

    def bias(lo: int, hi: int) -> Tensor:
        kept = rows(lo, hi)
        return torch.zeros(kept.shape, device=kept.device).masked_fill(~kept, float("-inf"))

    return bias


def chosen_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Callable[[int, int], Tensor],
    *,
    mask: Mask,
    scale: float | None,
) -> tuple[Tensor, SoftmaxMap]:
    """Softmax over the keys that ``rows(lo, hi)`` and the mask leave to query rows lo .. hi.

    The map holds q, k and the choice, and makes rows when asked: memory is linear in the number of keys.
    """
    return softmax_attention(q, k, v, mask=mask, scale=scale, bias=hidden_outside(rows))


def in_blocks(kept: Tensor, side: int, keys: int, group: int = 1) -> Callable[[int, int], Tensor]:
    """Rows of keys from a choice of blocks ``[B or 1, G or 1, Q, K/side]``; ``group`` query heads share one of its heads."""

    def rows(lo: int, hi: int) -> Tensor:
        part = kept[:, :, lo:hi].repeat_interleave(side, -1)[..., :keys]
        return part.repeat_interleave(group, 1) if part.shape[1] > 1 else part

    return rows
