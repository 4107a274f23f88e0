"""Recorders of state space models: Mamba (one matrix per channel) and Mamba-2 (one per head)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.models.recorders.state import CONV, StateRecorder, masked, work
from workbench.patterns.algebra import SumMap
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.linear import LinearMap
from workbench.patterns.selective import SelectiveScanMap


class Mamba(StateRecorder):
    """The selective scan with its skip connection, before the gate. The scan's function applies the gate too, so that the output
    before it is never there to be read: there is no site ``z``."""

    mixer = "selective scan"
    missing = "output gate (the map is before it); editing pattern; decoding from a cache"
    sites = frozenset({"v"})
    functions = ("mamba_selective_scan", "mamba_selective_state_update")
    values = "hidden_states"

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        return module.intermediate_size, module.intermediate_size, 1

    def unfold(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[..., None]

    def fold(self, x: Tensor) -> Tensor:
        return x[..., 0].transpose(1, 2)

    def map(self, given: Mapping[str, Any]) -> AttentionMap:
        dt, a, write, read = work(given["dt"], given["A"], given["B"].transpose(1, 2), given["C"].transpose(1, 2))
        if given["delta_bias"] is not None:
            dt = dt + given["delta_bias"].to(dt.dtype)[:, None]
        if given["delta_softplus"]:
            dt = torch.nn.functional.softplus(dt)
        real = self.session.real(self.layer)
        return SelectiveScanMap(dt, a, write, read, given["D"], real=real, value_space=CONV)


class Mamba2(StateRecorder):
    """The state space dual form with its skip connection, before the gated norm."""

    mixer = "state space (Mamba-2)"
    missing = "gated norm (the map is before it); editing pattern; decoding from a cache"
    functions = ("mamba2_chunk_scan", "mamba2_selective_state_update")
    values = "hidden_states"

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        return module.num_heads, module.num_heads, module.head_dim

    def map(self, given: Mapping[str, Any]) -> AttentionMap:
        dt, a, write, read = work(*(given[name] for name in ("dt", "A", "B", "C")))
        if given["dt_bias"] is not None:
            dt = dt + given["dt_bias"].detach().to(dt.dtype)
        if given["dt_softplus"]:
            dt = torch.nn.functional.softplus(dt)
        dt = dt.clamp(*given["dt_limit"]).transpose(1, 2)
        b, heads, n = dt.shape
        write, read = (x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1) for x in (write, read))
        shown = self.shown(n, dt)
        scan = LinearMap(
            masked(read, shown),
            masked(dt, shown)[..., None] * write,
            a[:, None] * dt,
            causal=True,
            value_space=CONV,
        )
        if given["D"] is None:
            return scan
        skip = masked(given["D"].to(dt.dtype)[None, :, None].expand(b, heads, n), shown)
        return SumMap(scan, DiagonalMap(skip, domain="token"), value_space=CONV)
