"""Causal attention of a vision transformer with a soft mask (iLLaMA).

    M_ij = P_ij (1 if j <= i else soft),   P the softmax over *all* tokens

The released code multiplies the softmax by the mask and does not renormalise: at soft = 0 the future gives nothing, but takes its
share of the denominators. ``soft`` falls from 1 (bidirectional) to 0 while training starts. The class token stands last, so that
its row sees the whole image. Source: Wang et al., Adapting LLaMA Decoder to Vision Transformer (2024), and its released code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import GatedMap
from workbench.mixers.flash import partial_attention
from workbench.mixers.local import chosen
from workbench.mixers.windows import check_square
from workbench.patterns.algebra import SumMap
from workbench.patterns.softmax import SoftmaxMap


def soft_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, soft: float = 0.0, scale: float | None = None
) -> tuple[Tensor, AttentionMap]:
    """Softmax over all tokens, times 1 for the past and ``soft`` in [0, 1] for the future.

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]`` to ``[B, H, N, V]``. Rows sum to less than 1 unless soft = 1.
    """
    check_square(q, k, v)
    if not 0 <= soft <= 1:
        raise WorkbenchError(f"soft is the weight of the future, from 0 to 1; got {soft}")
    whole, lse = partial_attention(q, k, v, mask=Mask(), scale=scale)
    past, past_lse = partial_attention(q, k, v, mask=Mask(causal=True), scale=scale)
    share = (past_lse - lse).exp()
    out = (1 - soft) * share[..., None].to(past.dtype) * past + soft * whole
    full = SoftmaxMap(q, k, lse, mask=Mask(), scale=scale)
    half = SoftmaxMap(q, k, lse, mask=Mask(causal=True), scale=scale)
    half.row_sum = "<=1"
    if soft in (0, 1):
        return out, full if soft else half
    parts = (GatedMap(part, torch.full_like(share, weight)) for part, weight in ((half, 1 - soft), (full, soft)))
    return out, SumMap(*parts, row_sum="<=1")


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8)}
    return {**example_tensors(seed, dtype, **shapes), "soft": 0.0}


VARIANTS = (
    Variant(
        name="illama-soft-causal-attention",
        paper="#165 Adapting LLaMA Decoder to Vision Transformer (2024)",
        family="softmax",
        priority="C",
        operator=soft_causal_attention,
        example=_example,
        reference="techmonsterwang/iLLaMA models/illama.py",
        note="Even at soft = 0, where the future has no weight, its keys are in the denominators, as released: not causal.",
        recipe=Recipe(prepare=chosen("q", "k", "v", soft=0.0)),
    ),
)
