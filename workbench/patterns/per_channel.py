"""Maps with coefficients of their own for every channel of a value: element-wise gates, weights that meet a second value.

Their rows are the mean over channels, their ``matvec`` takes each channel by its own coefficients, and the channels can be had
one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import GatedMap, head_index, state_metadata


class ChannelGatedMap(GatedMap):
    """Effective map of an attention whose outputs are gated per channel: o_ic = g_ic sum_j P_ij v_jc.

    ``raw`` is the inner map, ``gate`` ``[B, H, Q, E]``. As a map this is the mean over channels, rows mean_c(g_ic) P_ij;
    ``channel(c)`` is that of one channel, ``channel_gate`` the gate as given (element-wise form of arXiv 2505.06708).
    """

    channelwise = True

    def __init__(self, raw: AttentionMap, gate: Tensor) -> None:
        if gate.ndim != 4 or not gate.is_floating_point() or tuple(gate.shape[:3]) != tuple(raw.shape[:3]):
            wanted = [*raw.shape[:3], "E"]
            raise WorkbenchError(
                f"a gate is floating point [B, H, Q, E] = {wanted}; got {gate.dtype} {list(gate.shape)}"
            )
        self.channel_gate = gate.detach()
        super().__init__(raw, self.channel_gate.to(working_dtype(gate.dtype)).mean(-1))

    def channel(self, index: int) -> GatedMap:
        """The map of one channel of every head."""
        width = self.channel_gate.shape[3]
        if not 0 <= index < width:
            raise WorkbenchError(f"channel {index} of {width}")
        return GatedMap(self.raw, self.channel_gate[..., index])

    def heads(self, indices: Sequence[int]) -> ChannelGatedMap:
        chosen = head_index(indices, self.shape[1])
        return ChannelGatedMap(self.raw.heads(chosen), self.channel_gate[:, chosen])

    def matvec(self, v: Tensor) -> Tensor:
        self._check_width(v)
        out = self.raw.matvec(v)
        work = torch.promote_types(self.channel_gate.dtype, out.dtype)
        return (self.channel_gate.to(work) * out.to(work)).to(out.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        self._check_width(y)
        work = torch.promote_types(self.channel_gate.dtype, y.dtype)
        return self.raw.rmatvec((self.channel_gate.to(work) * y.to(work)).to(y.dtype))

    def _check_width(self, values: Tensor) -> None:
        width = self.channel_gate.shape[3]
        if values.ndim != 4 or values.shape[3] != width:
            raise WorkbenchError(f"this map has gates for {width} channels; got {list(values.shape)}")


class PerChannelMap(AttentionMap):
    """One map per channel of every head: ``inner`` is ``[B, H*E, Q, K]`` with a value head per row of it, ``width`` is E.

    Values are ``[B, G, K, E]`` with G = ``kv_heads``. Rows are the mean over channels; ``native()`` is the inner map.
    """

    channelwise = True

    def __init__(self, inner: AttentionMap, width: int, *, kv_heads: int | None = None, **metadata: str) -> None:
        b, channels, q, k = inner.shape
        if width < 1 or channels % width or inner.kv_heads != channels:
            raise WorkbenchError(
                f"a map of {channels} channels with {inner.kv_heads} value heads does not split into heads of {width}"
            )
        super().__init__((b, channels // width, q, k), kv_heads=kv_heads, offset=inner.offset)
        self.inner, self.width = inner, width
        for name in ("domain", "sign", "row_sum", "value_space", "exactness"):
            setattr(self, name, getattr(inner, name))
        state_metadata(self, metadata)

    def rows(self, lo: int, hi: int) -> Tensor:
        return self._mean(self.inner.rows(lo, hi))

    def native(self) -> AttentionMap:
        """The maps of the channels."""
        return self.inner

    def parts(self) -> dict[str, Any] | None:
        return {"inner": self.inner, "width": self.width, "kv_heads": self.kv_heads}

    def row_sums(self) -> Tensor:
        return self._mean(self.inner.row_sums())

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        self._check_width(v)
        values = v.repeat_interleave(self.shape[1] // self.kv_heads, 1).transpose(2, 3).flatten(1, 2)[..., None]
        return self.inner.matvec(values).squeeze(-1).unflatten(1, (-1, self.width)).transpose(2, 3)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        self._check_width(y)
        back = self.inner.rmatvec(y.transpose(2, 3).flatten(1, 2)[..., None]).squeeze(-1)
        return back.unflatten(1, (self.kv_heads, -1, self.width)).sum(2).transpose(2, 3)

    def _check_width(self, values: Tensor) -> None:
        if values.shape[3] != self.width:
            raise WorkbenchError(f"this map has {self.width} channels per head; got {list(values.shape)}")

    def _mean(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.width)).mean(2)

    def _received(self) -> Tensor:
        return self._mean(self.inner.received())

    def entropy(self) -> Tensor:
        raise Refused("the mean of the channels' maps is not what any channel sees: take native().entropy()")
