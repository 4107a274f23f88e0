"""A sparse code: of every row the few features that are active, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import WorkbenchError


@dataclass(frozen=True, eq=False)
class Code:
    """``values`` ``[N, k]`` and ``indices`` ``[N, k]`` int64, the features they belong to; 0 and -1 where a place is empty.
    ``features`` is F. Places of a row are in no particular order, and no feature stands twice in a row."""

    values: Tensor
    indices: Tensor
    features: int

    @classmethod
    def of(cls, dense: Tensor) -> Code:
        """The code of a dense ``[N, F]``: as many places as the row with the most active features has, at least one."""
        if dense.ndim != 2:
            raise WorkbenchError(f"a dense code is [N, F]; got {list(dense.shape)}")
        active = dense != 0
        k = max(int(active.sum(1).max()) if len(dense) else 0, 1)
        found = active.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :k]
        values = dense.gather(1, found)
        return cls(values, found.masked_fill(values == 0, -1), dense.shape[1])

    def dense(self) -> Tensor:
        """``[N, F]``."""
        out = self.values.new_zeros(len(self.values), self.features)
        return out.scatter_add(1, self.indices.clamp(min=0), self.values.masked_fill(self.indices < 0, 0))

    def counts(self) -> Tensor:
        """In how many rows each feature is active, ``[F]`` int64."""
        shifted = self.indices.masked_fill(self.values == 0, -1).flatten() + 1
        return torch.bincount(shifted, minlength=self.features + 1)[1:]

    def l0(self) -> Tensor:
        """Active features of each row, ``[N]``."""
        return (self.values != 0).sum(1)
