"""Sigmoid attention: o_i = sum_j sigmoid(s_ij + shift) v_j, without any normalisation.

Every weight depends on its own query and key alone: rows do not sum to 1, and taking a key away leaves the others as they are.
``shift`` is ``-ln K`` unless given, which keeps the row sums near 1 at the start of training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.kernels import sigmoid_attention as kernel
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative
from workbench.mixers.scored import checked
from workbench.patterns.sigmoid import SigmoidMap


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    shift: float | None = None,
    bias: Tensor | Relative | None = None,
) -> tuple[Tensor, SigmoidMap]:
    """Sigmoid attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]`` and v ``[B, G, K, V]`` to ``[B, H, Q, V]`` and map.

    ``bias`` broadcasts to ``[B, H, Q, K]`` or is a ``Relative`` table. The output comes from the fused kernel in
    q's dtype, and is rounded to v's. Source: Ramapuram et al., arXiv:2409.04431, section 2.
    """
    checked(q, k, v, mask)
    found = SigmoidMap(q, k, mask=mask, scale=scale, shift=shift, bias=bias)
    table = bias.table if isinstance(bias, Relative) else bias
    # The fused forms have no gradient for a bias; the reference builds the scores and has.
    dense = table is not None and table.requires_grad and torch.is_grad_enabled()
    done = kernel.sigmoid_attention(
        q, k, v.to(q.dtype), mask=mask, scale=scale, shift=shift, bias=bias, impl="reference" if dense else None
    )
    return done.output.to(v.dtype), found


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8)}
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    """The shift of texts of 64 tokens for all lengths, as a model is trained with one: else a longer text would change what
    its earlier tokens see."""
    return {**{name: given[name] for name in ("q", "k", "v", "mask")}, "shift": -math.log(64)}


VARIANTS = (
    Variant(
        name="sigmoid-attention",
        paper="#38 Theory, Analysis, and Best Practices for Sigmoid Self-Attention (2024)",
        family="weighted softmax",
        priority="B",
        operator=sigmoid_attention,
        example=_example,
        causal=True,
        reference="apple/ml-sigmoid-attention",
        note="the shift is -ln of the number of keys for every query, those hidden by the mask included",
        recipe=Recipe(prepare=_prepare),
    ),
)
