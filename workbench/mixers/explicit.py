"""The map of attention that built its pattern as numbers anyway."""

from __future__ import annotations

from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.maps import DenseMap


class ExplicitMap(DenseMap):
    """A pattern ``[B, H, Q, K]`` that exists as numbers, with ``lse`` ``[B, H, Q]`` of the scores it came from.

    The weights are what multiplied the values, edits of scores or pattern included; ``lse`` is -inf in rows that see no key.
    Tensors are detached; ``kv_heads`` and ``offset`` as in ``AttentionMap``.
    """

    def __init__(self, weights: Tensor, lse: Tensor, *, offset: int, kv_heads: int) -> None:
        super().__init__(weights.detach(), offset=offset, kv_heads=kv_heads)
        if tuple(lse.shape) != self.shape[:3]:
            raise WorkbenchError(f"lse is [B, H, Q] = {list(self.shape[:3])}; got {list(lse.shape)}")
        self.lse = lse.detach()
