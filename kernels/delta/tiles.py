"""What the Triton kernels of the gated delta rule share; ``kernels/delta/reference.py`` derives the formulas and names them.

``prepare`` runs first: one program per chunk inverts I + L and stores the inverse with rise, fall and beta, all float32, in
memory linear in N. Chunks are tiles of ``kernels/tiles.py``: positions that pad a tile hold zero keys, queries, values, beta
and log decay, so that they neither read nor write nor decay. Everything but the inputs is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.forms import interpreted
from workbench.kernels.tiles import Cells, dot, places, strides, width


@triton.jit
def _pieces(x):
    """Three bfloat16 numbers whose sum is x: 3 x 8 bits hold the 24 bits of a float32."""
    high = x.to(tl.bfloat16)
    rest = x.to(tl.float32) - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def exact(a, b, UPCAST: tl.constexpr):
    """a @ b to float32 accuracy, whatever the types. Products with a float32 side run on tensor cores in bfloat16 pieces, the
    smallest first, without those below the last bit: scalar float32 products are slower and unroll to code of megabytes."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        out = dot(a, b, UPCAST)
    elif a.dtype == tl.bfloat16:
        high, middle, low = _pieces(b)
        out = dot(a, low, UPCAST) + dot(a, middle, UPCAST) + dot(a, high, UPCAST)
    elif b.dtype == tl.bfloat16:
        high, middle, low = _pieces(a)
        out = dot(low, b, UPCAST) + dot(middle, b, UPCAST) + dot(high, b, UPCAST)
    else:
        a_high, a_middle, a_low = _pieces(a)
        b_high, b_middle, b_low = _pieces(b)
        small = dot(a_low, b_high, UPCAST) + dot(a_high, b_low, UPCAST) + dot(a_middle, b_middle, UPCAST)
        out = small + dot(a_middle, b_high, UPCAST) + dot(a_high, b_middle, UPCAST) + dot(a_high, b_high, UPCAST)
    return out


