"""Attention over pairs of keys (Kronecker or tensor attention).

    A_ijl = softmax over all (j, l) of scale sum_a q_ia k1_ja k2_la,   o_i = sum_jl A_ijl (v1_j * v2_l)

It is softmax attention over the K^2 row-wise products of the two key and value sequences. The operator is linear in v1 with v2
fixed, and the other way round. Exact and cubic in the tokens, for at most 64 keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Learned, Recipe, Variant, example_tensors
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.scored import check_tensor, checked, masked_softmax, visible
from workbench.patterns.triple import TripleMap, check_pairs


def triple_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[Tensor, TripleMap]:
    """Attention of q ``[B, H, Q, E]`` over pairs of k1 and k2 ``[B, G, K, E]`` with values v1 and v2 ``[B, G, K, V]``.

    ``scale`` defaults to ``1 / E``. A pair is visible where the mask shows both of its keys. Refused above 64 keys. Source: Alman
    and Song, How to Capture Higher-order Correlations?, arXiv:2310.04064, definition of tensor attention.
    """
    mask = Mask() if mask is None else mask
    b, h, n, m = checked(q, k1, v1, mask)
    check_tensor("k2", k2, tuple(k1.shape))
    check_tensor("v2", v2, tuple(v1.shape))
    check_pairs(m, m)
    work = working_dtype(q.dtype)
    group = h // k1.shape[1]
    first, second, left, right = (x.to(work).repeat_interleave(group, 1) for x in (k1, k2, v1, v2))
    factor = 1 / q.shape[3] if scale is None else scale
    scores = torch.einsum("bhia,bhja,bhla->bhijl", q.to(work) * factor, first, second)
    allowed = visible(mask, n, m, q.device)
    pairs = (allowed[..., None] & allowed[..., None, :]).expand(b, h, n, m, m)
    weights = masked_softmax(scores.flatten(3), pairs.flatten(3))[0].unflatten(3, (m, m))
    out = torch.einsum("bhijl,bhje,bhle->bhie", weights, left, right)
    return out.to(v1.dtype), TripleMap(weights, v2, offset=mask.offset)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    keys, values = (2, 2, tokens, 8), (2, 2, tokens, 6)
    shapes = {"q": (2, 4, tokens, 8), "k1": keys, "k2": keys, "v1": values, "v2": values}
    return example_tensors(seed, dtype, **shapes)


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    names = ("q", "k2", "v2", "mask")
    return {**{name: given[name] for name in names}, "k1": given["k"], "v1": given["v"]}


VARIANTS = (
    Variant(
        name="triple-attention",
        paper=(
            "#87 How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation "
            "(2023)"
        ),
        family="two-stage",
        priority="C",
        operator=triple_attention,
        example=_example,
        value_input="v1",
        reference="softmax attention over row-wise products of keys and values",
        note="the paper treats its cost and gives no model: heads, masks and grouped keys are those of ordinary attention",
        recipe=Recipe(learned={"k2": Learned("GE"), "v2": Learned("GE")}, prepare=_prepare),
    ),
)
