"""State recurrences by chunks.

    S_t = A_t S_{t-1} + b_t v_t^T,   o_i = c_i^T S_i = sum_{j <= i} c_i^T A_i .. A_{j+1} b_j v_j

Tokens are cut into chunks. A row is carried backwards as a vector r, from r = c_i on: at token t its cell is r . b_t, and then
r <- r A_t. The steps inside the chunks run for all chunks at once. For a whole chunk with tokens 1..C two things are made,

    W_j = A_C .. A_{j+1} b_j        what token j leaves in the state after the chunk, so later cells are r . W_j
    T = A_C .. A_1                  what carries a row over the chunk, r <- r T

in memory O(N S + N S^2 / C), or O(N S) for diagonal transitions. Decays are only ever multiplied, never divided by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.errors import WorkbenchError

LENGTH = 64
"""Longest chunk. Chunks are about as long as the state is wide, so that cells inside chunks take no more memory than rows."""

Step = Callable[[Tensor, Tensor], Tensor]
"""(rows ``[B, H, M, R, S]``, tokens ``[M]``) -> rows A_t ``[B, H, M, R, S]``, with another transition for each of the M tokens.
Rows may be wider (float64) than what the step holds, and stay so."""


class Dplr:
    """The step of A_t = diag(decay_t) + x_t y_t^T, with all three ``[B, H, N, S]``: r <- r * decay_t + (r . x_t) y_t."""

    def __init__(self, decay: Tensor, x: Tensor, y: Tensor) -> None:
        if not decay.shape == x.shape == y.shape or decay.ndim != 4:
            got = ", ".join(str(list(tensor.shape)) for tensor in (decay, x, y))
            raise WorkbenchError(f"decay, x and y are [B, H, N, S] alike; got {got}")
        self.decay, self.x, self.y = decay, x, y

    def __call__(self, rows: Tensor, t: Tensor) -> Tensor:
        decay, x, y = (tensor[:, :, t, None].to(rows.dtype) for tensor in (self.decay, self.x, self.y))
        return rows * decay + (rows @ x.transpose(-1, -2)) * y

    def detach(self) -> Dplr:
        return Dplr(self.decay.detach(), self.x.detach(), self.y.detach())

    def heads(self, chosen: list[int]) -> Dplr:
        return Dplr(self.decay[:, chosen], self.x[:, chosen], self.y[:, chosen])


class Recurrence:
    """``read`` c and ``write`` b ``[B, H, N, S]``, and transitions given by ``step`` or as ``diagonal`` ``[B, H, N, S]``.

    Plain torch without writes in place: gradients flow from ``output`` to whatever read, write, step and diagonal hold.
    Tensors are computed in the type that is asked for.
    """

    def __init__(
        self, read: Tensor, write: Tensor, step: Step | None = None, *, diagonal: Tensor | None = None
    ) -> None:
        if read.ndim != 4 or 0 in read.shape or not read.is_floating_point():
            raise WorkbenchError(f"read is floating point [B, H, N, S], not empty; got {read.dtype} {list(read.shape)}")
        if write.shape != read.shape:
            raise WorkbenchError(f"write is {list(read.shape)}, as read; got {list(write.shape)}")
        if (step is None) == (diagonal is None):
            got = "none" if step is None else "both"
            raise WorkbenchError(f"transitions are told by step or by diagonal; got {got}")
        if diagonal is not None and diagonal.shape != read.shape:
            raise WorkbenchError(f"diagonal is {list(read.shape)}, as read; got {list(diagonal.shape)}")
        self.read, self.write, self.step, self.diagonal = read, write, step, diagonal
        n, s = read.shape[2:]
        self.length = min(n, LENGTH, max(16, s))
        self.count = -(-n // self.length)

    def detach(self) -> Recurrence:
        step: Any = self.step
        step = step.detach() if hasattr(step, "detach") else step
        diagonal = None if self.diagonal is None else self.diagonal.detach()
        return Recurrence(self.read.detach(), self.write.detach(), step, diagonal=diagonal)

    def output(self, v: Tensor) -> Tensor:
        """o ``[B, H, N, E]`` for v ``[B, H, N, E]``, in v's type."""
        return self.apply(v, *self.carriers(v.dtype))

    def apply(self, v: Tensor, writes: Tensor, over: Tensor) -> Tensor:
        """``output`` with the ``carriers`` given."""
        values = self.cut(v, 0, self.count)
        cells, rows = self.inside(0, self.count, v.dtype)
        out = cells @ values
        state = v.new_zeros(*v.shape[:2], self.read.shape[3], v.shape[3])
        before = [state]
        for chunk in range(self.count - 1):
            t = over[:, :, chunk]
            carried = t[..., None] * state if self.diagonal is not None else t @ state
            state = carried + writes[:, :, chunk].transpose(-1, -2) @ values[:, :, chunk]
            before.append(state)
        out = out + rows @ torch.stack(before, 2)
        return out.flatten(2, 3)[:, :, : v.shape[2]]

    def adjoint(self, y: Tensor, writes: Tensor, over: Tensor) -> Tensor:
        """The transpose of ``apply``."""
        values = self.cut(y, 0, self.count)
        cells, rows = self.inside(0, self.count, y.dtype)
        out = cells.transpose(-1, -2) @ values
        wanted = y.new_zeros(*y.shape[:2], self.read.shape[3], y.shape[3])
        after = [wanted]
        for chunk in range(self.count - 1, 0, -1):
            if chunk < self.count - 1:
                t = over[:, :, chunk]
                wanted = t[..., None] * wanted if self.diagonal is not None else t.transpose(-1, -2) @ wanted
            wanted = wanted + rows[:, :, chunk].transpose(-1, -2) @ values[:, :, chunk]
            after.append(wanted)
        if self.count > 1:
            earlier = writes @ torch.stack(after[:0:-1], 2)
            out = torch.cat([out[:, :, :-1] + earlier, out[:, :, -1:]], 2)
        return out.flatten(2, 3)[:, :, : y.shape[2]]

    def carriers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W ``[B, H, M, C, S]`` and T (``[B, H, M, S, S]`` or its diagonal ``[B, H, M, S]``) of all chunks but the last, which
        no row crosses."""
        b, h, _, s = self.read.shape
        m = self.count - 1
        writes = self.cut(self.write, 0, m).to(dtype)
        left = []
        if self.diagonal is not None:
            over = torch.ones(b, h, m, s, dtype=dtype, device=self.read.device)
            for j in reversed(range(self.length)):
                left.append(over * writes[..., j, :])
                over = over * self.diagonal[:, :, self.tokens(0, m, j)].to(dtype)
        else:
            over = torch.eye(s, dtype=dtype, device=self.read.device).expand(b, h, m, s, s)
            for j in reversed(range(self.length)):
                left.append((over @ writes[..., j, :, None])[..., 0])
                over = self._carry(over, self.tokens(0, m, j))
        return torch.stack(left[::-1], -2), over

    def inside(self, first: int, last: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows of chunks ``[first, last)`` walked back to the starts of their chunks: the cells inside each chunk
        ``[B, H, M, C, C]``, and the rows ``[B, H, M, C, S]`` as they read the state before the chunk."""
        read, write = (self.cut(x, first, last).to(dtype) for x in (self.read, self.write))
        rows = read[..., self.length :, :]
        columns = []
        for j in reversed(range(self.length)):
            rows = torch.cat([read[..., j : j + 1, :], rows], -2)
            columns.append(pad((rows @ write[..., j, :, None])[..., 0], (j, 0)))
            rows = self._carry(rows, self.tokens(first, last, j))
        return torch.stack(columns[::-1], -1), rows

    def tokens(self, first: int, last: int, j: int) -> Tensor:
        """Token j of every chunk; those that pad the last chunk stand for its last token, and nothing reads or writes there."""
        start = torch.arange(first, last, device=self.read.device)
        return (start * self.length + j).clamp_(max=self.read.shape[2] - 1)

    def cut(self, x: Tensor, first: int, last: int) -> Tensor:
        """Tokens of chunks ``[first, last)`` as ``[B, H, M, C, .]``, padded with zeros."""
        part = x[:, :, first * self.length : last * self.length]
        missing = (last - first) * self.length - part.shape[2]
        part = pad(part, (0, 0, 0, missing)) if missing else part
        return part.unflatten(2, (last - first, self.length))

    def _carry(self, rows: Tensor, t: Tensor) -> Tensor:
        if self.diagonal is not None:
            return rows * self.diagonal[:, :, t, None].to(rows.dtype)
        assert self.step is not None
        return self.step(rows, t)
