"""Diagonal maps: every token, or every channel, is scaled by a gate of its own and nothing mixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index, state_metadata


class DiagonalMap(AttentionMap):
    """M = diag(gate): ``gate`` ``[B, H, N]`` over channels (``domain="channel"``) or tokens (``"token"``).

    ``native()`` is the gate.
    """

    def __init__(self, gate: Tensor, *, domain: str = "channel", **metadata: str) -> None:
        if gate.ndim != 3 or not gate.is_floating_point():
            raise WorkbenchError(f"a gate is floating point [B, H, N]; got {gate.dtype} {list(gate.shape)}")
        b, h, n = gate.shape
        super().__init__((b, h, n, n))
        self.gate = gate.detach()
        self.sign = "signed" if bool((self.gate < 0).any()) else "nonnegative"
        state_metadata(self, {"row_sum": "gate", "domain": domain, **metadata})

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        out = self.gate.new_zeros(*self.shape[:2], hi - lo, self.shape[3])
        out.diagonal(lo, -2, -1).copy_(self.gate[:, :, lo:hi])
        return out

    def native(self) -> Tensor:
        return self.gate

    def parts(self) -> dict[str, Any] | None:
        return {"gate": self.gate, "domain": self.domain}

    def heads(self, indices: Sequence[int]) -> DiagonalMap:
        chosen = self.gate[:, head_index(indices, self.shape[1])]
        return DiagonalMap(chosen, domain=self.domain, value_space=self.value_space, row_sum=self.row_sum)

    def entropy(self) -> Tensor:
        """That of rows with one entry, refused if a gate exceeds 1, as such rows are no sub-distributions."""
        if self.row_sum == "gate" and bool((self.gate > 1).any()):
            raise Refused(f"a gate of {float(self.gate.max()):.4g} makes rows that are no distribution")
        return super().entropy()

    def row_sums(self) -> Tensor:
        return self.gate.to(working_dtype(self.gate.dtype))

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        work = torch.promote_types(self.gate.dtype, v.dtype)
        return (self.gate.to(work)[..., None] * v.to(work)).to(v.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        return self.matvec(y)

    def _received(self) -> Tensor:
        return self.row_sums()
