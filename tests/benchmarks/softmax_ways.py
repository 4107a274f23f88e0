"""Softmax attention: the rows of its tables. Plain attention first, then every way to the same maps and statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
from machine import Way
from setting import (
    BOTH,
    DENSITIES,
    STATS,
    Setting,
    answers,
    bind,
    bind_density,
    kept_blocks,
    optional,
    softmax,
    too_large,
)
from torch import Tensor

from workbench.kernels.attention_stats import attention_stats
from workbench.kernels.flash_attention import flash_attention


def two_pass(at: Setting, reduce: tuple[str, ...], stats: tuple[str, ...]) -> Callable[[], dict[str, Tensor]]:
    """The model's own attention, then one pass over q k^T with the denominators that it returned."""

    def run() -> dict[str, Tensor]:
        output, lse = at.backend.run(at.q, at.k, at.v)
        found = attention_stats(at.q, at.k, lse, block=at.block if reduce else None, reduce=reduce, stats=stats)
        return {"output": output, **answers(found)}

    return run


def stats_alone(at: Setting, reduce: tuple[str, ...], stats: tuple[str, ...]) -> Callable[[], Any]:
    lse = at.backend.run(at.q, at.k, at.v)[1]
    return bind(attention_stats, at.q, at.k, lse, block=at.block if reduce else None, reduce=reduce, stats=stats)


def attention_ways(at: Setting) -> list[Way]:
    work, wide = (at.attention, at.inputs + 2 * at.maps + 2 * at.rows), (at.scores, at.inputs / 2 + 2 * at.maps)
    others = [b for b in peers.backends(at.device) if b.name != at.backend.name]
    flash = bind(flash_attention, at.q, at.k, at.v)
    mapped = bind(flash_attention, at.q, at.k, at.v, block=at.block, reduce=BOTH)
    dense = too_large(at, 16, "the dense pattern")
    return [
        softmax(at),
        *(softmax(at, backend) for backend in others),
        Way("two passes: SDPA, attention_stats", two_pass(at, BOTH, STATS), *work, read=answers),
        Way("attention_stats alone", stats_alone(at, BOTH, STATS), *wide, remark="lse given", read=answers),
        Way("flash_attention", flash, at.attention, at.inputs, read=answers),
        Way(
            "flash_attention with maps",
            mapped,
            at.attention,
            at.inputs + 2 * at.maps,
            "flash_attention",
            "block sum and max only",
            answers,
        ),
        optional(
            Way(
                "dense, pooled",
                bind(peers.eager, at.q, at.k, at.v, at.block),
                *work,
                read=answers,
                remark="what output_attentions=True gives",
            ),
            dense,
        ),
        Way(
            "SDPA, row chunks of the softmax",
            bind(_chunked_after, at, (*BOTH, *STATS)),
            *work,
            remark=f"plain torch, {peers.ROWS} rows at a time",
            read=answers,
        ),
    ]


def _chunked_after(at: Setting, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {
        "output": at.backend.run(at.q, at.k, at.v)[0],
        **peers.chunked(at.q, at.k, at.block, names),
    }


def received_ways(at: Setting) -> list[Way]:
    compiled = at.device == "cuda"
    flex = Way(
        f"two FlexAttention calls, {'compiled' if compiled else 'uncompiled'}",
        bind(peers.two_flex_calls(compiled, at.tokens, at.device), at.q, at.k, at.v),
        at.attention,
        at.inputs + at.rows,
        remark="" if compiled else "holds all scores: compiled calls return no log-sum-exp on CPUs",
        read=answers,
    )
    work = (at.attention, at.inputs + at.rows)
    return [
        softmax(at),
        Way("two passes: SDPA, attention_stats", two_pass(at, (), ("received",)), *work, read=answers),
        Way(
            "attention_stats, no lse given",
            bind(attention_stats, at.q, at.k, stats=("received",)),
            at.scores,
            at.inputs / 2 + at.rows,
            remark="no output",
            read=answers,
        ),
        optional(flex, "" if compiled else too_large(at, 16, "uncompiled FlexAttention")),
        optional(
            Way(
                "flash-colreduce",
                bind(peers.colreduce, at.q, at.k),
                at.scores,
                at.inputs / 2 + at.rows,
                remark="no output",
                read=lambda found: {"received": found},
            ),
            peers.missing("flash_colreduce", at.device),
        ),
        Way("SDPA, row chunks of the softmax", bind(_chunked_after, at, ("received",)), *work, read=answers),
    ]


def maximum_ways(at: Setting) -> list[Way]:
    work = (at.attention, at.inputs + at.maps)
    power = at.width & (at.width - 1) == 0 and 16 <= at.width <= 256
    why = "" if at.device == "cuda" else "needs a CUDA device"
    why = why or ("" if power and at.tokens % at.block == 0 else "needs widths of a power of two and whole blocks")
    one = bind(flash_attention, at.q, at.k, at.v, block=at.block, reduce=("max",))
    return [
        softmax(at),
        Way("flash_attention", bind(flash_attention, at.q, at.k, at.v), at.attention, at.inputs, read=answers),
        Way("flash_attention with the maximum", one, *work, "flash_attention", read=answers),
        Way("two passes: SDPA, attention_stats", two_pass(at, ("max",), ()), *work, read=answers),
        optional(
            Way(
                "pooling as SeerAttention published it",
                bind(peers.seer, at.q, at.k, at.v, at.block),
                *work,
                "flash_attention",
                "bfloat16 scratch and map",
                answers,
            ),
            why,
        ),
        Way("SDPA, row chunks of the softmax", bind(_chunked_after, at, ("max",)), *work, read=answers),
    ]


def sparse_ways(at: Setting) -> list[Way]:
    ways = [
        softmax(at),
        Way("flash_attention", bind(flash_attention, at.q, at.k, at.v), at.attention, at.inputs, read=answers),
    ]
    for density in DENSITIES:
        mask = kept_blocks(at, density)
        assert mask.blocks is not None
        side = mask.blocks.shape[-1]
        share = float(mask.blocks.float().mean()) * 2 * side / (side + 1)
        name, work = f"{density:.0%} of the blocks", share * at.attention
        call = bind(flash_attention, at.q, at.k, at.v, mask=mask)
        mapped = bind(flash_attention, at.q, at.k, at.v, mask=mask, block=at.block, reduce=BOTH)
        read = bind_density(density)
        ways += [
            Way(name, call, work, at.inputs, "flash_attention", f"{share:.0%} kept", read),
            Way(f"{name}, with maps", mapped, work, at.inputs + 2 * at.maps, name, read=read),
        ]
    return ways
