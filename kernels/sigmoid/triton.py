"""``sigmoid_attention`` in fused kernels: weights live in registers only, forward and backward.

Column sums need no atomics: each program of a head owns a zigzag of row tiles, which balances causal work, and adds to a private
row of K numbers; those rows are summed afterwards. With t = 2^-|x| and r = 1 / (1 + t) of a base-2 score x, the weight is r or
t r and its derivative t r r: nothing overflows or cancels, and a hidden score, -inf, gives zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.scores import Scores
from workbench.kernels.sigmoid_attention import Wanted
from workbench.kernels.tiles import (
    LOG2E,
    Cells,
    beside_its_tensors,
    dot,
    key_tiles,
    load_rows,
    mask_arguments,
    narrow,
    places,
    query_tiles,
    score_arguments,
    score_tile,
    store_rows,
    strides,
    visible,
    width,
)

PROGRAMS = 512
"""Programs that share the column sums of a call, about four per multiprocessor: more need more memory for private rows."""


@triton.jit
def _weights(x):
    """Sigmoid of a base-2 score and its derivative with respect to the natural score."""
    t = tl.exp2(-tl.abs(x))
    r = 1.0 / (1.0 + t)
    tr = t * r
    return tl.where(x >= 0, r, tr), tr * r


@triton.jit
def _seen(inside, at, KEYS, keys_b, b, HAS_KEYS: tl.constexpr):
    """Positions that exist and are not padding; what padding holds is never loaded."""
    if HAS_KEYS:
        return inside & (tl.load(KEYS + b * keys_b + at, mask=inside, other=0) != 0)
    return inside


@triton.jit
def sigmoid_forward(
    Q, K, V, OUT, MASS, PEAK, RECEIVED, ROW_SUMS,
    q_b, q_h, q_n, q_e, k_b, k_h, k_n, k_e, v_b, v_h, v_n, v_e,
    n_queries, n_keys, SHIFT, row_tiles, map_rows, map_columns, steps,
    OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
    DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
    SCALE, SOFTCAP, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_KEYS: tl.constexpr,
    HAS_QUERIES: tl.constexpr, HAS_DENSE: tl.constexpr, SIDE: tl.constexpr,
    HAS_CAP: tl.constexpr, BIAS_KIND: tl.constexpr, UPCAST: tl.constexpr,
    FOLD: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, VW: tl.constexpr, VP: tl.constexpr,
    TQ: tl.constexpr, TK: tl.constexpr,
    Q_BLOCK: tl.constexpr, Q_STEP: tl.constexpr, Q_PAD: tl.constexpr, Q_PER: tl.constexpr,
    K_BLOCK: tl.constexpr, K_STEP: tl.constexpr, K_PAD: tl.constexpr, K_PER: tl.constexpr,
    WITH_MASS: tl.constexpr, WITH_PEAK: tl.constexpr, WITH_RECEIVED: tl.constexpr, WITH_ROWS: tl.constexpr,
    LIFT: tl.constexpr,
):  # fmt: skip
    lane, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lanes = tl.num_programs(0)
    head = b * tl.num_programs(1) + h
    g = h // FOLD
    CQ: tl.constexpr = TQ // Q_PAD
    CK: tl.constexpr = TK // K_PAD
    for step in range(steps):
        # The longest rows of a causal map come first; odd turns go backwards, so that every program gets an equal share.
        tile = row_tiles - 1 - (step * lanes + tl.where(step % 2 == 0, lane, lanes - 1 - lane))
        if tile >= 0:
            rows, rows_in = places(tile, TQ, Q_BLOCK, Q_STEP, Q_PAD, Q_PER, n_queries)
            q = load_rows(
                Q, b, h, rows, _seen(rows_in, rows, QUERIES, queries_b, b, HAS_QUERIES), q_b, q_h, q_n, q_e, E, EP
            )
            low = tl.min(tl.where(rows_in, rows, n_queries - 1), 0)
            high = tl.max(tl.where(rows_in, rows, 0), 0)
            first, last = key_tiles(
                low, high, n_keys, OFFSET, WINDOW, PREFIX, CAUSAL, HAS_WINDOW, TK, K_BLOCK, K_STEP, K_PAD, K_PER
            )
            out = tl.zeros([TQ, VP], tl.float32)
            total = tl.zeros([TQ], tl.float32)
            for t in range(first, last):
                cols, cols_in = places(t, TK, K_BLOCK, K_STEP, K_PAD, K_PER, n_keys)
                held = _seen(cols_in, cols, KEYS, keys_b, b, HAS_KEYS)
                k = load_rows(K, b, g, cols, held, k_b, k_h, k_n, k_e, E, EP)
                ok = visible(
                    rows, rows_in, cols, cols_in, b, h,
                    OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
                    DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
                    CAUSAL, HAS_WINDOW, HAS_DOCS, HAS_KEYS, HAS_QUERIES, HAS_DENSE, SIDE,
                )  # fmt: skip
                s = score_tile(
                    q, k, ok, rows, cols, b, h,
                    SCALE, SOFTCAP, OFFSET, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
                    HAS_CAP, BIAS_KIND, UPCAST,
                )  # fmt: skip
                p, _ = _weights(s + SHIFT)
                v = load_rows(V, b, g, cols, held, v_b, v_h, v_n, v_e, VW, VP)
                out += dot(narrow(p * LIFT, v.dtype, UPCAST), v, UPCAST)
                if WITH_ROWS:
                    total += tl.sum(p, 1)
                if WITH_MASS or WITH_RECEIVED:
                    by_key = tl.sum(tl.reshape(p, (CQ, Q_PAD, TK)), 1)
                    if WITH_RECEIVED:
                        mine = RECEIVED + (head * lanes + lane).to(tl.int64) * n_keys + cols
                        tl.store(mine, tl.load(mine, mask=cols_in, other=0.0) + tl.sum(by_key, 0), mask=cols_in)
                    if WITH_MASS:
                        _cells(MASS, head, tile, t, map_rows, map_columns,
                               tl.sum(tl.reshape(by_key, (CQ, CK, K_PAD)), 2), CQ, CK)  # fmt: skip
                if WITH_PEAK:
                    top = tl.max(tl.reshape(p, (CQ, Q_PAD, TK)), 1)
                    _cells(PEAK, head, tile, t, map_rows, map_columns,
                           tl.max(tl.reshape(top, (CQ, CK, K_PAD)), 2), CQ, CK)  # fmt: skip
            store_rows(OUT, head, rows, rows_in, n_queries, out * (1.0 / LIFT), UPCAST, VW, VP)
            if WITH_ROWS:
                tl.store(ROW_SUMS + head.to(tl.int64) * n_queries + rows, total, mask=rows_in)
            if WITH_RECEIVED:
                tl.debug_barrier()  # the next row tile reads what other threads of this program have just written


@triton.jit
def _cells(MAP, head, i, j, map_rows, map_columns, values, CQ: tl.constexpr, CK: tl.constexpr):
    """Write the cells of one tile. Every cell belongs to one tile, so that nothing is read."""
    at_rows = i * CQ + tl.arange(0, CQ)
    at_columns = j * CK + tl.arange(0, CK)
    base = MAP + head.to(tl.int64) * map_rows * map_columns
    tl.store(base + at_rows.to(tl.int64)[:, None] * map_columns + at_columns[None, :], values)


@triton.jit
def _slopes(
    d, dot_dv, rows, rows_in, cols, cols_in, head, n_queries, n_keys, D_MASS, D_RECEIVED, D_ROW_SUMS, BLOCK, map_columns,
    map_size, ok, HAS_MASS: tl.constexpr, HAS_RECEIVED: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores, from the derivative ``d`` of the weights and the products dO . v."""
    if HAS_MASS:
        at = (rows // BLOCK).to(tl.int64)[:, None] * map_columns + (cols // BLOCK)[None, :]
        dot_dv += tl.load(D_MASS + head.to(tl.int64) * map_size + at, mask=ok, other=0.0)
    if HAS_RECEIVED:
        dot_dv += tl.load(D_RECEIVED + head.to(tl.int64) * n_keys + cols, mask=cols_in, other=0.0)[None, :]
    if HAS_ROWS:
        dot_dv += tl.load(D_ROW_SUMS + head.to(tl.int64) * n_queries + rows, mask=rows_in, other=0.0)[:, None]
    return tl.where(ok, d * dot_dv, 0.0)


@triton.jit
def sigmoid_backward_queries(
    Q, K, V, D_OUT, DQ, D_MASS, D_RECEIVED, D_ROW_SUMS,
    q_b, q_h, q_n, q_e, k_b, k_h, k_n, k_e, v_b, v_h, v_n, v_e, d_b, d_h, d_n, d_e,
    n_queries, n_keys, SHIFT, BLOCK, map_columns, map_size,
    OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
    DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
    SCALE, SOFTCAP, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_KEYS: tl.constexpr,
    HAS_QUERIES: tl.constexpr, HAS_DENSE: tl.constexpr, SIDE: tl.constexpr,
    HAS_CAP: tl.constexpr, BIAS_KIND: tl.constexpr, UPCAST: tl.constexpr,
    FOLD: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, VW: tl.constexpr, VP: tl.constexpr,
    TQ: tl.constexpr, TK: tl.constexpr,
    HAS_MASS: tl.constexpr, HAS_RECEIVED: tl.constexpr, HAS_ROWS: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    tile, h, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = b * tl.num_programs(1) + h
    g = h // FOLD
    rows, rows_in = places(tile, TQ, TQ, TQ, TQ, 1, n_queries)
    shown = _seen(rows_in, rows, QUERIES, queries_b, b, HAS_QUERIES)
    q = load_rows(Q, b, h, rows, shown, q_b, q_h, q_n, q_e, E, EP)
    grad = load_rows(D_OUT, b, h, rows, shown, d_b, d_h, d_n, d_e, VW, VP)
    low, high = tile * TQ, tl.minimum(tile * TQ + TQ, n_queries) - 1
    first, last = key_tiles(low, high, n_keys, OFFSET, WINDOW, PREFIX, CAUSAL, HAS_WINDOW, TK, TK, TK, TK, 1)
    dq = tl.zeros([TQ, EP], tl.float32)
    for t in range(first, last):
        cols, cols_in = places(t, TK, TK, TK, TK, 1, n_keys)
        held = _seen(cols_in, cols, KEYS, keys_b, b, HAS_KEYS)
        k = load_rows(K, b, g, cols, held, k_b, k_h, k_n, k_e, E, EP)
        v = load_rows(V, b, g, cols, held, v_b, v_h, v_n, v_e, VW, VP)
        ok = visible(
            rows, rows_in, cols, cols_in, b, h,
            OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
            DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
            CAUSAL, HAS_WINDOW, HAS_DOCS, HAS_KEYS, HAS_QUERIES, HAS_DENSE, SIDE,
        )  # fmt: skip
        s = score_tile(
            q, k, ok, rows, cols, b, h,
            SCALE, SOFTCAP, OFFSET, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
            HAS_CAP, BIAS_KIND, UPCAST,
        )  # fmt: skip
        _, d = _weights(s + SHIFT)
        ds = _slopes(
            d, dot(grad, tl.trans(v), UPCAST), rows, rows_in, cols, cols_in, head, n_queries, n_keys,
            D_MASS, D_RECEIVED, D_ROW_SUMS, BLOCK, map_columns, map_size, ok, HAS_MASS, HAS_RECEIVED, HAS_ROWS,
        )  # fmt: skip
        dq += dot(narrow(ds, k.dtype, UPCAST), k, UPCAST)
    store_rows(DQ, head, rows, rows_in, n_queries, dq * SCALE, UPCAST, E, EP)


@triton.jit
def sigmoid_backward_keys(
    Q, K, V, D_OUT, DK, DV, D_MASS, D_RECEIVED, D_ROW_SUMS,
    q_b, q_h, q_n, q_e, k_b, k_h, k_n, k_e, v_b, v_h, v_n, v_e, d_b, d_h, d_n, d_e,
    n_queries, n_keys, SHIFT, BLOCK, map_columns, map_size,
    OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
    DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
    SCALE, SOFTCAP, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_KEYS: tl.constexpr,
    HAS_QUERIES: tl.constexpr, HAS_DENSE: tl.constexpr, SIDE: tl.constexpr,
    HAS_CAP: tl.constexpr, BIAS_KIND: tl.constexpr, UPCAST: tl.constexpr,
    FOLD: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, VW: tl.constexpr, VP: tl.constexpr,
    TQ: tl.constexpr, TK: tl.constexpr,
    HAS_MASS: tl.constexpr, HAS_RECEIVED: tl.constexpr, HAS_ROWS: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    tile, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols, cols_in = places(tile, TK, TK, TK, TK, 1, n_keys)
    held = _seen(cols_in, cols, KEYS, keys_b, b, HAS_KEYS)
    k = load_rows(K, b, g, cols, held, k_b, k_h, k_n, k_e, E, EP)
    v = load_rows(V, b, g, cols, held, v_b, v_h, v_n, v_e, VW, VP)
    low, high = tile * TK, tl.minimum(tile * TK + TK, n_keys) - 1
    first, last = query_tiles(low, high, n_queries, OFFSET, WINDOW, PREFIX, CAUSAL, HAS_WINDOW, TQ, TQ, TQ, TQ, 1)
    dk = tl.zeros([TK, EP], tl.float32)
    dv = tl.zeros([TK, VP], tl.float32)
    # One loop over the query tiles of all heads that share these keys.
    for turn in range(FOLD * (last - first)):
        h = g * FOLD + turn // (last - first)
        head = b * tl.num_programs(1) * FOLD + h
        rows, rows_in = places(first + turn % (last - first), TQ, TQ, TQ, TQ, 1, n_queries)
        shown = _seen(rows_in, rows, QUERIES, queries_b, b, HAS_QUERIES)
        q = load_rows(Q, b, h, rows, shown, q_b, q_h, q_n, q_e, E, EP)
        grad = load_rows(D_OUT, b, h, rows, shown, d_b, d_h, d_n, d_e, VW, VP)
        ok = visible(
            rows, rows_in, cols, cols_in, b, h,
            OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
            DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
            CAUSAL, HAS_WINDOW, HAS_DOCS, HAS_KEYS, HAS_QUERIES, HAS_DENSE, SIDE,
        )  # fmt: skip
        s = score_tile(
            q, k, ok, rows, cols, b, h,
            SCALE, SOFTCAP, OFFSET, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
            HAS_CAP, BIAS_KIND, UPCAST,
        )  # fmt: skip
        p, d = _weights(s + SHIFT)
        dv += dot(tl.trans(narrow(p * LIFT, v.dtype, UPCAST)), grad, UPCAST)
        ds = _slopes(
            d, dot(grad, tl.trans(v), UPCAST), rows, rows_in, cols, cols_in, head, n_queries, n_keys,
            D_MASS, D_RECEIVED, D_ROW_SUMS, BLOCK, map_columns, map_size, ok, HAS_MASS, HAS_RECEIVED, HAS_ROWS,
        )  # fmt: skip
        dk += dot(tl.trans(narrow(ds, q.dtype, UPCAST)), q, UPCAST)
    head = b * tl.num_programs(1) + g
    store_rows(DK, head, cols, cols_in, n_keys, dk * SCALE, UPCAST, E, EP)
    store_rows(DV, head, cols, cols_in, n_keys, dv * (1.0 / LIFT), UPCAST, VW, VP)


@beside_its_tensors
def fused_forward(scores: Scores, v: Tensor, shift: float, wanted: Wanted) -> list[Tensor]:
    """Output and what is wanted, in the order of ``Wanted``."""
    q, k = scores.q, scores.k
    b, h, n, m = scores.shape
    tq, tk, warps = forward_tiles(max(width(q.shape[3]), width(v.shape[3])), q.element_size())
    rows, columns = (Cells(length, wanted.block or side, side) for length, side in ((n, tq), (m, tk)))
    used = ((n - 1) // rows.block * rows.per + (n - 1) % rows.block // rows.step) * rows.pad // tq + 1
    lanes = used if not wanted.received else max(1, min(used, PROGRAMS // (b * h)))

    def made(asked: bool, *shape: int) -> Tensor:
        return torch.zeros(shape if asked else (1,), dtype=torch.float32, device=q.device)

    map_rows, map_columns = rows.tiles * tq // rows.pad, columns.tiles * tk // columns.pad
    output = q.new_empty(b, h, n, v.shape[3])
    mass, peak = (made(asked, b, h, map_rows, map_columns) for asked in (wanted.mass, wanted.peak))
    received, row_sums = made(wanted.received, b, h, lanes, m), made(wanted.row_sums, b, h, n)
    sigmoid_forward[(lanes, h, b)](
        q, k, v, output, mass, peak, received, row_sums,
        row_tiles=used, map_rows=map_rows, map_columns=map_columns, steps=-(-used // lanes),
        **_common(scores, v, shift), **rows.arguments("Q_"), **columns.arguments("K_"), TQ=tq, TK=tk,
        WITH_MASS=wanted.mass, WITH_PEAK=wanted.peak, WITH_RECEIVED=wanted.received, WITH_ROWS=wanted.row_sums,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    found = [output]
    found += [columns.pool(rows.pool(mass, -2, "sum"), -1, "sum").contiguous()] if wanted.mass else []
    found += [columns.pool(rows.pool(peak, -2, "max"), -1, "max").contiguous()] if wanted.peak else []
    found += [received.sum(2)] if wanted.received else []
    found += [row_sums] if wanted.row_sums else []
    return found


@beside_its_tensors
def fused_backward(
    scores: Scores,
    v: Tensor,
    shift: float,
    block: int | None,
    d_output: Tensor,
    d_mass: Tensor | None,
    d_received: Tensor | None,
    d_row_sums: Tensor | None,
) -> list[Tensor]:
    """Gradients of q, k and v."""
    q, k = scores.q, scores.k
    b, h, n, m = scores.shape
    g = k.shape[1]
    tile, warps = backward_tile(max(width(q.shape[3]), width(v.shape[3])), q.element_size())
    d_output = d_output.to(q.dtype)
    sums = [q if part is None else part.float().contiguous() for part in (d_mass, d_received, d_row_sums)]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    given: dict[str, Any] = {
        **_common(scores, v, shift),
        **strides("d", d_output),
        "BLOCK": block or 1,
        "map_columns": 0 if d_mass is None else d_mass.shape[3],
        "map_size": 0 if d_mass is None else d_mass.shape[2] * d_mass.shape[3],
        "HAS_MASS": d_mass is not None,
        "HAS_RECEIVED": d_received is not None,
        "HAS_ROWS": d_row_sums is not None,
        "TQ": tile,
        "TK": tile,
        "num_warps": warps,
        "num_stages": 1 if q.element_size() == 4 else 2,
    }
    sigmoid_backward_queries[(-(-n // tile), h, b)](q, k, v, d_output, dq, *sums, **given)
    sigmoid_backward_keys[(-(-m // tile), g, b)](q, k, v, d_output, dk, dv, *sums, **given)
    return [dq, dk, dv]


def _common(scores: Scores, v: Tensor, shift: float) -> dict[str, Any]:
    e, w = scores.q.shape[3], v.shape[3]
    return {
        **strides("q", scores.q), **strides("k", scores.k), **strides("v", v),
        "n_queries": scores.shape[2], "n_keys": scores.shape[3], "SHIFT": shift * LOG2E,
        **mask_arguments(scores), **score_arguments(scores),
        "FOLD": scores.shape[1] // scores.k.shape[1], "E": e, "EP": width(e), "VW": w, "VP": width(w),
        # Weights near 1 / K are subnormal in float16: a power of two keeps them in range on their way into the product.
        "LIFT": 16384.0 if v.dtype == torch.float16 else 1.0,
    }  # fmt: skip


def forward_tiles(wide: int, size: int) -> tuple[int, int, int]:
    """Rows and columns of a tile and warps, for a padded width and an element size in bytes."""
    if size == 4:
        return (64, 32, 4) if wide <= 64 else (32, 32, 4) if wide <= 128 else (32, 16, 4)
    return (128, 64, 4 if wide <= 64 else 8) if wide <= 128 else (64, 32, 4)


def backward_tile(wide: int, size: int) -> tuple[int, int]:
    """Side of a tile and warps. Two accumulators of a key tile and two operands of a row tile are held at once."""
    if size == 4:
        return (32, 4) if wide <= 128 else (16, 4)
    return (64, 4 if wide <= 64 else 8) if wide <= 128 else (32, 4)
