"""The gradient of ``gated_delta_rule`` as Triton kernels; ``kernels/delta/reference.py`` derives the formulas.

The states before the chunks and U are computed again, then ``wanted`` (what the outputs want of U, a program per chunk), ``scan``
backwards (a program per tile of values carries dS from chunk to chunk and leaves it and Z behind) and ``gradients`` (a program
per chunk adds up over the values). Heads that share q, k or v are summed at the end, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.delta.tiles import (
    chunk_of,
    exact,
    pair_decay,
    prepare,
    scan,
    tokens,
    value_tile,
    warps,
)
from workbench.kernels.tiles import strides, width


@triton.jit
def wanted_kernel(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, LOG, DO, OUT, SCALE, n_tokens, n_chunks, H, SHARE_Q, SHARE_K,
    E: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_LOG: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scale P^T dO."""
    bh = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * BV
    i = tl.arange(0, C)
    w = first + tl.arange(0, BV)
    at = tl.program_id(0) * C + i
    there = at < n_tokens
    q = tokens(Q + bh // H * q_b + bh % H // SHARE_Q * q_h, at, there, q_n, q_e, 0, E, EP)
    k = tokens(K + bh // H * k_b + bh % H // SHARE_K * k_h, at, there, k_n, k_e, 0, E, EP)
    reads = tl.where(i[:, None] >= i[None, :], exact(q, tl.trans(k), UPCAST), 0.0)
    if HAS_LOG:
        reads = reads * pair_decay(tl.load(LOG + bh * n_tokens + at, mask=there, other=0.0), C)
    do = tokens(DO + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
    where = OUT + (bh * n_tokens + at)[:, None] * WIDTH + w[None, :]
    tl.store(where, SCALE * exact(tl.trans(reads), do, UPCAST), mask=there[:, None] & (w < WIDTH)[None, :])


@triton.jit
def backward_scan_kernel(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, DO, Z, LAST, INVERSE, VECTORS, AFTER, FIRST, SCALE,
    n_tokens, n_chunks, H, SHARE_Q, SHARE_K,
    E: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_LAST: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the states after every chunk and of the first state. ``Z`` holds scale P^T dO and is overwritten by Z."""
    first = tl.program_id(0) * BV
    bh = tl.program_id(1).to(tl.int64)
    e = tl.arange(0, EP)
    w = first + tl.arange(0, BV)
    inside = (e < E)[:, None] & (w < WIDTH)[None, :]
    cell = e[:, None] * WIDTH + w[None, :]
    Q += bh // H * q_b + bh % H // SHARE_Q * q_h
    K += bh // H * k_b + bh % H // SHARE_K * k_h
    ds = tl.zeros([EP, BV], tl.float32)
    if HAS_LAST:
        ds = tl.load(LAST + bh * E * WIDTH + cell, mask=inside, other=0.0)
    for back in range(n_chunks):
        chunk = n_chunks - 1 - back
        slot = bh * n_chunks + chunk
        tl.store(AFTER + slot * E * WIDTH + cell, ds, mask=inside)
        at = chunk * C + tl.arange(0, C)
        there = at < n_tokens
        q = tokens(Q, at, there, q_n, q_e, 0, E, EP)
        k = tokens(K, at, there, k_n, k_e, 0, E, EP)
        do = tokens(DO + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV).to(tl.float32)
        x, rise, fall, beta, total = chunk_of(INVERSE, VECTORS, slot, C)
        where = Z + (bh * n_tokens + at)[:, None] * WIDTH + w[None, :]
        here = there[:, None] & (w < WIDTH)[None, :]
        du = tl.load(where, mask=here, other=0.0) + fall[:, None] * exact(k, ds, UPCAST)
        z = exact(tl.trans(x), du, UPCAST)
        tl.store(where, z, mask=here)
        ds = total * ds + exact(tl.trans(q), (SCALE * rise)[:, None] * do, UPCAST)
        ds = ds - exact(tl.trans(k), (rise * beta)[:, None] * z, UPCAST)
    tl.store(FIRST + bh * E * WIDTH + cell, ds, mask=inside)


@triton.jit
def gradient_kernel(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, V, v_b, v_h, v_n, v_e, LOG, DO, U, Z, VECTORS, BEFORE, AFTER,
    DQ, DK, DBETA, DLOG, SCALE, n_tokens, n_chunks, H, SHARE_Q, SHARE_K, SHARE_V,
    E: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_LOG: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    slot = bh * n_chunks + chunk
    i = tl.arange(0, C)
    e = tl.arange(0, EP)
    at = chunk * C + i
    there = at < n_tokens
    below = i[:, None] > i[None, :]
    q = tokens(Q + bh // H * q_b + bh % H // SHARE_Q * q_h, at, there, q_n, q_e, 0, E, EP)
    k = tokens(K + bh // H * k_b + bh % H // SHARE_K * k_h, at, there, k_n, k_e, 0, E, EP)
    rise = tl.load(VECTORS + slot * 3 * C + i)
    fall = tl.load(VECTORS + slot * 3 * C + C + i)
    beta = tl.load(VECTORS + slot * 3 * C + 2 * C + i)
    total = tl.load(VECTORS + slot * 3 * C + C - 1)
    gamma = tl.where(i[:, None] >= i[None, :], 1.0, 0.0)
    if HAS_LOG:
        gamma = pair_decay(tl.load(LOG + bh * n_tokens + at, mask=there, other=0.0), C)
    gram = tl.where(below, exact(k, tl.trans(k), UPCAST) * gamma, 0.0)
    d_reads = tl.zeros([C, C], tl.float32)
    d_gram = tl.zeros([C, C], tl.float32)
    read_q = tl.zeros([C, EP], tl.float32)
    read_k = tl.zeros([C, EP], tl.float32)
    wrote_k = tl.zeros([C, EP], tl.float32)
    d_beta = tl.zeros([C], tl.float32)
    carried = tl.zeros([EP], tl.float32)
    for first in range(0, WIDTH, BV):
        w = first + tl.arange(0, BV)
        inside = (e < E)[:, None] & (w < WIDTH)[None, :]
        cell = slot * E * WIDTH + e[:, None] * WIDTH + w[None, :]
        before = tl.load(BEFORE + cell, mask=inside, other=0.0)
        after = tl.load(AFTER + cell, mask=inside, other=0.0)
        do = tokens(DO + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
        u = tokens(U + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
        z = tokens(Z + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
        v = tokens(V + bh // H * v_b + bh % H // SHARE_V * v_h, at, there, v_n, v_e, first, WIDTH, BV)
        dv = beta[:, None] * z
        d_reads += exact(do, tl.trans(u), UPCAST)
        d_gram += exact(dv, tl.trans(u), UPCAST)
        read_q += exact(do, tl.trans(before), UPCAST)
        read_k += exact(dv, tl.trans(before), UPCAST)
        wrote_k += exact(u, tl.trans(after), UPCAST)
        error = v.to(tl.float32) - rise[:, None] * exact(k, before, UPCAST) - exact(gram, u, UPCAST)
        d_beta += tl.sum(z * error, 1)
        carried += tl.sum(before * after, 1)
    d_reads = SCALE * tl.where(i[:, None] >= i[None, :], d_reads, 0.0) * gamma
    d_gram = tl.where(below, -d_gram, 0.0) * gamma
    read_q = (SCALE * rise)[:, None] * read_q
    read_k = rise[:, None] * read_k
    wrote_k = fall[:, None] * wrote_k
    where = (bh * n_tokens + at)[:, None] * E + e[None, :]
    inside = there[:, None] & (e < E)[None, :]
    tl.store(DQ + where, read_q + exact(d_reads, k, UPCAST), mask=inside)
    dk = exact(d_gram + tl.trans(d_gram), k, UPCAST) + exact(tl.trans(d_reads), q, UPCAST) + wrote_k - read_k
    tl.store(DK + where, dk, mask=inside)
    tl.store(DBETA + bh * n_tokens + at, d_beta, mask=there)
    if HAS_LOG:
        pairs = d_reads * exact(q, tl.trans(k), UPCAST) + d_gram * exact(k, tl.trans(k), UPCAST)
        over = tl.sum(tl.where(below, tl.cumsum(pairs, 0, reverse=True), 0.0), 1)
        reading = tl.sum(q.to(tl.float32) * read_q - k.to(tl.float32) * read_k, 1)
        written = tl.sum(k.to(tl.float32) * wrote_k, 1)
        over += tl.sum(tl.where(i[:, None] <= i[None, :], reading[None, :], 0.0), 1)
        over += tl.sum(tl.where(below, written[None, :], 0.0), 1) + total * tl.sum(carried, 0)
        tl.store(DLOG + bh * n_tokens + at, over, mask=there)


def backward(
    d_output: Tensor | None,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay and the initial state, float32."""
    b, h, n = beta.shape
    e, wide = q.shape[3], v.shape[3]
    # Chunks of 32 wide tokens: gradients of three [C, E] tiles are held at once.
    found = prepare(q, k, beta, log_decay, chunk=64 if width(e) <= 64 else 32)
    before, u, last = scan(found, v, state)
    do = torch.zeros_like(u, dtype=v.dtype) if d_output is None else d_output.to(v.dtype).contiguous()
    z, after = torch.empty_like(u), torch.empty_like(before)
    first = torch.empty_like(last)
    dq = torch.empty(b, h, n, e, dtype=torch.float32, device=q.device)
    dk = torch.empty_like(dq)
    d_beta, d_log = torch.empty_like(found.beta), torch.empty_like(found.beta)
    tile = min(width(wide), 32)
    shared = {
        **strides("q", q), **strides("k", k), "Q": q, "K": k, "DO": do, "SCALE": scale, "SHARE_Q": found.share(q),
        "WIDTH": wide, **found.shapes(), "num_warps": warps(found.cells.tile, e),
    }  # fmt: skip
    chunks = found.cells.tiles
    wanted_kernel[(chunks, found.rows, triton.cdiv(wide, tile))](OUT=z, BV=tile, **found.decays(), **shared)
    narrow = value_tile(e, wide)
    backward_scan_kernel[(triton.cdiv(wide, narrow), found.rows)](
        Z=z, LAST=first if d_state is None else d_state.float().contiguous(), AFTER=after, FIRST=first, BV=narrow,
        HAS_LAST=d_state is not None, **found.chunks(), **shared,
    )  # fmt: skip
    gradient_kernel[(chunks, found.rows)](
        **strides("v", v), V=v, U=u, Z=z, VECTORS=found.vectors, BEFORE=before, AFTER=after, DQ=dq, DK=dk,
        DBETA=d_beta, DLOG=d_log, SHARE_V=found.share(v), BV=tile, **found.decays(), **shared,
    )  # fmt: skip
    dv = found.beta[..., None] * z

    def tied(x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(1, (like.shape[1], -1)).sum(2)

    return tied(dq, q), tied(dk, k), tied(dv, v), d_beta, d_log, first
