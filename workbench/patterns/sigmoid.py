"""The map of sigmoid attention: every weight by itself, nothing normalised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.captures import Capture
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative, Scores
from workbench.kernels.sigmoid_attention import sigmoid_attention
from workbench.maps import head_index


class SigmoidMap(AttentionMap):
    """M_ij = 1 / (1 + exp(-(s_ij + shift))), 0 where the mask hides j from i; s as in ``kernels/scores.py``.

    ``q`` ``[B, H, Q, E]``, ``k`` ``[B, G, K, E]``; ``shift`` defaults to ``-ln K``; ``bias`` broadcasts to ``[B, H, Q, K]`` or is
    a ``Relative`` table. Block maps, row and column sums come from one pass of the kernel in linear memory.
    """

    row_sum = "free"

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        mask: Mask,
        scale: float | None = None,
        shift: float | None = None,
        bias: Tensor | Relative | None = None,
    ) -> None:
        if isinstance(bias, Relative):
            bias = Relative(bias.table.detach(), bias.first)
        elif bias is not None:
            bias = bias.detach()
        try:
            scores = Scores(q.detach(), k.detach(), mask, scale, bias=bias)
        except ValueError as error:
            raise WorkbenchError(str(error)) from None
        super().__init__(scores.shape, kv_heads=k.shape[1], offset=mask.offset)
        self.scores = scores
        self.shift = -math.log(k.shape[2]) if shift is None else shift
        if not math.isfinite(self.shift):
            raise WorkbenchError(f"shift is a finite number; got {shift}")

    @property
    def mask(self) -> Mask:
        return self.scores.mask

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._weights(lo, hi, 0, self.shape[3])

    def heads(self, indices: Sequence[int]) -> SigmoidMap:
        chosen = head_index(indices, self.shape[1])
        group = self.shape[1] // self.kv_heads
        old, bias = self.scores, self.scores.bias
        if isinstance(bias, Relative):
            bias = Relative(bias.table[chosen], bias.first) if bias.table.shape[0] > 1 else bias
        elif isinstance(bias, Tensor) and bias.ndim >= 3 and bias.shape[-3] > 1:
            bias = bias.index_select(bias.ndim - 3, torch.tensor(chosen, device=bias.device))
        assert bias is None or isinstance(bias, Tensor | Relative)
        return SigmoidMap(
            old.q[:, chosen],
            old.k[:, [head // group for head in chosen]],
            mask=old.mask.select(heads=torch.tensor(chosen)),
            scale=old.scale,
            shift=self.shift,
            bias=bias,
        )

    def row_sums(self) -> Tensor:
        return self._remember(("row_sums",), lambda: self._stats(stats=("row_sums",)).row_sums)

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return self._weights(q_lo, q_hi, k_lo, k_hi)

    def _weights(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        with torch.no_grad():
            return self.scores.tile(slice(q_lo, q_hi), slice(k_lo, k_hi)).add_(self.shift).sigmoid_()

    def _precompute(self, request: Capture) -> None:
        stats = tuple(name for name in ("received",) if name in request.stats)
        if request.blocks is not None or stats:
            found = self._stats(block=request.blocks, reduce=request.reduce, stats=stats)
            for name, blocks in found.blocks.items():
                self._memo["blocks", request.blocks, name] = blocks
            if found.received is not None:
                self._memo["received",] = found.received
        super()._precompute(request)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        return self._stats(block=size, reduce=(reduce,)).blocks[reduce]

    def _received(self) -> Tensor:
        found = self._stats(stats=("received",)).received
        assert found is not None
        return found

    def _stats(self, **wanted: Any) -> Any:
        """One pass of the kernel, over values of width 1 that nothing asks for."""
        s = self.scores
        values = s.k.new_zeros(*s.k.shape[:3], 1)
        assert s.bias is None or isinstance(s.bias, Tensor | Relative)
        with torch.no_grad():
            return sigmoid_attention(
                s.q, s.k, values, mask=s.mask, scale=s.scale, shift=self.shift, bias=s.bias, **wanted
            )
