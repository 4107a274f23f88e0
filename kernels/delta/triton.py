"""``gated_delta_rule`` as Triton kernels; ``kernels/delta/reference.py`` derives the formulas and names the symbols.

Output: ``prepare`` (a program per chunk), ``scan`` (a program per tile of values, chunk after chunk) and the outputs (a program
per chunk again). Map: a program per tile of rows keeps what its rows read, r ``[rows, E]``, in registers and walks the chunks
backwards. Each program writes its own cells, without atomics. Rows are one of

    ROWS    single rows of the map, stored as they are
    SUMS    the summed rows of one block each, stored as sums over cells of columns
    CELLS   the rows of one chunk, stored as reductions over cells of rows and columns
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.delta.gradient.triton import backward as backward
from workbench.kernels.delta.tiles import (
    Prepared,
    chunk_of,
    exact,
    pair_decay,
    prepare,
    scan,
    tokens,
    warps,
)
from workbench.kernels.tiles import (
    Cells,
    beside_its_tensors,
    places,
    strides,
    tile_of,
    upcast,
    width,
)

ROWS, SUMS, CELLS = 0, 1, 2


@triton.jit
def output_kernel(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, LOG, VECTORS, BEFORE, U, OUT, SCALE,
    n_tokens, n_chunks, H, SHARE_Q, SHARE_K,
    E: tl.constexpr, ES: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_LOG: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * BV
    i = tl.arange(0, C)
    w = first + tl.arange(0, BV)
    at = chunk * C + i
    there = at < n_tokens
    slot = bh * n_chunks + chunk
    Q += bh // H * q_b + bh % H // SHARE_Q * q_h
    K += bh // H * k_b + bh % H // SHARE_K * k_h
    reads = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BV], tl.float32)
    for start in range(0, E, ES):
        q = tokens(Q, at, there, q_n, q_e, start, E, ES)
        k = tokens(K, at, there, k_n, k_e, start, E, ES)
        e = start + tl.arange(0, ES)
        state = BEFORE + slot * E * WIDTH + e[:, None] * WIDTH + w[None, :]
        s = tl.load(state, mask=(e < E)[:, None] & (w < WIDTH)[None, :], other=0.0)
        reads += exact(q, tl.trans(k), UPCAST)
        out += exact(q, s, UPCAST)
    reads = tl.where(i[:, None] >= i[None, :], reads, 0.0)
    if HAS_LOG:
        reads = reads * pair_decay(tl.load(LOG + bh * n_tokens + at, mask=there, other=0.0), C)
    rise = tl.load(VECTORS + slot * 3 * C + i)
    inside = there[:, None] & (w < WIDTH)[None, :]
    cell = (bh * n_tokens + at)[:, None] * WIDTH + w[None, :]
    u = tl.load(U + cell, mask=inside, other=0.0)
    out = rise[:, None] * out + exact(reads, u, UPCAST)
    tl.store(OUT + cell, (SCALE * out).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _store(
    m, chunk, tile, bh, slots, slot_in, lo, SUM, ABS, MAX, n_slots, n_columns, n_tokens,
    MODE: tl.constexpr, HAS_SUM: tl.constexpr, HAS_ABS: tl.constexpr, HAS_MAX: tl.constexpr,
    RT: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Coefficients ``m`` ``[RT, C]`` of a chunk, reduced as the mode says. ``SUM`` takes the single rows of ``ROWS``."""
    at, there = places(chunk, C, BLOCK, STEP, PAD, PER, n_tokens)
    SUB: tl.constexpr = C // PAD
    column = chunk * SUB + tl.arange(0, SUB)
    if MODE == 0:
        where = SUM + (bh * n_slots + slots - lo)[:, None] * n_columns + at[None, :]
        tl.store(where, m, mask=slot_in[:, None] & there[None, :])
    elif MODE == 1:
        where = SUM + (bh * n_slots + slots)[:, None] * n_columns + column[None, :]
        tl.store(where, tl.sum(tl.reshape(m, [RT, SUB, PAD]), 2), mask=slot_in[:, None] & (column < n_columns)[None, :])
    else:
        row = tile * SUB + tl.arange(0, SUB)
        where = (bh * n_slots + row)[:, None] * n_columns + column[None, :]
        if HAS_SUM:
            tl.store(SUM + where, tl.sum(tl.sum(tl.reshape(m, [SUB, PAD, SUB, PAD]), 3), 1))
        if HAS_ABS:
            tl.store(ABS + where, tl.sum(tl.sum(tl.reshape(tl.abs(m), [SUB, PAD, SUB, PAD]), 3), 1))
        if HAS_MAX:
            real = tl.where(slot_in[:, None] & there[None, :], m, float("-inf"))
            tl.store(MAX + where, tl.max(tl.max(tl.reshape(real, [SUB, PAD, SUB, PAD]), 3), 1))


