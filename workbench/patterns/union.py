"""Softmax over a union of disjoint sets of pairs: tiles that share their rows' denominators.

    M_ij = exp(s^t_ij - lse_i)  for the one tile t that holds the pair (i, j),  0 if none does
    lse_i = log(sum_t sum_j exp(s^t_ij))

Masks such as "a window and some first tokens" are no conjunction of conditions, but a union of a few of those; rows that are
computed in pieces (ranks of a ring, cached context) are one by construction. Tiles may have queries of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.attention_map import TopK
from workbench.captures import Capture
from workbench.errors import WorkbenchError
from workbench.patterns.algebra import SumMap
from workbench.patterns.softmax import SoftmaxMap


class UnionMap(SumMap):
    """The sum of ``SoftmaxMap`` tiles whose masks share no pair and whose ``lse`` is that of the whole row.

    It answers everything from its tiles' answers, with their memory. ``row_sum`` is ``"1"`` if every row sees a key.
    """

    maps: tuple[SoftmaxMap, ...]

    def __init__(self, *tiles: SoftmaxMap, **metadata: str) -> None:
        for tile in tiles:
            if not isinstance(tile, SoftmaxMap):
                raise WorkbenchError(f"tiles of a union are SoftmaxMaps with the rows' lse; got {type(tile).__name__}")
            # A tile holds a part of its rows, whatever its mask covers.
            tile.row_sum = "<=1"
        super().__init__(*tiles, row_sum="<=1")
        self.lse = tiles[0].lse
        if bool(self.lse.isfinite().all()):
            self.row_sum = "1"
        for name, value in metadata.items():
            setattr(self, name, value)

    def masses(self) -> Tensor:
        """The mass of every row on each tile, ``[B, H, Q, tiles]``."""
        return torch.stack([tile.row_sums() for tile in self.maps], -1)

    def heads(self, indices: Sequence[int]) -> UnionMap:
        return type(self)(*(tile.heads(indices) for tile in self.maps))

    def _precompute(self, request: Capture) -> None:
        for tile in self.maps:
            tile._precompute(request)
        super()._precompute(request)

    def _entropy(self) -> Tensor:
        return torch.stack([tile.entropy() for tile in self.maps]).sum(0)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        if reduce == "max":
            return torch.stack([tile.blocks(size, "max") for tile in self.maps]).amax(0)
        return super()._blocks(size, reduce)

    def _topk(self, k: int) -> TopK:
        found = [tile.topk(k) for tile in self.maps]
        values = torch.cat([part.values for part in found], -1)
        keys = torch.cat([part.indices for part in found], -1)
        # In the order of the keys, so that the first of equal weights wins; empty places last.
        order = keys.masked_fill(keys < 0, self.shape[3]).argsort(-1)
        values, keys = values.gather(-1, order), keys.gather(-1, order)
        if k == 1:
            values, best = values.max(-1, keepdim=True)
        else:
            values, best = values.topk(k, dim=-1)
        return TopK(values, keys.gather(-1, best))
