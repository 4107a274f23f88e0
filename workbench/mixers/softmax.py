"""Softmax attention: any mask spec, multi-head, grouped and multi-query heads, softcap, sink logits, additive bias, head gate.

    P_ij = exp(scale q_i . k_j) / sum_j' exp(scale q_i . k_j') over the keys that the mask shows to i,   o_i = sum_j P_ij v_j

Query head h of H reads key and value head floor(h G / H) of G: G = H is multi-head attention, G = 1 multi-query attention.

``softmax_attention`` and what is made of it are references: their outputs come from all Q x K weights. Their maps hold q, k and
the denominators and make weights when asked; ``flash.flash_attention`` has an output without Q x K memory as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import HIDDEN, Bias
from workbench.maps import GatedMap
from workbench.mixers.scored import checked
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
    _, h, n, m = checked(q, k, v, mask)
    found = SoftmaxMap(q, k, mask=mask, scale=scale, softcap=softcap, sink=sink, bias=bias)
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


def multi_head_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float | None = None, bias: Bias | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Multi-head attention (Vaswani et al. 2017): q ``[B, H, Q, E]``, k ``[B, H, K, E]``, v ``[B, H, K, V]``, a key and value
    head for every query head."""
    _, h, _, _ = checked(q, k, v, mask)
    if k.shape[1] != h:
        raise WorkbenchError(f"k of multi-head attention has the {h} heads of q; got {list(k.shape)}")
    return softmax_attention(q, k, v, mask=mask, scale=scale, bias=bias)


def multi_query_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float | None = None, bias: Bias | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Multi-query attention (Shazeer, arXiv:1911.02150): q ``[B, H, Q, E]``, one head of keys k ``[B, 1, K, E]`` and values v
    ``[B, 1, K, V]`` for all query heads."""
    checked(q, k, v, mask)
    if k.shape[1] != 1:
        raise WorkbenchError(f"k of multi-query attention has one head; got {list(k.shape)}")
    return softmax_attention(q, k, v, mask=mask, scale=scale, bias=bias)


def _example(heads: int) -> Callable[[int, int, torch.dtype], dict[str, Any]]:
    """Four query heads on ``heads`` key and value heads; values are wider than keys, which no formula here forbids."""

    def example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        shapes = {"q": (2, 4, tokens, 8), "k": (2, heads, tokens, 8), "v": (2, heads, tokens, 6)}
        return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}

    return example


def _repeated(given: dict[str, Any]) -> dict[str, Any]:
    """In a model with fewer key heads than query heads those of a group are tied."""
    times = given["q"].shape[1] // given["k"].shape[1]
    shared = {name: given[name].repeat_interleave(times, 1) for name in ("k", "v")}
    return {"q": given["q"], "mask": given["mask"], **shared}


def _one_head(given: dict[str, Any]) -> dict[str, Any]:
    """One key head made of all of the layer's: a sum of projections is one projection, also after rotary positions."""
    shared = {name: given[name].sum(1, keepdim=True) * given[name].shape[1] ** -0.5 for name in ("k", "v")}
    return {"q": given["q"], "mask": given["mask"], **shared}


VARIANTS = (
    Variant(
        name="multi-head-attention",
        paper="Attention Is All You Need (2017)",
        family="softmax",
        priority="A",
        operator=multi_head_attention,
        example=_example(4),
        causal=True,
        reference="torch.nn.MultiheadAttention",
        note="The attention that #24, #96, #111 and #145 study.",
        recipe=Recipe(prepare=_repeated),
    ),
    Variant(
        name="grouped-query-attention",
        paper="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (2023)",
        family="softmax",
        priority="A",
        operator=softmax_attention,
        example=_example(2),
        causal=True,
        reference="torch.nn.functional.scaled_dot_product_attention(enable_gqa=True)",
        recipe=Recipe(),
    ),
    Variant(
        name="multi-query-attention",
        paper="Fast Transformer Decoding: One Write-Head is All You Need (2019)",
        family="softmax",
        priority="A",
        operator=multi_query_attention,
        example=_example(1),
        causal=True,
        reference="torch.nn.functional.scaled_dot_product_attention(enable_gqa=True)",
        recipe=Recipe(prepare=_one_head),
    ),
)
