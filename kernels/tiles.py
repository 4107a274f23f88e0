"""What the Triton kernels of the softmax family share: score tiles under any mask spec, and the geometry of block maps.

Imported by Triton forms only, and by them only when they run: nothing else may import it.

**Cells.** A kernel works on tiles of ``T`` positions, a block map on blocks of any size. Positions are therefore visited cell
by cell: cell c holds the positions ``(c // PER) * BLOCK + (c % PER) * STEP + 0 .. STEP - 1`` of its block, padded to a power of
two, ``PAD``; a tile is ``T / PAD`` cells. Blocks smaller than a tile are one cell each (``PER = 1``), larger ones are cut into
``PER`` cells of a tile each. A tile never mixes two blocks in one cell, so that cells reduce inside a tile; ``Cells.pool`` joins
the cells of a block afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.forms import interpreted
from workbench.kernels.scores import Relative, Scores

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
Given = ParamSpec("Given")
Found = TypeVar("Found")


def beside_its_tensors(launch: Callable[Given, Found]) -> Callable[Given, Found]:
    """Make the GPU that holds the first tensor the current one: Triton launches on the current device."""

    @wraps(launch)
    def there(*given: Given.args, **named: Given.kwargs) -> Found:
        like = next(part for part in given if isinstance(part, Scores | Tensor))
        with torch.cuda.device_of(like.q if isinstance(like, Scores) else like):
            return launch(*given, **named)

    return there


@dataclass(frozen=True)
class Cells:
    """How ``length`` positions in blocks of ``block`` fall into tiles of ``tile`` (a power of two)."""

    length: int
    block: int
    tile: int

    @property
    def step(self) -> int:
        """Positions in a whole cell."""
        return min(self.block, self.tile)

    @property
    def pad(self) -> int:
        return triton.next_power_of_2(self.step)

    @property
    def per(self) -> int:
        """Cells of a block."""
        return -(-self.block // self.step)

    @property
    def blocks(self) -> int:
        return -(-self.length // self.block)

    @property
    def count(self) -> int:
        """Cells up to the end of the last block."""
        return self.blocks * self.per

    @property
    def tiles(self) -> int:
        return -(-self.count * self.pad // self.tile)

    def pool(self, values: Tensor, axis: int, reduce: str) -> Tensor:
        """Cells to blocks along a negative ``axis``: ``sum`` or ``max``."""
        values = values.narrow(axis, 0, self.count).unflatten(axis, (self.blocks, self.per))
        return values.sum(axis) if reduce == "sum" else values.amax(axis)

    def arguments(self, prefix: str) -> dict[str, Any]:
        """The constexpr arguments of ``places``, named ``prefix + BLOCK`` and so on."""
        names = {"BLOCK": self.block, "STEP": self.step, "PAD": self.pad, "PER": self.per}
        return {prefix + name: value for name, value in names.items()}


@triton.jit
def places(
    tile, T: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, PER: tl.constexpr, length
):
    """Positions ``[T]`` of a tile and which of them exist."""
    at = tile * T + tl.arange(0, T)
    if PAD == BLOCK or (PAD == T and BLOCK % T == 0):
        return at, at < length
    cell = at // PAD
    inside = (cell % PER) * STEP + at % PAD
    position = (cell // PER) * BLOCK + inside
    return position, (at % PAD < STEP) & (inside < BLOCK) & (position < length)


@triton.jit
def tile_of(position, T: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, PER: tl.constexpr):
    """The tile that holds a position, for positions not below zero."""
    cell = (position // BLOCK) * PER + (position % BLOCK) // STEP
    return (cell * PAD) // T


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a @ b with float32 accumulation; float32 inputs are multiplied exactly (no TF32). The interpreter multiplies bfloat16
    as the integers that hold it, hence ``UPCAST``: products of upcast numbers are the same."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """float32 as ``dtype``, to nearest. The interpreter, where ``UPCAST`` holds, cuts bfloat16 off instead: it is given numbers
    that are rounded already."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
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