@triton.jit
def tokens(X, at, there, step_n, step_e, first, E: tl.constexpr, EP: tl.constexpr):
    """Rows ``at`` of ``X`` and their channels ``first .. first + EP - 1``, 0 outside of ``E``."""
    e = first + tl.arange(0, EP)
    where = X + at.to(tl.int64)[:, None] * step_n + e[None, :] * step_e
    return tl.load(where, mask=there[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def pair_decay(log, C: tl.constexpr):
    """Gamma ``[C, C]``. Logs are summed pair by pair: differences of running sums would lose digits next to strong decays."""
    i = tl.arange(0, C)
    total = tl.cumsum(tl.where(i[:, None] > i[None, :], log[:, None], 0.0), 0)
    return tl.where(i[:, None] >= i[None, :], tl.exp(total), 0.0)


@triton.jit
def unit_inverse(lower, C: tl.constexpr, LOG_C: tl.constexpr, UPCAST: tl.constexpr):
    """(I + lower)^{-1} of a strictly lower triangular ``[C, C]``, by inverting diagonal blocks of twice the size each round:
    [[A, 0], [B, D]]^{-1} = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]. Powers of ``lower`` would overflow where keys repeat."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    x = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, lower, 0.0)
    half = 2
    for _ in range(1, LOG_C):
        between = tl.where((i // (2 * half) == j // (2 * half)) & (i // half != j // half), lower, 0.0)
        x = x - exact(x, exact(between, x, UPCAST), UPCAST)
        half = half * 2
    return x


@triton.jit
def prepare_kernel(
    K, k_b, k_h, k_n, k_e, BETA, LOG, INVERSE, VECTORS, n_tokens, n_chunks, H, SHARE_K,
    E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, HAS_LOG: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    at, there = places(chunk, C, BLOCK, STEP, PAD, PER, n_tokens)
    k = tokens(K + bh // H * k_b + bh % H // SHARE_K * k_h, at, there, k_n, k_e, 0, E, EP)
    beta = tl.load(BETA + bh * n_tokens + at, mask=there, other=0.0)
    i = tl.arange(0, C)
    lower = exact(k, tl.trans(k), UPCAST)
    if HAS_LOG:
        log = tl.load(LOG + bh * n_tokens + at, mask=there, other=0.0)
        gamma = pair_decay(log, C)
        rise = tl.exp(tl.cumsum(log, 0))
        fall = tl.sum(tl.where(i[:, None] == C - 1, gamma, 0.0), 0)
        lower = lower * gamma
    else:
        rise = tl.full([C], 1.0, tl.float32)
        fall = rise
    lower = tl.where(i[:, None] > i[None, :], lower * beta[:, None], 0.0)
    x = unit_inverse(lower, C, LOG_C, UPCAST)
    slot = bh * n_chunks + chunk
    tl.store(INVERSE + slot * C * C + i[:, None] * C + i[None, :], x)
    tl.store(VECTORS + slot * 3 * C + i, rise)
    tl.store(VECTORS + slot * 3 * C + C + i, fall)
    tl.store(VECTORS + slot * 3 * C + 2 * C + i, beta)


@triton.jit
def chunk_of(INVERSE, VECTORS, slot, C: tl.constexpr):
    """What ``prepare`` stored for a chunk: inverse ``[C, C]``, rise, fall and beta ``[C]``, and rise_C."""
    i = tl.arange(0, C)
    x = tl.load(INVERSE + slot * C * C + i[:, None] * C + i[None, :])
    base = VECTORS + slot * 3 * C
    return x, tl.load(base + i), tl.load(base + C + i), tl.load(base + 2 * C + i), tl.load(base + C - 1)


@triton.jit
def scan_kernel(
    K, k_b, k_h, k_n, k_e, V, v_b, v_h, v_n, v_e, STATE, INVERSE, VECTORS, BEFORE, U, MISSED, LAST,
    n_tokens, n_chunks, H, SHARE_K, SHARE_V,
    E: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_STATE: tl.constexpr, KEEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """States before every chunk, the vectors U that the tokens write, what the state before the chunk misses of the values
    (V - diag(rise) K S, with ``KEEP``), and the last state; one program per tile of values."""
    first = tl.program_id(0) * BV
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    e = tl.arange(0, EP)
    w = first + tl.arange(0, BV)
    inside = (e < E)[:, None] & (w < WIDTH)[None, :]
    cell = e[:, None] * WIDTH + w[None, :]
    s = tl.zeros([EP, BV], tl.float32)
    if HAS_STATE:
        s = tl.load(STATE + bh * E * WIDTH + cell, mask=inside, other=0.0)
    for chunk in range(n_chunks):
        slot = bh * n_chunks + chunk
        tl.store(BEFORE + slot * E * WIDTH + cell, s, mask=inside)
        at = chunk * C + tl.arange(0, C)
        there = at < n_tokens
        k = tokens(K + b * k_b + h // SHARE_K * k_h, at, there, k_n, k_e, 0, E, EP)
        v = tokens(V + b * v_b + h // SHARE_V * v_h, at, there, v_n, v_e, first, WIDTH, BV).to(tl.float32)
        x, rise, fall, beta, total = chunk_of(INVERSE, VECTORS, slot, C)
        missed = v - rise[:, None] * exact(k, s, UPCAST)
        u = exact(x, beta[:, None] * missed, UPCAST)
        where = (bh * n_tokens + at)[:, None] * WIDTH + w[None, :]
        here = there[:, None] & (w < WIDTH)[None, :]
        tl.store(U + where, u, mask=here)
        if KEEP:
            tl.store(MISSED + where, missed, mask=here)
        s = total * s + exact(tl.trans(k), fall[:, None] * u, UPCAST)
    tl.store(LAST + bh * E * WIDTH + cell, s, mask=inside)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Inputs of the kernels of one call, beta and log decay float32 and contiguous, and what ``prepare`` made of them."""

    q: Tensor
    k: Tensor
    beta: Tensor
    log: Tensor | None
    cells: Cells
    inverse: Tensor
    vectors: Tensor

    @property
    def heads(self) -> int:
        return self.beta.shape[1]

    @property
    def rows(self) -> int:
        """Heads of all examples: one axis of every grid."""
        return self.beta.shape[0] * self.beta.shape[1]

    def shapes(self) -> dict[str, Any]:
        """Arguments that all kernels take."""
        return {
            "n_tokens": self.beta.shape[2], "n_chunks": self.cells.tiles, "H": self.heads, "SHARE_K": self.share(self.k),
            "E": self.k.shape[3], "EP": width(self.k.shape[3]), "C": self.cells.tile,
            "UPCAST": interpreted() and not self.k.is_cuda,
        }  # fmt: skip

    def share(self, x: Tensor) -> int:
        return self.heads // x.shape[1]

    def chunks(self) -> dict[str, Tensor]:
        return {"INVERSE": self.inverse, "VECTORS": self.vectors}

    def decays(self) -> dict[str, Any]:
        return {"LOG": self.beta if self.log is None else self.log, "HAS_LOG": self.log is not None}


def chunk_size(e: int, dtype: torch.dtype) -> int:
    """Tokens per chunk: longer chunks feed tensor cores better, but wide heads, and float32 heads, fill shared memory."""
    return 64 if width(e) * dtype.itemsize <= 256 else 32


def warps(chunk: int, k: Tensor) -> int:
    """Warps of a program that carries an ``[E, values]`` or ``[rows, E]`` tile in float32 from chunk to chunk."""
    return 8 if chunk * width(k.shape[3]) * k.dtype.itemsize >= 16384 else 4


def value_tile(e: int, width_v: int) -> int:
    """Values of a program of the scan, which holds ``[E, values]``: narrow, because only heads and tiles run in parallel."""
    return min(width(width_v), 32 if width(e) <= 128 else 16)


def prepare(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, block: int | None = None, chunk: int | None = None
) -> Prepared:
    """Chunks of the whole input; with ``block``, chunks that fall into blocks of that side."""
    chunk = chunk_size(k.shape[3], k.dtype) if chunk is None else chunk
    b, h, n = beta.shape
    cells = Cells(n, block or chunk, chunk)
    log = None if log_decay is None else log_decay.float().contiguous()
    found = Prepared(
        q, k, beta.float().contiguous(), log, cells,
        torch.empty(b, h, cells.tiles, chunk, chunk, dtype=torch.float32, device=q.device),
        torch.empty(b, h, cells.tiles, 3, chunk, dtype=torch.float32, device=q.device),
    )  # fmt: skip
    prepare_kernel[(cells.tiles, b * h)](
        k, *k.stride(), found.beta, INVERSE=found.inverse, VECTORS=found.vectors,
        LOG_C=chunk.bit_length() - 1, **found.decays(), **found.shapes(), **cells.arguments(""), num_warps=4,
    )  # fmt: skip
    return found


def scan(
    found: Prepared, v: Tensor, state: Tensor | None, missed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """States before each chunk ``[B, H, chunks, E, V]``, U ``[B, H, N, V]`` and the last state, float32; fills ``missed``."""
    b, h, n = found.beta.shape
    e, wide = found.k.shape[3], v.shape[3]
    before = torch.empty(b, h, found.cells.tiles, e, wide, dtype=torch.float32, device=v.device)
    u = torch.empty(b, h, n, wide, dtype=torch.float32, device=v.device)
    last = torch.empty(b, h, e, wide, dtype=torch.float32, device=v.device)
    tile = value_tile(e, wide)
    scan_kernel[(triton.cdiv(wide, tile), found.rows)](
        found.k, *found.k.stride(), **strides("v", v), V=v, STATE=last if state is None else state.float().contiguous(),
        BEFORE=before, U=u, MISSED=u if missed is None else missed, LAST=last, SHARE_V=found.share(v), WIDTH=wide, BV=tile,
        HAS_STATE=state is not None, KEEP=missed is not None,
        **found.chunks(), **found.shapes(), num_warps=warps(found.cells.tile, found.k),
    )  # fmt: skip
    return before, u, last
