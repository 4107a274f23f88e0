"""The one-pass block maximum that fused block-map kernels are measured against: attention that pools as SeerAttention does.

Written from the published description (Gao et al., arXiv:2410.13276, and the notes on it): a FlashAttention forward whose key
tile is the block. Every row leaves the largest score of each key tile, in bfloat16, in a scratch of N x N / block numbers; when
the row's maximum m and sum l are known, the scratch is read again, exp2(score - m) / l is maximised over the block's rows and
written in bfloat16. What belongs to that design and is kept: the scratch and its rounding (a base-2 score s is off by up to
|s| / 256, the weight by a factor of two to that power), N a multiple of the block, keys and values repeated for grouped heads
by the caller, forward only. Not part of the library: nothing but a benchmark may use it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.tiles import LOG2E, dot, strides, upcast

BLOCKS = (32, 64, 128)


@triton.jit
def _tile(
    q, m, l, acc, j, rows, wide, deep, K, V, k_n, k_e, v_n, v_e, R, r_n, SCALE,
    B: tl.constexpr, DIAGONAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One key tile of the running softmax; the tile's row maxima go to the scratch."""
    cols = (j * B + tl.arange(0, B)).to(tl.int64)
    k = tl.load(K + cols[:, None] * k_n + wide[None, :] * k_e)
    s = dot(q, tl.trans(k), UPCAST) * SCALE
    if DIAGONAL:
        s = tl.where(cols[None, :] <= rows[:, None], s, float("-inf"))
    top = tl.max(s, 1)
    tl.store(R + rows * r_n + j, top.to(tl.bfloat16))
    best = tl.maximum(m, top)
    p = tl.exp2(s - best[:, None])
    fade = tl.exp2(m - best)
    v = tl.load(V + cols[:, None] * v_n + deep[None, :] * v_e)
    acc = acc * fade[:, None] + dot(p.to(v.dtype), v, UPCAST)
    return best, l * fade + tl.sum(p, 1), acc


@triton.jit
def seer_max_pool_kernel(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, V, v_b, v_h, v_n, v_e, O, o_b, o_h, o_n, o_e,
    R, r_b, r_h, r_n, r_e, P, p_b, p_h, p_n, p_e, HEADS, SCALE,
    B: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = (tl.program_id(1) % HEADS).to(tl.int64)
    rows = (i * B + tl.arange(0, B)).to(tl.int64)
    wide, deep = tl.arange(0, E), tl.arange(0, EV)
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    R += b * r_b + h * r_h
    P += b * p_b + h * p_h + i * p_n
    q = tl.load(Q + b * q_b + h * q_h + rows[:, None] * q_n + wide[None, :] * q_e)
    m = tl.full([B], float("-inf"), tl.float32)
    l = tl.zeros([B], tl.float32)
    acc = tl.zeros([B, EV], tl.float32)
    for j in range(i):
        m, l, acc = _tile(
            q, m, l, acc, j, rows, wide, deep, K, V, k_n, k_e, v_n, v_e, R, r_n, SCALE, B, False, UPCAST
        )  # fmt: skip
    m, l, acc = _tile(
        q, m, l, acc, i, rows, wide, deep, K, V, k_n, k_e, v_n, v_e, R, r_n, SCALE, B, True, UPCAST
    )  # fmt: skip
    at = O + b * o_b + h * o_h + rows[:, None] * o_n + deep[None, :] * o_e
    tl.store(at, (acc / l[:, None]).to(O.dtype.element_ty))
    tl.debug_barrier()  # the scratch is read by other threads than those that wrote it
    for first in range(0, i + 1, B):
        tile = first + tl.arange(0, B)
        here = tile <= i
        top = tl.load(R + rows[:, None] * r_n + tile[None, :], mask=here[None, :], other=float("-inf")).to(tl.float32)
        tl.store(P + tile * p_e, tl.max(tl.exp2(top - m[:, None]) / l[:, None], 0).to(tl.bfloat16), mask=here)


def seer_max_pool(
    q: Tensor, k: Tensor, v: Tensor, block: int = 64, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of q, k ``[B, H, N, E]`` and v ``[B, H, N, EV]``, and its block maximum.

    Returns the output ``[B, H, N, EV]`` in q's dtype and ``[B, H, N/block, N/block]`` bfloat16: the largest probability in each
    block, not normalised, zero above the diagonal. Widths are powers of two from 16 to 256.
    """
    (b, h, n, e), ev = q.shape, v.shape[-1]
    if block not in BLOCKS or n % block:
        raise ValueError(f"block is one of {BLOCKS} and divides the {n} tokens; got {block}")
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"k and v have q's heads and tokens {[b, h, n]}; got {list(k.shape)} and {list(v.shape)}")
    for name, width in (("E", e), ("EV", ev)):
        if width & (width - 1) or not 16 <= width <= 256:
            raise ValueError(f"the head width {name} is a power of two from 16 to 256; got {width}")
    output = torch.empty(b, h, n, ev, dtype=q.dtype, device=q.device)
    scratch = torch.empty(b, h, n, n // block, dtype=torch.bfloat16, device=q.device)
    pooled = torch.zeros(b, h, n // block, n // block, dtype=torch.bfloat16, device=q.device)
    named: dict[str, Any] = {}
    for name, tensor in (("q", q), ("k", k), ("v", v), ("o", output), ("r", scratch), ("p", pooled)):
        named |= {name.upper(): tensor, **strides(name, tensor)}
    seer_max_pool_kernel[(n // block, b * h)](
        **named,
        HEADS=h,
        SCALE=LOG2E * (e**-0.5 if scale is None else scale),
        B=block,
        E=e,
        EV=ev,
        UPCAST=upcast(q),
        num_warps=8 if block * max(e, ev) > 64 * 64 else 4,
        # Two copies of the key and value tile in flight where they fit.
        num_stages=2 if q.element_size() == 2 and block * (e + ev) <= 2**15 else 1,
    )
    return output, pooled
