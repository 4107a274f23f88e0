"""Static block-sparse softmax: which blocks of keys a block of queries sees, by a rule about block numbers.

    S2-Attention    I - J < L  or  (J + h step + 1) mod stride = 0,  step = max(1, floor(stride / H)),  J <= I
    PowerAttention  I - J < L  or  I - J = 2^t  or  J < S,  J <= I
    BigBird         |I - J| <= 1  or  I or J in {0, n - 1}  or  J in r random blocks of (h, I)
    BlockRank       segment(j) = 0  or  segment(j) = segment(i)  or  i in the last segment,  j <= i

I and J are the numbers of the blocks of query i and key j, h the head. Inside of a visible block the mask of the tokens
(causal or not) still holds. Hidden blocks cost nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.flash import flash_attention, union_attention, with_rows
from workbench.mixers.local import check_qkv, chosen
from workbench.mixers.windows import at_least_one, check_square
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.union import UnionMap

CAUSAL = Mask(causal=True)


def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    side: int,
    local_blocks: int,
    stride: int,
    mask: Mask = CAUSAL,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """S2-Attention: every head sees the last ``local_blocks`` blocks and its own shard of the rest, one block in ``stride``.

    q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``; blocks have ``side`` tokens. With a stride of at most H the
    heads' shards together hold all blocks. Source: Lin et al., arXiv:2407.17678; the rule is that of vLLM's block-sparse
    attention.
    """
    check_qkv(q, k, v)
    at_least_one("side", side)
    blocks = s2_blocks(q.shape[1], -(-k.shape[2] // side), local_blocks, stride).to(q.device)
    return flash_attention(q, k, v, mask=under_blocks(mask, blocks, side, q.shape[2]), scale=scale)


def s2_blocks(heads: int, blocks: int, local_blocks: int, stride: int) -> Tensor:
    """Visible blocks of S2-Attention, bool ``[1, H, blocks, blocks]``."""
    at_least_one("local_blocks", local_blocks)
    at_least_one("stride", stride)
    rows, columns = _numbers(blocks)
    head = torch.arange(heads)[:, None, None]
    shard = (columns + head * max(1, stride // heads) + 1) % stride == 0
    return ((columns <= rows) & ((rows - columns < local_blocks) | shard))[None]


def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    side: int,
    local_blocks: int = 1,
    sink_blocks: int = 1,
    mask: Mask = CAUSAL,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """PowerAttention: local blocks, first blocks, and blocks a power of two away, so that m layers reach 2^m blocks.

    Shapes as in ``s2_attention``. Source: PowerAttention (2025).
    """
    check_qkv(q, k, v)
    at_least_one("side", side)
    blocks = power_blocks(-(-k.shape[2] // side), local_blocks, sink_blocks).to(q.device)
    return flash_attention(q, k, v, mask=under_blocks(mask, blocks, side, q.shape[2]), scale=scale)


def power_blocks(blocks: int, local_blocks: int, sink_blocks: int) -> Tensor:
    """Visible blocks of PowerAttention, bool ``[1, 1, blocks, blocks]``."""
    at_least_one("local_blocks", local_blocks)
    rows, columns = _numbers(blocks)
    away = rows - columns
    power = (away > 0) & (away & (away - 1) == 0)
    return ((away >= 0) & ((away < local_blocks) | power | (columns < sink_blocks)))[None, None]


def bigbird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    side: int,
    random_blocks: int = 3,
    seed: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """BigBird: the own block and its two neighbours, the first and the last block as global ones, and random blocks.

    Shapes as in ``s2_attention``, with as many queries as keys; not causal. Random blocks differ between heads and are the same
    for the same ``seed``. Source: Zaheer et al., arXiv:2007.14062, the internal construction.
    """
    check_square(q, k, v)
    at_least_one("side", side)
    blocks = bigbird_blocks(q.shape[1], -(-k.shape[2] // side), random_blocks, seed).to(q.device)
    return flash_attention(q, k, v, mask=under_blocks(Mask(), blocks, side, q.shape[2]), scale=scale)


def bigbird_blocks(heads: int, blocks: int, random_blocks: int, seed: int) -> Tensor:
    """Visible blocks of BigBird, bool ``[1, H, blocks, blocks]``; a row draws among the blocks that it does not see anyway."""
    if isinstance(random_blocks, bool) or not isinstance(random_blocks, int) or random_blocks < 0:
        raise WorkbenchError(f"random_blocks is a number of blocks, 0 or more; got {random_blocks!r}")
    rows, columns = _numbers(blocks)
    ends = (0, blocks - 1)
    fixed = (rows - columns).abs() <= 1
    for end in ends:
        fixed = fixed | (rows == end) | (columns == end)
    drawn = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)).masked_fill(fixed, -1.0)
    values, at = drawn.topk(min(random_blocks, blocks), dim=-1)
    extra = torch.zeros(heads, blocks, blocks, dtype=torch.bool).scatter_(-1, at, values >= 0)
    return (fixed | extra)[None]


def blockrank_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, *, mask: Mask = CAUSAL, scale: float | None = None
) -> tuple[Tensor, UnionMap]:
    """BlockRank: documents see the instruction and themselves, the query at the end sees everything; all causal.

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``; ``segments`` ``[B or 1, N]`` int, rising from 0 (the instruction)
    over the documents to the query, the last segment. Source: Gupta et al., Scalable In-context Ranking with Generative
    Models (2025).
    """
    check_square(q, k, v)
    fits = segments.ndim == 2 and segments.shape[0] in (1, q.shape[0]) and segments.shape[1] == q.shape[2]
    if segments.is_floating_point() or segments.dtype == torch.bool or not fits:
        wanted = f"int {[q.shape[0], q.shape[2]]} or {[1, q.shape[2]]}"
        raise WorkbenchError(f"segments are {wanted}; got {segments.dtype} {list(segments.shape)}")
    if bool((segments[:, 1:] < segments[:, :-1]).any()) or bool((segments[:, 0] != 0).any()):
        raise WorkbenchError("segments start at 0 and do not fall along the tokens")
    if not mask.causal or mask.documents is not None or mask.offset:
        raise WorkbenchError("mask of BlockRank is causal, without documents and without an offset")
    visible = torch.ones_like(segments, dtype=torch.bool) if mask.keys is None else mask.keys.to(segments.device)
    first, last = segments == 0, segments == segments[:, -1:]
    masks = [
        replace(mask, keys=visible & first),
        replace(mask, keys=visible & ~first, documents=segments),
        with_rows(replace(mask, keys=visible & ~first & ~last), last, k.shape[2]),
    ]
    return union_attention([(q, k, part) for part in masks], v, scale=scale)


def segment_relevance(found: AttentionMap, segments: Tensor, queries: Tensor) -> Tensor:
    """Mass that the rows chosen by ``queries`` (bool ``[Q]``) put on each segment, their mean: ``[B, H, segments]``.

    Read at a middle layer, with the tokens of the query as rows, this ranks the documents (BlockRank's inference)."""
    b, _, q, k = found.shape
    if queries.dtype != torch.bool or tuple(queries.shape) != (q,) or not bool(queries.any()):
        raise WorkbenchError(f"queries is bool [{q}] and chooses a row; got {queries.dtype} {list(queries.shape)}")
    if segments.ndim != 2 or segments.shape[1] != k:
        raise WorkbenchError(f"segments are [B or 1, {k}]; got {list(segments.shape)}")
    values = torch.nn.functional.one_hot(segments.long()).double()[:, None].expand(b, found.kv_heads, -1, -1)
    return found.matvec(values)[:, :, queries].mean(2)


def under_blocks(mask: Mask, blocks: Tensor, side: int, queries: int) -> Mask:
    """``mask`` with the block rule ``blocks`` ``[B or 1, H or 1, K/side, K/side]`` of absolute positions."""
    if mask.blocks is not None:
        raise WorkbenchError("mask has blocks of its own; a block rule takes their place")
    if mask.offset % side:
        raise WorkbenchError(f"mask.offset starts a block of {side} tokens here; got {mask.offset}")
    first = mask.offset // side
    return replace(mask, blocks=blocks[:, :, first : first + -(-queries // side)], side=side)


def _numbers(blocks: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(blocks)
    return at[:, None], at[None]


def _example(**options: Any) -> Any:
    def example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8)}
        return {**example_tensors(seed, dtype, **shapes), **options}

    return example


def _segments(tokens: int, device: torch.device | None = None) -> Tensor:
    """Four segments of about equal length."""
    return (torch.arange(tokens, device=device) * 4 // tokens)[None]


def _blockrank_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_example()(seed, tokens, dtype), "segments": _segments(tokens)}


def _blockrank_recipe(given: dict[str, Any]) -> dict[str, Any]:
    segments = _segments(given["q"].shape[2], given["q"].device)
    return {name: given[name] for name in ("q", "k", "v", "mask")} | {"segments": segments}


VARIANTS = (
    Variant(
        name="s2-attention",
        paper="#26 Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads (2024)",
        family="softmax",
        priority="B",
        operator=s2_attention,
        example=_example(side=2, local_blocks=1, stride=3),
        causal=True,
        reference="vLLM blocksparse_attention (docstring of its pattern)",
        note="Phi-3-small is said to use blocks of 64 tokens, 16 local blocks and a stride of 8.",
        recipe=Recipe(prepare=chosen("q", "k", "v", "mask", side=4, local_blocks=2, stride=3)),
    ),
    Variant(
        name="power-attention",
        paper="#80 PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention (2025)",
        family="softmax",
        priority="B",
        operator=power_attention,
        example=_example(side=2),
        causal=True,
        reference="definition",
        note="No released code was found; local and first blocks beside the powers of two are taken from general knowledge.",
        recipe=Recipe(prepare=chosen("q", "k", "v", "mask", side=4)),
    ),
    Variant(
        name="bigbird-attention",
        paper="Big Bird: Transformers for Longer Sequences (2020)",
        family="softmax",
        priority="B",
        operator=bigbird_attention,
        example=_example(side=2, random_blocks=1),
        reference="transformers BigBirdBlockSparseAttention",
        note="Random blocks are drawn anew here; a trained model's are those of its own seed.",
        recipe=Recipe(prepare=chosen("q", "k", "v", side=4, random_blocks=1)),
    ),
    Variant(
        name="blockrank-attention",
        paper="#106 Scalable In-context Ranking with Generative Models (2025)",
        family="softmax",
        priority="B",
        operator=blockrank_attention,
        example=_blockrank_example,
        causal=True,
        reference="nilesh2797/BlockRank blockrank_std_attention",
        note="Segments are padded to one length in the released code; here they have their own.",
        recipe=Recipe(prepare=_blockrank_recipe, steps=False),
    ),
)
