"""What every way of a question must answer: the reference forms in float64, on a setting small enough to be dense."""

from __future__ import annotations

from typing import Any

from setting import (
    BOTH,
    CODES,
    DENSITIES,
    STATS,
    Setting,
    answers,
    bind_density,
    code_inputs,
    decay_of,
    delta_inputs,
    kept_blocks,
)
from torch import Tensor

from workbench.kernels.attention_stats import attention_stats
from workbench.kernels.flash_attention import flash_attention
from workbench.kernels.gated_delta_rule import gated_delta_rule
from workbench.kernels.linear_attention import linear_attention
from workbench.kernels.sigmoid_attention import sigmoid_attention

EXACT: dict[str, Any] = {"impl": "reference"}


def softmax_truth(at: Setting) -> dict[str, Tensor]:
    q, k, v = at.q.double(), at.k.double(), at.v.double()
    output = flash_attention(q, k, v, **EXACT).output
    found = attention_stats(q, k, block=at.block, reduce=BOTH, stats=STATS, **EXACT)
    return {"output": output, **answers(found)}


def sparse_truth(at: Setting) -> dict[str, Tensor]:
    """Full attention, and attention over the blocks of every density under the names of ``bind_density``."""
    found = softmax_truth(at)
    q, k, v = at.q.double(), at.k.double(), at.v.double()
    for density in DENSITIES:
        mask = kept_blocks(at, density)
        found |= bind_density(density)(flash_attention(q, k, v, mask=mask, block=at.block, reduce=BOTH, **EXACT))
    return found


def sigmoid_truth(at: Setting) -> dict[str, Tensor]:
    tensors = (x.double() for x in (at.q, at.k, at.v))
    return answers(sigmoid_attention(*tensors, block=at.block, reduce=BOTH, **EXACT))


def linear_truth(at: Setting) -> dict[str, Tensor]:
    tensors = (x.double() for x in (at.q, at.k, at.v, decay_of(at)))
    return answers(linear_attention(*tensors, scale=at.width**-0.5, block=at.block, reduce=("sum", "abs"), **EXACT))


def delta_truth(at: Setting) -> dict[str, Tensor]:
    tensors = (x.double() for x in delta_inputs(at))
    return answers(gated_delta_rule(*tensors, block=at.block, reduce=("sum", "abs"), **EXACT))


def code_truth(at: Setting) -> dict[str, Tensor]:
    """The code in float64; what decoding gives, from the code itself."""
    x, into, out = (t.double() for t in code_inputs(at))
    dense = (x @ into).relu()
    values, indices = dense.topk(min(CODES, dense.shape[1]), -1)
    return {"values": values, "decoded": dense.new_zeros(dense.shape).scatter_(1, indices, values) @ out}
