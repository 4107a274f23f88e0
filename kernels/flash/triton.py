"""``flash_attention`` as one fused Triton kernel, block maps included; without a map the code of the maps is compiled away.

Persistent programs take row tiles longest first. Each owns a float32 scratch of one row tile by all key cells, which it reuses
for every row tile: memory is programs x tile x cells, not Q x cells. During the key loop a cell leaves behind, per row,
lambda = running maximum + log2(its sum) and its largest score; both are absolute, so that no later maximum changes them. Once
the row's lse is known, the scratch is read again: 2^(lambda - lse2) is summed over the rows of a cell, 2^(max - lse2) maximised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.pairs.tiles import cleaned, open_keys, pair_arguments
from workbench.kernels.scores import Scores
from workbench.kernels.tiles import (
    Cells,
    beside_its_tensors,
    dot,
    key_tiles,
    narrow,
    places,
    score_tile,
    strides,
    visible,
    width,
)  # fmt: skip


@triton.jit
def _flash(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, V, v_b, v_h, v_n, v_e, OUT, o_b, o_h, o_n, o_e,
    LSE, SINK, SCRATCH, MASS, PEAK, TILES, t_b, t_h, t_q, COUNTS, c_b, c_h,
    items, row_tiles, heads, batch_heads, n_queries, n_keys, first_seen, slots_held, row_cells, key_cells,
    OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
    DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
    SCALE, SOFTCAP, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_KEYS: tl.constexpr,
    HAS_QUERIES: tl.constexpr, HAS_DENSE: tl.constexpr, SIDE: tl.constexpr,
    HAS_CAP: tl.constexpr, BIAS_KIND: tl.constexpr, UPCAST: tl.constexpr,
    R_BLOCK: tl.constexpr, R_STEP: tl.constexpr, R_PAD: tl.constexpr, R_PER: tl.constexpr,
    C_BLOCK: tl.constexpr, C_STEP: tl.constexpr, C_PAD: tl.constexpr, C_PER: tl.constexpr,
    FOLD: tl.constexpr, E: tl.constexpr, EW: tl.constexpr, VE: tl.constexpr, VW: tl.constexpr,
    TQ: tl.constexpr, TK: tl.constexpr, HAS_SINK: tl.constexpr, LISTED: tl.constexpr, SIMPLE: tl.constexpr,
    SUMS: tl.constexpr, PEAKS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    CELLS: tl.constexpr = TK // C_PAD
    BANDS: tl.constexpr = TQ // R_PAD
    program = tl.program_id(0)
    lane = tl.arange(0, TQ)
    e = tl.arange(0, EW)
    ve = tl.arange(0, VW)
    sums_at = SCRATCH + program.to(tl.int64) * slots_held * TQ * (SUMS + PEAKS)
    peaks_at = sums_at + slots_held * TQ * SUMS
    for item in range(program, items, tl.num_programs(0)):
        tile = row_tiles - 1 - item // batch_heads
        bh = item % batch_heads
        b = (bh // heads).to(tl.int64)
        h = (bh % heads).to(tl.int64)
        g = h // FOLD
        rows, rows_in = places(tile, TQ, R_BLOCK, R_STEP, R_PAD, R_PER, n_queries)
        low = tl.min(tl.where(rows_in, rows, n_queries - 1))
        high = tl.max(tl.where(rows_in, rows, 0))
        if LISTED:
            first = 0
            last = tl.load(COUNTS + b * c_b + h * c_h + tile)
        else:
            first, last = key_tiles(
                low, high, n_keys, OFFSET, WINDOW, PREFIX, CAUSAL, HAS_WINDOW, TK, C_BLOCK, C_STEP, C_PAD, C_PER
            )
        listed = TILES + b * t_b + h * t_h + tile.to(tl.int64) * t_q
        open_from, open_to = open_keys(
            low, high, first, last, n_keys, OFFSET, WINDOW, PREFIX, CAUSAL, HAS_WINDOW, TK, SIMPLE
        )
        q = tl.load(
            Q + b * q_b + h * q_h + rows.to(tl.int64)[:, None] * q_n + e[None, :] * q_e,
            mask=rows_in[:, None] & (e[None, :] < E), other=0.0,
        )  # fmt: skip
        top = tl.full([TQ], float("-inf"), tl.float32)
        total = tl.zeros([TQ], tl.float32)
        if HAS_SINK:
            top = tl.zeros([TQ], tl.float32) + tl.load(SINK + h).to(tl.float32) * 1.4426950408889634
            total = total + 1.0
        acc = tl.zeros([TQ, VW], tl.float32)
        for phase in tl.static_range((0 if HAS_WINDOW else 1) if SIMPLE else 2, 3):
            start = open_to
            stop = last
            if phase == 0:
                start = first
                stop = open_from
            elif phase == 1:
                start = open_from
                stop = open_to
            for t in range(start, stop):
                key_tile = t
                if LISTED:
                    key_tile = tl.load(listed + t)
                cols, cols_in = places(key_tile, TK, C_BLOCK, C_STEP, C_PAD, C_PER, n_keys)
                if HAS_WINDOW:
                    cols_in = cols_in & (cols >= first_seen)
                far = cols.to(tl.int64)[:, None]
                k = tl.load(
                    K + b * k_b + g * k_h + far * k_n + e[None, :] * k_e,
                    mask=cols_in[:, None] & (e[None, :] < E), other=0.0,
                )  # fmt: skip
                v = tl.load(
                    V + b * v_b + g * v_h + far * v_n + ve[None, :] * v_e,
                    mask=cols_in[:, None] & (ve[None, :] < VE), other=0.0,
                )  # fmt: skip
                if phase == 1:
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
                slot = (t - first) * CELLS
                if CELLS == 1 or not PEAKS:
                    best = tl.max(s, 1)
                    if PEAKS:
                        tl.store(peaks_at + slot * TQ + lane, best)
                else:
                    cells = tl.max(tl.reshape(s, [TQ, CELLS, C_PAD]), 2)
                    tl.store(peaks_at + (slot + tl.arange(0, CELLS))[None, :] * TQ + lane[:, None], cells)
                    best = tl.max(cells, 1)
                new = tl.maximum(top, best)
                base = tl.where(new == float("-inf"), 0.0, new)
                p = tl.exp2(s - base[:, None])
                decay = tl.exp2(top - base)
                if CELLS == 1 or not SUMS:
                    mass = tl.sum(p, 1)
                    if SUMS:
                        tl.store(sums_at + slot * TQ + lane, base + tl.log2(mass))
                else:
                    cells = tl.sum(tl.reshape(p, [TQ, CELLS, C_PAD]), 2)
                    tl.store(
                        sums_at + (slot + tl.arange(0, CELLS))[None, :] * TQ + lane[:, None],
                        base[:, None] + tl.log2(cells),
                    )
                    mass = tl.sum(cells, 1)
                total = total * decay + mass
                acc = acc * decay[:, None] + dot(narrow(p, v.dtype, UPCAST), v, UPCAST)
                top = new
        lse = tl.where(total > 0, top + tl.log2(total), float("-inf"))
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            OUT + b * o_b + h * o_h + rows.to(tl.int64)[:, None] * o_n + ve[None, :] * o_e,
            narrow(acc, OUT.dtype.element_ty, UPCAST), mask=rows_in[:, None] & (ve[None, :] < VE),
        )  # fmt: skip
        tl.store(LSE + bh.to(tl.int64) * n_queries + rows, lse * 0.6931471805599453, mask=rows_in)
        if SUMS or PEAKS:
            tl.debug_barrier()  # the scratch was written by other threads than those that read it
            base = tl.where(rows_in & (lse > float("-inf")), lse, float("inf"))
            band = tile * BANDS + tl.arange(0, BANDS)
            out = (bh.to(tl.int64) * row_cells + band[None, :]) * key_cells
            for begin in range(0, (last - first) * CELLS, AGAIN):
                slot = begin + tl.arange(0, AGAIN)
                here = slot < (last - first) * CELLS
                cell = first * CELLS + slot
                if LISTED:
                    cell = tl.load(listed + slot // CELLS, mask=here, other=0) * CELLS + slot % CELLS
                held = (here & (cell < key_cells))[:, None] & (band < row_cells)[None, :]
                if SUMS:
                    x = tl.load(sums_at + slot[:, None] * TQ + lane[None, :], mask=here[:, None], other=float("-inf"))
                    x = tl.reshape(tl.exp2(x - base[None, :]), [AGAIN, BANDS, R_PAD])
                    tl.store(MASS + out + cell[:, None], tl.sum(x, 2), mask=held)
                if PEAKS:
                    x = tl.load(peaks_at + slot[:, None] * TQ + lane[None, :], mask=here[:, None], other=float("-inf"))
                    x = tl.reshape(x - base[None, :], [AGAIN, BANDS, R_PAD])
                    tl.store(PEAK + out + cell[:, None], tl.exp2(tl.max(x, 2)), mask=held)
            tl.debug_barrier()  # the next row tile writes into the same scratch


@dataclass(frozen=True)
class Tuning:
    """Rows and keys of a tile, warps, and depth of the pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def tuning(e: int, v: int, dtype: torch.dtype) -> Tuning:
    wide = max(width(e), width(v))
    if dtype == torch.float32:
        return Tuning(64, 32, 4, 2) if wide <= 64 else Tuning(32, 32, 4, 2) if wide <= 128 else Tuning(32, 16, 4, 2)
    if wide <= 64:
        return Tuning(128, 64, 4, 3)
    return Tuning(128, 64, 8, 3) if wide <= 128 else Tuning(64, 32, 8, 2)


