"""Softmax attention with mass that goes to no key, and with capped scores.

    sink logits      P_ij = exp(s_ij) / (exp(z_h) + sum_j' exp(s_ij'))       a learned logit z per head
    off by one       P_ij = exp(s_ij) / (1 + sum_j' exp(s_ij'))              the same with z = 0
    softcap          P_ij = softmax_j(c tanh(s_ij / c))

In the first two a row sums to less than 1 and the rest is the sink's; ``map.row_sums()`` tells how much the keys got.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.scored import check_tensor, checked
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.softmax import SoftmaxMap


def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, *, mask: Mask, scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Attention with a sink logit per head: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``, ``sink`` ``[H]``.

    The sink takes part in the softmax and has no value (gpt-oss, where every other layer also has a window: ``mask.window``).
    """
    _, h, _, _ = checked(q, k, v, mask)
    check_tensor("sink", sink, (h,))
    return softmax_attention(q, k, v, mask=mask, scale=scale, sink=sink)


def off_by_one_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Attention with ``exp(s) / (1 + sum exp(s))``: a head may abstain. Shapes as in ``sink_attention``.

    Source: Evan Miller, Attention Is Off By One (2023); it is a sink whose logit is 0 and is not learned.
    """
    _, h, _, _ = checked(q, k, v, mask)
    return softmax_attention(q, k, v, mask=mask, scale=scale, sink=q.new_zeros(h))


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, softcap: float = 50.0, scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Attention whose scores stay between ``-softcap`` and ``softcap``: ``softcap tanh(s / softcap)`` before the mask.

    Shapes as in ``sink_attention``. Gemma 2 caps at 50.
    """
    checked(q, k, v, mask)
    if not softcap > 0:
        raise WorkbenchError(f"softcap is a positive number; got {softcap}")
    return softmax_attention(q, k, v, mask=mask, scale=scale, softcap=softcap)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8)}
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}


def _sink_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_example(seed, tokens, dtype), **example_tensors(seed + 1, dtype, sink=(4,))}


def _capped_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_example(seed, tokens, dtype), "softcap": 1.5}


VARIANTS = (
    Variant(
        name="sink-logits",
        paper="gpt-oss-120b & gpt-oss-20b Model Card (2025)",
        family="weighted softmax",
        priority="A",
        operator=sink_attention,
        example=_sink_example,
        causal=True,
        reference="HF GptOssAttention",
        recipe=Recipe(parameters={"sink": Parameter("H")}),
    ),
    Variant(
        name="softmax-off-by-one",
        paper="Attention Is Off By One (2023)",
        family="weighted softmax",
        priority="A",
        operator=off_by_one_attention,
        example=_example,
        causal=True,
        reference="the article's formula",
        recipe=Recipe(),
    ),
    Variant(
        name="softcapped-attention",
        paper="Gemma 2: Improving Open Language Models at a Practical Size (2024)",
        family="weighted softmax",
        priority="A",
        operator=softcapped_attention,
        example=_capped_example,
        causal=True,
        reference="HF Gemma2Attention",
        recipe=Recipe(),
    ),
)
