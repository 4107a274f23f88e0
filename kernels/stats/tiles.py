"""What happens inside one tile of the ``attention_stats`` kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from workbench.kernels.tiles import places, score_tile, visible


@triton.jit
def packed(x, position):
    """Order-preserving int64 of a float32 and a key position below 2**31: larger first, then the smaller position."""
    bits = x.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - position).to(tl.int64)


@triton.jit
def cell_sums(p, ROWS: tl.constexpr, COLS: tl.constexpr, R_PAD: tl.constexpr, C_PAD: tl.constexpr):
    if C_PAD == COLS:
        by_row = tl.sum(p, 1)[:, None]
    else:
        by_row = tl.sum(tl.reshape(p, [ROWS, COLS // C_PAD, C_PAD]), 2)
    return tl.sum(tl.reshape(by_row, [ROWS // R_PAD, R_PAD, COLS // C_PAD]), 1)


@triton.jit
def cell_peaks(x, ROWS: tl.constexpr, COLS: tl.constexpr, R_PAD: tl.constexpr, C_PAD: tl.constexpr):
    if C_PAD == COLS:
        by_row = tl.max(x, 1)[:, None]
    else:
        by_row = tl.max(tl.reshape(x, [ROWS, COLS // C_PAD, C_PAD]), 2)
    return tl.max(tl.reshape(by_row, [ROWS // R_PAD, R_PAD, COLS // C_PAD]), 1)


@triton.jit
def scored(
    K, q, t, rows, rows_in, b, h, e, E, listed, k_n, k_e, n_keys, first_seen,
    OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
    DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
    SCALE, SOFTCAP, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_KEYS: tl.constexpr,
    HAS_QUERIES: tl.constexpr, HAS_DENSE: tl.constexpr, SIDE: tl.constexpr,
    HAS_CAP: tl.constexpr, BIAS_KIND: tl.constexpr, UPCAST: tl.constexpr, LISTED: tl.constexpr, OPEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    C_BLOCK: tl.constexpr, C_STEP: tl.constexpr, C_PAD: tl.constexpr, C_PER: tl.constexpr,
):  # fmt: skip
    """Base-2 scores of the t-th key tile of a row tile, the tile, its keys and which of them exist."""
    tile = t
    if LISTED:
        tile = tl.load(listed + t)
    cols, cols_in = places(tile, BN, C_BLOCK, C_STEP, C_PAD, C_PER, n_keys)
    if HAS_WINDOW:
        cols_in = cols_in & (cols >= first_seen)
    k = tl.load(
        K + cols.to(tl.int64)[:, None] * k_n + e[None, :] * k_e, mask=cols_in[:, None] & (e < E)[None, :], other=0.0
    )
    if OPEN:
        ok = tl.full([BM, BN], 1, tl.int1)
    else:
        ok = visible(
            rows, rows_in, cols, cols_in, b, h, OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b,
            QUERIES, queries_b, DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
            CAUSAL, HAS_WINDOW, HAS_DOCS, HAS_KEYS, HAS_QUERIES, HAS_DENSE, SIDE,
        )  # fmt: skip
    s = score_tile(
        q, k, ok, rows, cols, b, h, SCALE, SOFTCAP, OFFSET, BIAS, bias_b, bias_h, bias_q, bias_k,
        bias_first, bias_last, HAS_CAP, BIAS_KIND, UPCAST,
    )  # fmt: skip
    return s, tile, cols, cols_in
