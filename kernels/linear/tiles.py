"""Decays inside Triton kernels, from running sums of the base-2 log decay held as two float32 numbers each; tiles and sizes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_sum(HIGH, LOW, head, at, n):
    """Running sum of the base-2 log decay up to and with token ``at``, as two numbers; 0 before the first token."""
    place = head.to(tl.int64) * n + tl.minimum(at, n - 1)
    return tl.load(HIGH + place, mask=at >= 0, other=0.0), tl.load(LOW + place, mask=at >= 0, other=0.0)


@triton.jit
def decay_between(high, low, high_from, low_from):
    """Decay from one token to a later one; at most about 1 also where the order is the other way round."""
    far = high - high_from
    near = low - low_from
    total = far + near
    rest = near - (total - far)  # what rounding took from the exponent, to first order
    return tl.exp2(tl.minimum(total, 0.0)) * (1.0 + rest * 0.6931471805599453)


@triton.jit
def pair_decays(HIGH, LOW, head, at, n, C: tl.constexpr, HAS_DECAY: tl.constexpr):
    """D of a chunk ``[C, C]``, with 0 above the diagonal."""
    below = at[:, None] >= at[None, :]
    if HAS_DECAY:
        high, low = log_sum(HIGH, LOW, head, at, n)
        return tl.where(below, decay_between(high[:, None], low[:, None], high[None, :], low[None, :]), 0.0)
    return tl.where(below, tl.full([C, C], 1.0, tl.float32), 0.0)


@triton.jit
def edge_decays(HIGH, LOW, head, at, n, start, C: tl.constexpr, HAS_DECAY: tl.constexpr):
    """rise and fall ``[C]`` of a chunk, and its whole decay."""
    if HAS_DECAY:
        high, low = log_sum(HIGH, LOW, head, at, n)
        first_high, first_low = log_sum(HIGH, LOW, head, start - 1, n)
        last_high, last_low = log_sum(HIGH, LOW, head, start + C - 1, n)
        rise = decay_between(high, low, first_high, first_low)
        fall = decay_between(last_high, last_low, high, low)
        return rise, fall, decay_between(last_high, last_low, first_high, first_low)
    one = tl.full([C], 1.0, tl.float32)
    return one, one, 1.0


@triton.jit
def state_tile(X, part, e, w, E: tl.constexpr, W: tl.constexpr):
    """A tile of state number ``part`` of a contiguous ``[.., E, W]``, as pointers and where they are inside."""
    return X + part.to(tl.int64) * (E * W) + e[:, None] * W + w[None, :], (e < E)[:, None] & (w < W)[None, :]


def chunk_tiles(wide: int, size: int) -> tuple[int, int, int]:
    """Tokens in a chunk, columns of v at a time and warps, for a padded width and an element size in bytes."""
    if size == 4:
        return (32, 32, 4) if wide <= 128 else (32, 16, 8)
    return (64, 64, 4) if wide <= 64 else (64, 32, 8) if wide <= 128 else (32, 32, 8)


def map_tiles(wide: int, size: int) -> tuple[int, int, int]:
    """Rows and columns of a tile of the pass over pairs, and warps."""
    if size == 4:
        return (64, 32, 4) if wide <= 64 else (32, 32, 4) if wide <= 128 else (32, 16, 4)
    return (128, 64, 8 if wide > 64 else 4) if wide <= 128 else (64, 32, 4)
