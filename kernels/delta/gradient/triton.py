"""The gradient of ``gated_delta_rule`` as Triton kernels; ``kernels/delta/reference.py`` derives the formulas.

The states before the chunks and U are computed again, then ``wanted`` (what the outputs want of U, a program per chunk), a scan
backwards (a program per tile of values carries dS from chunk to chunk and leaves it and Z behind), and for all chunks at once
the gradients of P, G and beta and then those of q and k. Heads that share q, k or v are summed last, in a fixed order.
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
from workbench.kernels.tiles import (
    beside_its_tensors,
    strides,
    width,
)


@triton.jit
def wanted_kernel(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, LOG, DO, OUT, SCALE, n_tokens, n_chunks, H, SHARE_Q, SHARE_K,
    E: tl.constexpr, ES: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_LOG: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scale P^T dO."""
    bh = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * BV
    i = tl.arange(0, C)
    w = first + tl.arange(0, BV)
    at = tl.program_id(0) * C + i
    there = at < n_tokens
    Q += bh // H * q_b + bh % H // SHARE_Q * q_h
    K += bh // H * k_b + bh % H // SHARE_K * k_h
    reads = tl.zeros([C, C], tl.float32)
    for start in range(0, E, ES):
        q = tokens(Q, at, there, q_n, q_e, start, E, ES)
        reads += exact(q, tl.trans(tokens(K, at, there, k_n, k_e, start, E, ES)), UPCAST)
    reads = tl.where(i[:, None] >= i[None, :], reads, 0.0)
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
def pairs_kernel(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, LOG, DO, U, Z, MISSED, VECTORS, PAIRS, DBETA, DLOG, SCALE,
    n_tokens, n_chunks, H, SHARE_Q, SHARE_K,
    E: tl.constexpr, ES: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_LOG: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gamma * dP and Gamma * dG of a chunk, the gradient of beta, and what pairs inside the chunk want of the log decay."""
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    slot = bh * n_chunks + chunk
    i = tl.arange(0, C)
    at = chunk * C + i
    there = at < n_tokens
    below = i[:, None] > i[None, :]
    Q += bh // H * q_b + bh % H // SHARE_Q * q_h
    K += bh // H * k_b + bh % H // SHARE_K * k_h
    reads = tl.zeros([C, C], tl.float32)
    gram = tl.zeros([C, C], tl.float32)
    for start in range(0, E, ES):
        k = tokens(K, at, there, k_n, k_e, start, E, ES)
        reads += exact(tokens(Q, at, there, q_n, q_e, start, E, ES), tl.trans(k), UPCAST)
        gram += exact(k, tl.trans(k), UPCAST)
    beta = tl.load(VECTORS + slot * 3 * C + 2 * C + i)
    gamma = tl.where(i[:, None] >= i[None, :], 1.0, 0.0)
    if HAS_LOG:
        gamma = pair_decay(tl.load(LOG + bh * n_tokens + at, mask=there, other=0.0), C)
    gram = tl.where(below, gram * gamma, 0.0)
    d_reads = tl.zeros([C, C], tl.float32)
    d_gram = tl.zeros([C, C], tl.float32)
    d_beta = tl.zeros([C], tl.float32)
    for first in range(0, WIDTH, BV):
        do = tokens(DO + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
        u = tokens(U + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
        z = tokens(Z + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
        missed = tokens(MISSED + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
        d_reads += exact(do, tl.trans(u), UPCAST)
        d_gram += exact(z, tl.trans(u), UPCAST)
        d_beta += tl.sum(z * (missed - exact(gram, u, UPCAST)), 1)
    tl.store(DBETA + bh * n_tokens + at, d_beta, mask=there)
    d_reads = SCALE * gamma * d_reads
    d_gram = tl.where(below, -beta[:, None] * d_gram, 0.0)
    if HAS_LOG:
        pairs = tl.cumsum(d_reads * reads + d_gram * gram, 0, reverse=True)
        tl.store(DLOG + bh * n_tokens + at, tl.sum(tl.where(below, pairs, 0.0), 1), mask=there)
    where = PAIRS + slot * 2 * C * C + i[:, None] * C + i[None, :]
    tl.store(where, d_reads)
    tl.store(where + C * C, gamma * d_gram)


@triton.jit
def gradient_kernel(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, DO, U, Z, VECTORS, BEFORE, AFTER, PAIRS, DQ, DK, DLOG, SCALE,
    n_tokens, n_chunks, H, SHARE_Q, SHARE_K,
    E: tl.constexpr, ES: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_LOG: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of ``ES`` channels of q and k, and what these channels, across borders of the chunk, want of the log decay."""
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    start = tl.program_id(2) * ES
    slot = bh * n_chunks + chunk
    i = tl.arange(0, C)
    e = start + tl.arange(0, ES)
    at = chunk * C + i
    there = at < n_tokens
    rise = tl.load(VECTORS + slot * 3 * C + i)
    fall = tl.load(VECTORS + slot * 3 * C + C + i)
    beta = tl.load(VECTORS + slot * 3 * C + 2 * C + i)
    read_q = tl.zeros([C, ES], tl.float32)
    read_k = tl.zeros([C, ES], tl.float32)
    wrote_k = tl.zeros([C, ES], tl.float32)
    carried = tl.zeros([ES], tl.float32)
    for first in range(0, WIDTH, BV):
        w = first + tl.arange(0, BV)
        inside = (e < E)[:, None] & (w < WIDTH)[None, :]
        cell = slot * E * WIDTH + e[:, None] * WIDTH + w[None, :]
        before = tl.load(BEFORE + cell, mask=inside, other=0.0)
        after = tl.load(AFTER + cell, mask=inside, other=0.0)
        do = tokens(DO + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
        u = tokens(U + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
        z = tokens(Z + bh * n_tokens * WIDTH, at, there, WIDTH, 1, first, WIDTH, BV)
        read_q += exact(do, tl.trans(before), UPCAST)
        read_k += exact(z, tl.trans(before), UPCAST)
        wrote_k += exact(u, tl.trans(after), UPCAST)
        carried += tl.sum(before * after, 1)
    read_q = (SCALE * rise)[:, None] * read_q
    read_k = (rise * beta)[:, None] * read_k
    wrote_k = fall[:, None] * wrote_k
    q = tokens(Q + bh // H * q_b + bh % H // SHARE_Q * q_h, at, there, q_n, q_e, start, E, ES)
    k = tokens(K + bh // H * k_b + bh % H // SHARE_K * k_h, at, there, k_n, k_e, start, E, ES)
    pairs = PAIRS + slot * 2 * C * C + i[:, None] * C + i[None, :]
    d_reads = tl.load(pairs)
    d_gram = tl.load(pairs + C * C)
    where = (bh * n_tokens + at)[:, None] * E + e[None, :]
    inside = there[:, None] & (e < E)[None, :]
    tl.store(DQ + where, read_q + exact(d_reads, k, UPCAST), mask=inside)
    dk = exact(d_gram + tl.trans(d_gram), k, UPCAST) + exact(tl.trans(d_reads), q, UPCAST) + wrote_k - read_k
    tl.store(DK + where, dk, mask=inside)
    if HAS_LOG:
        reading = tl.sum(q.to(tl.float32) * read_q - k.to(tl.float32) * read_k, 1)
        written = tl.sum(k.to(tl.float32) * wrote_k, 1)
        over = tl.sum(tl.where(i[:, None] <= i[None, :], reading[None, :], 0.0), 1)
        over += tl.sum(tl.where(i[:, None] > i[None, :], written[None, :], 0.0), 1)
        over += tl.load(VECTORS + slot * 3 * C + C - 1) * tl.sum(carried, 0)
        tl.store(DLOG + (tl.program_id(2) * tl.num_programs(1) + bh) * n_tokens + at, over, mask=there)


@beside_its_tensors
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
    # Gradients hold five [C, C] tiles at once.
    found = prepare(q, k, beta, log_decay, chunk=32)
    missed = torch.empty(b, h, n, wide, dtype=torch.float32, device=q.device)
    before, u, last = scan(found, v, state, missed)
    do = torch.zeros_like(u, dtype=v.dtype) if d_output is None else d_output.to(v.dtype).contiguous()
    z, after = torch.empty_like(u), torch.empty_like(before)
    first = torch.empty_like(last)
    pairs = torch.empty(b, h, found.cells.tiles, 2, 32, 32, dtype=torch.float32, device=q.device)
    dq = torch.empty(b, h, n, e, dtype=torch.float32, device=q.device)
    dk, d_beta = torch.empty_like(dq), torch.empty_like(found.beta)
    part, tile, narrow = min(width(e), 32), min(width(wide), 32), value_tile(e, wide)
    d_log = torch.empty(1 + triton.cdiv(e, part), b, h, n, dtype=torch.float32, device=q.device)
    shared = {
        **strides("q", q), **strides("k", k), "Q": q, "K": k, "DO": do, "SCALE": scale, "SHARE_Q": found.share(q),
        "WIDTH": wide, **found.shapes(),
    }  # fmt: skip
    tiles = {**shared, "ES": part, "BV": tile, "num_warps": 4}
    grid = (found.cells.tiles, found.rows)
    wanted_kernel[(*grid, triton.cdiv(wide, tile))](OUT=z, **found.decays(), **tiles)
    backward_scan_kernel[(triton.cdiv(wide, narrow), found.rows)](
        Z=z, LAST=first if d_state is None else d_state.float().contiguous(), AFTER=after, FIRST=first, BV=narrow,
        HAS_LAST=d_state is not None, **found.chunks(), **shared, num_warps=warps(32, k),
    )  # fmt: skip
    pairs_kernel[grid](
        U=u, Z=z, MISSED=missed, VECTORS=found.vectors, PAIRS=pairs, DBETA=d_beta, DLOG=d_log[0],
        **found.decays(), **tiles,
    )  # fmt: skip
    gradient_kernel[(*grid, triton.cdiv(e, part))](
        U=u, Z=z, VECTORS=found.vectors, BEFORE=before, AFTER=after, PAIRS=pairs, DQ=dq, DK=dk, DLOG=d_log[1:],
        HAS_LOG=log_decay is not None, **tiles,
    )  # fmt: skip

    def tied(x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(1, (like.shape[1], -1)).sum(2)

    return tied(dq, q), tied(dk, k), tied(found.beta[..., None] * z, v), d_beta, d_log.sum(0), first
