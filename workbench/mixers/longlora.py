"""Shifted sparse attention: groups of tokens, moved by half a group in half of the heads (LongLoRA), with sinks (SinkLoRA).

    group g, heads below H / 2   floor(i / g) = floor(j / g),                     j <= i
    the other heads              floor((i + g / 2) / g) = floor((j + g / 2) / g),   j <= i

This is what LongLoRA's FlashAttention path computes. Its eager path rolls the second half of the heads by g / 2 and applies a
causal mask in the rolled order, where the first g / 2 tokens come after the last ones: they see the end of the sequence.
``future_mass`` shows that leak. SinkLoRA returns a part of the moved heads to their place and lets all tokens see the first ones.
Sources: Chen et al., arXiv:2309.12307, section 3.2, and the released code; SinkLoRA (2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.block_masks import under_blocks
from workbench.mixers.flash import flash_attention, union_attention, with_keys
from workbench.mixers.local import chosen
from workbench.mixers.windows import at_least_one, check_square
from workbench.patterns.arranged import PermutedMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.union import UnionMap

CAUSAL = Mask(causal=True)


def shifted_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: int,
    shifted_heads: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """S2-Attn of LongLoRA without wrapping: q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``.

    ``group`` is even, a quarter of the tokens in the paper; the last ``shifted_heads`` heads are moved, half of them by default.
    """
    mask = _groups(q, k, v, group, shifted_heads, CAUSAL)
    return flash_attention(q, k, v, mask=mask, scale=scale)


def wrapped_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: int,
    shifted_heads: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, PermutedMap]:
    """S2-Attn of LongLoRA as its eager code has it: rolled, grouped, causal in the rolled order. Not causal in the true one.

    q ``[B, H, N, E]``, k ``[B, H, N, E]``, v ``[B, H, N, V]``: grouped keys are repeated before. Options as in
    ``shifted_sparse_attention``.
    """
    moved = _moved(q, k, v, group, shifted_heads)
    h, n = q.shape[1:3]
    if k.shape[1] != h:
        raise WorkbenchError(f"k has the {h} heads of q here, repeated before; got {k.shape[1]}")
    position = torch.arange(n, device=q.device)
    order = (position + moved.to(q.device)[:, None] * (group // 2)) % n
    mask = Mask(causal=True, documents=(position // group)[None])
    rolled = [part.gather(2, order[None, :, :, None].expand_as(part)) for part in (q, k, v)]
    out, inner = flash_attention(*rolled, mask=mask, scale=scale)
    place = order.argsort(-1)
    return out.gather(2, place[None, :, :, None].expand_as(out)), PermutedMap(inner, place[None], place[None])


def sink_fixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: int,
    sinks: int = 4,
    shifted_heads: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, UnionMap]:
    """SF-Attn of SinkLoRA: groups, fewer moved heads (a quarter by default), and first tokens that all later ones see.

    Shapes and options as in ``shifted_sparse_attention``; ``sinks`` first tokens.
    """
    at_least_one("sinks", sinks)
    count = q.shape[1] // 4 if shifted_heads is None else shifted_heads
    first = (torch.arange(k.shape[2], device=k.device) < sinks)[None]
    masks = [with_keys(CAUSAL, first), _groups(q, k, v, group, count, with_keys(CAUSAL, ~first))]
    return union_attention([(q, k, mask) for mask in masks], v, scale=scale)


def future_mass(found: AttentionMap) -> Tensor:
    """Mass of every row on tokens after it, ``[B, H, Q]``: 0 everywhere for a causal map."""
    return found.mass(lambda b, h, q, k: k > q)


def _moved(q: Tensor, k: Tensor, v: Tensor, group: int, shifted_heads: int | None) -> Tensor:
    """Whether each head is moved, bool ``[H]``."""
    check_square(q, k, v)
    at_least_one("group", group)
    if group % 2:
        raise WorkbenchError(f"group is even, as heads move by half of it; got {group}")
    heads = q.shape[1]
    count = heads // 2 if shifted_heads is None else shifted_heads
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= heads:
        raise WorkbenchError(f"shifted_heads is a number of heads from 0 to {heads}; got {count!r}")
    return torch.arange(heads) >= heads - count


def _groups(q: Tensor, k: Tensor, v: Tensor, group: int, shifted_heads: int | None, mask: Mask) -> Mask:
    """Groups as pairs of blocks of half a group, which pair up otherwise in moved heads."""
    moved = _moved(q, k, v, group, shifted_heads)
    side = group // 2
    pair = (torch.arange(-(-q.shape[2] // side)) + moved[:, None]) // 2
    return under_blocks(mask, (pair[:, :, None] == pair[:, None])[None].to(q.device), side, q.shape[2])


def _example(groups: int, **options: Any) -> Any:
    def example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        shapes = {"q": (2, 4, tokens, 8), "k": (2, groups, tokens, 8), "v": (2, groups, tokens, 8)}
        return {**example_tensors(seed, dtype, **shapes), **options}

    return example


def _repeated(given: dict[str, Any]) -> dict[str, Any]:
    times = given["q"].shape[1] // given["k"].shape[1]
    return {"q": given["q"], "group": 8} | {name: given[name].repeat_interleave(times, 1) for name in ("k", "v")}


LONGLORA = "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models (2023)"
VARIANTS = (
    Variant(
        name="longlora-s2-attention",
        paper=LONGLORA,
        family="softmax",
        priority="B",
        operator=shifted_sparse_attention,
        example=_example(2, group=4),
        causal=True,
        reference="LongLoRA llama_attn_replace.forward_flashattn",
        recipe=Recipe(prepare=chosen("q", "k", "v", group=8)),
    ),
    Variant(
        name="longlora-s2-attention-wrapped",
        paper=LONGLORA,
        family="softmax",
        priority="B",
        operator=wrapped_sparse_attention,
        example=_example(4, group=4),
        reference="SinkLoRA llama_attn_replace.forward_noflashattn",
        note="Looks ahead although it is meant to be causal: first tokens of the moved heads see the last ones.",
        recipe=Recipe(prepare=_repeated),
    ),
    Variant(
        name="sinklora-sf-attention",
        paper="#153 SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models (2024)",
        family="softmax",
        priority="B",
        operator=sink_fixed_attention,
        example=_example(2, group=4, sinks=2),
        causal=True,
        reference="definition",
        note="The released code holds only LongLoRA's attention: the share of heads that moves and the sinks are taken from the "
        "paper's summary.",
        recipe=Recipe(prepare=chosen("q", "k", "v", group=8, sinks=2)),
    ),
)
