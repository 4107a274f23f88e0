"""The map of an operator whose rows are a short function: score- and weight-modified softmax, small images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.maps import state_metadata


class LazyMap(AttentionMap):
    """Rows from ``rows(lo, hi)``, which returns ``[B, H, hi - lo, K]`` and is called without gradients.

    Memory is that of the rows asked for: reductions walk over row chunks. Metadata (``sign``, ``row_sum``, ``domain``,
    ``value_space``, ``exactness``) is as told; the function itself is not looked at.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        rows: Callable[[int, int], Tensor],
        *,
        kv_heads: int | None = None,
        offset: int = 0,
        **metadata: str,
    ) -> None:
        super().__init__(shape, kv_heads=kv_heads, offset=offset)
        state_metadata(self, metadata)
        self._rows = rows

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        with torch.no_grad():
            return self._rows(lo, hi).detach()