@triton.jit
def map_kernel(
    Q, q_b, q_h, q_n, q_e, K, k_b, k_h, k_n, k_e, LOG, INVERSE, VECTORS, SUM, ABS, MAX, SCALE, lo, hi, n_slots, n_columns,
    n_tokens, n_chunks, H, SHARE_Q, SHARE_K,
    MODE: tl.constexpr, HAS_SUM: tl.constexpr, HAS_ABS: tl.constexpr, HAS_MAX: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, RT: tl.constexpr, C: tl.constexpr, HAS_LOG: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest walks start first
    bh = tl.program_id(1).to(tl.int64)
    Q += bh // H * q_b + bh % H // SHARE_Q * q_h
    K += bh // H * k_b + bh % H // SHARE_K * k_h
    group = 1
    if MODE == 2:
        slots, slot_in = places(tile, C, BLOCK, STEP, PAD, PER, n_tokens)
        first_in = tile
        last_in = tile
    else:
        slots = lo + tile * RT + tl.arange(0, RT)
        slot_in = slots < hi
        if MODE == 1:
            group = BLOCK
        low = (lo + tile * RT) * group
        high = tl.minimum(tl.minimum(lo + (tile + 1) * RT, hi) * group, n_tokens) - 1
        first_in = tile_of(low, C, BLOCK, STEP, PAD, PER)
        last_in = tile_of(high, C, BLOCK, STEP, PAD, PER)
    i = tl.arange(0, C)
    r = tl.zeros([RT, EP], tl.float32)
    for back in range(last_in - first_in + 1):  # chunks whose rows enter
        chunk = last_in - back
        at, there = places(chunk, C, BLOCK, STEP, PAD, PER, n_tokens)
        k = tokens(K, at, there, k_n, k_e, 0, E, EP)
        q = tokens(Q, at, there, q_n, q_e, 0, E, EP)
        x, rise, fall, beta, total = chunk_of(INVERSE, VECTORS, bh * n_chunks + chunk, C)
        reads = tl.where(i[:, None] >= i[None, :], exact(q, tl.trans(k), UPCAST), 0.0)
        if HAS_LOG:
            reads = reads * pair_decay(tl.load(LOG + bh * n_tokens + at, mask=there, other=0.0), C)
        own = (slots[:, None] == (at // group)[None, :]) & slot_in[:, None] & there[None, :]
        pick = tl.where(own, SCALE, 0.0)
        p = fall[None, :] * exact(r, tl.trans(k), UPCAST) + exact(pick, reads, UPCAST)
        m = beta[None, :] * exact(p, x, UPCAST)
        r = total * r - exact(m * rise[None, :], k, UPCAST) + exact(pick * rise[None, :], q, UPCAST)
        _store(
            m, chunk, tile, bh, slots, slot_in, lo, SUM, ABS, MAX, n_slots, n_columns, n_tokens,
            MODE, HAS_SUM, HAS_ABS, HAS_MAX, RT, C, BLOCK, STEP, PAD, PER,
        )  # fmt: skip
    for back in range(first_in):  # chunks before all of the rows
        chunk = first_in - 1 - back
        at, there = places(chunk, C, BLOCK, STEP, PAD, PER, n_tokens)
        k = tokens(K, at, there, k_n, k_e, 0, E, EP)
        x, rise, fall, beta, total = chunk_of(INVERSE, VECTORS, bh * n_chunks + chunk, C)
        p = fall[None, :] * exact(r, tl.trans(k), UPCAST)
        m = beta[None, :] * exact(p, x, UPCAST)
        r = total * r - exact(m * rise[None, :], k, UPCAST)
        _store(
            m, chunk, tile, bh, slots, slot_in, lo, SUM, ABS, MAX, n_slots, n_columns, n_tokens,
            MODE, HAS_SUM, HAS_ABS, HAS_MAX, RT, C, BLOCK, STEP, PAD, PER,
        )  # fmt: skip


@beside_its_tensors
def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    found = prepare(q, k, beta, log_decay)
    before, u, last = scan(found, v, state)
    # Triton's interpreter cuts bfloat16 off instead of rounding it.
    out = torch.empty_like(u, dtype=torch.float32 if upcast(v) else v.dtype)
    tile = min(width(v.shape[3]), 32)
    output_kernel[(found.cells.tiles, found.rows, triton.cdiv(v.shape[3], tile))](
        **strides("q", q), **strides("k", k), Q=q, K=k, VECTORS=found.vectors, BEFORE=before, U=u, OUT=out, SCALE=scale,
        SHARE_Q=found.share(q), WIDTH=v.shape[3], BV=tile, ES=min(width(q.shape[3]), 32), **found.decays(), **found.shapes(),
        num_warps=4,
    )  # fmt: skip
    return out.to(v.dtype), last


@beside_its_tensors
def rows(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, lo: int, hi: int) -> Tensor:
    b, h, n = beta.shape
    log = None if log_decay is None else log_decay[:, :, :hi]
    found = prepare(q[:, :, :hi], k[:, :, :hi], beta[:, :, :hi], log)
    out = torch.zeros(b, h, hi - lo, n, dtype=torch.float32, device=q.device)
    _map(found, ROWS, scale, {"sum": out}, lo, hi)
    return out


@beside_its_tensors
def block_maps(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, block: int, reduce: tuple[str, ...]
) -> dict[str, Tensor]:
    if not reduce:
        return {}
    found = prepare(q, k, beta, log_decay, block)
    cells = found.cells
    every = bool({"abs", "max"} & set(reduce))
    columns = cells.tiles * (cells.tile // cells.pad)
    names: list[str] = [
        name for name in ("sum", "abs", "max") if name in reduce or (name == "sum" and "mean" in reduce)
    ]
    shape = (*beta.shape[:2], columns if every else cells.blocks, columns)
    maps = {name: torch.zeros(shape, dtype=torch.float32, device=q.device) for name in names}
    _map(found, CELLS if every else SUMS, scale, maps, 0, cells.blocks)
    if "max" in maps:  # a cell above the diagonal is 0 if it exists
        cell = torch.arange(columns, device=q.device)
        absent = cell // cells.per * cells.block + cell % cells.per * cells.step >= cells.length
        absent |= cell % cells.per * cells.step >= cells.block
        maps["max"].masked_fill_(absent[:, None] | absent, float("-inf"))
    for name, values in maps.items():
        kind = "max" if name == "max" else "sum"
        values = cells.pool(values, -1, kind)
        maps[name] = cells.pool(values, -2, kind) if every else values
    if "mean" in reduce:
        lengths = torch.full((cells.blocks,), float(block), device=q.device)
        lengths[-1] = cells.length - (cells.blocks - 1) * block
        maps["mean"] = maps["sum"] / (lengths[:, None] * lengths)
    return {name: maps[name].contiguous() for name in reduce}


def _map(found: Prepared, mode: int, scale: float, maps: dict[str, Tensor], lo: int, hi: int) -> None:
    """Fill ``maps``, which hold 0, with rows or blocks ``lo .. hi - 1``."""
    cells: Cells = found.cells
    some = next(iter(maps.values()))
    tile = cells.tile if mode == CELLS else min(cells.tile, max(16, triton.next_power_of_2(hi - lo)))
    tiles = cells.tiles if mode == CELLS else triton.cdiv(hi - lo, tile)
    map_kernel[(tiles, found.rows)](
        **strides("q", found.q), **strides("k", found.k), Q=found.q, K=found.k,
        SUM=maps.get("sum", some), ABS=maps.get("abs", some), MAX=maps.get("max", some), SCALE=scale, lo=lo, hi=hi,
        n_slots=some.shape[2], n_columns=some.shape[3], SHARE_Q=found.share(found.q), MODE=mode,
        HAS_SUM="sum" in maps, HAS_ABS="abs" in maps, HAS_MAX="max" in maps, RT=tile,
        **found.decays(), **found.chunks(), **found.shapes(), **cells.arguments(""),
        num_warps=warps(cells.tile, found.k),
    )  # fmt: skip
