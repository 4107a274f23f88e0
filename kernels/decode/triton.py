"""The three sparse maps of ``sparse_decode`` as Triton kernels: gathers, float32 accumulation, no atomics.

Decoding a row and summing a feature are one kernel, a weighted bag of table rows: one program per bag and block of columns
adds the rows of its bag in a fixed order. A feature that most rows use is one long bag; its columns are its parallelism.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.decode.cpu import by_feature
from workbench.kernels.sparse_decode import accumulation
from workbench.kernels.tiles import (
    beside_its_tensors,
    narrow,
    upcast,
)

TILE = 4096
"""Gathered elements a program holds: 32 a thread with 4 warps."""
DEPTH = 8
"""Rows gathered at a time: enough loads in flight, few wasted on features that fire rarely."""


@triton.jit
def _bags(
    TABLE, ROWS, WEIGHTS, STARTS, BIAS, OUT, TOTALS, n_rows, width, size, t_n, t_d, bias_d,
    HAS_STARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TOTALS: tl.constexpr, P: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = block * BD + tl.arange(0, BD)
    inside = at < width
    if HAS_STARTS:
        first = tl.load(STARTS + bag)
        last = tl.load(STARTS + bag + 1)
    else:
        first = bag * size
        last = first + size
    acc = tl.zeros([P, BD], tl.float32)
    total = tl.zeros([P], tl.float32)
    for start in range(first, last, P):
        pair = start + tl.arange(0, P)
        row = tl.load(ROWS + pair, mask=pair < last, other=-1)
        held = (row >= 0) & (row < n_rows)
        weight = tl.load(WEIGHTS + pair, mask=held, other=0.0).to(tl.float32)
        where = TABLE + row[:, None] * t_n + at.to(tl.int64)[None, :] * t_d
        part = tl.load(where, mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        acc += weight[:, None] * part
        if HAS_TOTALS:
            total += weight
    out = tl.sum(acc, 0)
    if HAS_BIAS:
        out += tl.load(BIAS + at * bias_d, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + bag * width + at, narrow(out, OUT.dtype.element_ty, UPCAST), mask=inside)
    if HAS_TOTALS:
        if block == 0:
            tl.store(TOTALS + bag, tl.sum(total, 0))


@triton.jit
def _dots(
    ROWS, INDEX, WEIGHT, OUT, features, width, k, r_n, r_d, w_f, w_d, P: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * P + tl.arange(0, P)
    feature = tl.load(INDEX + n * k + place, mask=place < k, other=-1)
    held = (feature >= 0) & (feature < features)
    acc = tl.zeros([P, BD], tl.float32)
    for start in range(0, width, BD):
        at = start + tl.arange(0, BD)
        inside = at < width
        row = tl.load(ROWS + n * r_n + at * r_d, mask=inside, other=0.0).to(tl.float32)
        where = WEIGHT + feature[:, None] * w_f + at.to(tl.int64)[None, :] * w_d
        weight = tl.load(where, mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        acc += row[None, :] * weight
    # A row of NaN times the zeros of an empty place would be NaN.
    tl.store(OUT + n * k + place, tl.where(held, tl.sum(acc, 1), 0.0), mask=place < k)


def columns(width: int) -> int:
    """Columns of a program, a power of two."""
    return min(TILE // DEPTH, max(16, triton.next_power_of_2(width)))


@beside_its_tensors
def decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    table, (n, k), width = row_major(weight), values.shape, weight.shape[1]
    out = weight.new_empty(n, width)
    like = weight if bias is None else bias
    _bags[(n, triton.cdiv(width, columns(width)))](
        table, indices.contiguous(), values.contiguous(), indices, like, out, out, weight.shape[0], width, k,
        table.stride(0), table.stride(1), like.stride(0),
        HAS_STARTS=False, HAS_BIAS=bias is not None, HAS_TOTALS=False, P=DEPTH, BD=columns(width),
        UPCAST=upcast(weight), num_warps=4,
    )  # fmt: skip
    return out


@beside_its_tensors
def dots(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    table, (n, k), width = row_major(weight), indices.shape, weight.shape[1]
    out = rows.new_empty((n, k), dtype=accumulation(rows, weight))
    _dots[(n, triton.cdiv(k, DEPTH))](
        rows, indices.contiguous(), table, out, weight.shape[0], width, k,
        rows.stride(0), rows.stride(1), table.stride(0), table.stride(1), P=DEPTH, BD=columns(width), num_warps=4,
    )  # fmt: skip
    return out


@beside_its_tensors
def feature_sums(values: Tensor, indices: Tensor, rows: Tensor, features: int) -> tuple[Tensor, Tensor]:
    row, value, starts = by_feature(values, indices, features)
    table, width = row_major(rows), rows.shape[1]
    sums = rows.new_empty(features, width)
    totals = rows.new_empty((features,), dtype=accumulation(values, rows))
    _bags[(features, triton.cdiv(width, columns(width)))](
        table, row, value, starts, rows, sums, totals, rows.shape[0], width, 0,
        table.stride(0), table.stride(1), 0,
        HAS_STARTS=True, HAS_BIAS=False, HAS_TOTALS=True, P=DEPTH, BD=columns(width), UPCAST=upcast(rows), num_warps=4,
    )  # fmt: skip
    return sums, totals


def row_major(table: Tensor) -> Tensor:
    """The table with rows in one piece: gathering strided rows costs a memory sector per element, a copy is cheaper."""
    return table if table.stride(1) == 1 else table.contiguous()
