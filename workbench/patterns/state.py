"""Maps of state recurrences: S_t = A_t S_{t-1} + b_t v_t^T, o_i = c_i^T S_i, so M_ij = c_i^T A_i A_{i-1} .. A_{j+1} b_j.

``patterns/recurrence.py`` says how rows are carried back chunk by chunk. Sums of rows are carried like rows, so that a block
map costs one row per row block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap, block_cells
from workbench.maps import head_index
from workbench.patterns.recurrence import Dplr, Recurrence, Step
from workbench.patterns.transported import TransportedMap


def dplr(decay: Tensor, x: Tensor, y: Tensor) -> Dplr:
    """Diagonal plus low rank: the step of A_t = diag(decay_t) + x_t y_t^T (RWKV-7, KDA), all ``[B, H, N, S]``."""
    return Dplr(decay, x, y)


class StateMap(TransportedMap):
    """M_ij = read_i^T A_i .. A_{j+1} write_j, with ``read`` and ``write`` ``[B, H, N, S]``.

    The transitions are given by ``step`` (see ``recurrence.Step``; ``dplr`` makes one) or, if they are diagonal, as
    ``diagonal`` ``[B, H, N, S]`` (the factors themselves, not their logarithms). A step may have ``heads(indices)``, the step
    of those heads: the map of some heads is then a state map too; and ``detach()``, which is called on it.
    """

    def __init__(
        self,
        read: Tensor,
        write: Tensor,
        step: Step | None = None,
        *,
        diagonal: Tensor | None = None,
        kv_heads: int | None = None,
    ) -> None:
        self.recurrence = Recurrence(read, write, step, diagonal=diagonal).detach()
        b, h, n, _ = read.shape
        super().__init__((b, h, n), read.dtype, read.device, kv_heads)
        self._kept: tuple[Tensor, Tensor] | None = None

    @property
    def read(self) -> Tensor:
        return self.recurrence.read

    @property
    def write(self) -> Tensor:
        return self.recurrence.write

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        b, h, n, _ = self.shape
        c = self.recurrence.length
        out = torch.zeros(b, h, hi - lo, self.recurrence.count * c, dtype=self.dtype, device=self.device)
        if lo == hi:
            return out[..., :n]
        first, last = lo // c, (hi - 1) // c
        with torch.no_grad():
            cells, carried = self.recurrence.inside(first, last + 1, self.dtype)
            cut = slice(lo - first * c, hi - first * c)
            cells, carried = cells.flatten(2, 3)[:, :, cut], carried.flatten(2, 3)[:, :, cut].clone()
            for chunk in range(first, last + 1):
                here = slice(max(0, chunk * c - lo), min(hi, (chunk + 1) * c) - lo)
                out[:, :, here, chunk * c : (chunk + 1) * c] = cells[:, :, here]
            writes, over = self._carriers(self.dtype)
            for chunk in range(last - 1, -1, -1):
                start = max(0, (chunk + 1) * c - lo)
                rows = carried[:, :, start:]
                out[:, :, start:, chunk * c : (chunk + 1) * c] = rows @ writes[:, :, chunk].transpose(-1, -2)
                carried[:, :, start:] = self._over(rows, over[:, :, chunk])
        return out[..., :n]

    def parts(self) -> dict[str, Any] | None:
        """Those of a diagonal or a ``dplr`` step; any other step is a function."""
        found = {"read": self.read, "write": self.write, "kv_heads": self.kv_heads}
        step = self.recurrence.step
        if step is None:
            return {**found, "diagonal": self.recurrence.diagonal}
        return {**found, "decay": step.decay, "x": step.x, "y": step.y} if type(step) is Dplr else None

    @classmethod
    def of_parts(cls, **parts: Any) -> AttentionMap:
        factors = [parts.pop(name) for name in ("decay", "x", "y") if name in parts]
        return cls(**parts, step=dplr(*factors) if factors else None)

    def heads(self, indices: Sequence[int]) -> AttentionMap:
        chosen = head_index(indices, self.shape[1])
        read, write = self.read[:, chosen], self.write[:, chosen]
        if self.recurrence.diagonal is not None:
            return StateMap(read, write, diagonal=self.recurrence.diagonal[:, chosen])
        select: Any = getattr(self.recurrence.step, "heads", None)
        if select is None:
            return super().heads(indices)
        return StateMap(read, write, select(chosen))

    def _apply(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self.recurrence.apply(v, *self._carriers(v.dtype))

    def _adjoint(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self.recurrence.adjoint(y, *self._carriers(y.dtype))

    def _blocks(self, size: int, reduce: str) -> Tensor:
        if reduce not in ("sum", "mean"):
            return super()._blocks(size, reduce)
        with torch.no_grad():
            sums = self._block_sums(size)
        n = self.shape[2]
        return sums / block_cells(n, n, size, sums) if reduce == "mean" else sums

    def _block_sums(self, size: int) -> Tensor:
        b, h, n, _ = self.shape
        count, c = self.recurrence.count, self.recurrence.length
        blocks = -(-n // size)
        block = (torch.arange(count * c, device=self.device) // size).clamp(max=blocks - 1).view(count, c)
        cells, rows = self.recurrence.inside(0, count, self.dtype)
        out = torch.zeros(b, h, blocks * blocks, dtype=self.dtype, device=self.device)
        out.index_add_(2, (block[:, :, None] * blocks + block[:, None]).flatten(), cells.flatten(2))
        out = out.view(b, h, blocks, blocks)
        carried = torch.zeros(b, h, blocks, self.read.shape[3], dtype=self.dtype, device=self.device)
        writes, over = self._carriers(self.dtype)
        for chunk in range(count - 2, -1, -1):
            carried.index_add_(2, block[chunk + 1], rows[:, :, chunk + 1])
            first = int(block[chunk + 1, 0])
            entered = carried[:, :, first:]
            out[:, :, first:].index_add_(3, block[chunk], entered @ writes[:, :, chunk].transpose(-1, -2))
            carried[:, :, first:] = self._over(entered, over[:, :, chunk])
        return out

    def _over(self, rows: Tensor, over: Tensor) -> Tensor:
        """Rows ``[B, H, R, S]`` carried over a chunk."""
        return rows * over[:, :, None] if self.recurrence.diagonal is not None else rows @ over

    def _carriers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W and T of all chunks; those of the map's own type are kept."""
        if dtype != self.dtype:
            return self.recurrence.carriers(dtype)
        if self._kept is None:
            self._kept = self.recurrence.carriers(dtype)
        return self._kept
