"""Superlinear multi-step attention: search for spans, attend inside of each, mix the spans by how well they were found.

    anchors of i    a_t = i - (floor(t^(1/p)) - 1),  t = w + 1, w + 2, ...                         about i^p of them
    spans of i      the ``spans`` anchors with the largest x_i . k_a;  from a - ceil(f_b (i+1)^r) to a + ceil(f_f (i+1)^r)
    window of i     the last floor((w + 1)^(1/p)) - 1 keys, of which every span has a share
    o_i = sum_s g_is softmax(scale q_i . k_j over j in span s or window) v,   g_i = softmax_s(x_i . k_a)

Rows sum to 1, but are no softmax over all their keys at once; where spans overlap, weights add up. Anchors begin behind the
window, so every key can be found. Source: Huang, Superlinear Multi-Step Attention, arXiv:2601.18401, and its released code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from workbench import attention_map
from workbench.catalogue import Learned, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.chosen import RoutedSparseMap, check_side
from workbench.mixers.scored import check_tensor, checked, masked_softmax, plain_scores, weighted
from workbench.patterns.sparse import SparseMap

UNFOUND = -1e9
"""Search score of a span that does not exist, as released: spans that were found get all of the gate."""


class SpansMap(RoutedSparseMap):
    """Weights over the spans and the window of each row.

    ``gate`` ``[B, H, Q, spans]`` (also ``native()``) is the weight of each span; ``first`` and ``last`` are its ends, -1 where
    there is none (its share of the gate then goes to the window)."""

    def __init__(self, executed: SparseMap, gate: Tensor, first: Tensor, last: Tensor) -> None:
        super().__init__(executed, gate)
        self.gate, self.first, self.last = self.router, first, last


def superlinear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    search: Tensor,
    *,
    spans: int = 3,
    window_index: int = 0,
    backward: float = 2.0,
    forward: float = 0.0,
    search_power: float = 0.5,
    span_power: float = 0.5,
    scale: float | None = None,
    offset: int = 0,
) -> tuple[Tensor, SpansMap]:
    """Two-step causal attention: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``; ``search`` ``[B, H, Q, E]`` are the
    queries of the first step (no scale there).

    ``window_index`` w sets the window, ``backward`` f_b and ``forward`` f_f the reach of a span around its anchor,
    ``search_power`` p the number of anchors and ``span_power`` r the length of spans. Gradients flow through the softmax of every
    span and through the gate to ``search``. The map holds the weights of spans and window.
    """
    b, h, n, m = checked(q, k, v, Mask(causal=True, offset=offset))
    check_tensor("search", search, (b, h, n, q.shape[3]))
    check_side("spans", spans)
    if isinstance(window_index, bool) or not isinstance(window_index, int) or window_index < 0:
        raise WorkbenchError(f"window_index is a number of stripes, not negative; got {window_index!r}")
    for name, power in (("search_power", search_power), ("span_power", span_power)):
        if not 0 < power < 1:
            raise WorkbenchError(f"{name} is between 0 and 1; got {power}")
    if not backward > 0 or not forward >= 0 or math.inf in (backward, forward):
        raise WorkbenchError(f"backward is positive and forward not negative; got {backward} and {forward}")
    if offset + n > m:
        raise WorkbenchError(f"the last query stands at {offset + n - 1}; k has {m} keys")
    at = torch.arange(n, device=q.device) + offset
    window = _stripe(window_index + 1, search_power) - 1
    anchor, value = _found(search, k, at, spans, window_index, search_power)
    gate = value.masked_fill(anchor < 0, UNFOUND).softmax(-1)
    reach = (at + 1).double() ** span_power
    first = (anchor - (backward * reach).ceil().long()[:, None]).clamp(min=0)
    last = torch.minimum(anchor + (forward * reach).ceil().long()[:, None], (at - window)[:, None])
    first, last = first.masked_fill(anchor < 0, -1), last.masked_fill(anchor < 0, -1)
    out, found = _inside(q, k, v, gate, first, last, at, window, scale)
    return out, SpansMap(found, gate, first, last)


def _stripe(index: int, power: float) -> int:
    """floor(index^(1 / power)), exact where 1 / power is a whole number."""
    inverse = 1 / power
    whole = round(inverse)
    return index**whole if abs(inverse - whole) < 1e-12 else math.floor(index**inverse)


def _found(search: Tensor, k: Tensor, at: Tensor, spans: int, window_index: int, power: float) -> tuple[Tensor, Tensor]:
    """Anchors with the best scores and their scores, both ``[B, H, Q, spans]``; -1 where a row has fewer."""
    shifts, index, farthest = [], window_index + 1, int(at.max())
    while (shift := _stripe(index, power) - 1) <= farthest:
        shifts.append(shift)
        index += 1
    (b, h, _, _), work = search.shape, working_dtype(search.dtype)
    anchors = at[:, None] - torch.tensor(shifts, dtype=torch.int64, device=at.device)
    keys = k.to(work)[:, :, anchors.clamp(min=0)]
    grouped = search.to(work).unflatten(1, (k.shape[1], -1))
    scores = (keys[:, :, None] @ grouped[..., None]).squeeze(-1).flatten(1, 2)
    scores = scores.masked_fill(anchors < 0, float("-inf"))
    value, place = scores.topk(min(spans, len(shifts)), dim=-1)
    anchor = anchors.expand(b, h, -1, -1).gather(-1, place).masked_fill(value.isneginf(), -1)
    missing = spans - place.shape[-1]
    pad = (0, missing)
    return torch.nn.functional.pad(anchor, pad, value=-1), torch.nn.functional.pad(value, pad, value=UNFOUND)


def _inside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    first: Tensor,
    last: Tensor,
    at: Tensor,
    window: int,
    scale: float | None,
) -> tuple[Tensor, SparseMap]:
    """Softmax inside of every span and the window, mixed by the gate; rows in chunks, as their scores are made for all keys."""
    (b, h, n, _), m = q.shape, k.shape[2]
    length = int((last - first).max()) + 1
    near = at[:, None] - torch.arange(window, device=q.device)
    near = near.masked_fill(near < 0, -1)
    step = max(1, attention_map.CHUNK // (b * h * m))
    outs, listed, held = [], [], []
    for lo in range(0, n, step):
        rows = slice(lo, min(n, lo + step))
        inside = first[:, :, rows, :, None] + torch.arange(length, device=q.device)
        inside = inside.masked_fill((inside > last[:, :, rows, :, None]) | (first[:, :, rows, :, None] < 0), -1)
        beside = near[rows].expand(b, h, -1, -1)
        keys = torch.cat([inside.flatten(3), beside], -1)
        scores = plain_scores(q[:, :, rows], k, scale).gather(-1, keys.clamp(min=0))
        spanned = scores[..., : -window or None].unflatten(-1, inside.shape[3:])
        shared = scores[..., spanned[0, 0, 0].numel() :, None].transpose(-1, -2)
        joint = torch.cat([spanned, shared.expand(*spanned.shape[:4], window)], -1)
        seen = torch.cat([inside, beside[..., None, :].expand(*inside.shape[:4], window)], -1) >= 0
        weights = masked_softmax(joint, seen)[0] * gate[:, :, rows, :, None]
        weights = torch.cat([weights[..., :length].flatten(3), weights[..., length:].sum(3)], -1)
        dense = torch.zeros(*weights.shape[:3], m, dtype=weights.dtype, device=q.device)
        outs.append(weighted(dense.scatter_add(-1, keys.clamp(min=0), weights), v))
        listed.append(keys)
        held.append(weights.detach())
    found = SparseMap(torch.cat(listed, 2), torch.cat(held, 2), m, kv_heads=k.shape[1], offset=int(at[0]))
    return torch.cat(outs, 2), found


# ---------------------------------------------------------------------------- records


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6), "search": (2, 4, tokens, 8)}
    return {**example_tensors(seed, dtype, **shapes), "spans": 2, "window_index": 1, "backward": 1.0}


def prepare_superlinear(given: dict[str, Any]) -> dict[str, Any]:
    """The released two to three spans, reach of 2 roots back and 1 ahead, window of 3 keys."""
    named = {"window_index": 1, "backward": 2.0, "forward": 1.0, "offset": given["mask"].offset}
    return {**{name: given[name] for name in ("q", "k", "v", "search")}, **named}


VARIANTS = (
    Variant(
        name="superlinear",
        paper="#95 Superlinear Multi-Step Attention (2026)",
        family="routing",
        priority="B",
        operator=superlinear_attention,
        example=_example,
        causal=True,
        reference="concavity-ai/superlinear kernels",
        note="the sequence-mixing layer before the search, Mamba-2 in the release, is not part of it",
        recipe=Recipe(learned={"search": Learned("HE")}, prepare=prepare_superlinear),
    ),
)
