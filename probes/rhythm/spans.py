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
from workbench.maps import AttentionMap, GatedMap
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.padding import padding
from workbench.probes.rhythm.bands import check, first_key
from workbench.probes.sources import Source, maps_of, provenance_of
from workbench.probes.tables import Head, HeadTable
from workbench.probes.visibility import visibility
from workbench.run import Run

SHARE = 0.3


def head_spans(source: Source, *, prompt: int = 0, raw: bool = False) -> HeadTable:
    """Span of every head in tokens, with its interval over sequences and the span of even attention.

    ``prompt``: queries and keys of the first so many tokens are left out; so are padding queries. Gated maps count as
    they act, ``raw=True`` looks inside the gate. Missing weight counts as distance 0. Refused for signed and channel
    maps.
    """
    maps = maps_of(source)
    tokens = source.tokens if isinstance(source, Run) else None
    value, low, high, null = ({} for _ in range(4))
    for name, amap in maps.items():
        check(amap, name)
        inner = amap.raw if raw and isinstance(amap, GatedMap) else amap
        first = first_key(prompt, amap.shape[3])
        pad = padding(name, amap, tokens)
        seen = visibility(inner, real=pad.queries, keys=pad.keys)
        counted = seen.real & (torch.arange(amap.shape[2]) + amap.offset >= first)
        if not bool(counted.any()):
            raise Refused(f"layer {name!r} has no query after the prompt of {prompt} tokens")
        distance = inner.mass(mods.both(mods.distance(), mods.span(first, amap.shape[3])))
        each = _mean(distance.detach().cpu().double(), counted)
        value[name], (low[name], high[name]) = each.mean(0), interval(each)
        null[name] = _mean(_even(inner, seen, first), counted).mean(0).expand(amap.shape[1])
    return HeadTable(
        "Head span", {"span": value}, {"span": "tokens"}, {"span": low}, {"span": high}, {"span": null},
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


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted queries, ``[B, H]``."""
    kept = counted[:, None].expand(len(values), 1, -1)
    return torch.where(kept, values, 0.0).sum(-1) / kept.sum(-1)


def _even(amap: AttentionMap, seen: object, first: int) -> Tensor:
    """Distance under even attention, ``[B, 1 or H, Q]``."""
    parts = []
    keys = torch.arange(amap.shape[3])
    for lo, hi, tile in seen.tiles():  # type: ignore[attr-defined]
        apart = (torch.arange(lo, hi)[:, None] + amap.offset - keys).abs() * (keys >= first)
        parts.append((tile * apart).sum(-1, dtype=torch.float64) / tile.sum(-1).clamp(min=1))
    found = torch.cat(parts, -1)
    return found.expand(max(len(found), amap.shape[0]), -1, -1)


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
