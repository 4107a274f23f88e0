"""The one backward of everything that is built on softmax weights p_ij = exp(s_ij - lse_i) (``kernels/scores.py`` defines s).

    G_ij  = dO_i . v_j + gate_i (d_blocks[I(i), J(j)] + d_received_j)      gradient with respect to p_ij
    D_i   = sum_j p_ij G_ij - d_lse_i
    ds_ij = p_ij (G_ij - D_i)    where lse was computed from q and k
          = p_ij G_ij            where lse was given, a constant of p
    dq_i  = scale sum_j ds_ij c_ij k_j,   dk_j = scale sum_i ds_ij c_ij q_i,   dv_j = sum_i p_ij dO_i

with c_ij = 1 - (cap(x_ij) / softcap)^2 under a softcap, else 1. Scores are recomputed, no Q x K tensor is held (Dao et al. 2022,
FlashAttention, algorithm 4, with the extra terms). What follows from D is the caller's: a sink logit has the gradient
``-sum_i exp(sink_h - lse_i) D_i``, a given lse ``-D_i``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.kernels.forms import choose
from workbench.kernels.scores import N_SCORES, SCORES_SCHEMA, Scores, score_parts, scores_of

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor]


def softmax_backward(
    scores: Scores,
    lse: Tensor,
    *,
    out: Tensor | None = None,
    d_out: Tensor | None = None,
    v: Tensor | None = None,
    d_lse: Tensor | None = None,
    d_blocks: Tensor | None = None,
    block: int | None = None,
    d_received: Tensor | None = None,
    gate: Tensor | None = None,
    through_lse: bool = True,
    impl: str | None = None,
) -> Gradients:
    """``(dq, dk, dv, D)``: gradients in the dtypes of q, k and v (dv None without v), ``D`` ``[B, H, Q]`` in the working type.

    ``lse`` ``[B, H, Q]`` natural log, sink included, -inf for rows that see nothing. ``d_out`` ``[B, H, Q, V]`` needs ``v``
    ``[B, G, K, V]`` and ``out``, the output itself. ``d_lse`` ``[B, H, Q]``; ``d_blocks`` ``[B, H, Q/block, K/block]`` (rounded
    up) is the gradient of the block **sums** of side ``block``; ``d_received`` ``[B, H, K]``; ``gate`` ``[B, H, Q]``, of any
    sign, multiplies the rows in both. dk and dv are summed over the query heads of a group.

    ``impl``: ``cpu`` (row chunks, any device) or ``triton``; None takes ``triton`` on CUDA tensors. Sums are taken in a fixed
    order, without atomics, by ``triton`` and by ``cpu`` on CPU tensors. A bias function is for ``cpu`` only. There is no gradient
    of these gradients. Raises ``ValueError`` naming the argument at fault.
    """
    if impl == "reference":
        raise ValueError(
            "impl: softmax_backward has the forms cpu and triton; the reference is differentiated by autograd"
        )
    b, h, q, k = scores.shape
    value_width = 0 if v is None else v.shape[3]
    if (d_out is None) != (v is None) or (d_out is not None and out is None):
        raise ValueError("d_out, v and out go together: the gradient of an output needs the output and its values")
    if (d_blocks is None) != (block is None):
        raise ValueError("d_blocks and block go together: the gradient of block sums and their side")
    if block is not None and block < 1:
        raise ValueError(f"block is a positive number of tokens; got {block!r}")
    grid = (b, h, -(-q // block), -(-k // block)) if block is not None else ()
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "lse": (lse, (b, h, q)),
        "out": (out if d_out is not None else None, (b, h, q, value_width)),
        "d_out": (d_out, (b, h, q, value_width)),
        "v": (v, (b, scores.k.shape[1], k, value_width)),
        "d_lse": (d_lse, (b, h, q)),
        "d_blocks": (d_blocks, grid),
        "d_received": (d_received, (b, h, k)),
        "gate": (gate, (b, h, q)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(shape)} here; got {list(tensor.shape)}")
    callable_bias = callable(scores.bias)
    form = choose(impl, scores.q, lse, v, d_out, unsupported="the bias is a function" if callable_bias else "")
    extras = (lse, out if d_out is not None else None, d_out, v, d_lse, d_blocks, block, d_received, gate, through_lse)
    if callable_bias:
        found = _run(scores, extras, form)
    else:
        found = torch.ops.workbench.softmax_backward(*score_parts(scores), *extras, form)
    dq, dk, dv, d_row = found
    return dq, dk, None if v is None else dv, d_row


def _run(scores: Scores, extras: tuple[Any, ...], form: str) -> list[Tensor]:
    if form == "triton":
        from workbench.kernels.backward.triton import fused_backward as run
    else:
        from workbench.kernels.backward.cpu import blocked_backward as run
    with torch.no_grad():
        return run(scores, *extras)


def _body(*arguments: Any) -> list[Tensor]:
    return _run(scores_of(arguments[:N_SCORES]), arguments[N_SCORES:-1], arguments[-1])


_operator = torch.library.custom_op(
    "workbench::softmax_backward",
    _body,
    mutates_args=(),
    schema=f"({SCORES_SCHEMA}, Tensor lse, Tensor? out, Tensor? d_out, Tensor? v, Tensor? d_lse, Tensor? d_blocks, int? block, "
    "Tensor? d_received, Tensor? gate, bool through_lse, str impl) -> Tensor[]",
)


@_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    q, k, lse, v = arguments[0], arguments[1], arguments[N_SCORES], arguments[N_SCORES + 3]
    working = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk, dv = (q.new_empty(part.shape if part is not None else 0) for part in (q, k, v))
    return [dq, dk, dv, q.new_empty(lse.shape, dtype=working)]
