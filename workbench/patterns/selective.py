"""The map of a selective scan (Mamba): one matrix per channel, kept in the scan's own small operands.

    M^c_ij = sum_n C_in dt_jc B_jn exp(A_cn (dt_{j+1,c} + ... + dt_ic)) + D_c [i = j]          for j <= i

Spelled out as a map with a decay per channel this takes B C N S numbers; here dt ``[B, C, N]``, B and C ``[B, N, S]`` are kept,
and the rest is made when something is asked, and let go again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index, state_metadata
from workbench.mods import Mod
from workbench.patterns.algebra import SumMap
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.linear import ChannelDecayMap


class SelectiveScanMap(AttentionMap):
    """``step`` (dt after its bias and softplus) ``[B, C, N]``, ``a`` ``[C, S]`` not positive, ``write`` and ``read`` (the scan's
    B and C) ``[B, N, S]``, ``skip`` (its D) ``[C]`` or None. Every channel is a head: values are ``[B, C, N, 1]``.

    ``real`` ``[B, N]`` bool: rows and columns of other tokens are zero. ``native()`` is the sum of maps it answers from.
    """

    def __init__(
        self,
        step: Tensor,
        a: Tensor,
        write: Tensor,
        read: Tensor,
        skip: Tensor | None = None,
        *,
        real: Tensor | None = None,
        **metadata: str,
    ) -> None:
        if step.ndim != 3 or not step.is_floating_point():
            raise WorkbenchError(f"step is floating point [B, C, N]; got {step.dtype} {list(step.shape)}")
        b, c, n = step.shape
        s = a.shape[-1]
        for name, tensor, shape in (
            ("a", a, (c, s)),
            ("write", write, (b, n, s)),
            ("read", read, (b, n, s)),
            ("skip", skip, (c,)),
            ("real", real, (b, n)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise WorkbenchError(f"{name} is {list(shape)} for a step of {[b, c, n]}; got {list(tensor.shape)}")
        super().__init__((b, c, n, n))
        self.step, self.a, self.write, self.read = step.detach(), a.detach(), write.detach(), read.detach()
        self.skip = None if skip is None else skip.detach()
        self.real = real
        state_metadata(self, {"sign": "signed", "row_sum": "free", **metadata})

    def native(self) -> AttentionMap:
        work = working_dtype(torch.promote_types(self.step.dtype, self.a.dtype))
        b, c, n, _ = self.shape
        step, a, write, read = (x.to(work) for x in (self.step, self.a, self.write, self.read))
        shown = None if self.real is None else self.real.to(step.device, work)
        if shown is not None:
            write, read = write * shown[..., None], read * shown[..., None]
        scan: AttentionMap = ChannelDecayMap(
            read[:, None].expand(b, c, n, -1),
            step[..., None] * write[:, None],
            step[..., None] * a[None, :, None],
            value_space=self.value_space,
        )
        if self.skip is None:
            return scan
        skip = self.skip.to(work)[None, :, None].expand(b, c, n)
        skip = skip if shown is None else skip * shown[:, None]
        return SumMap(scan, DiagonalMap(skip, domain="token"), value_space=self.value_space)

    def rows(self, lo: int, hi: int) -> Tensor:
        return self.native().rows(lo, hi)

    def row_sums(self) -> Tensor:
        return self._remember(("row_sums",), lambda: self.native().row_sums())

    def matvec(self, v: Tensor) -> Tensor:
        return self.native().matvec(v)

    def rmatvec(self, y: Tensor) -> Tensor:
        return self.native().rmatvec(y)

    def parts(self) -> dict[str, Any] | None:
        return {
            "step": self.step,
            "a": self.a,
            "write": self.write,
            "read": self.read,
            "skip": self.skip,
            "real": self.real,
        }

    def heads(self, indices: Sequence[int]) -> SelectiveScanMap:
        chosen = head_index(indices, self.shape[1])
        skip = None if self.skip is None else self.skip[chosen]
        return SelectiveScanMap(
            self.step[:, chosen], self.a[chosen], self.write, self.read, skip, real=self.real,
            value_space=self.value_space,
        )  # fmt: skip

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return self.native()._tile(q_lo, q_hi, k_lo, k_hi)

    def _chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        return self.native()._chunks()

    def _received(self) -> Tensor:
        return self.native().received()

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        return self.native()._mass(mod)

    def _distance(self, window: int | None) -> Tensor:
        return self.native().distance(window)

    def _distance2(self) -> Tensor:
        return self.native().distance(moment=2)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        return self.native().blocks(size, reduce)
