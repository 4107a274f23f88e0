"""Pyramid sparse attention: blocks of keys are read in full, averaged in pools of 2, 4 or 8, or not at all.

    s_iP = scale q_i . mean(k_j, j in P) + ln |P|        for the pools P of a block at its level (1, 2, 4, 8 tokens; 0: skipped)
    o_i  = sum_P softmax_P(s_i) mean(v_j, j in P)

The lift to tokens is exact: every token of a pool has the pool's weight over the number of its tokens, which is the softmax over
tokens whose keys are the means of their pools. Source: PSA: Pyramid Sparse Attention for Efficient Video Understanding and
Generation, and its released kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.chosen import block_means, check_side
from workbench.mixers.scored import checked, masked_softmax, plain_scores, weighted
from workbench.patterns.lazy import LazyMap

LEVELS = (1, 2, 4, 8)
QUOTA = {1: 0.10, 2: 0.05, 4: 0.0, 8: 0.20}
"""Share of blocks at each level in the released configuration; the other 65 % are skipped."""


class PyramidMap(LazyMap):
    """The exact token map of pooled attention.

    ``levels`` ``[B or 1, H or 1, Q/query_side, K/key_side]`` (also ``native()``) is the level of each block as executed."""

    levels: Tensor

    def native(self) -> Tensor:
        """The level of each block."""
        return self.levels


def pyramid_levels(importance: Tensor, quota: Mapping[int, float] = QUOTA) -> Tensor:
    """Levels int64 from the importance ``[B, H, rows, blocks]`` of blocks: the best share of each row at the first level, the
    next share at the second, and so on; the rest is 0. The best block of a row is always read in full."""
    if importance.ndim != 4 or not importance.is_floating_point():
        raise WorkbenchError(
            f"importance is floating point [B, H, rows, blocks]; got {importance.dtype} {list(importance.shape)}"
        )
    if any(level not in LEVELS or share < 0 for level, share in quota.items()) or sum(quota.values()) > 1 + 1e-9:
        raise WorkbenchError(f"quota gives levels of {LEVELS} shares that sum to at most 1; got {dict(quota)}")
    blocks = importance.shape[3]
    ranks = importance.detach().sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    levels = torch.zeros_like(ranks)
    start, total = 0, 0.0
    for level, share in quota.items():
        total += share
        end = max(start, int(blocks * total + 1e-9))
        levels = levels.masked_fill((ranks >= start) & (ranks < end), level)
        start = end
    return levels.masked_fill(ranks == 0, 1)


def pyramid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    *,
    query_side: int = 128,
    key_side: int = 64,
    mask: Mask = Mask(),
    scale: float | None = None,
) -> tuple[Tensor, PyramidMap]:
    """Attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]`` and v ``[B, G, K, V]`` at the resolution of ``levels``.

    ``levels`` ``[B or 1, H or 1, Q/query_side, K/key_side]`` (rounded up, int64) says for every block of queries and keys how
    many tokens a pool has: 1, 2, 4 or 8, or 0 to skip it. Pools at the end of the keys hold what is there. ``mask`` may be
    causal; blocks that not all of their queries see in full are then read at level 1 at most.
    """
    b, h, n, m = checked(q, k, v, mask)
    check_side("query_side", query_side)
    check_side("key_side", key_side)
    plain = Mask(causal=mask.causal, offset=mask.offset)
    if plain.parts() != mask.parts():
        raise WorkbenchError("mask is causal or empty here, with an offset: pools hold visible keys only")
    rows, blocks = -(-n // query_side), -(-m // key_side)
    whole = isinstance(levels, Tensor) and levels.dtype == torch.int64 and levels.ndim == 4
    if (
        not whole
        or levels.shape[0] not in (1, b)
        or levels.shape[1] not in (1, h)
        or levels.shape[2:] != (rows, blocks)
    ):
        got = f"{levels.dtype} {list(levels.shape)}" if isinstance(levels, Tensor) else type(levels).__name__
        raise WorkbenchError(f"levels are int64 [B or 1, H or 1, {rows}, {blocks}]; got {got}")
    used = [int(level) for level in levels.unique()]
    if any(level and (level not in LEVELS or key_side % level) for level in used):
        raise WorkbenchError(f"levels are 0 or of {LEVELS} and divide key_side={key_side}; got {used}")
    levels = levels.detach()
    if mask.causal:
        first = torch.arange(rows, device=q.device)[:, None] * query_side + mask.offset
        ends = (torch.arange(blocks, device=q.device) + 1) * key_side - 1
        levels = torch.where(ends <= first, levels, levels.clamp(max=1))
    own = (torch.arange(n, device=q.device) + mask.offset).clamp(max=m - 1) // key_side
    seen = levels[:, :, torch.arange(n, device=q.device) // query_side] > 0
    full = seen.gather(-1, own[:, None].expand(*seen.shape[:3], 1)).all() if mask.causal else seen.any(-1).all()
    used = [level for level in used if level]
    work = working_dtype(q.dtype)
    pools = {level: block_means(k.to(work), level) for level in used}
    weights = _weights(q, pools, levels, (query_side, key_side), mask, scale, 0, m)
    held, kept = q.detach(), {level: pool.detach() for level, pool in pools.items()}

    def some(lo: int, hi: int) -> Tensor:
        return _weights(held[:, :, lo:hi], kept, levels, (query_side, key_side), mask, scale, lo, m)

    row_sum = "1" if bool(full) else "<=1"
    found = PyramidMap((b, h, n, m), some, kv_heads=k.shape[1], offset=mask.offset, row_sum=row_sum)
    found.levels = levels
    return weighted(weights, v), found


def _weights(
    q: Tensor,
    pools: Mapping[int, Tensor],
    levels: Tensor,
    sides: tuple[int, int],
    mask: Mask,
    scale: float | None,
    lo: int,
    keys: int,
) -> Tensor:
    """Weights of the query rows from ``lo`` on: the softmax over tokens with the keys of their pools."""
    at = torch.arange(lo, lo + q.shape[2], device=q.device)
    here = levels[:, :, at // sides[0]].repeat_interleave(sides[1], -1)[..., :keys]
    scores = torch.full((*q.shape[:3], keys), -math.inf, dtype=working_dtype(q.dtype), device=q.device)
    for level, pool in pools.items():
        wide = plain_scores(q, pool, scale).repeat_interleave(level, -1)[..., :keys]
        scores = torch.where(here == level, wide, scores)
    allowed = here > 0
    if mask.causal:
        allowed = allowed & (torch.arange(keys, device=q.device) <= at[:, None] + mask.offset)
    return masked_softmax(scores, allowed.expand_as(scores))[0]


# ---------------------------------------------------------------------------- records


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    rows, blocks = -(-tokens // 3), -(-tokens // 4)
    shapes = {
        "q": (2, 4, tokens, 8),
        "k": (2, 2, tokens, 8),
        "v": (2, 2, tokens, 6),
        "importance": (2, 4, rows, blocks),
    }
    given = example_tensors(seed, dtype, **shapes)
    levels = pyramid_levels(given.pop("importance"), {1: 0.3, 2: 0.3, 4: 0.3})
    return {**given, "levels": levels, "query_side": 3, "key_side": 4}


def prepare_pyramid(given: dict[str, Any]) -> dict[str, Any]:
    """Blocks of 4 tokens, ranked by the products of their means; a quarter of them at each of the levels 1, 2 and 4."""
    q, k = given["q"], given["k"]
    importance = plain_scores(block_means(q.detach(), 4), block_means(k.detach(), 4))
    levels = pyramid_levels(importance, {1: 0.25, 2: 0.25, 4: 0.25})
    return {"q": q, "k": k, "v": given["v"], "levels": levels, "query_side": 4, "key_side": 4}


VARIANTS = (
    Variant(
        name="pyramid-sparse-attention",
        paper="#110 PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation (2025)",
        family="routing",
        priority="B",
        operator=pyramid_attention,
        example=_example,
        reference="ziplab/Pyramid-Sparse-Attention src/psa_triton",
        note="importance is an argument of pyramid_levels; the release takes block maxima of attention over sampled tokens",
        recipe=Recipe(prepare=prepare_pyramid),
    ),
)
