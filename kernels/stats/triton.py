"""``attention_stats`` as one Triton kernel: one visit of every score tile, whatever is asked.

A program owns some query tiles of one (example, head) and walks over the key tiles they may see. Row statistics stay in
registers until the end of the row; a cell of the block map belongs to one tile and is written once; the mass that keys
receive is added to a row of partial sums that only this program touches. So there are no atomics and every run gives the
same bits. Programs take their tiles in zigzag order, long causal rows and short ones alike. Without a given lse a first walk
over the same tiles finds it.

Masses of weight functions are evaluated by torch on bands of rows (``BAND`` weights at a time) that the kernel then reads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.forms import interpreted
from workbench.kernels.pairs.tiles import cleaned, open_keys, pair_arguments
from workbench.kernels.scores import Scores
from workbench.kernels.stats.reference import pair_indices, pair_weights
from workbench.kernels.stats.request import Wanted, block_cells, layout
from workbench.kernels.stats.tiles import cell_peaks, cell_sums, packed, scored
from workbench.kernels.tiles import (
    Cells,
    beside_its_tensors,
    key_tiles,
    places,
    strides,
    width,
)

BAND = 2**26
PARTIAL = 2**28
"""Largest number of partial column sums, 1 GiB: fewer programs share the rows of a head where keys are very many."""


@triton.jit
def stats_kernel(
    Q, K, LSE, GATE, SINK, SETS, WEIGHT,
    OUT_LSE, SUMS, PEAKS, PARTIALS, ENTROPY, DISTANCE, WINDOWED, DISTANCE2, TOP, TOP_KEY, BEST, MASS,
    q_b, q_h, q_n, q_e, k_b, k_h, k_n, k_e, sets_m, sets_b, weight_b, weight_h, weight_q, weight_k, weight_row,
    TILES, t_b, t_h, t_q, COUNTS, c_b, c_h, first_seen, keys_total,
    H, FOLD, n_queries, n_keys, E, tile_first, tile_last, CUT, n_sets, mass_slot, rows_total, cells_q, cells_k,
    OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
    DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
    SCALE, SOFTCAP, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_KEYS: tl.constexpr,
    HAS_QUERIES: tl.constexpr, HAS_DENSE: tl.constexpr, SIDE: tl.constexpr,
    HAS_CAP: tl.constexpr, BIAS_KIND: tl.constexpr, UPCAST: tl.constexpr, LISTED: tl.constexpr, SIMPLE: tl.constexpr,
    GIVEN: tl.constexpr, HAS_GATE: tl.constexpr, HAS_SINK: tl.constexpr,
    WANT_SUMS: tl.constexpr, WANT_PEAKS: tl.constexpr, WANT_RECEIVED: tl.constexpr, WANT_ENTROPY: tl.constexpr,
    WANT_DISTANCE: tl.constexpr, WANT_WINDOWED: tl.constexpr, WANT_DISTANCE2: tl.constexpr, WANT_TOP: tl.constexpr,
    TOPK: tl.constexpr, WANT_SETS: tl.constexpr, SETS_PAD: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    R_BLOCK: tl.constexpr, R_STEP: tl.constexpr, R_PAD: tl.constexpr, R_PER: tl.constexpr,
    C_BLOCK: tl.constexpr, C_STEP: tl.constexpr, C_PAD: tl.constexpr, C_PER: tl.constexpr,
):  # fmt: skip
    lane, lanes = tl.program_id(0), tl.num_programs(0)
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row_base = head.to(tl.int64) * n_queries
    e = tl.arange(0, EP)
    Q += b * q_b + h * q_h
    K += b * k_b + (h // FOLD) * k_h
    FAR: tl.constexpr = WANT_DISTANCE or WANT_WINDOWED or WANT_DISTANCE2
    for turn in range(tl.cdiv(tile_last - tile_first, lanes)):
        tile = tile_first + turn * lanes + tl.where(turn % 2 == 0, lane, lanes - 1 - lane)
        if tile < tile_last:
            rows, rows_in = places(tile, BM, R_BLOCK, R_STEP, R_PAD, R_PER, n_queries)
            low = tl.min(tl.where(rows_in, rows, n_queries - 1))
            high = tl.max(tl.where(rows_in, rows, 0))
            if LISTED:
                first = 0
                last = tl.load(COUNTS + b * c_b + h * c_h + tile)
            else:
                first, last = key_tiles(
                    low, high, n_keys, OFFSET, WINDOW, PREFIX, CAUSAL, HAS_WINDOW, BN, C_BLOCK, C_STEP, C_PAD, C_PER
                )
            listed = TILES + b * t_b + h * t_h + tile.to(tl.int64) * t_q
            open_from, open_to = open_keys(
                low, high, first, last, n_keys, OFFSET, WINDOW, PREFIX, CAUSAL, HAS_WINDOW, BN, SIMPLE
            )
            q = tl.load(
                Q + rows.to(tl.int64)[:, None] * q_n + e[None, :] * q_e,
                mask=rows_in[:, None] & (e < E)[None, :],
                other=0.0,
            )
            if GIVEN:
                base = tl.load(LSE + row_base + rows, mask=rows_in, other=float("inf")) * 1.4426950408889634
            else:
                peak = tl.full([BM], float("-inf"), tl.float32)
                total = tl.zeros([BM], tl.float32)
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
                        s, _, _, _ = scored(
                            K, q, t, rows, rows_in, b, h, e, E, listed, k_n, k_e, n_keys, first_seen,
                            OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
                            DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
                            SCALE, SOFTCAP, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
                            CAUSAL, HAS_WINDOW, HAS_DOCS, HAS_KEYS, HAS_QUERIES, HAS_DENSE, SIDE,
                            HAS_CAP, BIAS_KIND, UPCAST, LISTED, phase == 1, BM, BN, C_BLOCK, C_STEP, C_PAD, C_PER,
                        )  # fmt: skip
                        above = tl.maximum(peak, tl.max(s, 1))
                        safe = tl.where(above == float("-inf"), 0.0, above)
                        total = total * tl.exp2(peak - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
                        peak = above
                if HAS_SINK:
                    sink = tl.load(SINK + h).to(tl.float32) * 1.4426950408889634
                    above = tl.maximum(peak, sink)
                    total = total * tl.exp2(peak - above) + tl.exp2(sink - above)
                    peak = above
                base = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
                tl.store(OUT_LSE + row_base + rows, base * 0.6931471805599453, mask=rows_in)
            base = tl.where(rows_in & (tl.abs(base) < float("inf")), base, float("inf"))  # no row, no weight
            if HAS_GATE:
                base -= tl.log2(tl.load(GATE + row_base + rows, mask=rows_in, other=1.0).to(tl.float32))
            entropy = tl.zeros([BM], tl.float32)
            distance = tl.zeros([BM], tl.float32)
            windowed = tl.zeros([BM], tl.float32)
            distance2 = tl.zeros([BM], tl.float32)
            top = tl.full([BM], float("-inf"), tl.float32)
            top_key = tl.full([BM], -1, tl.int32)
            best = tl.full([BM, TOPK], -9223372036854775807, tl.int64)
            masses = tl.zeros([BM, SETS_PAD], tl.float32)
            weighted = tl.zeros([BM], tl.float32)
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
                    s, tile_k, cols, cols_in = scored(
                        K, q, t, rows, rows_in, b, h, e, E, listed, k_n, k_e, n_keys, first_seen,
                        OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
                        DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
                        SCALE, SOFTCAP, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
                        CAUSAL, HAS_WINDOW, HAS_DOCS, HAS_KEYS, HAS_QUERIES, HAS_DENSE, SIDE,
                        HAS_CAP, BIAS_KIND, UPCAST, LISTED, phase == 1, BM, BN, C_BLOCK, C_STEP, C_PAD, C_PER,
                    )  # fmt: skip
                    x = s - base[:, None]
                    p = tl.exp2(x)
                    if WANT_SUMS or WANT_PEAKS:
                        i = tile * (BM // R_PAD) + tl.arange(0, BM // R_PAD)
                        j = tile_k * (BN // C_PAD) + tl.arange(0, BN // C_PAD)
                        at = (head.to(tl.int64) * cells_q + i)[:, None] * cells_k + j[None, :]
                        if WANT_SUMS:
                            tl.store(SUMS + at, cell_sums(p, BM, BN, R_PAD, C_PAD))
                        if WANT_PEAKS:
                            tl.store(PEAKS + at, tl.exp2(cell_peaks(x, BM, BN, R_PAD, C_PAD)))
                    if WANT_RECEIVED:
                        at = PARTIALS + (head.to(tl.int64) * lanes + lane) * keys_total + cols
                        tl.store(at, tl.load(at, mask=cols_in, other=0.0) + tl.sum(p, 0), mask=cols_in)
                    if WANT_ENTROPY:
                        entropy += tl.sum(p * tl.where(p > 0, x, 0.0), 1)
                    if FAR:
                        far = tl.abs((rows[:, None] + OFFSET - cols[None, :]).to(tl.float32))
                        if WANT_DISTANCE:
                            distance += tl.sum(p * far, 1)
                        if WANT_WINDOWED:
                            windowed += tl.sum(p * tl.minimum(far, CUT), 1)
                        if WANT_DISTANCE2:
                            distance2 += tl.sum(p * far * far, 1)
                    if WANT_TOP:
                        peak, at = tl.max(x, 1, return_indices=True)
                        here = tl.sum(tl.where(tl.arange(0, BN)[None, :] == at[:, None], cols[None, :], 0), 1)
                        top_key = tl.where(peak > top, here, top_key)
                        top = tl.maximum(peak, top)
                    if TOPK > 1:
                        keys = packed(x, tl.broadcast_to(cols[None, :], [BM, BN]))
                        if tl.max((tl.max(keys, 1) > tl.min(best, 1)).to(tl.int32), 0) > 0:
                            both = tl.join(best, tl.topk(keys, TOPK))
                            best = tl.topk(tl.reshape(both, [BM, 2 * TOPK]), TOPK)
                    if WANT_SETS:
                        for m in range(n_sets):
                            w = tl.load(SETS + m * sets_m + b * sets_b + cols, mask=cols_in, other=0.0)
                            share = tl.sum(p * w[None, :], 1)
                            masses += tl.where(tl.arange(0, SETS_PAD)[None, :] == m, share[:, None], 0.0)
                    if WANT_WEIGHT:
                        at = WEIGHT + b * weight_b + h * weight_h
                        at = at + (rows - weight_row).to(tl.int64)[:, None] * weight_q + cols[None, :] * weight_k
                        weighted += tl.sum(p * tl.load(at, mask=rows_in[:, None] & cols_in[None, :], other=0.0), 1)
            if WANT_ENTROPY:
                tl.store(ENTROPY + row_base + rows, entropy * -0.6931471805599453, mask=rows_in)
            if WANT_DISTANCE:
                tl.store(DISTANCE + row_base + rows, distance, mask=rows_in)
            if WANT_WINDOWED:
                tl.store(WINDOWED + row_base + rows, windowed, mask=rows_in)
            if WANT_DISTANCE2:
                tl.store(DISTANCE2 + row_base + rows, distance2, mask=rows_in)
            if WANT_TOP:
                value = tl.exp2(top)
                tl.store(TOP + row_base + rows, value, mask=rows_in)
                tl.store(TOP_KEY + row_base + rows, tl.where(value > 0, top_key, -1).to(tl.int64), mask=rows_in)
            if TOPK > 1:
                at = (row_base + rows)[:, None] * TOPK + tl.arange(0, TOPK)[None, :]
                tl.store(BEST + at, best, mask=rows_in[:, None])
            if WANT_SETS:
                m = tl.arange(0, SETS_PAD)
                at = m.to(tl.int64)[None, :] * rows_total + (row_base + rows)[:, None]
                tl.store(MASS + at, masses, mask=rows_in[:, None] & (m < n_sets)[None, :])
            if WANT_WEIGHT:
                tl.store(MASS + mass_slot * rows_total + row_base + rows, weighted, mask=rows_in)
        if WANT_RECEIVED:
            tl.debug_barrier()  # the next turn reads partial sums that other threads of this program wrote


@beside_its_tensors
def triton_stats(scores: Scores, lse: Tensor | None, wanted: Wanted) -> list[Tensor]:
    b, h, n, m = scores.shape
    like = scores.q.new_empty(0, dtype=torch.float32)
    tile_q, tile_k, warps = tile_shape(scores.q.shape[3], scores.q.element_size())
    row_cells, key_cells = Cells(n, wanted.block or tile_q, tile_q), Cells(m, wanted.block or tile_k, tile_k)
    lanes = _lanes(row_cells.tiles, b * h, m if "received" in wanted.stats else 0, like.device)
    rows = (b, h, n)
    grid = (b * h, row_cells.tiles * tile_q // row_cells.pad, key_cells.tiles * tile_k // key_cells.pad)
    linear, peaks = {"sum", "mean", "abs"} & set(wanted.reduce), "max" in wanted.reduce
    topk = 1 if not wanted.topk else max(2, triton.next_power_of_2(wanted.topk))
    held = lse.to(torch.float32).contiguous() if lse is not None else like.new_empty(rows)
    made: dict[str, Tensor] = {"lse": held}
    made |= {name: like.new_empty(rows) for name in wanted.stats if name not in ("received", "top1")}
    if linear:
        made["sums"] = like.new_zeros(grid)
    if peaks:
        made["peaks"] = like.new_zeros(grid)
    if "received" in wanted.stats:
        made["partials"] = like.new_zeros((b, h, lanes, m))
    if "top1" in wanted.stats:
        made |= {"top1 values": like.new_empty(rows), "top1 keys": like.new_empty(rows, dtype=torch.int64)}
    if wanted.topk:
        made["best"] = like.new_empty((*rows, topk), dtype=torch.int64)
    count = len(wanted.keys) + len(wanted.pairs)
    made["mass"] = like.new_empty((max(1, count), *rows))
    sets = torch.stack([w.to(like).expand(b, -1) for w in wanted.keys]) if wanted.keys else like.new_zeros(1, 1, 1)
    clean, _ = cleaned(scores, None)
    arguments = _arguments(clean, wanted, held, made, sets, (tile_q, tile_k), topk)
    arguments |= pair_arguments(clean, row_cells, key_cells)
    arguments |= {"tile_first": 0, "tile_last": row_cells.tiles, "GIVEN": lse is not None, "WANT_WEIGHT": False}
    arguments |= {"cells_q": grid[1], "cells_k": grid[2]}
    arguments |= row_cells.arguments("R_") | key_cells.arguments("C_")
    stages = 2 if scores.q.element_size() == 4 else 3
    launch = {"num_warps": warps, "num_stages": stages}
    stats_kernel[(lanes, b * h)](**arguments, **launch)
    for slot, pair in enumerate(wanted.pairs, len(wanted.keys)):
        _pair_mass(clean, pair, slot, arguments, (tile_q, tile_k), launch)
    return _ordered(made, scores, wanted, row_cells, key_cells)


def tile_shape(e: int, item: int) -> tuple[int, int, int]:
    """Query rows and keys of a tile, and warps, for heads of width ``e`` in ``item`` bytes."""
    if interpreted():
        return 32, 32, 4
    if item == 4:
        return (64, 32, 8) if width(e) <= 128 else (32, 32, 4)  # exact float32 products spill in larger tiles
    return (128, 64, 8) if width(e) <= 128 else (64, 64, 8)


def _lanes(tiles: int, heads: int, keys: int, device: torch.device) -> int:
    """Programs that share the query tiles of a head."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    lanes = max(1, -(-4 * processors // heads), 2 if device.type != "cuda" else 1)
    return max(1, min(lanes, tiles, PARTIAL // (heads * keys) if keys else tiles))


def _arguments(
    scores: Scores, wanted: Wanted, lse: Tensor, made: dict[str, Tensor], sets: Tensor, tile: tuple[int, int], topk: int
) -> dict[str, Any]:
    b, h, n, m = scores.shape
    q, k = scores.q, scores.k

    def out(name: str) -> Tensor:
        return made.get(name, lse)

    stats = set(wanted.stats)
    gate = lse if wanted.gate is None else wanted.gate.contiguous()
    sink = lse if scores.sink is None else scores.sink.contiguous()
    return {
        "Q": q, "K": k, "LSE": lse, "GATE": gate, "SINK": sink, "SETS": sets, "WEIGHT": lse,
        "OUT_LSE": lse, "SUMS": out("sums"), "PEAKS": out("peaks"), "PARTIALS": out("partials"),
        "ENTROPY": out("entropy"), "DISTANCE": out("distance"), "WINDOWED": out("windowed"),
        "DISTANCE2": out("distance2"), "TOP": out("top1 values"), "TOP_KEY": out("top1 keys"), "BEST": out("best"),
        "MASS": made["mass"],
        **strides("q", q), **strides("k", k), "sets_m": sets.stride(0), "sets_b": sets.stride(1),
        "weight_b": 0, "weight_h": 0, "weight_q": 0, "weight_k": 0, "weight_row": 0,
        "H": h, "FOLD": h // k.shape[1], "keys_total": m, "E": q.shape[3], "CUT": float(wanted.window or 0),
        "n_sets": len(wanted.keys), "mass_slot": 0, "rows_total": b * h * n,
        "HAS_GATE": wanted.gate is not None, "HAS_SINK": scores.sink is not None,
        "WANT_SUMS": "sums" in made, "WANT_PEAKS": "peaks" in made, "WANT_RECEIVED": "received" in stats,
        "WANT_ENTROPY": "entropy" in stats, "WANT_DISTANCE": "distance" in stats,
        "WANT_WINDOWED": "windowed" in stats, "WANT_DISTANCE2": "distance2" in stats, "WANT_TOP": "top1" in stats,
        "TOPK": topk, "WANT_SETS": bool(wanted.keys), "SETS_PAD": triton.next_power_of_2(max(1, len(wanted.keys))),
        "EP": width(q.shape[3]), "BM": tile[0], "BN": tile[1],
    }  # fmt: skip


def _pair_mass(
    scores: Scores, pair: Any, slot: int, arguments: dict[str, Any], tile: tuple[int, int], launch: dict[str, int]
) -> None:
    """The mass under a weight function, band by band of query rows."""
    b, h, n, m = scores.shape
    cells, key_cells = Cells(n, tile[0], tile[0]), Cells(m, tile[1], tile[1])
    visits = pair_arguments(scores, cells, key_cells)
    step = max(1, BAND // (b * h * m * tile[0]))
    nothing = {name: False for name in arguments if name.startswith("WANT_")}
    lanes = _lanes(step, b * h, 0, scores.q.device)
    for first in range(0, cells.tiles, step):
        lo, hi = first * tile[0], min(n, (first + step) * tile[0])
        weight = pair_weights(pair, pair_indices(scores, lo, hi), torch.float32)
        weight = weight[(None,) * (4 - weight.ndim)].expand(b, h, hi - lo, m)
        steps = {f"weight_{axis}": step for axis, step in zip("bhqk", weight.stride(), strict=True)}
        given = {**arguments, **visits, **nothing, **steps, "WANT_WEIGHT": True, "WEIGHT": weight, "weight_row": lo}
        given |= {"tile_first": first, "tile_last": min(cells.tiles, first + step), "mass_slot": slot, "TOPK": 1}
        given |= cells.arguments("R_") | key_cells.arguments("C_") | {"GIVEN": True}
        stats_kernel[(lanes, b * h)](**given, **launch)


def _ordered(
    made: dict[str, Tensor], scores: Scores, wanted: Wanted, row_cells: Cells, key_cells: Cells
) -> list[Tensor]:
    _, _, n, m = scores.shape
    found = dict(made)
    for name in wanted.reduce:
        assert wanted.block is not None
        how = "max" if name == "max" else "sum"
        part = key_cells.pool(row_cells.pool(made["peaks" if name == "max" else "sums"], -2, how), -1, how)
        part = part.unflatten(0, scores.shape[:2])
        found[f"blocks {name}"] = part / block_cells(n, m, wanted.block, part) if name == "mean" else part
    if "received" in wanted.stats:
        found["received"] = made["partials"].sum(2)
    if wanted.topk:
        best = made["best"].sort(-1, descending=True).values[..., : wanted.topk]
        bits = (best >> 32).to(torch.int32)
        values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32).exp2()
        found["topk values"] = values
        found["topk keys"] = torch.where(values > 0, 0x7FFFFFFF - (best & 0x7FFFFFFF), -1)
    found |= {f"mass {i}": made["mass"][i] for i in range(len(wanted.keys) + len(wanted.pairs))}
    return [found[name] for name in layout(wanted)]