@triton.jit
def tanh(x):
    """Within two units in the last place of float32, also near zero."""
    t = tl.exp2(-2.885390081777927 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    far = tl.where(x < 0, -far, far)
    y = x * x
    near = x + x * y * (-0.3333333333333333 + y * (0.13333333333333333 + y * (-0.05396825396825397
        + y * (0.021869488536155203 - y * 0.008863235529902197))))  # fmt: skip
    return tl.where(y < 0.0625, near, far)


@triton.jit
def key_tiles(
    low, high, n_keys, OFFSET, WINDOW, PREFIX, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Key tiles ``[first, last)`` outside of which query rows ``low .. high`` see nothing, by causality and window."""
    first_key = 0
    last_key = n_keys - 1
    if CAUSAL:
        last_key = tl.minimum(last_key, tl.maximum(high + OFFSET, PREFIX - 1))
    elif HAS_WINDOW:
        last_key = tl.minimum(last_key, tl.maximum(high + OFFSET + WINDOW - 1, PREFIX - 1))
    if HAS_WINDOW:
        if PREFIX == 0:
            first_key = tl.minimum(tl.maximum(low + OFFSET - WINDOW + 1, 0), n_keys)
    first = tile_of(first_key, T, BLOCK, STEP, PAD, PER)
    last = tile_of(tl.maximum(last_key, 0), T, BLOCK, STEP, PAD, PER) + 1
    return first, tl.where(last_key < first_key, first, last)


@triton.jit
def query_tiles(
    low, high, n_queries, OFFSET, WINDOW, PREFIX, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Query tiles ``[first, last)`` outside of which keys ``low .. high`` are seen by nobody, by causality and window."""
    first_row = 0
    last_row = n_queries - 1
    if low >= PREFIX:
        if CAUSAL:
            first_row = tl.maximum(low - OFFSET, 0)
        elif HAS_WINDOW:
            first_row = tl.maximum(low - OFFSET - WINDOW + 1, 0)
        if HAS_WINDOW:
            last_row = tl.minimum(last_row, high + WINDOW - 1 - OFFSET)
    first = tile_of(first_row, T, BLOCK, STEP, PAD, PER)
    last = tile_of(tl.maximum(last_row, 0), T, BLOCK, STEP, PAD, PER) + 1
    return first, tl.where(last_row < first_row, first, last)


@triton.jit
def visible(
    rows, rows_in, cols, cols_in, b, h,
    OFFSET, WINDOW, PREFIX, DOCS, docs_b, KEYS, keys_b, QUERIES, queries_b,
    DENSE, dense_b, dense_h, dense_q, dense_k, BLOCKS, blocks_b, blocks_h, blocks_q, blocks_k,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_KEYS: tl.constexpr,
    HAS_QUERIES: tl.constexpr, HAS_DENSE: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Allowed pairs ``[rows, cols]`` of a tile; ``kernels/mask.py`` says what each part means."""
    i = rows[:, None] + OFFSET
    j = cols[None, :]
    ok = rows_in[:, None] & cols_in[None, :]
    if CAUSAL:
        near = j <= i
        if HAS_WINDOW:
            near = near & (i - j < WINDOW)
        ok = ok & (near | (j < PREFIX))
    elif HAS_WINDOW:
        ok = ok & (((i - j < WINDOW) & (j - i < WINDOW)) | (j < PREFIX))
    if HAS_DOCS:
        own = tl.load(DOCS + b * docs_b + rows + OFFSET, mask=rows_in, other=0)
        theirs = tl.load(DOCS + b * docs_b + cols, mask=cols_in, other=0)
        ok = ok & (own[:, None] == theirs[None, :])
    if HAS_KEYS:
        ok = ok & (tl.load(KEYS + b * keys_b + cols, mask=cols_in, other=0) != 0)[None, :]
    if HAS_QUERIES:
        ok = ok & (tl.load(QUERIES + b * queries_b + rows, mask=rows_in, other=0) != 0)[:, None]
    if HAS_DENSE:
        at = (
            DENSE
            + b * dense_b
            + h * dense_h
            + rows.to(tl.int64)[:, None] * dense_q
            + cols.to(tl.int64)[None, :] * dense_k
        )
        ok = ok & (tl.load(at, mask=ok, other=0) != 0)
    if SIDE > 0:
        at = (
            BLOCKS
            + b * blocks_b
            + h * blocks_h
            + (rows // SIDE)[:, None] * blocks_q
            + (cols // SIDE)[None, :] * blocks_k
        )
        ok = ok & (tl.load(at, mask=ok, other=0) != 0)
    return ok


@triton.jit
def score_tile(
    q, k, ok, rows, cols, b, h,
    SCALE, SOFTCAP, OFFSET, BIAS, bias_b, bias_h, bias_q, bias_k, bias_first, bias_last,
    HAS_CAP: tl.constexpr, BIAS_KIND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Base-2 scores ``[rows, cols]``, float32, -inf where ``ok`` is false. ``q`` ``[rows, E]``, ``k`` ``[cols, E]``."""
    s = dot(q, tl.trans(k), UPCAST) * SCALE
    if HAS_CAP:
        s = SOFTCAP * tanh(s / SOFTCAP)
    if BIAS_KIND == 1:
        at = BIAS + b * bias_b + h * bias_h + rows.to(tl.int64)[:, None] * bias_q + cols.to(tl.int64)[None, :] * bias_k
        extra = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        s = s + extra
        ok = ok & (extra > -1e30)
    elif BIAS_KIND == 2:
        far = cols[None, :] - (rows[:, None] + OFFSET) - bias_first
        far = tl.minimum(tl.maximum(far, 0), bias_last)
        extra = tl.load(BIAS + h * bias_h + far * bias_k, mask=ok, other=0.0).to(tl.float32)
        s = s + extra
        ok = ok & (extra > -1e30)
    return tl.where(ok, s * 1.4426950408889634, float("-inf"))


def mask_arguments(scores: Scores) -> dict[str, Any]:
    """Arguments of ``visible``, named as there. Absent tensors are a pointer that is never followed."""
    mask, q = scores.mask, scores.q
    absent = q

    def held(part: Tensor | None, dtype: torch.dtype) -> Tensor:
        return absent if part is None else part.to(q.device, dtype)

    docs, keys = held(mask.documents, torch.int32), held(mask.keys, torch.uint8)
    queries, dense = held(mask.queries, torch.uint8), held(mask.dense, torch.uint8)
    blocks = held(mask.blocks, torch.uint8)
    return {
        "OFFSET": mask.offset,
        "WINDOW": mask.window or 0,
        "PREFIX": mask.prefix,
        "DOCS": docs, "docs_b": _strides(docs)[0],
        "KEYS": keys, "keys_b": _strides(keys)[0],
        "QUERIES": queries, "queries_b": _strides(queries)[0],
        "DENSE": dense, **_named("dense", dense),
        "BLOCKS": blocks, **_named("blocks", blocks),
        "CAUSAL": mask.causal,
        "HAS_WINDOW": mask.window is not None,
        "HAS_DOCS": mask.documents is not None,
        "HAS_KEYS": mask.keys is not None,
        "HAS_QUERIES": mask.queries is not None,
        "HAS_DENSE": mask.dense is not None,
        "SIDE": mask.side or 0,
    }  # fmt: skip


def score_arguments(scores: Scores) -> dict[str, Any]:
    """Arguments of ``score_tile`` beside those of ``visible``."""
    bias, kind, first, last = scores.q, 0, 0, 0
    if isinstance(scores.bias, Relative):
        bias, kind = scores.bias.table.to(scores.q.device)[None, :, None, :], 2
        first, last = scores.bias.first, scores.bias.table.shape[1] - 1
    elif isinstance(scores.bias, Tensor):
        bias, kind = scores.bias.to(scores.q.device)[(None,) * (4 - scores.bias.ndim)], 1
    assert scores.scale is not None
    return {
        "SCALE": float(scores.scale),
        "SOFTCAP": float(scores.softcap or 1.0),
        "BIAS": bias, **_named("bias", bias), "bias_first": first, "bias_last": last,
        "HAS_CAP": scores.softcap is not None,
        "BIAS_KIND": kind,
        "UPCAST": upcast(scores.q),
    }  # fmt: skip


def upcast(like: Tensor) -> bool:
    return like.dtype == torch.bfloat16 and interpreted() and not like.is_cuda


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    """``{name}_b``, ``_h``, ``_n``, ``_e`` of a tensor ``[B, heads, tokens, E]``."""
    return {f"{name}_{axis}": step for axis, step in zip("bhne", tensor.stride(), strict=True)}


def width(e: int) -> int:
    """Head width padded to what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(e))


def _named(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": step for axis, step in zip("bhqk", _strides(tensor), strict=True)}


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides with 0 where an axis of length 1 stands for any length."""
    return tuple(0 if n == 1 else step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
