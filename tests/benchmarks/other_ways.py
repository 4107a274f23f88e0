"""Attention without a softmax, and the sparse autoencoder: the rows of their tables."""

from __future__ import annotations

from typing import Any

import peers
import torch
from machine import Way
from setting import (
    BOTH,
    CODES,
    Setting,
    answers,
    bind,
    code_inputs,
    code_sizes,
    decay_of,
    delta_inputs,
    optional,
    plain,
)
from torch import Tensor

from workbench.kernels.gated_delta_rule import gated_delta_rule
from workbench.kernels.linear_attention import linear_attention
from workbench.kernels.sigmoid_attention import sigmoid_attention
from workbench.kernels.sparse_decode import sparse_decode
from workbench.kernels.topk_encode import topk_encode


def sigmoid_ways(at: Setting) -> list[Way]:
    maps = (at.attention, at.inputs + 2 * at.maps)
    mapped = bind(sigmoid_attention, at.q, at.k, at.v, block=at.block, reduce=BOTH)
    return [
        plain(at),
        Way("sigmoid_attention", bind(sigmoid_attention, at.q, at.k, at.v), at.attention, at.inputs, read=answers),
        Way("sigmoid_attention with maps", mapped, *maps, "sigmoid_attention", read=answers),
        Way(
            "row chunks in torch",
            bind(peers.sigmoid_rows, at.q, at.k, at.v, None),
            at.attention,
            at.inputs,
            read=answers,
        ),
        Way(
            "row chunks in torch with maps",
            bind(peers.sigmoid_rows, at.q, at.k, at.v, at.block),
            *maps,
            "row chunks in torch",
            read=answers,
        ),
    ]


def linear_ways(at: Setting) -> list[Way]:
    decay = decay_of(at)
    work = 4.0 * at.width**2 * at.heads * at.tokens
    scale = at.width**-0.5
    call = bind(linear_attention, at.q, at.k, at.v, decay, scale=scale)
    mapped = bind(linear_attention, at.q, at.k, at.v, decay, scale=scale, block=at.block, reduce=("sum", "abs"))
    scaled = at.q * scale
    rows = bind(peers.decayed_rows, scaled, at.k, at.v, decay, None)
    mapped_rows = bind(peers.decayed_rows, scaled, at.k, at.v, decay, at.block)
    return [
        plain(at),
        Way("linear_attention", call, work, at.inputs, read=answers),
        Way(
            "linear_attention with maps",
            mapped,
            work + at.scores,
            at.inputs + 2 * at.maps,
            "linear_attention",
            read=answers,
        ),
        Way("rows of the map in torch", rows, work, at.inputs, read=answers),
        Way(
            "rows of the map in torch with maps",
            mapped_rows,
            work + at.scores,
            at.inputs + 2 * at.maps,
            "rows of the map in torch",
            read=answers,
        ),
    ]


def delta_ways(at: Setting) -> list[Way]:
    parts = delta_inputs(at)
    work = 6.0 * at.width**2 * at.heads * at.tokens
    moved = 4.0 * at.heads * at.tokens * at.width * at.dtype.itemsize
    mapped = bind(gated_delta_rule, *parts, block=at.block, reduce=("sum", "abs"))
    sums = bind(gated_delta_rule, *parts, block=at.block, reduce=("sum",))

    def output(found: Tensor) -> dict[str, Tensor]:
        return {"output": found}

    return [
        plain(at),
        Way("gated_delta_rule", bind(gated_delta_rule, *parts), work, moved, read=answers),
        Way("gated_delta_rule with the sum", sums, work, moved + at.maps, "gated_delta_rule", read=answers),
        Way(
            "gated_delta_rule with sum and abs",
            mapped,
            work + 2 * at.scores,
            moved + 2 * at.maps,
            "gated_delta_rule",
            read=answers,
        ),
        optional(
            Way("transformers, plain torch", bind(peers.torch_delta, *parts), work, moved, read=output),
            peers.missing("transformers", at.device, cuda_only=False),
        ),
        optional(
            Way("flash-linear-attention", bind(peers.fla_delta, *parts), work, moved, read=output),
            peers.missing("fla", at.device),
        ),
    ]


def _dense_code(at: Setting) -> str:
    need = float(at.tokens) * code_sizes(at)[1] * (at.dtype.itemsize + 4)
    return f"not run: the dense code needs {need / 2**30:.0f} GiB" if need > at.free else ""


def encode_ways(at: Setting) -> list[Way]:
    (d, f), n, item = code_sizes(at), at.tokens, at.dtype.itemsize
    x, into, _ = code_inputs(at)
    few = min(CODES, f)
    work = 2.0 * n * d * f, item * float(n * d + d * f) + 12.0 * n * few

    def dense() -> Any:
        return (x @ into).relu().topk(few, -1)

    return [
        optional(Way("dense, relu, topk", dense, *work, read=lambda found: {"values": found[0]}), _dense_code(at)),
        Way("topk_encode", bind(topk_encode, x, into, k=few), *work, read=lambda found: {"values": found.values}),
    ]


def decode_ways(at: Setting) -> list[Way]:
    (d, f), n, item = code_sizes(at), at.tokens, at.dtype.itemsize
    x, into, out = code_inputs(at)
    few = min(CODES, f)
    held = topk_encode(x, into, k=few)
    values, indices, places = held.values.to(at.dtype), held.indices, held.indices.clamp(min=0)
    work = 2.0 * n * few * d, item * float(min(n * few, f) * d + n * d) + 12.0 * n * few

    def dense() -> Tensor:
        return torch.zeros(n, f, dtype=at.dtype, device=at.device).scatter_(1, places, values) @ out

    def bag() -> Tensor:
        return torch.nn.functional.embedding_bag(places, out, per_sample_weights=values, mode="sum")

    def whole(found: Tensor) -> dict[str, Tensor]:
        return {"decoded": found}

    return [
        optional(Way("scattered, dense product", dense, *work, read=whole), _dense_code(at)),
        Way("embedding_bag", bag, *work, read=whole),
        Way("sparse_decode", bind(sparse_decode, values, indices, out), *work, read=whole),
    ]
