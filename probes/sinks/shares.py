"""How much of a layer's attention each key receives, from column sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.probes.bootstrap import standard_error
from workbench.probes.padding import Padding, padding
from workbench.probes.visibility import Visibility, visibility

_CHUNK = 2**24


@dataclass(frozen=True)
class Columns:
    """What the keys of one layer receive, per sequence; keys count from the first real token, NaN where there is none.

    ``share`` ``[B, H, K]``: mean weight over the real queries that may see the key; ``uniform`` the same if every query spread
    its weight evenly; ``mass`` the sum over the queries; ``signed`` the mean signed weight of a signed map, else None.
    ``queries`` ``[B, 1 or H, K]``: how many may see the key.
    """

    share: Tensor
    uniform: Tensor
    mass: Tensor
    signed: Tensor | None
    queries: Tensor
    pad: Padding
    seen: Visibility


@dataclass(frozen=True)
class Shares:
    """One layer. ``share error uniform signed`` ``[H, K]`` and ``queries`` ``[K]`` are means over sequences, ``first`` and
    ``paid`` ``[B, H]`` the sink token's share and its attention averaged over all real queries; keys count from
    the first real token. ``gate`` ``[H]`` is the mean gate over real queries of a gated layer. ``forced``: nobody
    who sees the sink token has a choice.
    """

    share: Tensor
    error: Tensor
    uniform: Tensor
    signed: Tensor | None
    queries: Tensor
    first: Tensor
    paid: Tensor
    gate: Tensor | None
    tokens: tuple[str, ...]
    forced: bool


def columns(
    name: int | str,
    amap: AttentionMap,
    tokens: Tokens | None = None,
    *,
    raw: bool = False,
    mask: Mask | None = None,
    relative: bool = False,
) -> Columns:
    """Column sums of the layer ``name``; see ``probes/sinks/scores.py`` for the quantities and for ``relative``."""
    if amap.domain != "token":
        raise Refused(f"layer {name!r}: columns of a {amap.domain} map are no tokens, so no token can be a sink")
    if raw and amap.row_sum == "gate" and not isinstance(amap, GatedMap):
        raise Refused(f"layer {name!r}: {amap!r} does not hold the attention inside its gate; ask with raw=False")
    inner = amap.raw if isinstance(amap, GatedMap) else amap
    asked = inner if raw else amap
    pad = padding(name, amap, tokens)
    seen = visibility(amap, mask=mask, real=pad.queries, keys=pad.keys)
    gate = amap.gate if isinstance(amap, GatedMap) and not raw else None
    signed = asked.sign == "signed"
    if signed or relative:
        mass = _relative(inner, gate, seen)
        uniform = seen.uniform(None if gate is None else gate.abs())
    else:
        mass = _received(asked, pad, seen)
        uniform = _even(asked, gate, seen)
    count = seen.queries()

    def mean(total: Tensor) -> Tensor:
        return torch.where(count > 0, total / count.clamp(min=1), float("nan"))

    share = mean(mass)
    return Columns(
        share=pad.align(share),
        uniform=pad.align(uniform.expand_as(share)),
        mass=pad.align(mass),
        signed=pad.align(mean(_received(asked, pad, seen))) if signed else None,
        queries=pad.align(count.expand(len(share), -1, -1)),
        pad=pad,
        seen=seen,
    )


def shares(
    name: int | str,
    amap: AttentionMap,
    tokens: Tokens | None = None,
    *,
    keys: int | None = None,
    token: int = 0,
    raw: bool = False,
    mask: Mask | None = None,
    relative: bool = False,
) -> Shares:
    """Shares of the first ``keys`` keys of the layer ``name``; see ``probes/sinks/scores.py`` for the quantities."""
    if token >= amap.shape[3]:
        raise WorkbenchError(f"layer {name!r} has {amap.shape[3]} keys, so there is no token {token}")
    found = columns(name, amap, tokens, raw=raw, mask=mask, relative=relative)
    width = found.share.shape[-1] if keys is None else min(keys, found.share.shape[-1])
    real = found.pad.real_queries(amap.shape[2])[:, None]
    return Shares(
        share=found.share[..., :width].nanmean(0),
        error=standard_error(found.share[..., :width]),
        uniform=found.uniform[..., :width].nanmean(0),
        signed=None if found.signed is None else found.signed[..., :width].nanmean(0),
        queries=found.queries.nan_to_num(0.0).mean((0, 1))[:width],
        first=found.share[..., token],
        paid=found.mass[..., token] / real,
        gate=_mean_gate(amap, found.seen) if isinstance(amap, GatedMap) else None,
        tokens=found.pad.labels(width),
        forced=_forced(found.seen, found.pad, token),
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


def _relative(inner: AttentionMap, gate: Tensor | None, seen: Visibility) -> Tensor:
    """Column sums over real queries of |M_ij| / sum_j |M_ij|, times |gate|; ``[B, H, K]`` in float64. Empty rows give nothing."""
    b, h, queries, keys = inner.shape
    step = max(1, _CHUNK // max(1, b * h * keys))
    total = torch.zeros(b, h, keys, dtype=torch.float64)
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        rows = inner.rows(lo, hi).detach().cpu().double().abs() * seen.tile(lo, hi)
        weight = 1 / rows.sum(-1)
        if gate is not None:
            weight = weight * gate[:, :, lo:hi].detach().cpu().double().abs()
        total += (rows * weight.masked_fill(~weight.isfinite(), 0.0)[..., None]).sum(2)
    return total


def _even(amap: AttentionMap, gate: Tensor | None, seen: Visibility) -> Tensor:
    """Share of each key under even attention. Rows of free sum spread what they have; NaN where that is not known."""
    if amap.row_sum != "free":
        return seen.uniform(gate)
    try:
        return seen.uniform(amap.row_sums().detach())
    except Refused:
        return torch.full_like(seen.uniform(), float("nan"))


def _mean_gate(amap: GatedMap, seen: Visibility) -> Tensor:
    real = seen.real[:, None].expand(amap.shape[:3])
    return amap.gate.detach().cpu().double().masked_fill(~real, 0.0).sum((0, 2)) / real.sum((0, 2))


def _forced(seen: Visibility, pad: Padding, token: int) -> bool:
    """Whether every query that may see the token can see nothing else: then its share says nothing."""
    ones = seen.uniform()
    first = pad.align(ones.expand(max(len(ones), pad.batch), -1, -1))[..., token]
    return bool(((first - 1).abs() < 1e-12).all())
