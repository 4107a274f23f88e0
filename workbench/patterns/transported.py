"""Causal square maps that carry rows from token to token: what they answer by products with a few vectors instead of by rows.

For such a map M V and M^T Y cost O(N), a row costs O(N), and all rows O(N^2). Sums over keys are products: the row sums are
M 1, the mass of given keys is M w, the received mass is M^T 1, and the distance is i (M 1)_i - (M j)_i.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.attention_map import CHUNK, AttentionMap
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mods import Mod

ROWS = 128
"""Rows that walk together at least: a walk passes all chunks before them, whether for one row or for many."""


class TransportedMap(AttentionMap):
    """A signed causal map ``[B, H, N, N]`` with fast products. Subclasses give ``rows``, ``_apply`` and ``_adjoint``.

    Both take one value head per head and run in the type they are given, which is at least the map's own.
    """

    sign = "signed"
    row_sum = "free"

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, kv_heads: int | None
    ) -> None:
        b, h, n = shape
        if kv_heads is not None and (kv_heads < 1 or h % kv_heads):
            raise WorkbenchError(f"kv_heads divides the {h} heads; got {kv_heads}")
        super().__init__((b, h, n, n), kv_heads=kv_heads)
        self.dtype = working_dtype(dtype)
        self.device = device

    @abstractmethod
    def _apply(self, v: Tensor) -> Tensor:
        """M v for v ``[B, H, N, E]``."""

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor:
        """M^T y for y ``[B, H, N, E]``."""

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        values = v.to(torch.promote_types(self.dtype, v.dtype)).repeat_interleave(self.shape[1] // self.kv_heads, 1)
        return self._apply(values).to(v.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        found = self._adjoint(y.to(torch.promote_types(self.dtype, y.dtype)))
        return found.unflatten(1, (self.kv_heads, -1)).sum(2).to(y.dtype)

    def row_sums(self) -> Tensor:
        return self._remember(("row_sums",), lambda: self._apply(self._columns(torch.ones(1, self.shape[3])))[..., 0])

    def _columns(self, weights: Tensor) -> Tensor:
        """Weights of keys ``[B or 1, K]`` as values of one channel for every head."""
        b, h, n, _ = self.shape
        return weights.to(self.device, self.dtype)[:, None, :, None].expand(b, h, n, 1)

    def _received(self) -> Tensor:
        return self._adjoint(self._columns(torch.ones(1, self.shape[2])))[..., 0]

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        return self._apply(self._columns(mod))[..., 0] if isinstance(mod, Tensor) else super()._mass(mod)

    def _distance(self, window: int | None) -> Tensor:
        if window is not None:
            return super()._distance(window)
        at, (sums, first) = self._moments(2)
        return (at * sums - first).to(self.dtype)

    def _distance2(self) -> Tensor:
        at, (sums, first, second) = self._moments(3)
        return (at * at * sums - 2 * at * first + second).to(self.dtype)

    def _moments(self, count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Positions, and sum_j M_ij j^p for p < ``count``: in float64, as their differences cancel most digits."""
        b, h, n, _ = self.shape
        at = torch.arange(n, dtype=torch.float64, device=self.device)
        powers = torch.stack([at**p for p in range(count)], -1).expand(b, h, n, count)
        return at, self._apply(powers).unbind(-1)

    def _chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        b, h, q, k = self.shape
        step = min(q, max(ROWS, CHUNK // (b * h * k)))
        for lo in range(0, q, step):
            hi = min(q, lo + step)
            yield lo, hi, self.rows(lo, hi)
