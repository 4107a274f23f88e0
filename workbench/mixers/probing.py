"""Attentive pooling: few learned or global queries over all tokens, one row per head.

efficient probing   P_mj = softmax_j(scale u_m . x_j),           o_m = sum_j P_mj v_j^(m)      v in M groups of channels
LAMA                P_hj = softmax_j((l_h . x_j) (r_h . c)),     o_h = sum_j P_hj v_j          rank-one affinity l_h r_h^T
gated class         P_j  = softmax_j(scale (m q) . (m k_j)),     o   = m sum_j P_j v_j         m masks channels
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Variant, example_tensors
from workbench.kernels.mask import Mask
from workbench.mixers.scored import check_tensor, checked
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.per_channel import ChannelGatedMap
from workbench.patterns.softmax import SoftmaxMap


def efficient_probing(
    queries: Tensor, x: Tensor, v: Tensor, *, mask: Mask = Mask(), scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Multi-query pooling of x ``[B, N, C]`` by learned ``queries`` ``[M, C]``: the tokens themselves are the keys.

    v ``[B, M, N, C/M]`` are the values, of which every query pools its own channels. Output ``[B, M, 1, C/M]``, map
    ``[B, M, 1, N]``; ``scale`` is ``C ** -0.5`` by default. ``mask.keys`` hides padding. Source: Psomas et al., Attention,
    Please! Revisiting Attentive Probing for Masked Image Modeling, and its code.
    """
    check_tensor("x", x, ("B", "N", "C"))
    b, n, width = x.shape
    check_tensor("queries", queries, ("M", width))
    count = queries.shape[0]
    check_tensor("v", v, (b, count, n, "width"))
    return softmax_attention(
        queries[None, :, None].expand(b, -1, -1, -1), x[:, None].expand(-1, count, -1, -1), v, mask=mask, scale=scale
    )


def low_rank_attention(
    x: Tensor, v: Tensor, context: Tensor, left: Tensor, right: Tensor, *, mask: Mask = Mask()
) -> tuple[Tensor, SoftmaxMap]:
    """LAMA: states x ``[B, N, D]`` are weighed by a global ``context`` ``[B, D]`` through one rank-one affinity per head,
    ``left`` and ``right`` ``[H, D]``.

    v ``[B, 1, N, E]`` (the states) is shared by the heads. Output ``[B, H, 1, E]``, map ``[B, H, 1, N]``. ``mask.keys`` hides
    padding. Source: Mehta et al., Low Rank Factorization for Compact Multi-Head Self-Attention.
    """
    check_tensor("x", x, ("B", "N", "D"))
    b, n, width = x.shape
    check_tensor("context", context, (b, width))
    check_tensor("left", left, ("H", width))
    check_tensor("right", right, (left.shape[0], width))
    check_tensor("v", v, (b, 1, n, "width"))
    queries = (context.to(x.dtype) @ right.to(x.dtype).T)[..., None] * left.to(x.dtype)
    return softmax_attention(queries[:, :, None], x[:, None], v, mask=mask, scale=1.0)


def gated_class_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, mask: Mask = Mask(), scale: float | None = None
) -> tuple[Tensor, ChannelGatedMap]:
    """Class attention whose channels are masked for a task: q ``[B, H, 1, E]`` of the class token, k, v ``[B, G, K, E]`` of class
    and patch tokens, ``gate`` ``[H, E]`` near 0 or 1 (a sigmoid of a scaled task embedding).

    The gate multiplies queries, keys and outputs; in a network also the inputs of the three projections. ``map.raw`` is the map
    before the gate of the output, ``map.channel(c)`` that of one channel. Source: Cotogni et al., Exemplar-free Continual
    Learning of Vision Transformers via Gated Class-Attention and Cascaded Feature Drift Compensation, and its code.
    """
    b, h, n, _ = checked(q, k, v, mask)
    check_tensor("q", q, (b, h, 1, q.shape[3]))
    check_tensor("v", v, (*k.shape[:3], q.shape[3]))
    check_tensor("gate", gate, (h, q.shape[3]))
    rows = gate[:, None].to(q.dtype)
    # A key head that serves several query heads is masked once, on the side of the queries: m (m q) . k = (m q) . (m k).
    out, raw = softmax_attention(q * rows * rows, k, v, mask=mask, scale=scale)
    return out * rows.to(out.dtype), ChannelGatedMap(raw, rows.expand(b, -1, n, -1))


# ---------------------------------------------------------------------------- records


def _probing_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return example_tensors(seed, dtype, queries=(3, 12), x=(2, tokens, 12), v=(2, 3, tokens, 4))


def _lama_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"x": (2, tokens, 8), "v": (2, 1, tokens, 6), "context": (2, 8), "left": (4, 8), "right": (4, 8)}
    given = example_tensors(seed, dtype, **shapes)
    return {**given, "left": given["left"] * 8**-0.5, "right": given["right"] * 8**-0.5}


def _class_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, 1, 8), "k": (2, 4, tokens, 8), "v": (2, 4, tokens, 8), "gate": (4, 8)}
    given = example_tensors(seed, dtype, **shapes)
    return {**given, "gate": (2 * given["gate"]).sigmoid()}


VARIANTS = (
    Variant(
        name="efficient-probing",
        paper="#79 Attention, Please! Revisiting Attentive Probing for Masked Image Modeling (2025)",
        family="softmax",
        priority="C",
        operator=efficient_probing,
        example=_probing_example,
        reference="billpsomas/efficient-probing poolings/ep.py",
    ),
    Variant(
        name="low-rank-multi-head-attention",
        paper="#129 Low Rank Factorization for Compact Multi-Head Self-Attention (2019)",
        family="softmax",
        priority="C",
        operator=low_rank_attention,
        example=_lama_example,
        reference="the paper's abstract",
        note="the factors of the affinity are taken from general knowledge; values are the recurrent states themselves",
    ),
    Variant(
        name="gated-class-attention",
        paper="#94 Exemplar-free Continual Learning of Vision Transformers via Gated Class-Attention and Cascaded Feature Drift "
        "Compensation (2022)",
        family="weighted softmax",
        priority="C",
        operator=gated_class_attention,
        example=_class_example,
        reference="OcraM17/GCAB-CFDC continual/convit.py",
    ),
)
