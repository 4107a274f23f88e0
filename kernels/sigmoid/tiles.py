"""Rows of tensors in and out of Triton kernels, and rounding that is the same on a GPU and in the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """float32 as ``dtype``, to nearest. The interpreter, where ``UPCAST`` holds, cuts
    bfloat16 off instead: half a unit is added first."""
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_rows(X, b, h, at, seen, x_b, x_h, x_n, x_e, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Rows ``at`` of ``X[b, h]``, zero where not ``seen``."""
    e = tl.arange(0, PAD)
    base = X + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h
    return tl.load(
        base + at.to(tl.int64)[:, None] * x_n + e[None, :] * x_e, mask=seen[:, None] & (e < WIDTH)[None, :], other=0.0
    )


@triton.jit
def store_rows(X, head, at, inside, n, x, UPCAST: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Rows ``at`` of head number ``head`` of a contiguous ``[.., n, WIDTH]``."""
    e = tl.arange(0, PAD)
    place = X + (head.to(tl.int64) * n + at.to(tl.int64))[:, None] * WIDTH + e[None, :]
    tl.store(place, narrow(x, X.dtype.element_ty, UPCAST), mask=inside[:, None] & (e < WIDTH)[None, :])
