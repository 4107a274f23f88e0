"""Recorder of gated short convolutions (LFM2): y = C * conv(B * x), per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.models.recorders.state import StateWatch, masked, work
from workbench.patterns.toeplitz import ToeplitzMap

_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__)


class ShortConv(StateWatch):
    """M_ij = C_i w[i - j] B_j per channel, with both gates in the map. A bias of the convolution is no part of it."""

    mixer = "short convolution + gates"
    missing = "bias of the convolution, where there is one; editing pattern; decoding from a cache"

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        width = module.conv.weight.shape[0]
        return width, width, 1

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        if func in (torch.chunk, Tensor.chunk) and not self.met and kwargs.get("dim") == -2:
            enters, leaves, x = result
            self.leaves = leaves
            self.build(lambda: self._map(enters, leaves))
            new = self.session.on_values(self.layer, x.transpose(1, 2)[..., None])
            return enters, leaves, new[..., 0].transpose(1, 2)
        if func in _PRODUCTS and self.met and args[0] is self.leaves:
            return self.session.on_output(self.layer, result.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        return result

    def _map(self, enters: Tensor, leaves: Tensor) -> AttentionMap:
        kernel, left, right = work(self.module.conv.weight[None, :, 0].flip(-1), leaves, enters)
        n = enters.shape[2]
        shown = self.shown(n, left)
        return ToeplitzMap(kernel, queries=n, keys=n, left=masked(left, shown), right=masked(right, shown))
