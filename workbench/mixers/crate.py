"""Multi-head subspace self-attention of white-box transformers: one projection per head is query, key and value at once.

    w_h = U_h^T x,   s_ij = scale w_hi . w_hj,   P = softmax(s),   o = P w

A gradient step on the coding rate of the tokens in the subspace U_h has this form. Scores are symmetric, so that
P_ij P_jk P_ki = P_ji P_kj P_ik around every triangle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.kernels.mask import Mask
from workbench.mixers.image import spread
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.softmax import SoftmaxMap


def subspace_self_attention(
    w: Tensor, v: Tensor, *, mask: Mask = Mask(), scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Attention of a subspace with itself: w ``[B, H, N, E]`` are queries and keys, v ``[B, H, N, V]`` the values.

    In the network v is w; as an argument of its own the output is linear in it. The projection back by U_h is part of the
    network's output projection. Source: Yu et al., arXiv:2311.13110, the MSSA operator.
    """
    return softmax_attention(w, w, v, mask=mask, scale=scale)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    found = example_tensors(seed, dtype, w=(2, 4, tokens, 6))
    return {**found, "v": found["w"].clone()}


def _prepare(parts: dict[str, Any]) -> dict[str, Any]:
    own = spread(parts["v"], parts["q"].shape[1])
    return {"w": own, "v": own, "mask": parts["mask"]}


VARIANTS = (
    Variant(
        name="subspace-self-attention",
        paper="#135 White-Box Transformers via Sparse Rate Reduction: Compression Is All There Is? (2023)",
        family="weighted softmax",
        priority="B",
        operator=subspace_self_attention,
        example=_example,
        reference="Ma-Lab-Berkeley/CRATE model/crate.py",
        recipe=Recipe(prepare=_prepare, ignores=("q", "k")),
    ),
)
