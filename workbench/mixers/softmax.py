"""Softmax attention: any mask spec, grouped heads, softcap, sink logits, additive bias, head gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import HIDDEN, Bias
from workbench.maps import GatedMap
from workbench.patterns.softmax import SoftmaxMap


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    bias: Bias | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """Plain softmax attention: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]`` to output ``[B, H, Q, V]`` and map.

    The output is differentiable and has v's dtype; the map is detached.
    """
    found = SoftmaxMap(q, k, mask=mask, scale=scale, softcap=softcap, sink=sink, bias=bias)
    b, h, n, m = found.shape
    if v.ndim != 4 or tuple(v.shape[:3]) != (b, k.shape[1], m):
        raise WorkbenchError(f"v is [B, G, K, width] = {[b, k.shape[1], m, 'width']}; got {list(v.shape)}")
    group = h // k.shape[1]
    work = found.scores.dtype
    s = (q.to(work) * (q.shape[3] ** -0.5 if scale is None else scale)) @ k.to(work).repeat_interleave(
        group, 1
    ).transpose(-1, -2)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        added = (bias if isinstance(bias, Tensor) else found.scores.bias_tile(slice(0, n), slice(0, m))).to(work)
        s = s + added.masked_fill(added <= HIDDEN, float("-inf"))
    allowed = mask.tile(slice(0, n), slice(0, m), q.device)
    if allowed is not None:
        s = s.masked_fill(~allowed, float("-inf"))
    top = (
        s.amax(-1, keepdim=True)
        if sink is None
        else torch.maximum(s.amax(-1, keepdim=True), sink.to(work)[None, :, None, None])
    )
    top = top.detach().masked_fill(top.isneginf(), 0.0)
    weights = (s - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink.to(work)[None, :, None, None] - top).exp()
    found._lse = (total.log() + top).squeeze(-1).detach()
    weights = weights / total.masked_fill(total == 0, 1.0)
    return (weights.to(v.dtype) @ v.repeat_interleave(group, 1)), found


def gated_softmax_attention(
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
) -> tuple[Tensor, GatedMap]:
    """Softmax attention whose head outputs are multiplied by ``gate`` ``[B, H, Q]`` (head-wise gate, arXiv 2505.06708)."""
    out, raw = softmax_attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sink=sink, bias=bias)
    found = GatedMap(raw, gate.detach())
    return out * gate[..., None].to(out.dtype), found


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8)}
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}


VARIANTS = (
    Variant(
        name="grouped-query-attention",
        paper="#88 FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness (2022)",
        family="softmax",
        priority="A",
        operator=softmax_attention,
        example=_example,
        causal=True,
        reference="torch.nn.functional.scaled_dot_product_attention",
        recipe=Recipe(),
    ),
)
