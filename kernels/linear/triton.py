"""``linear_attention`` in fused kernels: a scan over chunks, everything else chunk by chunk in parallel, pairs tile by tile.

The formulas are those of ``cpu.py``. Running sums of the log decay are taken once in float64, in base 2, and handed over as two
float32 numbers each, so that the difference of two of them is exact to float32 however far down the sequence it lies. No atomics:
a program owns what it writes, and gradients of shared keys are summed over their query heads inside it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.linear.tiles import (
    chunk_tiles,
    decay_between,
    edge_decays,
    log_sum,
    map_tiles,
    pair_decays,
    state_tile,
)
from workbench.kernels.tiles import (
    LOG2E,
    Cells,
    beside_its_tensors,
    dot,
    load_rows,
    narrow,
    places,
    store_rows,
    strides,
    tile_of,
    upcast,
    width,
)

NOTHING = 151
"""2^-NOTHING rounds to 0 in float32."""


@triton.jit
def linear_scan(
    X, Y, FIRST, STATES, LAST, HIGH, LOW,
    x_b, x_h, x_n, x_e, y_b, y_h, y_n, y_e, n, chunks, MUL,
    X_FOLD: tl.constexpr, Y_FOLD: tl.constexpr, E: tl.constexpr, W: tl.constexpr, TE: tl.constexpr, TW: tl.constexpr,
    C: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_FIRST: tl.constexpr, BACKWARDS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of all states. Forwards: X = k, Y = v, and the states before each chunk; backwards: X = q, Y = dO, and the gradients
    of the states after each chunk."""
    e = (tl.program_id(0) // tl.cdiv(W, TW)) * TE + tl.arange(0, TE)
    w = (tl.program_id(0) % tl.cdiv(W, TW)) * TW + tl.arange(0, TW)
    h, b = tl.program_id(1), tl.program_id(2)
    head = b * tl.num_programs(1) + h
    now = tl.zeros([TE, TW], tl.float32)
    if HAS_FIRST:
        at_state, inside = state_tile(FIRST, head, e, w, E, W)
        now += tl.load(at_state, mask=inside, other=0.0)
    xs = X + b.to(tl.int64) * x_b + (h // X_FOLD).to(tl.int64) * x_h + e[None, :] * x_e
    ys = Y + b.to(tl.int64) * y_b + (h // Y_FOLD).to(tl.int64) * y_h + w[None, :] * y_e
    for step in range(chunks):
        chunk = step
        if BACKWARDS:
            chunk = chunks - 1 - step
        at_state, inside = state_tile(STATES, head * chunks + chunk, e, w, E, W)
        tl.store(at_state, now, mask=inside)
        at = chunk * C + tl.arange(0, C)
        x = tl.load(xs + at.to(tl.int64)[:, None] * x_n, mask=(at < n)[:, None] & (e < E)[None, :], other=0.0)
        y = tl.load(ys + at.to(tl.int64)[:, None] * y_n, mask=(at < n)[:, None] & (w < W)[None, :], other=0.0)
        rise, fall, whole = edge_decays(HIGH, LOW, head, at, n, chunk * C, C, HAS_DECAY)
        if HAS_DECAY:
            weight = fall
            if BACKWARDS:
                weight = rise
            x = narrow(x.to(tl.float32) * weight[:, None], x.dtype, UPCAST)
        now = whole * now + MUL * dot(tl.trans(x), y, UPCAST)
    at_state, inside = state_tile(LAST, head, e, w, E, W)
    tl.store(at_state, now, mask=inside)


@triton.jit
def linear_output(
    Q, K, V, OUT, STATES, HIGH, LOW,
    q_b, q_h, q_n, q_e, k_b, k_h, k_n, k_e, v_b, v_h, v_n, v_e, n, heads, SCALE,
    FOLD: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, TW: tl.constexpr,
    C: tl.constexpr, HAS_DECAY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(2)
    b, h = head // heads, head % heads
    at = chunk * C + tl.arange(0, C)
    e, w = tl.arange(0, EP), tl.program_id(1) * TW + tl.arange(0, TW)
    q = load_rows(Q, b, h, at, at < n, q_b, q_h, q_n, q_e, E, EP)
    k = load_rows(K, b, h // FOLD, at, at < n, k_b, k_h, k_n, k_e, E, EP)
    m = dot(q, tl.trans(k), UPCAST) * pair_decays(HIGH, LOW, head, at, n, C, HAS_DECAY)
    v = tl.load(
        V + b.to(tl.int64) * v_b + (h // FOLD).to(tl.int64) * v_h + at.to(tl.int64)[:, None] * v_n + w[None, :] * v_e,
        mask=(at < n)[:, None] & (w < W)[None, :],
        other=0.0,
    )
    at_state, inside = state_tile(STATES, head * tl.num_programs(0) + chunk, e, w, E, W)
    state = narrow(tl.load(at_state, mask=inside, other=0.0), q.dtype, UPCAST)
    rise, _, _ = edge_decays(HIGH, LOW, head, at, n, chunk * C, C, HAS_DECAY)
    out = dot(narrow(m, v.dtype, UPCAST), v, UPCAST) + rise[:, None] * dot(q, state, UPCAST)
    place = OUT + (head.to(tl.int64) * n + at.to(tl.int64))[:, None] * W + w[None, :]
    tl.store(place, narrow(out * SCALE, OUT.dtype.element_ty, UPCAST), mask=(at < n)[:, None] & (w < W)[None, :])


@triton.jit
def linear_backward(
    Q, K, V, D_OUT, DQ, DK, D_LOG, STATES, LATER, HIGH, LOW,
    q_b, q_h, q_n, q_e, k_b, k_h, k_n, k_e, v_b, v_h, v_n, v_e, d_b, d_h, d_n, d_e, n, SCALE,
    FOLD: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, TW: tl.constexpr,
    C: tl.constexpr, HAS_DECAY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and the log decay in one chunk, over the query heads that share its keys."""
    chunk, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunks = tl.num_programs(0)
    slot = tl.arange(0, C)
    at = chunk * C + slot
    e = tl.arange(0, EP)
    k = load_rows(K, b, g, at, at < n, k_b, k_h, k_n, k_e, E, EP)
    dk = tl.zeros([C, EP], tl.float32)
    for turn in range(FOLD):
        h = g * FOLD + turn
        head = b * tl.num_programs(1) * FOLD + h
        products = tl.zeros([C, C], tl.float32)
        past = tl.zeros([C, EP], tl.float32)
        future = tl.zeros([C, EP], tl.float32)
        over = 0.0
        for first in range(0, W, TW):
            w = first + tl.arange(0, TW)
            some = (at < n)[:, None] & (w < W)[None, :]
            v = tl.load(
                V + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h + at.to(tl.int64)[:, None] * v_n + w[None, :] * v_e,
                mask=some, other=0.0,
            )  # fmt: skip
            grad = tl.load(
                D_OUT + b.to(tl.int64) * d_b + h.to(tl.int64) * d_h + at.to(tl.int64)[:, None] * d_n + w[None, :] * d_e,
                mask=some, other=0.0,
            )  # fmt: skip
            at_state, inside = state_tile(STATES, head * chunks + chunk, e, w, E, W)
            state = tl.load(at_state, mask=inside, other=0.0)
            at_later, inside = state_tile(LATER, head * chunks + chunk, e, w, E, W)
            later = tl.load(at_later, mask=inside, other=0.0)
            products += dot(grad, tl.trans(v), UPCAST)
            past += dot(grad, tl.trans(narrow(state, grad.dtype, UPCAST)), UPCAST)
            future += dot(v, tl.trans(narrow(later, v.dtype, UPCAST)), UPCAST)
            if HAS_DECAY:
                over += tl.sum(tl.sum(state * later, 1), 0)
        q = load_rows(Q, b, h, at, at < n, q_b, q_h, q_n, q_e, E, EP)
        rise, fall, whole = edge_decays(HIGH, LOW, head, at, n, chunk * C, C, HAS_DECAY)
        past = past * (rise * SCALE)[:, None]
        future = future * fall[:, None]
        products = products * (pair_decays(HIGH, LOW, head, at, n, C, HAS_DECAY) * SCALE)
        if HAS_DECAY:
            # Pairs j < t <= i, by where i and j lie: both in the chunk, only i, only j, neither.
            inner = products * dot(q, tl.trans(k), UPCAST)
            crossing = dot(inner, tl.where(slot[:, None] < slot[None, :], 1.0, 0.0), False)
            crossing += tl.sum(q.to(tl.float32) * past, 1)[:, None]
            right = tl.sum(k.to(tl.float32) * future, 1)[:, None]
            d_log = tl.sum(tl.where(slot[:, None] >= slot[None, :], crossing, 0.0), 0)
            d_log += tl.sum(tl.where(slot[:, None] < slot[None, :], right, 0.0), 0) + whole * over
            tl.store(D_LOG + head.to(tl.int64) * n + at, d_log, mask=at < n)
        products = narrow(products, k.dtype, UPCAST)
        store_rows(DQ, head, at, at < n, n, dot(products, k, UPCAST) + past, UPCAST, E, EP)
        dk += dot(tl.trans(products), q, UPCAST) + future
    store_rows(DK, b * tl.num_programs(1) + g, at, at < n, n, dk, UPCAST, E, EP)


@triton.jit
def linear_backward_values(
    Q, K, D_OUT, DV, LATER, HIGH, LOW,
    q_b, q_h, q_n, q_e, k_b, k_h, k_n, k_e, d_b, d_h, d_n, d_e, n, groups, SCALE,
    FOLD: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, TW: tl.constexpr,
    C: tl.constexpr, HAS_DECAY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of v in one chunk, over the query heads that share it."""
    chunk = tl.program_id(0)
    b, g = tl.program_id(2) // groups, tl.program_id(2) % groups
    at = chunk * C + tl.arange(0, C)
    e, w = tl.arange(0, EP), tl.program_id(1) * TW + tl.arange(0, TW)
    some = (at < n)[:, None] & (w < W)[None, :]
    k = load_rows(K, b, g, at, at < n, k_b, k_h, k_n, k_e, E, EP)
    dv = tl.zeros([C, TW], tl.float32)
    for turn in range(FOLD):
        h = g * FOLD + turn
        head = b * groups * FOLD + h
        q = load_rows(Q, b, h, at, at < n, q_b, q_h, q_n, q_e, E, EP)
        grad = tl.load(
            D_OUT + b.to(tl.int64) * d_b + h.to(tl.int64) * d_h + at.to(tl.int64)[:, None] * d_n + w[None, :] * d_e,
            mask=some, other=0.0,
        )  # fmt: skip
        m = dot(q, tl.trans(k), UPCAST) * (pair_decays(HIGH, LOW, head, at, n, C, HAS_DECAY) * SCALE)
        at_later, inside = state_tile(LATER, head * tl.num_programs(0) + chunk, e, w, E, W)
        later = narrow(tl.load(at_later, mask=inside, other=0.0), k.dtype, UPCAST)
        _, fall, _ = edge_decays(HIGH, LOW, head, at, n, chunk * C, C, HAS_DECAY)
        dv += dot(tl.trans(narrow(m, grad.dtype, UPCAST)), grad, UPCAST) + fall[:, None] * dot(k, later, UPCAST)
    place = DV + (tl.program_id(2).to(tl.int64) * n + at.to(tl.int64))[:, None] * W + w[None, :]
    tl.store(place, narrow(dv, DV.dtype.element_ty, UPCAST), mask=some)


@triton.jit
def linear_maps(
    Q, K, ABS, MAX, HIGH, LOW, FIRST,
    q_b, q_h, q_n, q_e, k_b, k_h, k_n, k_e, n, row_tiles, map_rows, map_columns, SCALE,
    FOLD: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    Q_BLOCK: tl.constexpr, Q_STEP: tl.constexpr, Q_PAD: tl.constexpr, Q_PER: tl.constexpr,
    K_BLOCK: tl.constexpr, K_STEP: tl.constexpr, K_PAD: tl.constexpr, K_PER: tl.constexpr,
    HAS_DECAY: tl.constexpr, WITH_ABS: tl.constexpr, WITH_MAX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums of magnitudes and largest values of the cells of one row of tiles."""
    tile, h, b = row_tiles - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = b * tl.num_programs(1) + h
    CQ: tl.constexpr = TQ // Q_PAD
    CK: tl.constexpr = TK // K_PAD
    rows, rows_in = places(tile, TQ, Q_BLOCK, Q_STEP, Q_PAD, Q_PER, n)
    q = load_rows(Q, b, h, rows, rows_in, q_b, q_h, q_n, q_e, E, EP)
    low_row = tl.min(tl.where(rows_in, rows, n - 1), 0)
    high_row = tl.max(tl.where(rows_in, rows, 0), 0)
    first = 0
    rise = tl.full([TQ], 1.0, tl.float32)
    if HAS_DECAY:
        first = tile_of(tl.load(FIRST + head * row_tiles + tile), TK, K_BLOCK, K_STEP, K_PAD, K_PER)
        row_high, row_low = log_sum(HIGH, LOW, head, rows, n)
        edge_high, edge_low = log_sum(HIGH, LOW, head, low_row, n)
        rise = decay_between(row_high, row_low, edge_high, edge_low)
    rise = rise * SCALE
    diagonal = tile_of(low_row, TK, K_BLOCK, K_STEP, K_PAD, K_PER)
    last = tile_of(high_row, TK, K_BLOCK, K_STEP, K_PAD, K_PER) + 1
    for t in range(first, last):
        cols, cols_in = places(t, TK, K_BLOCK, K_STEP, K_PAD, K_PER, n)
        k = load_rows(K, b, h // FOLD, cols, cols_in, k_b, k_h, k_n, k_e, E, EP)
        m = dot(q, tl.trans(k), UPCAST)
        if t < diagonal:  # every key before every row: the decay factors through the first row
            m = m * rise[:, None]
            if HAS_DECAY:
                high, low = log_sum(HIGH, LOW, head, cols, n)
                m = m * decay_between(edge_high, edge_low, high, low)[None, :]
        else:
            if HAS_DECAY:
                high, low = log_sum(HIGH, LOW, head, cols, n)
                m = m * decay_between(row_high[:, None], row_low[:, None], high[None, :], low[None, :])
            m = tl.where(rows[:, None] >= cols[None, :], m * SCALE, 0.0)
        at_rows = tile * CQ + tl.arange(0, CQ)
        at_columns = t * CK + tl.arange(0, CK)
        place = (head.to(tl.int64) * map_rows + at_rows)[:, None] * map_columns + at_columns[None, :]
        if WITH_ABS:
            by_key = tl.sum(tl.reshape(tl.abs(m), (CQ, Q_PAD, TK)), 1)
            tl.store(ABS + place, tl.sum(tl.reshape(by_key, (CQ, CK, K_PAD)), 2))
        if WITH_MAX:
            m = tl.where(rows_in[:, None] & cols_in[None, :], m, float("-inf"))
            top = tl.max(tl.reshape(m, (CQ, Q_PAD, TK)), 1)
            tl.store(MAX + place, tl.max(tl.reshape(top, (CQ, CK, K_PAD)), 2))


@beside_its_tensors
def fused_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
    block: int | None,
    with_abs: bool,
    with_max: bool,
) -> list[Tensor]:
    """Output, final state, and the maps asked for."""
    b, h, n, _ = q.shape
    shapes, decay, sizes = _common(q, k, v, log_decay)
    states, last = _scan(k, v, h, state, 1.0, decay, shapes, sizes, False)
    output = q.new_empty(b, h, n, v.shape[3])
    linear_output[(triton.cdiv(n, sizes["C"]), triton.cdiv(v.shape[3], sizes["TW"]), b * h)](
        q, k, v, output, states, **decay, **strides("q", q), **strides("k", k), **strides("v", v),
        heads=h, SCALE=scale, **shapes, **sizes,
    )  # fmt: skip
    if block is None or not (with_abs or with_max):
        return [output, last]
    return [output, last, *_maps(q, k, decay, scale, block, with_abs, with_max)]


@beside_its_tensors
def fused_backward(
    d_output: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, and of log_decay and the initial state where they are given."""
    b, h, n, _ = q.shape
    g = k.shape[1]
    d_output = d_output.to(q.dtype)
    shapes, decay, sizes = _common(q, k, v, log_decay)
    states, _ = _scan(k, v, h, state, 1.0, decay, shapes, sizes, False)
    later, d_first = _scan(q, d_output, h, d_state, scale, decay, shapes, sizes, True)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_log = torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    given = {**decay, **strides("q", q), **strides("k", k), **strides("d", d_output), "SCALE": scale, **shapes, **sizes}
    chunks = triton.cdiv(n, sizes["C"])
    linear_backward[(chunks, g, b)](q, k, v, d_output, dq, dk, d_log, states, later, **strides("v", v), **given)
    linear_backward_values[(chunks, triton.cdiv(v.shape[3], sizes["TW"]), b * g)](
        q, k, d_output, dv, later, groups=g, **given
    )
    return [dq, dk, dv] + ([d_log] if log_decay is not None else []) + ([d_first] if state is not None else [])


def _scan(
    x: Tensor,
    y: Tensor,
    heads: int,
    first: Tensor | None,
    mul: float,
    decay: dict[str, Tensor],
    shapes: dict[str, Any],
    sizes: dict[str, Any],
    backwards: bool,
) -> tuple[Tensor, Tensor]:
    """All states ``[B, H, chunks, E, V]`` and the last one ``[B, H, E, V]``."""
    b, _, n, e = x.shape
    w = y.shape[3]
    chunks = triton.cdiv(n, sizes["C"])
    states = torch.empty(b, heads, chunks, e, w, dtype=torch.float32, device=x.device)
    last = torch.empty(b, heads, e, w, dtype=torch.float32, device=x.device)
    side = 64 if x.element_size() == 2 else 32
    te, tw = min(width(e), side), min(width(w), side)
    linear_scan[(triton.cdiv(e, te) * triton.cdiv(w, tw), heads, b)](
        x, y, last if first is None else first.float().contiguous(), states, last, **decay, **strides("x", x),
        **strides("y", y), n=n, chunks=chunks, MUL=mul, X_FOLD=heads // x.shape[1], Y_FOLD=heads // y.shape[1],
        E=e, W=w, TE=te, TW=tw, C=sizes["C"], HAS_DECAY=shapes["HAS_DECAY"], HAS_FIRST=first is not None,
        BACKWARDS=backwards, UPCAST=shapes["UPCAST"], num_warps=4, num_stages=3,
    )  # fmt: skip
    return states, last


def _maps(
    q: Tensor,
    k: Tensor,
    decay: dict[str, Tensor],
    scale: float,
    block: int,
    with_abs: bool,
    with_max: bool,
) -> list[Tensor]:
    b, h, n, e = q.shape
    tq, tk, warps = map_tiles(width(e), q.element_size())
    rows, columns = Cells(n, block, tq), Cells(n, block, tk)
    used = ((n - 1) // block * rows.per + (n - 1) % block // rows.step) * rows.pad // tq + 1
    first = q
    if decay["HIGH"] is not q:
        # Running sums fall along the sequence: the first key that a row of tiles can see at all.
        cell = torch.arange(used, device=q.device) * (tq // rows.pad)
        sums = decay["HIGH"].double() + decay["LOW"].double()
        edge = sums[:, :, (cell // rows.per * block + cell % rows.per * rows.step).clamp(max=n - 1)]
        first = torch.searchsorted(-sums, -edge - NOTHING).clamp_(max=n - 1).to(torch.int32)
    shape = (b, h, rows.tiles * tq // rows.pad, columns.tiles * tk // columns.pad)
    mass, peak = (torch.zeros(shape if w else (1,), dtype=torch.float32, device=q.device) for w in (with_abs, with_max))
    linear_maps[(used, h, b)](
        q, k, mass, peak, **decay, FIRST=first, **strides("q", q), **strides("k", k),
        n=n, row_tiles=used, map_rows=shape[2], map_columns=shape[3], SCALE=scale,
        FOLD=h // k.shape[1], E=e, EP=width(e), TQ=tq, TK=tk, **rows.arguments("Q_"), **columns.arguments("K_"),
        HAS_DECAY=decay["HIGH"] is not q, WITH_ABS=with_abs, WITH_MAX=with_max, UPCAST=upcast(q),
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    found = [columns.pool(rows.pool(mass, -2, "sum"), -1, "sum").contiguous()] if with_abs else []
    if with_max:
        # Cells that do not exist must not count as the zeros that cells above the diagonal are.
        peak.masked_fill_(_absent(rows, shape[2], q)[:, None] | _absent(columns, shape[3], q), float("-inf"))
        found.append(columns.pool(rows.pool(peak, -2, "max"), -1, "max").contiguous())
    return found


def _absent(cells: Cells, count: int, like: Tensor) -> Tensor:
    cell = torch.arange(count, device=like.device)
    inside = cell % cells.per * cells.step
    return (inside >= cells.block) | (cell // cells.per * cells.block + inside >= cells.length)


def _common(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """What the kernels of the chunks share: shapes, running sums of the log decay, tile sizes."""
    e, w = q.shape[3], v.shape[3]
    shapes = {
        "n": q.shape[2], "FOLD": q.shape[1] // k.shape[1], "E": e, "EP": width(e), "W": w,
        "HAS_DECAY": log_decay is not None, "UPCAST": upcast(q),
    }  # fmt: skip
    decay = {"HIGH": q, "LOW": q}
    if log_decay is not None:
        sums = log_decay.double().clamp(min=-2.0 * NOTHING).cumsum(2) * LOG2E
        high = sums.float()
        decay = {"HIGH": high.contiguous(), "LOW": (sums - high).float().contiguous()}
    chunk, tw, warps = chunk_tiles(max(width(e), width(w)), q.element_size())
    return shapes, decay, {"C": chunk, "TW": min(tw, width(w)), "num_warps": warps, "num_stages": 1}
