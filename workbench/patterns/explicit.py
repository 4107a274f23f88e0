"""The map of attention that built its pattern as numbers anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.maps import DenseMap, head_index


class ExplicitMap(DenseMap):
    """A softmax pattern ``[B, H, Q, K]`` that exists as numbers, with ``lse`` ``[B, H, Q]`` of the scores it came from.

    The weights are what multiplied the values, edits of scores or pattern included; ``lse`` is -inf in rows that see no key.
    Rows of types narrower than float32 count as sums to 1 within 2e-2, the rounding of many small weights. Tensors are
    detached; ``kv_heads`` and ``offset`` as in ``AttentionMap``.
    """

    def __init__(self, weights: Tensor, lse: Tensor, *, offset: int, kv_heads: int) -> None:
        super().__init__(weights, offset=offset, kv_heads=kv_heads)
        if tuple(lse.shape) != self.shape[:3]:
            raise WorkbenchError(f"lse is [B, H, Q] = {list(self.shape[:3])}; got {list(lse.shape)}")
        self.lse = lse.detach()
        if torch.finfo(weights.dtype).bits < 32 and self.sign == "nonnegative":
            sums = self.weights.sum(-1, dtype=torch.float32)
            if bool((sums <= 1.02).all()):
                self.row_sum = "1" if bool((sums >= 0.98).all()) else "<=1"

    def heads(self, indices: Sequence[int]) -> ExplicitMap:
        chosen = head_index(indices, self.shape[1])
        return ExplicitMap(self.weights[:, chosen], self.lse[:, chosen], offset=self.offset, kv_heads=len(chosen))
