"""Which heads read nearby, which look across the text?

The span of a head is the mean distance of what it attends to, in tokens (Li et al., arXiv 2510.13554, section 3):

    d = mean over the queries t of the response of sum_s A[t, s] (t - s)

The 30% of all heads with the smallest span are called local, the 30% with the largest global. A span grows with the
text, so spans are compared on one text, and stand beside that of evenly spread attention.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from workbench import mods
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.rhythm.bands import first_key
from workbench.probes.rhythm.waad import NO_DISTANCE
from workbench.probes.sources import Source, inner, maps_of, need_shares, provenance_of, real_mean, tokens_of
from workbench.probes.tables import Head, HeadTable
from workbench.probes.visibility import Visibility, layer_visibility

SHARE = 0.3


def head_spans(source: Source, *, prompt: int = 0, raw: bool = False) -> HeadTable:
    """Span of every head in tokens, with its interval over sequences and the span of even attention.

    ``prompt``: queries and keys of the first so many tokens are left out; so are padding queries. Gated maps count as
    they act, ``raw=True`` looks inside the gate. Missing weight counts as distance 0, but a head without any is NaN.
    Refused for signed and channel maps.
    """
    maps = maps_of(source)
    each, null, undefined = {}, {}, {}
    for name, amap in maps.items():
        asked = inner(name, amap, raw)
        need_shares(name, asked, NO_DISTANCE)
        first = first_key(prompt, amap.shape[3])
        seen = layer_visibility(name, asked, tokens_of(source))
        counted = seen.real & (torch.arange(amap.shape[2]) + amap.offset >= first)
        if not bool(counted.any()):
            raise Refused(f"layer {name!r} has no query after the prompt of {prompt} tokens")
        known = mods.both(mods.distance(), mods.span(first, amap.shape[3]))
        distance = asked.mass(known) if first else asked.distance()
        each[name] = real_mean(distance, counted)
        nowhere = each[name] == 0
        if bool(nowhere.any()) and asked.row_sum != "1":
            each[name] = each[name].masked_fill(nowhere & (real_mean(asked.row_sums(), counted) == 0), float("nan"))
        if bool(each[name].isnan().any()):
            undefined[str(name)] = "a head without weight, or a sequence without a query, looks nowhere"
        null[name] = real_mean(_even(asked, seen, first), counted)
    return HeadTable.averaged(
        "Head span", {"span": each}, {"span": "tokens"}, null={"span": null}, undefined=undefined,
        provenance=provenance_of(source),
    )  # fmt: skip


def local_heads(spans: HeadTable, share: float = SHARE) -> list[Head]:
    """The ``share`` of all heads with the smallest span, smallest first."""
    return spans.top("span")[::-1][: _count(spans, share)]


def global_heads(spans: HeadTable, share: float = SHARE) -> list[Head]:
    """The ``share`` of all heads with the largest span, largest first."""
    return spans.top("span")[: _count(spans, share)]


def mean_over(heads: Iterable[Head], values: dict[int | str, Tensor]) -> Tensor:
    """Mean over chosen heads of per-layer values ``[B, H, T]``: ``[B, T]``."""
    return torch.stack([values[head.layer][:, head.head] for head in heads]).mean(0)


def _count(spans: HeadTable, share: float) -> int:
    if not 0 < share <= 0.5:
        raise WorkbenchError(f"share is the part of the heads that count as local, in (0, 0.5]; got {share}")
    return max(1, round(share * len(spans.top("span"))))


def _even(amap: AttentionMap, seen: Visibility, first: int) -> Tensor:
    """Distance under even attention, ``[B, H, Q]``."""
    parts = []
    keys = torch.arange(amap.shape[3])
    for lo, hi, tile in seen.tiles():
        apart = (torch.arange(lo, hi)[:, None] + amap.offset - keys).abs() * (keys >= first)
        parts.append((tile * apart).sum(-1, dtype=torch.float64) / tile.sum(-1).clamp(min=1))
    return torch.cat(parts, -1).expand(*amap.shape[:2], -1)


ANALYSES = (
    Analysis(
        name="head-spans",
        question="Which heads read nearby, which look across the text?",
        function=head_spans,
        example=lambda: {"source": random_maps(tokens=24)},
        paper="Li et al. 2025 (arXiv 2510.13554), section 3",
        source="maps",
        null="evenly spread attention over the visible keys",
    ),
)
