"""The map of Fourier mixing over tokens: cosines of real parts and sines of imaginary parts.

    y_i = Re sum_j exp(-2 pi i j sqrt(-1) / N) (a_j + b_j sqrt(-1)) = sum_j cos(2 pi i j / N) a_j + sin(2 pi i j / N)
    b_j

Keys are the N real parts a and then the N imaginary parts b of values that were transformed along their channels.
Nothing depends on the input; rows are made on demand and products go by FFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import METADATA, AttentionMap
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index, state_metadata


class FourierMap(AttentionMap):
    """``[B, H, N, 2N]`` with M_ij = scale cos(2 pi i j / N) and M_i,N+j = scale sin(2 pi i j / N), the same for all
    heads.

    Each head has a value head of its own. Angles are taken from i j modulo N, so that long sequences lose no digits.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        tokens: int,
        *,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **metadata: str,
    ) -> None:
        if min(batch, heads, tokens) < 1:
            raise WorkbenchError(f"a map has at least one example, head and token; got {[batch, heads, tokens]}")
        super().__init__((batch, heads, tokens, 2 * tokens))
        self.scale, self._work = scale, working_dtype(dtype)
        self._device = torch.device("cpu" if device is None else device)
        told = {"sign": "signed", "row_sum": "free", "value_space": "transformed channels, real then imaginary"}
        state_metadata(self, {**told, **metadata})
        if tokens == 1 and scale > 0:
            self.sign = "nonnegative"

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._tile(lo, hi, 0, self.shape[3])

    def parts(self) -> dict[str, Any] | None:
        b, h, n, _ = self.shape
        return {"batch": b, "heads": h, "tokens": n, "scale": self.scale, "dtype": self._work}

    def heads(self, indices: Sequence[int]) -> FourierMap:
        told = {name: getattr(self, name) for name in METADATA}
        return FourierMap(
            self.shape[0], len(head_index(indices, self.shape[1])), self.shape[2],
            scale=self.scale, dtype=self._work, device=self._device, **told,
        )  # fmt: skip

    def row_sums(self) -> Tensor:
        ones = torch.ones(*self.shape[:2], self.shape[3], 1, dtype=self._work, device=self._device)
        return self._remember(("row_sums",), lambda: self.matvec(ones)[..., 0])

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        real, imaginary = v.to(torch.promote_types(self._work, v.dtype)).chunk(2, 2)
        return (self.scale * torch.fft.fft(torch.complex(real, imaginary), dim=2).real).to(v.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        spectrum = torch.fft.fft(y.to(torch.promote_types(self._work, y.dtype)), dim=2)
        return (self.scale * torch.cat([spectrum.real, -spectrum.imag], 2)).to(y.dtype)

    def _received(self) -> Tensor:
        return self.rmatvec(torch.ones(*self.shape[:3], 1, dtype=self._work, device=self._device))[..., 0]

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        n = self.shape[2]
        keys = torch.arange(k_lo, k_hi, device=self._device)
        turns = torch.arange(q_lo, q_hi, device=self._device)[:, None] * keys % n
        angle = turns.to(self._work) * (2 * math.pi / n)
        found = self.scale * torch.where(keys < n, angle.cos(), angle.sin())
        return found.expand(*self.shape[:2], -1, -1)
