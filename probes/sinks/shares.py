"""How much of a layer's attention each key receives, from column sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import Refused
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.probes.bootstrap import standard_error
from workbench.probes.padding import Padding, padding
from workbench.probes.visibility import Visibility, visibility

_CHUNK = 2**24


@dataclass(frozen=True)
class Shares:
    """One layer. ``share error uniform`` ``[H, K]`` and ``queries`` ``[K]`` are means over sequences, ``first`` and
    ``paid`` ``[B, H]`` the first token's share and its attention averaged over all real queries; keys count from
    the first real token. ``gate`` ``[H]`` is the mean gate over real queries of a gated layer. ``forced``: nobody
    who sees the first token has a choice.
    """

    share: Tensor
    error: Tensor
    uniform: Tensor
    queries: Tensor
    first: Tensor
    paid: Tensor
    gate: Tensor | None
    tokens: tuple[str, ...]
    forced: bool


def shares(
    name: int | str,
    amap: AttentionMap,
    tokens: Tokens | None = None,
    *,
    keys: int | None = None,
    raw: bool = False,
    mask: Mask | None = None,
) -> Shares:
    """Shares of the first ``keys`` keys of the layer ``name``; see ``probes/sinks/scores.py`` for the quantities."""
    if amap.domain in ("channel", "frequency"):
        raise Refused(f"layer {name!r}: columns of a {amap.domain} map are no tokens, so no token can be a sink")
    if raw and amap.row_sum == "gate" and not isinstance(amap, GatedMap):
        raise Refused(f"layer {name!r}: {amap!r} does not hold the attention inside its gate; ask with raw=False")
    inner = amap.raw if isinstance(amap, GatedMap) else amap
    pad = padding(name, amap, tokens)
    seen = visibility(amap, mask=mask, real=pad.queries, keys=pad.keys)
    gate = amap.gate if isinstance(amap, GatedMap) and not raw else None
    received = _received(inner if raw else amap, pad, seen)
    count = seen.queries()
    share = torch.where(count > 0, received / count.clamp(min=1), float("nan"))
    uniform = seen.uniform(gate).expand_as(share)
    share, uniform, received = pad.align(share), pad.align(uniform), pad.align(received)
    width = share.shape[-1] if keys is None else min(keys, share.shape[-1])
    return Shares(
        share=share[..., :width].nanmean(0),
        error=standard_error(share[..., :width]),
        uniform=uniform[..., :width].nanmean(0),
        queries=pad.align(count.expand_as(share)).nan_to_num(0.0).mean((0, 1))[:width],
        first=share[..., 0],
        paid=received[..., 0] / pad.real_queries(amap.shape[2])[:, None],
        gate=_mean_gate(amap, seen) if isinstance(amap, GatedMap) else None,
        tokens=pad.labels(width),
        forced=_forced(seen, pad),
    )


def _received(amap: AttentionMap, pad: Padding, seen: Visibility) -> Tensor:
    """Column sums over real queries, ``[B, H, K]`` in float64."""
    hidden = seen.mask.queries
    emptied = hidden is not None and pad.queries is not None and not bool((hidden.cpu() & ~pad.queries).any())
    if pad.queries is None or emptied or bool(pad.queries.all()):
        return amap.received().detach().cpu().double()
    b, h, queries, keys = amap.shape
    step = max(1, _CHUNK // max(1, b * h * keys))
    total = torch.zeros(b, h, keys, dtype=torch.float64)
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        real = pad.queries[:, None, lo:hi, None]
        total += amap.rows(lo, hi).detach().cpu().double().masked_fill(~real, 0.0).sum(2)
    return total


def _mean_gate(amap: GatedMap, seen: Visibility) -> Tensor:
    real = seen.real[:, None].expand(amap.shape[:3])
    return amap.gate.detach().cpu().double().masked_fill(~real, 0.0).sum((0, 2)) / real.sum((0, 2))


def _forced(seen: Visibility, pad: Padding) -> bool:
    """Whether every query that may see the first token can see nothing else: then its share says nothing."""
    ones = seen.uniform()
    first = pad.align(ones.expand(max(len(ones), pad.batch), -1, -1))[..., 0]
    return bool(((first - 1).abs() < 1e-12).all())
