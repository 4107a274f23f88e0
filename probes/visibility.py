"""Which queries may see a key, counted without building a Q x K mask.

Every share and every uniform-attention null divides by these counts. Masks made of causality, a window, a prefix
and hidden keys let a query see at most two runs of keys, so counts are sums over runs in O(Q + K); document and
dense masks are walked in row chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, SummaryMap
from workbench.models.protocol import Tokens
from workbench.probes.padding import padding
from workbench.probes.sources import ungated

_CHUNK = 2**22


@dataclass(frozen=True)
class Visibility:
    """Allowed pairs of one mask over ``shape = (Q, K)``. ``real`` ``[B or 1, Q]`` is False on padding queries."""

    mask: Mask
    shape: tuple[int, int]
    real: Tensor

    def keys(self) -> Tensor:
        """How many keys each query may see, ``[B|1, H|1, Q]``; 0 for padding queries."""
        runs = self._runs
        if runs is not None:
            shown = self._shown()
            until = torch.nn.functional.pad(shown.cumsum(-1), (1, 0))
            count = torch.stack([until[:, hi] - until[:, lo] for lo, hi in runs]).sum(0)
            return (count * self.real)[:, None]
        return torch.cat([tile.sum(-1, dtype=torch.float64) for _, _, tile in self.tiles()], dim=-1)

    def spread(self, weight: Tensor) -> Tensor:
        """Sum of ``weight`` ``[B|1, H|1, Q]`` over the real queries that may see each key, ``[B|1, H|1, K]``."""
        weight = weight.double().cpu() * self.real[:, None]
        runs = self._runs
        if runs is not None:
            steps = weight.new_zeros(*weight.shape[:2], self.shape[1] + 1)
            for begin, end in runs:
                steps.index_add_(-1, begin, weight)
                steps.index_add_(-1, end, -weight)
            return steps.cumsum(-1)[..., :-1] * self._shown()[:, None]
        total: Tensor | None = None
        for lo, hi, tile in self.tiles():
            mass = (tile.double() * weight[..., lo:hi, None]).sum(-2)
            total = mass if total is None else total + mass
        assert total is not None
        return total

    def queries(self) -> Tensor:
        """How many real queries may see each key, ``[B|1, H|1, K]``."""
        return self.spread(torch.ones(1, 1, self.shape[0], dtype=torch.float64)).round()

    def uniform(self, gate: Tensor | None = None) -> Tensor:
        """Share of a key if every query spread its weight evenly over what it may see: the mean of g_i / n_i
        over the queries i that may see the key, ``[B|1, H|1, K]``. ``gate`` g ``[B, H, Q]`` is 1 by default.
        NaN if nobody may."""
        keys = self.keys()
        even = torch.where(keys > 0, 1 / keys.clamp(min=1), 0.0)
        total = self.spread(even if gate is None else even * gate.double().cpu())
        count = self.queries()
        return torch.where(count > 0, total / count.clamp(min=1), float("nan"))

    def tile(self, lo: int, hi: int) -> Tensor:
        """Allowed pairs of query rows ``[lo, hi)``, bool ``[B|1, H|1, hi - lo, K]``, padding queries included
        as False."""
        allowed = self.mask.tile(slice(lo, hi), slice(0, self.shape[1]))
        if allowed is None:
            allowed = torch.ones(1, 1, hi - lo, self.shape[1], dtype=torch.bool)
        return allowed & self.real[:, None, lo:hi, None]

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        queries, keys = self.shape
        parts = [p.shape[0] for p in (self.mask.documents, self.mask.dense) if p is not None]
        width = keys * max(len(self.real), *parts, 1)
        step = max(1, _CHUNK // max(1, width))
        for lo in range(0, queries, step):
            hi = min(queries, lo + step)
            yield lo, hi, self.tile(lo, hi)

    def _shown(self) -> Tensor:
        if self.mask.keys is None:
            return torch.ones(1, self.shape[1], dtype=torch.float64)
        return self.mask.keys.double().cpu()

    @cached_property
    def _runs(self) -> list[tuple[Tensor, Tensor]] | None:
        """Per query the runs of visible keys ``[lo, hi)``, before hidden keys; None for document and dense masks."""
        if self.mask.documents is not None or self.mask.dense is not None:
            return None
        queries, keys = self.shape
        plain = Mask(causal=self.mask.causal, window=self.mask.window, offset=self.mask.offset)
        spans = torch.tensor([plain.span(i, i + 1, keys) for i in range(queries)], dtype=torch.long).reshape(-1, 2)
        lo, hi = spans[:, 0], spans[:, 1]
        prefix = min(self.mask.prefix, keys)
        if not prefix or not (self.mask.causal or self.mask.window is not None):
            return [(lo, hi)]
        return [(torch.zeros_like(lo), torch.full_like(lo, prefix)), (lo.clamp(min=prefix), hi.clamp(min=prefix))]


def visibility(
    amap: AttentionMap, *, mask: Mask | None = None, real: Tensor | None = None, keys: Tensor | None = None
) -> Visibility:
    """Who may see whom in a map.

    ``mask`` wins over the map's own; a map without one is causal if it holds no weight on any key after its query, and
    sees everything otherwise. ``real`` ``[B, Q]`` and ``keys`` ``[B, K]`` are False on padding.
    """
    inner = ungated(amap)
    found = mask if mask is not None else getattr(inner, "mask", None)
    if not isinstance(found, Mask) and isinstance(inner, SummaryMap):
        raise Refused(
            "this map was captured without rows and knows no mask, so that nothing tells who may see whom: give mask=Mask(...) "
            "where the analysis takes one, or capture with keep=True"
        )
    if not isinstance(found, Mask):
        found = Mask(causal=not looks_ahead(inner), offset=inner.offset)
    if found.offset != inner.offset:
        found = found.at(inner.offset)
    try:
        found.check(inner.shape)
    except ValueError as error:
        raise WorkbenchError(f"this mask does not fit a map of {list(inner.shape)}: {error}") from None
    if keys is not None:
        own = found.keys
        found = replace(found, keys=keys.cpu() if own is None else own.cpu() & keys.cpu())
    queries = inner.shape[2]
    rows = torch.ones(1, queries, dtype=torch.bool) if real is None else real.cpu()
    if found.queries is not None:
        rows = rows & found.queries.cpu()
    return Visibility(found, (queries, inner.shape[3]), rows)


def layer_visibility(
    name: int | str, amap: AttentionMap, tokens: Tokens | None, *, mask: Mask | None = None
) -> Visibility:
    """Who may see whom in a layer of a run with these tokens, padding left out."""
    pad = padding(name, amap, tokens)
    return visibility(amap, mask=mask, real=pad.queries, keys=pad.keys)


def looks_ahead(amap: AttentionMap) -> bool:
    """Whether any query gives weight to a key after it; rows are read in chunks."""
    b, h, queries, keys = amap.shape
    step = max(1, _CHUNK // max(1, b * h * keys))
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        rows = amap.rows(lo, hi)
        ahead = torch.arange(keys, device=rows.device) > torch.arange(lo, hi, device=rows.device)[:, None] + amap.offset
        if ahead.any() and (rows * ahead).any():
            return True
    return False
