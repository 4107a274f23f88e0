"""``topk_encode`` as one matrix product whose tiles never leave the registers, except for the best of each row.

A program takes a tile of rows and walks over the tiles of its share of the features. Pre-activations become integers of the
same order; with the feature below them they are 64-bit keys, all different, so that the largest keys are the largest
pre-activations with ties to the smaller feature. The keys of the k best so far stay in registers, unsorted. Of each tile,
the largest entry that beats the worst of them replaces it, until no row has one left. A row's t-th tile brings k / t of those
on average, k log(F / tile) in all: far less than sorting each tile would cost. The shares' candidates are sorted by torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.tiles import (
    beside_its_tensors,
    dot,
    upcast,
)

PROGRAMS = 512
"""Programs to aim at: two waves of two programs on each of a large GPU's 132 processors."""
LEAST = 1024
"""Fewest features of a share: below, its first tiles, in which everything is new, outweigh the rest."""
MINUS_INFINITY = -2139095041
"""-inf as an integer of the same order as the floats."""


@triton.jit
def _encode(
    X, WEIGHT, BIAS, KEYS, n_rows, width, features, share, x_n, x_d, w_d, w_f, bias_f,
    K: tl.constexpr, PLACES: tl.constexpr, FLOOR: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    rows_in = rows < n_rows
    part = tl.program_id(1)
    places = tl.arange(0, PLACES)
    # Empty places are below every entry above FLOOR, and all different; those beyond K are never the worst.
    empty = tl.where(places < K, FLOOR * 4294967296 + places.to(tl.int64), 9223372036854775807)
    best_keys = tl.zeros([BN, PLACES], tl.int64) + empty[None, :]
    worst = tl.min(best_keys, 1)
    x_rows = X + rows.to(tl.int64)[:, None] * x_n
    last = tl.minimum((part + 1) * share, features)
    for first in range(part * share, last, BF):
        cols = first + tl.arange(0, BF)
        cols_in = cols < last
        w_cols = WEIGHT + cols.to(tl.int64)[None, :] * w_f
        acc = tl.zeros([BN, BF], tl.float32)
        for start in range(0, width, BD):
            at = start + tl.arange(0, BD)
            x_ok = rows_in[:, None]
            w_ok = cols_in[None, :]
            if not EVEN:
                x_ok = x_ok & (at < width)[None, :]
                w_ok = w_ok & (at < width)[:, None]
            x = tl.load(x_rows + at[None, :] * x_d, mask=x_ok, other=0.0)
            w = tl.load(w_cols + at.to(tl.int64)[:, None] * w_d, mask=w_ok, other=0.0)
            acc += dot(x, w, UPCAST)
        if HAS_BIAS:
            acc += tl.load(BIAS + cols * bias_f, mask=cols_in, other=0.0).to(tl.float32)[None, :]
        bits = acc.to(tl.int32, bitcast=True)
        score = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        score = tl.where(acc == 0.0, 0, score)  # -0.0, a product that underflows, is 0.0
        score = tl.where(acc != acc, 0x7FFFFFFF, score)
        score = tl.where(rows_in[:, None] & cols_in[None, :], score, -2147483648)
        top = tl.max(score, 1)
        # Features come in ascending order: an entry that equals the worst one comes after it.
        enters = top > (worst >> 32).to(tl.int32)
        while tl.max(enters.to(tl.int32), 0) > 0:
            place = tl.min(tl.where(score == top[:, None], cols[None, :], 0x7FFFFFFF), 1)
            key = (top.to(tl.int64) << 32) | (4294967295 - place.to(tl.int64))
            replaced = enters[:, None] & (best_keys == worst[:, None])
            best_keys = tl.where(replaced, key[:, None], best_keys)
            worst = tl.min(best_keys, 1)
            score = tl.where(cols[None, :] == place[:, None], -2147483648, score)
            top = tl.max(score, 1)
            enters = top > (worst >> 32).to(tl.int32)
    where = KEYS + (rows.to(tl.int64) * tl.num_programs(1) + part)[:, None] * K + places[None, :]
    tl.store(where, best_keys, mask=rows_in[:, None] & (places < K)[None, :])


class Tiles(NamedTuple):
    rows: int
    features: int
    width: int
    warps: int
    stages: int


def tiles(k: int, n: int, dtype: torch.dtype) -> Tiles:
    """Keys and pre-activations take at most 64 + 64 registers of a thread, three stages of operands at most 72 KiB."""
    places = max(16, triton.next_power_of_2(k))
    warps = 4 if places <= 64 else 8 if places <= 512 else 16
    rows = max(16, min(64, 1024 * warps // places, triton.next_power_of_2(n)))
    return Tiles(rows, 128, 32 if dtype == torch.float32 else 64, warps, 3)


def shares(n: int, f: int, size: Tiles) -> int:
    """Features of a program, a multiple of its tiles: enough programs to fill a GPU, in whole waves."""
    parts = max(1, min(PROGRAMS // triton.cdiv(n, size.rows), f // LEAST))
    return triton.cdiv(triton.cdiv(f, parts), size.features) * size.features


@beside_its_tensors
def encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, positive: bool) -> tuple[Tensor, Tensor]:
    (n, d), f = x.shape, weight.shape[1]
    size = tiles(k, n, x.dtype)
    share = shares(n, f, size)
    parts = triton.cdiv(f, share)
    keys = torch.empty((n, parts * k), dtype=torch.int64, device=x.device)
    like = x[0] if bias is None else bias
    floor = 0 if positive else MINUS_INFINITY
    _encode[(triton.cdiv(n, size.rows), parts)](
        x, weight, like, keys, n, d, f, share,
        x.stride(0), x.stride(1), weight.stride(0), weight.stride(1), like.stride(0),
        K=k, PLACES=max(16, triton.next_power_of_2(k)), FLOOR=floor, HAS_BIAS=bias is not None, EVEN=d % size.width == 0,
        BN=size.rows, BF=size.features, BD=size.width, UPCAST=upcast(x),
        num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return unpacked(keys.topk(k, dim=1).values, floor)


def unpacked(keys: Tensor, floor: int) -> tuple[Tensor, Tensor]:
    """Values and features of keys; 0 and -1 where a place was never filled."""
    score = (keys >> 32).to(torch.int32)
    values = (score ^ ((score >> 31) & 0x7FFFFFFF)).view(torch.float32)
    empty = score <= floor
    return values.masked_fill(empty, 0.0), (0xFFFFFFFF - (keys & 0xFFFFFFFF)).masked_fill(empty, -1)
