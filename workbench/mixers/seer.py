"""SeerAttention: a learned gate over blocks decides which of them attention reads. One map to see, three to compare.

    gate      softmax over blocks of pooled, projected and rotated queries and keys          what was predicted
    target    block maxima of full attention over their row sum                              what the gate is trained to be
    executed  softmax over the keys of the selected blocks                                   what made the output

Prefill (SeerAttention) pools blocks of queries; decoding (SeerAttention-R) has one gate row per token, shared by the query
heads of a key head. The gate gets its gradient from ``kernels.seer.distillation_loss``, none through the selection.
Sources: Gao et al., arXiv:2410.13276 and arXiv:2506.08889.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.kernels.seer import AttnGate, seer_target, select_blocks
from workbench.mixers.chosen import (
    RoutedMap,
    best,
    block_means,
    check_side,
    chosen_softmax,
    in_blocks,
    positions,
    sees_itself,
)
from workbench.mixers.relative import rotate
from workbench.mixers.scored import check_tensor, checked, masked_softmax
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.lazy import LazyMap
from workbench.patterns.softmax import SoftmaxMap


class SeerMap(RoutedMap):
    """The executed map of SeerAttention, with ``gate`` (also ``native()``), ``target`` and the ``kept`` blocks.

    ``full`` is the map of attention without selection, with the same q and k. ``target`` is made of it when asked, as maps over
    blocks: one row per block of queries, or per token where the gate has one; for a gate shared by groups, the group's.
    """

    def __init__(
        self, executed: SoftmaxMap, gate: AttentionMap, kept: Tensor, side: int, full: SoftmaxMap, whole: bool
    ) -> None:
        super().__init__(executed, gate, kept, whole=whole)
        self.gate, self.side, self.full = gate, side, full

    @property
    def target(self) -> AttentionMap:
        return self._remember(("target",), self._target)

    def _target(self) -> AttentionMap:
        groups, rows, blocks = self.gate.shape[1:]
        shared = None if groups == self.shape[1] else groups
        if rows != self.shape[2]:
            return AttentionMap.from_dense(
                seer_target(self.full.blocks(self.side, "max"), shared), offset=0, domain="block"
            )

        def maxima(lo: int, hi: int) -> Tensor:
            weights = F.pad(self.full.rows(lo, hi), (0, blocks * self.side - self.shape[3]))
            return seer_target(weights.unflatten(-1, (blocks, self.side)).amax(-1), shared)

        return LazyMap(self.gate.shape, maxima, offset=self.offset, domain="block", row_sum="<=1")


def seer_gate(q: Tensor, k: Tensor, query: Tensor, key: Tensor, *, side: int, mask: Mask) -> Tensor:
    """The gate map ``[B, H, Q/side, K/side]`` of q ``[B, H, Q, F]`` and k ``[B, G, K, F]`` before positions, with the projections
    ``query`` ``[H, F, D]`` of mean queries and ``key`` ``[G, 3 F, D]`` of maxima, minima and means of keys."""
    check_tensor("q", q, ("B", "H", "Q", "F"))
    h, width = q.shape[1], q.shape[3]
    check_tensor("k", k, (q.shape[0], "G", "K", width))
    check_tensor("query", query, (h, width, "D"))
    check_tensor("key", key, (k.shape[1], 3 * width, query.shape[2]))
    try:
        gate = AttnGate(h, k.shape[1], width, gate=query.shape[2], block=side)
        return functional_call(gate, {"query": query, "key": key}, (q, k), {"mask": mask})
    except ValueError as error:
        raise WorkbenchError(str(error)) from None


def seer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    threshold: float | None = None,
    top: int | None = None,
    always: Iterable[str] = ("diagonal",),
    side: int = 64,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
) -> tuple[Tensor, SeerMap]:
    """Causal attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]`` and v ``[B, G, K, V]`` on the blocks of ``side`` tokens that
    ``gate`` ``[B, H or G, Q/side, K/side]`` selects (rows that sum to 1, of ``seer_gate`` or ``kernels.seer.AttnGate``).

    Either blocks whose gate is at least ``threshold``, or the ``top`` largest of each row; ``always`` as in
    ``kernels.seer.select_blocks``. The executed map is block-sparse: it answers in linear memory.
    """
    b, h, n, m, groups = _shapes(q, k, v, mask, side)
    rows, blocks = -(-n // side), -(-m // side)
    check_tensor("gate", gate, (b, h, rows, blocks), (b, groups, rows, blocks))
    names = (always,) if isinstance(always, str) else tuple(always)
    try:
        chosen = select_blocks(gate.detach(), threshold=threshold, top=top, always=names, side=side, offset=mask.offset)
    except ValueError as error:
        raise WorkbenchError(str(error)) from None
    kept = chosen.repeat_interleave(h // gate.shape[1], 1)
    out, executed = softmax_attention(q, k, v, mask=replace(mask, blocks=kept, side=side), scale=scale)
    whole = "diagonal" in names and sees_itself(mask, n, m)
    seen = AttentionMap.from_dense(gate.detach(), offset=0, domain="block")
    return out, SeerMap(executed, seen, kept, side, SoftmaxMap(q, k, mask=mask, scale=scale), whole)


def token_gate(q: Tensor, k: Tensor, query: Tensor, key: Tensor, *, side: int, offset: int = 0) -> Tensor:
    """The gate map ``[B, G, Q, K/side]`` of decoding: q ``[B, H, Q, F]`` and k ``[B, G, K, F]`` before positions, ``query``
    ``[G, (H / G) F, D]`` of the queries of a group side by side, ``key`` ``[G, 3 F, D]`` as in ``seer_gate``.

    Queries are rotated by their position, blocks by that of their first key. A block is seen once it is complete, so that no
    row knows of later keys; rows before that are zero.
    """
    check_tensor("q", q, ("B", "H", "Q", "F"))
    check_side("side", side)
    b, h, n, width = q.shape
    check_tensor("k", k, (b, "G", "K", width))
    groups, m = k.shape[1], k.shape[2]
    if h % groups:
        raise WorkbenchError(f"k: its {groups} heads must divide the {h} heads of q")
    check_tensor("query", query, (groups, h // groups * width, "D"))
    check_tensor("key", key, (groups, 3 * width, query.shape[2]))
    work = torch.promote_types(working_dtype(q.dtype), query.dtype)
    pad = (0, 0, 0, -m % side)
    cells = F.pad(k.to(work), pad, value=float("-inf")).unflatten(2, (-1, side))
    least = F.pad(k.to(work), pad, value=float("inf")).unflatten(2, (-1, side)).amin(3)
    pooled = torch.cat([cells.amax(3), least, block_means(k.to(work), side)], -1)
    starts = torch.arange(0, m, side, device=q.device)
    at = torch.arange(n, device=q.device) + offset
    grouped = q.to(work).unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)
    left = rotate(torch.einsum("bgni,gid->bgnd", grouped, query.to(work)), at)
    right = rotate(torch.einsum("bgni,gid->bgnd", pooled, key.to(work)), starts)
    scores = left @ right.transpose(-1, -2) * query.shape[2] ** -0.5
    return masked_softmax(scores, starts + side - 1 <= at[:, None])[0]


def seer_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    threshold: float | None = None,
    top: int | None = None,
    side: int = 64,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
) -> tuple[Tensor, SeerMap]:
    """SeerAttention-R: every token of q ``[B, H, Q, E]`` reads the blocks of k ``[B, G, K, E]`` and v ``[B, G, K, V]`` that its
    own row of ``gate`` ``[B, G, Q, K/side]`` selects, one choice for the query heads of a key head.

    Either blocks with a gate of at least ``threshold``, or the ``top`` largest (the token budget over ``side``); the token's own
    block is always read, and counted. With ``token_gate`` the rows before the last are what decoding would have read there.
    """
    b, h, n, m, groups = _shapes(q, k, v, mask, side)
    check_tensor("gate", gate, (b, groups, n, -(-m // side)))
    if (threshold is None) == (top is None):
        raise WorkbenchError(
            f"threshold or top: exactly one of them is given; got threshold={threshold!r}, top={top!r}"
        )
    at = positions(mask, n, q.device)
    block = torch.arange(gate.shape[3], device=q.device)
    own, past = block == at // side, (block <= at // side).expand_as(gate)
    open_gate = None if threshold is None else gate.detach() >= threshold
    kept = best(gate, top or 0, past, own) if open_gate is None else past & (open_gate | own)
    out, executed = chosen_softmax(q, k, v, in_blocks(kept, side, m, h // groups), mask=mask, scale=scale)
    seen = AttentionMap.from_dense(gate.detach(), offset=mask.offset, domain="block")
    full = SoftmaxMap(q, k, mask=mask, scale=scale)
    return out, SeerMap(executed, seen, kept, side, full, sees_itself(mask, n, m))


def _shapes(q: Tensor, k: Tensor, v: Tensor, mask: Mask, side: int) -> tuple[int, int, int, int, int]:
    shape = checked(q, k, v, mask)
    if not mask.causal or mask.prefix or mask.blocks is not None:
        raise WorkbenchError("mask is causal here, without prefix and without blocks, which the gate selects")
    check_side("side", side)
    return *shape, k.shape[1]


# ---------------------------------------------------------------------------- records


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    blocks = -(-tokens // 3)
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6), "gate": (2, 4, blocks, blocks)}
    given = example_tensors(seed, dtype, **shapes)
    hidden = torch.ones(blocks, blocks, dtype=torch.bool).triu(1)
    gate = given["gate"].masked_fill(hidden, float("-inf")).softmax(-1)
    return {**given, "gate": gate, "top": 2, "side": 3, "mask": Mask(causal=True)}


def _decode_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    blocks = -(-tokens // 3)
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6), "gate": (2, 2, tokens, blocks)}
    given = example_tensors(seed, dtype, **shapes)
    seen = torch.arange(blocks) * 3 <= torch.arange(tokens)[:, None]
    gate = masked_softmax(given["gate"], seen)[0]
    return {**given, "gate": gate, "top": 2, "side": 3, "mask": Mask(causal=True)}


def _projection(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * shape[1] ** -0.5


def _key_weights(given: dict[str, Any]) -> Tensor:
    """``[G, E, 48]`` as ``[G, 3 E, 16]``."""
    return given["key"].unflatten(2, (3, -1)).transpose(1, 2).flatten(1, 2)


def _native(given: dict[str, Any], gate: Tensor, top: int, side: int) -> dict[str, Any]:
    return {**{name: given[name] for name in ("q", "k", "v", "mask")}, "gate": gate, "top": top, "side": side}


def prepare_seer(given: dict[str, Any]) -> dict[str, Any]:
    """A gate over blocks of one token, so that nothing later enters a choice; 8 of them are read."""
    key = _key_weights(given)
    gate = seer_gate(given["gate_q"], given["gate_k"], given["query"], key, side=1, mask=given["mask"])
    return _native(given, gate, 8, 1)


def prepare_seer_decode(given: dict[str, Any]) -> dict[str, Any]:
    """A gate row per token over blocks of 4 tokens, of which 3 are read."""
    query = given["query"].unflatten(0, (given["k"].shape[1], -1)).flatten(1, 2)
    gate = token_gate(given["gate_q"], given["gate_k"], query, _key_weights(given), side=4, offset=given["mask"].offset)
    return _native(given, gate, 3, 4)


LEARNED = {"gate_q": Learned("HE"), "gate_k": Learned("GE")}
PARAMETERS = {"query": Parameter("HE16", _projection), "key": Parameter("GE48", _projection)}
NOTE = (
    "in a native model the gate reads queries and keys of its own and gets no gradient: it is trained by distillation"
)

VARIANTS = (
    Variant(
        name="seer-attention",
        paper="#63 SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (2024)",
        family="routing",
        priority="A",
        operator=seer_attention,
        example=_example,
        causal=True,
        reference="microsoft/SeerAttention seer_attn prefill",
        note=f"a block of queries is chosen by all of its queries, later ones included; {NOTE}",
        recipe=Recipe(learned=LEARNED, parameters=PARAMETERS, prepare=prepare_seer),
    ),
    Variant(
        name="seer-attention-r",
        paper="SeerAttention-R: Sparse Attention Adaptation for Long Reasoning (2025)",
        family="routing",
        priority="A",
        operator=seer_decode_attention,
        example=_decode_example,
        causal=True,
        reference="microsoft/SeerAttention seer_attn decode",
        note=f"the gate sees complete blocks, the one being filled is always read; {NOTE}",
        recipe=Recipe(learned=LEARNED, parameters=PARAMETERS, prepare=prepare_seer_decode),
    ),
)
