"""The maps of a selective scan (Mamba-1): every channel has a state of its own with diagonal transitions.

M^c_ij = sum_s C_is exp(A_cs (Delta_{j+1} + .. + Delta_i)) B_js Delta_j  + [i = j] D_c          Delta = Delta^c
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index
from workbench.patterns.recurrence import Recurrence
from workbench.patterns.state import StateMap
from workbench.patterns.transported import TransportedMap

TOGETHER = 2**23
"""Numbers of state rows, channels x tokens x width, that are held at a time."""


class ScanMap(TransportedMap):
    """One map per channel, ``[B, channels, N, N]``: ``dt`` ``[B, channels, N]`` (after softplus), ``a`` ``[channels, S]`` (not
    positive), ``b`` and ``c`` ``[B, groups, N, S]`` with groups dividing the channels, ``d`` ``[channels]`` or None.

    Only these are held; states are made for some channels at a time. ``heads`` picks channels.
    """

    def __init__(self, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None) -> None:
        check_scan(dt, a, b, c, d)
        super().__init__((dt.shape[0], dt.shape[1], dt.shape[2]), dt.dtype, dt.device, None)
        self.dt, self.a, self.b, self.c = dt.detach(), a.detach(), b.detach(), c.detach()
        self.d = None if d is None else d.detach()

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._each(lambda part, _: part.rows(lo, hi))

    def heads(self, indices: Sequence[int]) -> ScanMap:
        chosen = head_index(indices, self.shape[1])
        share = self.shape[1] // self.b.shape[1]
        groups = [channel // share for channel in chosen]
        d = None if self.d is None else self.d[chosen]
        return ScanMap(self.dt[:, chosen], self.a[chosen], self.b[:, groups], self.c[:, groups], d)

    def _apply(self, v: Tensor) -> Tensor:
        return self._each(lambda part, channels: part._apply(v[:, channels]))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._each(lambda part, channels: part._adjoint(y[:, channels]))

    def _blocks(self, size: int, reduce: str) -> Tensor:
        if reduce not in ("sum", "mean"):
            return super()._blocks(size, reduce)
        return self._each(lambda part, _: part.blocks(size, reduce))

    def _each(self, answer: Callable[[StateMap, slice], Tensor]) -> Tensor:
        """Answers of some channels at a time, side by side."""
        batch, channels, n, _ = self.shape
        step = max(1, TOGETHER // (batch * n * (self.a.shape[1] + 1)))
        found = []
        for lo in range(0, channels, step):
            part = slice(lo, min(channels, lo + step))
            recurrence = scan(self.dt, self.a, self.b, self.c, self.d, part)
            assert recurrence.diagonal is not None
            found.append(answer(StateMap(recurrence.read, recurrence.write, diagonal=recurrence.diagonal), part))
        return torch.cat(found, 1)


def scan(
    dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None, channels: slice = slice(None)
) -> Recurrence:
    """The recurrence of some channels, in the working type. ``d`` is one more state, which every token forgets at once."""
    work = working_dtype(dt.dtype)
    share = dt.shape[1] // b.shape[1]
    group = torch.arange(dt.shape[1], device=dt.device)[channels] // share
    dt, a = dt[:, channels, :, None].to(work), a[channels].to(work)
    read = c[:, group].to(work)
    write = b[:, group].to(work) * dt
    decay = (dt * a[:, None]).exp()
    if d is not None:
        one = torch.ones_like(decay[..., :1])
        read = torch.cat([read, one], -1)
        write = torch.cat([write, d[channels].to(work)[:, None, None] * one], -1)
        decay = torch.cat([decay, torch.zeros_like(one)], -1)
    return Recurrence(read, write, diagonal=decay)


def check_scan(dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> None:
    """Raise ``WorkbenchError`` naming the argument of a selective scan that does not fit."""
    if dt.ndim != 3 or 0 in dt.shape or not dt.is_floating_point():
        raise WorkbenchError(f"dt is floating point [B, channels, N], not empty; got {dt.dtype} {list(dt.shape)}")
    batch, channels, n = dt.shape
    if a.ndim != 2 or a.shape[0] != channels:
        raise WorkbenchError(f"a is [channels, S] with {channels} channels; got {list(a.shape)}")
    for name, part in (("b", b), ("c", c)):
        fits = part.ndim == 4 and part.shape[0] == batch and tuple(part.shape[2:]) == (n, a.shape[1])
        if not fits or channels % part.shape[1] or part.shape != b.shape:
            wanted = f"[B, groups, N, S] = {[batch, 'groups', n, a.shape[1]]} with groups dividing {channels}"
            raise WorkbenchError(f"{name} is {wanted}, b and c alike; got {list(part.shape)}")
    if d is not None and tuple(d.shape) != (channels,):
        raise WorkbenchError(f"d is [channels] = {[channels]}; got {list(d.shape)}")
