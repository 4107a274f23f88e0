"""Maps of state recurrences: S_t = A_t S_{t-1} + b_t v_t^T, o_i = c_i^T S_i, so M_ij = c_i^T A_i A_{i-1} .. A_{j+1} b_j.

Tokens are cut into chunks of C. A row is carried backwards as a vector r, from r = c_i on: at token t its cell is r . b_t, and
then r <- r A_t. The steps inside the chunks run for all chunks at once. For a whole chunk with tokens 1..C two things are kept,

    W_j = A_C .. A_{j+1} b_j        what token j leaves in the state after the chunk, so cells are r . W_j
    T = A_C .. A_1                  what carries a row over the chunk, r <- r T

in memory O(N S + N S^2 / C), or O(N S) for diagonal transitions. Decays are only ever multiplied, never divided by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap, block_cells
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index
from workbench.patterns.transported import TransportedMap

LENGTH = 64
"""Tokens of a chunk."""

Step = Callable[[Tensor, Tensor], Tensor]
"""(rows ``[B, H, M, R, S]``, tokens ``[M]``) -> rows A_t ``[B, H, M, R, S]``, with another transition for each of the M tokens.
Rows may be wider (float64) than what the step holds, and stay so."""


class Dplr:
    """The step of A_t = diag(decay_t) + x_t y_t^T, with all three ``[B, H, N, S]``: r <- r * decay_t + (r . x_t) y_t."""

    def __init__(self, decay: Tensor, x: Tensor, y: Tensor) -> None:
        if not decay.shape == x.shape == y.shape or decay.ndim != 4:
            got = ", ".join(str(list(tensor.shape)) for tensor in (decay, x, y))
            raise WorkbenchError(f"decay, x and y are [B, H, N, S] alike; got {got}")
        work = working_dtype(decay.dtype)
        self.decay, self.x, self.y = (tensor.detach().to(work) for tensor in (decay, x, y))

    def __call__(self, rows: Tensor, t: Tensor) -> Tensor:
        decay, x, y = (tensor[:, :, t, None] for tensor in (self.decay, self.x, self.y))
        return rows * decay + (rows * x).sum(-1, keepdim=True) * y

    def heads(self, chosen: list[int]) -> Dplr:
        return Dplr(self.decay[:, chosen], self.x[:, chosen], self.y[:, chosen])


def dplr(decay: Tensor, x: Tensor, y: Tensor) -> Dplr:
    """Diagonal plus low rank: the step of A_t = diag(decay_t) + x_t y_t^T (RWKV-7, KDA), all ``[B, H, N, S]``."""
    return Dplr(decay, x, y)


class StateMap(TransportedMap):
    """M_ij = read_i^T A_i .. A_{j+1} write_j, with ``read`` and ``write`` ``[B, H, N, S]``.

    The transitions are given by ``step`` (see ``Step``; ``dplr`` makes one) or, if they are diagonal, as ``diagonal``
    ``[B, H, N, S]`` (the factors themselves, not their logarithms). A step may have ``heads(indices)``, the step of those heads:
    the map of some heads is then a state map too.
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
        if read.ndim != 4 or 0 in read.shape or not read.is_floating_point():
            raise WorkbenchError(f"read is floating point [B, H, N, S], not empty; got {read.dtype} {list(read.shape)}")
        if write.shape != read.shape:
            raise WorkbenchError(f"write is {list(read.shape)}, as read; got {list(write.shape)}")
        if (step is None) == (diagonal is None):
            raise WorkbenchError(
                f"transitions are told by step or by diagonal; got {'none' if step is None else 'both'}"
            )
        if diagonal is not None and diagonal.shape != read.shape:
            raise WorkbenchError(f"diagonal is {list(read.shape)}, as read; got {list(diagonal.shape)}")
        b, h, n, _ = read.shape
        super().__init__((b, h, n), read.dtype, read.device, kv_heads)
        self.read, self.write = read.detach(), write.detach()
        self.diagonal = None if diagonal is None else diagonal.detach()
        self.step = step
        self.length = min(LENGTH, n)
        self.count = -(-n // self.length)
        self._kept: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        b, h, n, _ = self.shape
        c = self.length
        out = torch.zeros(b, h, hi - lo, self.count * c, dtype=self.dtype, device=self.device)
        if lo == hi:
            return out[..., :n]
        first, last = lo // c, (hi - 1) // c
        local = torch.zeros(b, h, last + 1 - first, c, c, dtype=self.dtype, device=self.device)
        r = torch.zeros_like(local[..., :0])
        for j, cells, r in self._inside(first, last + 1, self.dtype):  # noqa: B007
            local[..., j:, j] = cells
        r = r.flatten(2, 3)[:, :, lo - first * c : hi - first * c]
        local = local.flatten(2, 3)[:, :, lo - first * c : hi - first * c]
        for chunk in range(last, first - 1, -1):
            start, stop = max(0, chunk * c - lo), min(hi, (chunk + 1) * c) - lo
            out[:, :, start:stop, chunk * c : (chunk + 1) * c] = local[:, :, start:stop]
        for chunk in range(last - 1, -1, -1):
            start = max(0, (chunk + 1) * c - lo)
            writes, over = self._chunk(self.dtype, chunk)
            carried = r[:, :, start:]
            out[:, :, start:, chunk * c : (chunk + 1) * c] = carried @ writes.transpose(-1, -2)
            r[:, :, start:] = self._over(carried, over)
        return out[..., :n]

    def heads(self, indices: Sequence[int]) -> AttentionMap:
        chosen = head_index(indices, self.shape[1])
        read, write = self.read[:, chosen], self.write[:, chosen]
        if self.diagonal is not None:
            return StateMap(read, write, diagonal=self.diagonal[:, chosen])
        select: Any = getattr(self.step, "heads", None)
        if select is None:
            return super().heads(indices)
        return StateMap(read, write, select(chosen))

    # ------------------------------------------------------------- chunks

    def _apply(self, v: Tensor) -> Tensor:
        values = self._cut(v, 0, self.count)
        out, r = torch.zeros_like(values), values
        for j, cells, r in self._inside(0, self.count, v.dtype):  # noqa: B007
            out[..., j:, :] += cells[..., None] * values[..., j, None, :]
        state = v.new_zeros(*v.shape[:2], self.read.shape[3], v.shape[3])
        for chunk in range(self.count - 1):
            writes, over = self._chunk(v.dtype, chunk)
            state = self._under(state, over) + writes.transpose(-1, -2) @ values[:, :, chunk]
            out[:, :, chunk + 1] += r[:, :, chunk + 1] @ state
        return out.flatten(2, 3)[:, :, : v.shape[2]]

    def _adjoint(self, y: Tensor) -> Tensor:
        values = self._cut(y, 0, self.count)
        out, r = torch.zeros_like(values), values
        for j, cells, r in self._inside(0, self.count, y.dtype):  # noqa: B007
            out[..., j, :] = (cells[..., None] * values[..., j:, :]).sum(-2)
        wanted = y.new_zeros(*y.shape[:2], self.read.shape[3], y.shape[3])
        for chunk in range(self.count - 2, -1, -1):
            if chunk + 2 < self.count:
                over = self._chunk(y.dtype, chunk + 1)[1]
                wanted = over[..., None] * wanted if self.diagonal is not None else over.transpose(-1, -2) @ wanted
            wanted = wanted + r[:, :, chunk + 1].transpose(-1, -2) @ values[:, :, chunk + 1]
            out[:, :, chunk] += self._chunk(y.dtype, chunk)[0] @ wanted
        return out.flatten(2, 3)[:, :, : y.shape[2]]

    def _blocks(self, size: int, reduce: str) -> Tensor:
        if reduce not in ("sum", "mean"):
            return super()._blocks(size, reduce)
        sums = self._block_sums(size)
        n = self.shape[2]
        return sums / block_cells(n, n, size, sums) if reduce == "mean" else sums

    def _block_sums(self, size: int) -> Tensor:
        """Sums of rows are carried like rows: one for each row block."""
        b, h, n, _ = self.shape
        c = self.length
        blocks = -(-n // size)
        block = (torch.arange(self.count * c, device=self.device) // size).clamp(max=blocks - 1).view(self.count, c)
        out = torch.zeros(b, h, blocks * blocks, dtype=self.dtype, device=self.device)
        r = out[..., None, None]
        for j, cells, r in self._inside(0, self.count, self.dtype):  # noqa: B007
            into = block[:, j:] * blocks + block[:, j, None]
            out.index_add_(2, into.flatten(), cells.flatten(2))
        out = out.view(b, h, blocks, blocks)
        carried = torch.zeros(b, h, blocks, self.read.shape[3], dtype=self.dtype, device=self.device)
        for chunk in range(self.count - 2, -1, -1):
            carried.index_add_(2, block[chunk + 1], r[:, :, chunk + 1])
            writes, over = self._chunk(self.dtype, chunk)
            first = int(block[chunk + 1, 0])
            out[:, :, first:].index_add_(3, block[chunk], carried[:, :, first:] @ writes.transpose(-1, -2))
            carried[:, :, first:] = self._over(carried[:, :, first:], over)
        return out

    def _over(self, rows: Tensor, over: Tensor) -> Tensor:
        """Rows ``[B, H, R, S]`` carried over a chunk."""
        return rows * over[:, :, None] if self.diagonal is not None else rows @ over

    def _under(self, state: Tensor, over: Tensor) -> Tensor:
        """The state ``[B, H, S, E]`` after a chunk that writes nothing."""
        return state * over[..., None] if self.diagonal is not None else over @ state

    def _chunk(self, dtype: torch.dtype, chunk: int) -> tuple[Tensor, Tensor]:
        """W ``[B, H, C, S]`` and T (``[B, H, S, S]`` or its diagonal ``[B, H, S]``) of one chunk that is not the last."""
        if dtype not in self._kept:
            self._kept[dtype] = self._carriers(dtype)
        writes, over = self._kept[dtype]
        return writes[:, :, chunk], over[:, :, chunk]

    def _carriers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W and T of all chunks but the last, which no row crosses."""
        b, h, _n, s = self.read.shape
        m = self.count - 1
        writes = self._cut(self.write, 0, m).to(dtype)
        if self.diagonal is not None:
            over = torch.ones(b, h, m, s, dtype=dtype, device=self.device)
            left = torch.empty_like(writes)
            for j in reversed(range(self.length)):
                left[..., j, :] = over * writes[..., j, :]
                over = over * self.diagonal[:, :, self._tokens(0, m, j)].to(dtype)
            return left, over
        over = torch.eye(s, dtype=dtype, device=self.device).expand(b, h, m, s, s)
        left = torch.empty_like(writes)
        for j in reversed(range(self.length)):
            left[..., j, :] = (over @ writes[..., j, :, None])[..., 0]
            over = self._carry(over, self._tokens(0, m, j))
        return left, over

    def _inside(self, first: int, last: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Walk the rows of chunks ``[first, last)`` back to the starts of their chunks, token j = C - 1 .. 0 of each at once.

        Yields j, the cells ``[B, H, M, C - j]`` of rows j.. of each chunk in its column j, and the rows ``[B, H, M, C, S]``,
        which after the last step read the state before the chunk.
        """
        read, write = (self._cut(x, first, last).to(dtype) for x in (self.read, self.write))
        rows = torch.zeros_like(read)
        for j in reversed(range(self.length)):
            rows[..., j, :] = read[..., j, :]
            carried = rows[..., j:, :]
            cells = (carried @ write[..., j, :, None])[..., 0]
            rows[..., j:, :] = self._carry(carried, self._tokens(first, last, j))
            yield j, cells, rows

    def _carry(self, rows: Tensor, t: Tensor) -> Tensor:
        if self.diagonal is not None:
            return rows * self.diagonal[:, :, t, None].to(rows.dtype)
        assert self.step is not None
        return self.step(rows, t)

    def _tokens(self, first: int, last: int, j: int) -> Tensor:
        """Token j of every chunk; those that pad the last chunk stand for its last token, and nothing reads or writes there."""
        return (torch.arange(first, last, device=self.device) * self.length + j).clamp_(max=self.shape[2] - 1)

    def _cut(self, x: Tensor, first: int, last: int) -> Tensor:
        """Tokens of chunks ``[first, last)`` as ``[B, H, M, C, .]``, padded with zeros."""
        part = x[:, :, first * self.length : last * self.length]
        missing = (last - first) * self.length - part.shape[2]
        part = torch.nn.functional.pad(part, (0, 0, 0, missing)) if missing else part
        return part.unflatten(2, (last - first, self.length))
