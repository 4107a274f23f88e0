"""Gated attention: a sigmoid gate on what softmax attention returns, per head or per channel.

    head-wise      o_ih  = g_ih  sum_j P_ij v_j      g ``[B, H, Q]``
    element-wise   o_ihc = g_ihc sum_j P_ij v_jc     g ``[B, H, Q, E]``

P is what the scores say; what a key contributes is g P. Sinks show in the first and not in the second, so both are kept: ``raw``
is P, ``gate`` (``channel_gate`` for the second form) is g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Learned, Recipe, Variant, example_tensors
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Bias
from workbench.mixers.scored import check_tensor, checked
from workbench.mixers.softmax import gated_softmax_attention, softmax_attention
from workbench.patterns.per_channel import ChannelGatedMap


def elementwise_gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    bias: Bias | None = None,
) -> tuple[Tensor, ChannelGatedMap]:
    """Softmax attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]`` and v ``[B, G, K, V]``, multiplied channel by channel by
    ``gate`` ``[B, H, Q, V]``, after its sigmoid (element-wise form of arXiv 2505.06708, as in Qwen3-Next)."""
    b, h, n, _ = checked(q, k, v, mask)
    check_tensor("gate", gate, (b, h, n, v.shape[3]))
    out, raw = softmax_attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sink=sink, bias=bias)
    return out * gate.to(out.dtype), ChannelGatedMap(raw, gate)


def _headwise_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8), "gate": (2, 4, tokens)}
    given = example_tensors(seed, dtype, **shapes)
    return {**given, "gate": given["gate"].sigmoid(), "mask": Mask(causal=True)}


def _elementwise_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6), "gate": (2, 4, tokens, 6)}
    given = example_tensors(seed, dtype, **shapes)
    return {**given, "gate": given["gate"].sigmoid(), "mask": Mask(causal=True)}


PAPER = "#59 Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free (2025)"

VARIANTS = (
    Variant(
        name="headwise-gated-attention",
        paper=PAPER,
        family="weighted softmax",
        priority="A",
        operator=gated_softmax_attention,
        example=_headwise_example,
        causal=True,
        reference="HF Qwen3NextAttention, with one gate per head",
        recipe=Recipe(learned={"gate": Learned("H", torch.sigmoid)}),
    ),
    Variant(
        name="elementwise-gated-attention",
        paper=PAPER,
        family="weighted softmax",
        priority="A",
        operator=elementwise_gated_attention,
        example=_elementwise_example,
        causal=True,
        reference="HF Qwen3NextAttention",
        recipe=Recipe(learned={"gate": Learned("HE", torch.sigmoid)}),
    ),
)
