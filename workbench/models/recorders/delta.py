"""Recorders of the gated delta rule: Gated DeltaNet (Qwen3-Next, Qwen3.5, OLMo hybrid) and Kimi Delta Attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.models.recorders.state import CONV, StateRecorder, masked, work
from workbench.patterns.delta import DeltaMap
from workbench.patterns.state import StateMap, dplr

EPS = 1e-6
"""What the models' own L2 norm adds under its root."""


class GatedDelta(StateRecorder):
    """q and k after convolution and L2 norm, head-wise decay; several value heads share a query and key head."""

    mixer = "gated delta rule"
    functions = (
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        "chunk_gated_delta_rule",
        "recurrent_gated_delta_rule",
    )
    values = "value"

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        return module.num_v_heads, module.num_v_heads, module.head_k_dim

    def map(self, given: Mapping[str, Any]) -> AttentionMap:
        q, k, beta, log_decay = _operands(given)
        shown = self.shown(q.shape[2], q)
        found = DeltaMap(masked(q, shown), k, masked(beta, shown), log_decay, scale=q.shape[-1] ** -0.5)
        found.value_space = CONV
        return found


class KimiDelta(StateRecorder):
    """Kimi Delta Attention: the delta rule with a decay per channel, S_t = (I - beta k k^T) diag(a) S_{t-1} + beta k v^T."""

    mixer = "delta rule with decay per channel"
    functions = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
    values = "value"

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        return module.num_heads, module.num_heads, module.head_dim

    def map(self, given: Mapping[str, Any]) -> AttentionMap:
        q, k, beta, log_decay = _operands(given)
        shown = self.shown(q.shape[2], q)
        decay, write = log_decay.exp(), masked(beta, shown)[..., None] * k
        found = StateMap(masked(q, shown) * q.shape[-1] ** -0.5, write, dplr(decay, -write, k * decay))
        found.value_space = CONV
        return found


def _operands(given: Mapping[str, Any]) -> list[Tensor]:
    """q, k, beta and the logarithm of the decay with heads before tokens, as they enter the rule."""
    q, k, beta, g = work(*(given[name].transpose(1, 2) for name in ("query", "key", "beta", "g")))
    if given["use_qk_l2norm_in_kernel"]:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) for x in (q, k))
    return [q, k, beta, g]
