"""The map of attention over pairs of keys: weights of order 3, and what they make of the keys one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import DenseMap, head_index

LIMIT = 64
"""Most keys of a ``TripleMap``: a query has a weight for each of their pairs."""


class TopPairs(NamedTuple):
    """The largest weights of every query and the two keys of each, all ``[B, H, Q, k]``, in descending order."""

    values: Tensor
    first: Tensor
    second: Tensor


class TripleMap(AttentionMap):
    """Weights A_ijl of pairs of keys, as a map of the first values with the second ones held fixed:

        o_ic = sum_jl A_ijl v1_jc v2_lc,   M_ij for channel c: sum_l A_ijl v2_lc

    ``weights`` ``[B, H, Q, K, L]`` and ``second`` ``[B, G, L, E]``, the second values. Rows are the mean over channels,
    ``matvec`` takes first values ``[B, G, K, E]`` each by its own coefficients, ``channel(c)`` is the map of one channel.
    ``native()`` is the order-3 tensor; ``marginal`` and ``pairs`` look at it without any values.
    """

    channelwise = True
    order = 3
    row_sum = "free"

    def __init__(self, weights: Tensor, second: Tensor, *, offset: int = 0) -> None:
        if weights.ndim != 5 or 0 in weights.shape or not weights.is_floating_point():
            raise WorkbenchError(
                f"weights are floating point [B, H, Q, K, L]; got {weights.dtype} {list(weights.shape)}"
            )
        check_pairs(weights.shape[3], weights.shape[4])
        b, h, q, k, m = weights.shape
        fits = second.ndim == 4 and second.is_floating_point() and (second.shape[0], second.shape[2]) == (b, m)
        if not fits or not second.shape[3] or h % second.shape[1]:
            wanted = f"[B, G, L, E] = {[b, 'G', m, 'E']} with G dividing {h}"
            raise WorkbenchError(f"second values are floating point {wanted}; got {list(second.shape)}")
        super().__init__((b, h, q, k), kv_heads=second.shape[1], offset=offset)
        self.weights, self.second = weights.detach(), second.detach()
        self.sign = "signed" if bool((self.second < 0).any()) else "nonnegative"

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._of(self.second.to(working_dtype(self.second.dtype)).mean(-1), lo, hi)

    def native(self) -> Tensor:
        """The weights of pairs, ``[B, H, Q, K, L]``."""
        return self.weights

    def channel(self, index: int) -> AttentionMap:
        """The map of one channel of every head."""
        if not 0 <= index < self.second.shape[3]:
            raise WorkbenchError(f"channel {index} of {self.second.shape[3]}")
        return DenseMap(self._of(self.second[..., index], 0, self.shape[2]), offset=self.offset, kv_heads=self.kv_heads)

    def marginal(self, place: int) -> AttentionMap:
        """How much weight each key has as the first (``place=1``) or the second (``2``) of a pair; rows sum to 1."""
        if place not in (1, 2):
            raise WorkbenchError(f"keys stand in place 1 or 2 of a pair; got {place}")
        return DenseMap(self.weights.sum(-1 if place == 1 else -2), offset=self.offset, kv_heads=self.kv_heads)

    def pairs(self, k: int = 1) -> TopPairs:
        """The ``k`` largest weights of every query with their keys; -1 where the weight is 0."""
        keys, seconds = self.weights.shape[3:]
        if not 1 <= k <= keys * seconds:
            raise WorkbenchError(f"pairs wants 1 <= k <= {keys * seconds}; got {k}")
        values, at = self.weights.flatten(3).topk(k, dim=-1)
        none = values == 0
        return TopPairs(values, (at // seconds).masked_fill(none, -1), (at % seconds).masked_fill(none, -1))

    def heads(self, indices: Sequence[int]) -> TripleMap:
        chosen = head_index(indices, self.shape[1])
        group = self.shape[1] // self.kv_heads
        return TripleMap(self.weights[:, chosen], self.second[:, [i // group for i in chosen]], offset=self.offset)

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        self._check_width(v)
        work = torch.promote_types(working_dtype(self.weights.dtype), v.dtype)
        first, second = (self._spread(x).to(work) for x in (v, self.second))
        return torch.einsum("bhijl,bhje,bhle->bhie", self.weights.to(work), first, second).to(v.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        self._check_width(y)
        work = torch.promote_types(working_dtype(self.weights.dtype), y.dtype)
        second = self._spread(self.second).to(work)
        back = torch.einsum("bhijl,bhie,bhle->bhje", self.weights.to(work), y.to(work), second)
        return back.unflatten(1, (self.kv_heads, -1)).sum(2).to(y.dtype)

    def entropy(self) -> Tensor:
        raise Refused("coefficients made of second values are no distribution: take marginal(1).entropy()")

    def _of(self, values: Tensor, lo: int, hi: int) -> Tensor:
        """Rows for second values ``[B, G, L]``."""
        work = torch.promote_types(working_dtype(self.weights.dtype), values.dtype)
        return (self.weights[:, :, lo:hi].to(work) @ self._spread(values).to(work)[:, :, None, :, None]).squeeze(-1)

    def _spread(self, values: Tensor) -> Tensor:
        """Values of the value heads for every query head."""
        return values.repeat_interleave(self.shape[1] // values.shape[1], 1)

    def _check_width(self, values: Tensor) -> None:
        if values.shape[3] != self.second.shape[3]:
            raise WorkbenchError(f"this map has {self.second.shape[3]} channels per head; got {list(values.shape)}")


def check_pairs(first: int, second: int) -> None:
    """Refuse more keys than ``LIMIT`` on either side of a pair."""
    if max(first, second) > LIMIT:
        raise Refused(
            f"pairs of {first} and {second} keys are {first * second:,} weights per query; at most {LIMIT} keys a side: "
            "take fewer tokens"
        )
