"""Mean attention mass on sets of keys, for many sets in one walk over the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.maps import AttentionMap, GatedMap
from workbench.mods import Mod
from workbench.probes.visibility import Visibility

_CHUNK = 2**22


def mean_masses(amap: AttentionMap, seen: Visibility, mods: Sequence[Mod]) -> tuple[Tensor, Tensor]:
    """Per mod, sequence and head the mean mass on the keys a mod names, over the real queries that may see such a
    key; and the same if every query spread its weight (the gate, in a gated map) evenly over what it may see. Both
    ``[M, B, H]`` in float64, NaN without a query.

    Mods are conditions (bool). Rows are made once for all of them, in chunks, so nothing of size Q x K is kept.
    """
    b, h, queries, keys = amap.shape
    total, even = (torch.zeros(len(mods), b, h, dtype=torch.float64) for _ in range(2))
    count = torch.zeros(len(mods), b, h, dtype=torch.float64)
    even_weight = 1 / seen.keys().clamp(min=1)
    if isinstance(amap, GatedMap):
        gate = amap.gate.detach().cpu().double()
        even_weight = even_weight * torch.where(seen.real[:, None], gate, 0.0)
    index = torch.arange(b)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.long)
    columns = torch.arange(keys)[None, None, None, :]
    step = max(1, min(queries, _CHUNK // max(1, b * h * keys)))
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        rows, tile = amap.rows(lo, hi).detach(), seen.tile(lo, hi)
        at = torch.arange(lo, hi)[None, None, :, None] + amap.offset
        for i, mod in enumerate(mods):
            named = mod(*index, at, columns) & tile
            hits = named.sum(-1, dtype=torch.float64)
            if not hits.any():
                continue
            total[i] += torch.where(named.to(rows.device), rows, 0.0).sum((-2, -1)).cpu().double()
            even[i] += (hits * even_weight[..., lo:hi]).sum(-1)
            count[i] += (hits > 0).sum(-1)
    none = count == 0
    mean, expected = ((part / count.clamp(min=1)).masked_fill(none, float("nan")) for part in (total, even))
    return mean, expected
