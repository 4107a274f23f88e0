"""``softmax_backward`` as two Triton kernels without atomics: a row tile owns its rows of dq, a key tile its rows of dk and dv.

The row kernel makes D first. Without gradients of block sums or received mass, D is rowsum(dO * O); with them it takes a pass
of its own over the keys, since O does not contain them. The key kernel loops over the query heads of its group and their row
tiles, in a fixed order. Both recompute p from q, k and lse and meet only the tiles that the forward meets.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.flash.triton import Tuning
from workbench.kernels.pairs.chunks import blank, unseen
from workbench.kernels.pairs.tiles import cleaned, open_keys, pair_arguments
from workbench.kernels.scores import Scores
from workbench.kernels.tiles import (
    Cells,
    beside_its_tensors,
    dot,
    key_tiles,
    narrow,
    query_tiles,
    score_tile,
    strides,
    tanh,
    visible,
    width,
)


@triton.jit
def _of_maps(
    rows, rows_in, cols, cols_in, bh, D_BLOCKS, block_rows, block_columns, RECEIVED, n_received, GATE, n_queries,
    TQ: tl.constexpr, TK: tl.constexpr, BLOCK: tl.constexpr, HAS_RECEIVED: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """The part of G ``[rows, cols]`` that comes from block sums and received mass; finite where a pair does not exist."""
    g = tl.zeros([TQ, TK], tl.float32)
    if BLOCK > 0:
        line = D_BLOCKS + (bh * block_rows + rows // BLOCK) * block_columns
        if BLOCK % TK == 0:  # all keys of a tile lie in one block
            key = tl.min(cols)
            g += tl.load(line + key // BLOCK, mask=rows_in & (key < n_received), other=0.0)[:, None]
        else:
            there = rows_in[:, None] & cols_in[None, :]
            g += tl.load(line[:, None] + (cols // BLOCK)[None, :], mask=there, other=0.0)
    if HAS_RECEIVED:
        g += tl.load(RECEIVED + bh * n_received + cols, mask=cols_in, other=0.0)[None, :]
    if HAS_GATE:
        g *= tl.load(GATE + bh * n_queries + rows, mask=rows_in, other=0.0)[:, None]
    return g


@triton.jit
def _by_row(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, V, v_b, v_h, v_n, v_e, OUT, o_b, o_h, o_n, o_e, DO, do_b, do_h, do_n, do_e,
    DQ, LSE, D_LSE, D, D_BLOCKS, RECEIVED, GATE, TILES, t_b, t_h, t_q, COUNTS, c_b, c_h,
    row_tiles, heads, batch_heads, n_queries, n_keys, first_seen, block_rows, block_columns, n_received,
    OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
    DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
    SCALE, SOFTCAP, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_KEYS: tl.constexpr,
    HAS_QUERIES: tl.constexpr, HAS_DENSE: tl.constexpr, SIDE: tl.constexpr,
    HAS_CAP: tl.constexpr, BIAS_KIND: tl.constexpr, UPCAST: tl.constexpr,
    FOLD: tl.constexpr, E: tl.constexpr, EW: tl.constexpr, VE: tl.constexpr, VW: tl.constexpr,
    TQ: tl.constexpr, TK: tl.constexpr, LISTED: tl.constexpr, SIMPLE: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_D_LSE: tl.constexpr, BLOCK: tl.constexpr, HAS_RECEIVED: tl.constexpr, HAS_GATE: tl.constexpr,
    THROUGH: tl.constexpr,
):  # fmt: skip
    TWICE: tl.constexpr = BLOCK > 0 or HAS_RECEIVED
    tile = row_tiles - 1 - tl.program_id(0) // batch_heads
    bh = (tl.program_id(0) % batch_heads).to(tl.int64)
    b = bh // heads
    h = bh % heads
    group = h // FOLD
    rows = tile * TQ + tl.arange(0, TQ)
    rows_in = rows < n_queries
    low = tile * TQ
    high = tl.minimum(low + TQ, n_queries) - 1
    e = tl.arange(0, EW)
    ve = tl.arange(0, VW)
    if LISTED:
        first = 0
        last = tl.load(COUNTS + b * c_b + h * c_h + tile)
    else:
        first, last = key_tiles(low, high, n_keys, OFFSET, WINDOW, PREFIX, CAUSAL, HAS_WINDOW, TK, TK, TK, TK, 1)
    listed = TILES + b * t_b + h * t_h + tile.to(tl.int64) * t_q
    open_from, open_to = open_keys(
        low, high, first, last, n_keys, OFFSET, WINDOW, PREFIX, CAUSAL, HAS_WINDOW, TK, SIMPLE
    )
    near = rows.to(tl.int64)[:, None]
    q = tl.load(
        Q + b * q_b + h * q_h + near * q_n + e[None, :] * q_e, mask=rows_in[:, None] & (e[None, :] < E), other=0.0
    )
    lse = tl.load(LSE + bh * n_queries + rows, mask=rows_in, other=float("-inf")) * 1.4426950408889634
    lse = tl.where(lse > float("-inf"), lse, float("inf"))
    do = q
    d = tl.zeros([TQ], tl.float32)
    if HAS_OUT:
        real = rows_in[:, None] & (ve[None, :] < VE)
        do = tl.load(DO + b * do_b + h * do_h + near * do_n + ve[None, :] * do_e, mask=real, other=0.0)
        if not TWICE:
            out = tl.load(OUT + b * o_b + h * o_h + near * o_n + ve[None, :] * o_e, mask=real, other=0.0)
            d = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_D_LSE:
        d -= tl.load(D_LSE + bh * n_queries + rows, mask=rows_in, other=0.0)
    dq = tl.zeros([TQ, EW], tl.float32)
    for stage in tl.static_range(0 if TWICE else 3, 6):
        if SIMPLE or stage % 3 == 2:
            start = open_to
            stop = last
            if stage % 3 == 0:
                start = first
                stop = open_from
            elif stage % 3 == 1:
                start = open_from
                stop = open_to
            total = tl.zeros([TQ], tl.float32)
            for t in range(start, stop):
                key_tile = t
                if LISTED:
                    key_tile = tl.load(listed + t)
                cols = key_tile * TK + tl.arange(0, TK)
                cols_in = cols < n_keys
                if HAS_WINDOW:
                    cols_in = cols_in & (cols >= first_seen)
                far = cols.to(tl.int64)[:, None]
                k = tl.load(
                    K + b * k_b + group * k_h + far * k_n + e[None, :] * k_e,
                    mask=cols_in[:, None] & (e[None, :] < E), other=0.0,
                )  # fmt: skip
                v = k
                if HAS_OUT:
                    v = tl.load(
                        V + b * v_b + group * v_h + far * v_n + ve[None, :] * v_e,
                        mask=cols_in[:, None] & (ve[None, :] < VE), other=0.0,
                    )  # fmt: skip
                if stage % 3 == 1:
                    ok = tl.full([TQ, TK], 1, tl.int1)
                else:
                    ok = visible(
                        rows, rows_in, cols, cols_in, b, h, OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b,
                        QUERIES, queries_b, DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q,
                        blocks_k, CAUSAL, HAS_WINDOW, HAS_DOCS, HAS_KEYS, HAS_QUERIES, HAS_DENSE, SIDE,
                    )  # fmt: skip
                s = score_tile(
                    q, k, ok, rows, cols, b, h, SCALE, SOFTCAP, OFFSET, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first,
                    bias_last, HAS_CAP, BIAS_KIND, UPCAST,
                )  # fmt: skip
                p = tl.exp2(s - lse[:, None])
                g = dot(do, tl.trans(v), UPCAST) if HAS_OUT else tl.zeros([TQ, TK], tl.float32)
                if TWICE:
                    g += _of_maps(
                        rows, rows_in, cols, cols_in, bh, D_BLOCKS, block_rows, block_columns, RECEIVED, n_received, GATE,
                        n_queries, TQ, TK, BLOCK, HAS_RECEIVED, HAS_GATE,
                    )  # fmt: skip
                if stage < 3:
                    total += tl.sum(p * g, 1)
                else:
                    if THROUGH:
                        g -= d[:, None]
                    ds = p * g
                    if HAS_CAP:
                        bent = tanh(dot(q, tl.trans(k), UPCAST) * SCALE / SOFTCAP)
                        ds *= 1.0 - bent * bent
                    dq += dot(narrow(ds, k.dtype, UPCAST), k, UPCAST)
            d += total
    real = rows_in[:, None] & (e[None, :] < E)
    tl.store(DQ + (bh * n_queries + near) * E + e[None, :], narrow(dq * SCALE, DQ.dtype.element_ty, UPCAST), mask=real)
    tl.store(D + bh * n_queries + rows, d, mask=rows_in)


@triton.jit
def _by_key(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, V, v_b, v_h, v_n, v_e, DO, do_b, do_h, do_n, do_e,
    DK, DV, LSE, D, D_BLOCKS, RECEIVED, GATE, TILES, t_b, t_h, t_q, COUNTS, c_b, c_h,
    groups, batch_groups, n_queries, n_keys, first_seen, block_rows, block_columns, n_received,
    OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
    DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
    SCALE, SOFTCAP, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_KEYS: tl.constexpr,
    HAS_QUERIES: tl.constexpr, HAS_DENSE: tl.constexpr, SIDE: tl.constexpr,
    HAS_CAP: tl.constexpr, BIAS_KIND: tl.constexpr, UPCAST: tl.constexpr,
    FOLD: tl.constexpr, E: tl.constexpr, EW: tl.constexpr, VE: tl.constexpr, VW: tl.constexpr,
    TQ: tl.constexpr, TK: tl.constexpr, LISTED: tl.constexpr, SIMPLE: tl.constexpr,
    HAS_OUT: tl.constexpr, BLOCK: tl.constexpr, HAS_RECEIVED: tl.constexpr, HAS_GATE: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // batch_groups
    bg = (tl.program_id(0) % batch_groups).to(tl.int64)
    b = bg // groups
    group = bg % groups
    cols = tile * TK + tl.arange(0, TK)
    cols_in = cols < n_keys
    if HAS_WINDOW:
        cols_in = cols_in & (cols >= first_seen)
    low = tile * TK
    high = tl.minimum(low + TK, n_keys) - 1
    e = tl.arange(0, EW)
    ve = tl.arange(0, VW)
    far = cols.to(tl.int64)[:, None]
    k = tl.load(
        K + b * k_b + group * k_h + far * k_n + e[None, :] * k_e, mask=cols_in[:, None] & (e[None, :] < E), other=0.0
    )
    v = k
    if HAS_OUT:
        v = tl.load(
            V + b * v_b + group * v_h + far * v_n + ve[None, :] * v_e,
            mask=cols_in[:, None] & (ve[None, :] < VE), other=0.0,
        )  # fmt: skip
    dk = tl.zeros([TK, EW], tl.float32)
    dv = tl.zeros([TK, VW], tl.float32)
    for fold in range(FOLD):
        h = group * FOLD + fold
        bh = b * groups * FOLD + h
        if LISTED:
            first = 0
            last = tl.load(COUNTS + b * c_b + h * c_h + tile)
        else:
            first, last = query_tiles(
                low, high, n_queries, OFFSET, WINDOW, PREFIX, CAUSAL, HAS_WINDOW, TQ, TQ, TQ, TQ, 1
            )
            last = tl.where(high < low, first, last)
        listed = TILES + b * t_b + h * t_h + tile.to(tl.int64) * t_q
        open_from = first
        open_to = first
        if SIMPLE:  # row tiles in which every row sees every key of the tile
            open_to = last  # rows past the end have an infinite lse
            if HAS_WINDOW:
                open_to = tl.minimum(open_to, tl.maximum(low + WINDOW - OFFSET, 0) // TQ)
                if not CAUSAL:
                    open_from = (tl.maximum(high - WINDOW + 1 - OFFSET, 0) + TQ - 1) // TQ
            if CAUSAL:
                if HAS_WINDOW or high >= PREFIX:
                    open_from = (tl.maximum(high - OFFSET, 0) + TQ - 1) // TQ
            open_from = tl.minimum(tl.maximum(open_from, first), last)
            open_to = tl.minimum(tl.maximum(open_to, open_from), last)
        for phase in tl.static_range(
            (0 if CAUSAL or HAS_WINDOW else 1) if SIMPLE else 2, 3 if HAS_WINDOW or not SIMPLE else 2
        ):
            start = open_to
            stop = last
            if phase == 0:
                start = first
                stop = open_from
            elif phase == 1:
                start = open_from
                stop = open_to
            for t in range(start, stop):
                row_tile = t
                if LISTED:
                    row_tile = tl.load(listed + t)
                rows = row_tile * TQ + tl.arange(0, TQ)
                rows_in = rows < n_queries
                near = rows.to(tl.int64)[:, None]
                q = tl.load(
                    Q + b * q_b + h * q_h + near * q_n + e[None, :] * q_e,
                    mask=rows_in[:, None] & (e[None, :] < E), other=0.0,
                )  # fmt: skip
                do = q
                if HAS_OUT:
                    do = tl.load(
                        DO + b * do_b + h * do_h + near * do_n + ve[None, :] * do_e,
                        mask=rows_in[:, None] & (ve[None, :] < VE), other=0.0,
                    )  # fmt: skip
                lse = tl.load(LSE + bh * n_queries + rows, mask=rows_in, other=float("-inf")) * 1.4426950408889634
                lse = tl.where(lse > float("-inf"), lse, float("inf"))
                if phase == 1:
                    ok = tl.full([TQ, TK], 1, tl.int1)
                else:
                    ok = visible(
                        rows, rows_in, cols, cols_in, b, h, OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b,
                        QUERIES, queries_b, DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q,
                        blocks_k, CAUSAL, HAS_WINDOW, HAS_DOCS, HAS_KEYS, HAS_QUERIES, HAS_DENSE, SIDE,
                    )  # fmt: skip
                # Keys are the rows here, so that both products below find their left factor where it is. A bias by distance
                # takes the difference of its two positions, whose order the signs keep.
                across, along = (-cols, -rows) if BIAS_KIND == 2 else (cols, rows)
                step_across, step_along = (bias_q, bias_k) if BIAS_KIND == 2 else (bias_k, bias_q)
                s = score_tile(
                    k, q, tl.trans(ok), across, along, b, h, SCALE, SOFTCAP, OFFSET, BIAS, bias_b, bias_h, step_across,
                    step_along, bias_first, bias_last, HAS_CAP, BIAS_KIND, UPCAST,
                )  # fmt: skip
                p = tl.exp2(s - lse[None, :])
                g = tl.zeros([TK, TQ], tl.float32)
                if HAS_OUT:
                    dv += dot(narrow(p, do.dtype, UPCAST), do, UPCAST)
                    g = dot(v, tl.trans(do), UPCAST)
                if BLOCK > 0 or HAS_RECEIVED:
                    g += tl.trans(_of_maps(
                        rows, rows_in, cols, cols_in, bh, D_BLOCKS, block_rows, block_columns, RECEIVED, n_received, GATE,
                        n_queries, TQ, TK, BLOCK, HAS_RECEIVED, HAS_GATE,
                    ))  # fmt: skip
                if THROUGH:
                    g -= tl.load(D + bh * n_queries + rows, mask=rows_in, other=0.0)[None, :]
                ds = p * g
                if HAS_CAP:
                    bent = tanh(dot(k, tl.trans(q), UPCAST) * SCALE / SOFTCAP)
                    ds *= 1.0 - bent * bent
                dk += dot(narrow(ds, q.dtype, UPCAST), q, UPCAST)
    there = (cols < n_received)[:, None]
    at = bg * n_received + far
    tl.store(DK + at * E + e[None, :], narrow(dk * SCALE, DK.dtype.element_ty, UPCAST), mask=there & (e[None, :] < E))
    if HAS_OUT:
        tl.store(DV + at * VE + ve[None, :], narrow(dv, DV.dtype.element_ty, UPCAST), mask=there & (ve[None, :] < VE))


def tuning(e: int, v: int, dtype: torch.dtype) -> Tuning:
    wide = max(width(e), width(v))
    if dtype == torch.float32:
        return Tuning(32, 32, 4, 2) if wide <= 64 else Tuning(32, 32, 8, 2) if wide <= 128 else Tuning(16, 16, 4, 2)
    if wide <= 64:
        return Tuning(64, 64, 4, 2)
    return Tuning(64, 64, 8, 2) if wide <= 128 else Tuning(32, 32, 8, 2)


@beside_its_tensors
def fused_backward(
    scores: Scores,
    lse: Tensor,
    out: Tensor | None,
    d_out: Tensor | None,
    v: Tensor | None,
    d_lse: Tensor | None,
    d_blocks: Tensor | None,
    block: int | None,
    d_received: Tensor | None,
    gate: Tensor | None,
    through_lse: bool,
) -> list[Tensor]:
    """dq, dk, dv (empty without v) and D."""
    b, h, q, k = scores.shape
    groups, e, ve = scores.k.shape[1], scores.q.shape[3], scores.q.shape[3] if v is None else v.shape[3]
    tune = tuning(e, ve, scores.q.dtype)
    rows, columns = Cells(q, tune.rows, tune.rows), Cells(k, tune.keys, tune.keys)
    clean, values = cleaned(scores, v)
    upstream = None if d_out is None else d_out.to(scores.q.dtype)
    if upstream is not None and scores.mask.queries is not None:
        upstream = blank(upstream, unseen(scores)[1])
    given = (scores.q, scores.k, scores.q.new_empty(0) if v is None else v)
    dq, dk, dv = (part.new_empty(part.shape) for part in given)
    d = torch.empty(b, h, q, dtype=torch.float32, device=lse.device)

    def held(part: Tensor | None) -> Tensor:
        return d if part is None else part.to(torch.float32).contiguous()

    absent = clean.q  # a pointer that is never followed
    shared: dict[str, Any] = {
        "Q": clean.q, **strides("q", clean.q), "K": clean.k, **strides("k", clean.k),
        "V": absent if values is None else values, **strides("v", absent if values is None else values),
        "DO": absent if upstream is None else upstream, **strides("do", absent if upstream is None else upstream),
        "LSE": held(lse), "D": d, "D_BLOCKS": held(d_blocks), "RECEIVED": held(d_received), "GATE": held(gate),
        "block_rows": 0 if d_blocks is None else d_blocks.shape[2],
        "block_columns": 0 if d_blocks is None else d_blocks.shape[3],
        "n_received": k, "FOLD": h // groups, "E": e, "EW": width(e), "VE": ve, "VW": width(ve), "TQ": tune.rows,
        "TK": tune.keys, "HAS_OUT": v is not None, "BLOCK": block or 0, "HAS_RECEIVED": d_received is not None,
        "HAS_GATE": gate is not None, "THROUGH": through_lse, "num_warps": tune.warps, "num_stages": tune.stages,
    }  # fmt: skip
    _by_row[(rows.tiles * b * h,)](
        OUT=absent if out is None else out, **strides("o", absent if out is None else out), DQ=dq, D_LSE=held(d_lse),
        HAS_D_LSE=d_lse is not None, row_tiles=rows.tiles, heads=h, batch_heads=b * h,
        **pair_arguments(clean, rows, columns), **shared,
    )  # fmt: skip
    _by_key[(columns.tiles * b * groups,)](
        DK=dk, DV=dk if v is None else dv, groups=groups, batch_groups=b * groups,
        **pair_arguments(clean, rows, columns, by_key=True), **shared,
    )  # fmt: skip
    return [dq, dk, dv, d]