@beside_its_tensors
def fused_flash(
    scores: Scores, v: Tensor, block: int | None, sums: bool, peaks: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, lse, block sums and block maxima (None where not asked for)."""
    b, h, q, k = scores.shape
    fold, e, ve = h // scores.k.shape[1], scores.q.shape[3], v.shape[3]
    tune = tuning(e, ve, scores.q.dtype)
    rows, columns = Cells(q, block or tune.rows, tune.rows), Cells(k, block or tune.keys, tune.keys)
    if block is None:
        sums = peaks = False
    clean, values = cleaned(scores, v)
    assert values is not None
    pairs = pair_arguments(clean, rows, columns)
    items = rows.tiles * b * h
    programs = min(items, programs_at_once(scores.q, tune))
    output = v.new_empty(b, h, q, ve)
    lse = v.new_empty((b, h, q), dtype=torch.float32)
    slots = columns.tiles * (tune.keys // columns.pad)
    scratch = lse.new_empty(programs * slots * tune.rows * (sums + peaks))
    mass, peak = (lse.new_zeros(b, h, rows.count, columns.count) if asked else lse for asked in (sums, peaks))
    _flash[(programs,)](
        Q=clean.q, **strides("q", clean.q), K=clean.k, **strides("k", clean.k), V=values, **strides("v", values),
        OUT=output, **strides("o", output), LSE=lse, SINK=lse if scores.sink is None else scores.sink.to(v.device),
        SCRATCH=scratch if sums or peaks else lse, MASS=mass, PEAK=peak, items=items, row_tiles=rows.tiles, heads=h,
        batch_heads=b * h, slots_held=slots, row_cells=rows.count, key_cells=columns.count, **pairs,
        **rows.arguments("R_"), **columns.arguments("C_"), FOLD=fold, E=e, EW=width(e), VE=ve, VW=width(ve),
        TQ=tune.rows, TK=tune.keys, HAS_SINK=scores.sink is not None, SUMS=sums, PEAKS=peaks,
        AGAIN=max(1, 4096 // tune.rows), num_warps=tune.warps, num_stages=tune.stages,
    )  # fmt: skip

    def pooled(cells: Tensor, reduce: str) -> Tensor:
        return columns.pool(rows.pool(cells, -2, reduce), -1, reduce)

    return output, lse, pooled(mass, "sum") if sums else None, pooled(peak, "max") if peaks else None


def programs_at_once(like: Tensor, tune: Tuning) -> int:
    """As many as run at once at eight warps a multiprocessor; few when interpreted, so that scratch is reused."""
    if not like.is_cuda:
        return 3
    return max(1, 8 // tune.warps) * torch.cuda.get_device_properties(like.device).multi_processor_count
