"""The rows of a map that belong to patches, a few at a time, and what they would be if attention were even."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, SummaryMap
from workbench.mods import Mod
from workbench.probes.sources import inner, maps_of, ungated
from workbench.probes.visibility import Visibility, visibility
from workbench.probes.vision.grid import Grid

_CHUNK = 2**21


class PatchRows(NamedTuple):
    """Rows of some queries: ``queries`` ``[c]`` their patch numbers, ``rows`` ``[B, H, c, K]``, and ``even``, the same sums
    spread evenly over the keys that each query may see; float64 on the CPU."""

    queries: Tensor
    rows: Tensor
    even: Tensor


def patch_maps(source: object, grid: Grid, *, raw: bool = False) -> dict[int | str, AttentionMap]:
    """The maps of ``source`` that the grid belongs to, by layer. Refuses maps that are no attention over its tokens.

    Gated maps count as they act; ``raw=True`` looks at the attention inside the gate.
    """
    found = maps_of(source)
    if grid.stack and all(isinstance(name, str) for name in found):
        found = {name: amap for name, amap in found.items() if str(name).split(".")[0] == grid.stack}
        if not found:
            raise WorkbenchError(
                f"there are no maps of the {grid.stack} stack; it has layers {', '.join(map(str, maps_of(source)))}"
            )
    chosen = {}
    for name, amap in found.items():
        if amap.domain != "token":
            raise Refused(f"layer {name!r}: rows of a {amap.domain} map are no patches")
        asked = inner(name, amap, raw)
        if asked.sign != "nonnegative":
            raise Refused(
                f"layer {name!r}: weights of a signed map cancel, so that a mean over places says nothing; pass a map of their "
                "absolute values, AttentionMap.from_dense(weights.abs())"
            )
        if asked.shape[2] != asked.shape[3] or asked.offset:
            raise Refused(f"layer {name!r}: patches look at patches in a square map; this one is {list(asked.shape)}")
        grid.check(asked.shape[3], f"layer {name!r}")
        chosen[name] = asked
    return chosen


def seen_by(amap: AttentionMap) -> Visibility:
    """Who may see whom; a summary that knows no mask is taken to see everything."""
    inside = ungated(amap)
    return visibility(amap, mask=Mask() if isinstance(inside, SummaryMap) and inside.mask is None else None)


def patch_rows(amap: AttentionMap, grid: Grid) -> Iterator[PatchRows]:
    """All rows of patches, in order, in chunks: nothing of size Q x K is kept."""
    seen = seen_by(amap)
    share = 1 / seen.keys().clamp(min=1)
    b, h, _, keys = amap.shape
    index = grid.index
    step = max(1, _CHUNK // max(1, b * h * keys))
    for at in range(0, len(index), step):
        tokens = index[at : at + step]
        lo, hi = int(tokens[0]), int(tokens[-1]) + 1
        rows = amap.rows(lo, hi).detach().cpu().double()[:, :, tokens - lo]
        even = (seen.tile(lo, hi) * share[..., lo:hi, None])[:, :, tokens - lo] * rows.sum(-1, keepdim=True)
        yield PatchRows(torch.arange(at, at + len(tokens)), rows, even)


def patch_sums(amap: AttentionMap, grid: Grid) -> tuple[Tensor, Tensor]:
    """What every patch receives from all patches, ``[B, H, N]``, as it is and spread evenly."""
    received, even = torch.zeros(2, *amap.shape[:2], grid.patches, dtype=torch.float64)
    for part in patch_rows(amap, grid):
        received += part.rows[..., grid.index].sum(2)
        even += part.even[..., grid.index].sum(2)
    return received, even


def even_sums(amap: AttentionMap, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """For maps without rows: patch numbers ``[c]``, and ``[B|1, H|1, c, K]``, one spread evenly over the keys that each patch may
    see; float64."""
    seen = seen_by(amap)
    share = 1 / seen.keys().clamp(min=1)
    index = grid.index
    step = max(1, _CHUNK // amap.shape[3])
    for at in range(0, len(index), step):
        tokens = index[at : at + step]
        lo, hi = int(tokens[0]), int(tokens[-1]) + 1
        even = (seen.tile(lo, hi) * share[..., lo:hi, None])[:, :, tokens - lo]
        yield torch.arange(at, at + len(tokens)), even


def hop_distance(grid: Grid, queries: Tensor) -> Tensor:
    """Chebyshev distance in patches of some patches to all, ``[c, N]``: 1 for the eight neighbours."""
    return (grid.places[queries][:, None] - grid.places).abs().amax(-1)


def pixel_distance(grid: Grid, queries: Tensor) -> Tensor:
    """Distance in pixels between the middles of some patches and all, ``[c, N]`` in float64."""
    return torch.cdist(grid.centres[queries], grid.centres)


def is_summary(amap: AttentionMap) -> bool:
    """Whether the map has no rows to give, only what was asked for when it was captured."""
    return isinstance(ungated(amap), SummaryMap)


def named_masses(amap: AttentionMap, grid: Grid, names: Iterable[str]) -> list[Tensor]:
    """Masses that a map without rows was captured with, of every patch's row: ``[B, H, N]`` each in float64."""
    try:
        return [amap.mass(name).detach().cpu().double()[:, :, grid.index] for name in names]
    except UnknownName as error:
        raise WorkbenchError(
            f"{error}; capture rows with keep=True, or the masses of patches with wb.capture(mass=image_mods(grid), keep=False)"
        ) from None


def image_mods(grid: Grid) -> dict[str, Mod]:
    """Named masses that answer ``hops`` and ``attention_distance`` without rows, for
    ``capture(mass=image_mods(grid), keep=False)``: ``hop k``, ``pixels``, ``class`` and ``others``."""
    number = torch.full((int(grid.index.max()) + 1,), -1)
    number[grid.index] = torch.arange(grid.patches)
    places, centres = grid.places, grid.centres

    def patch(token: Tensor) -> Tensor:
        inside = token < len(number)
        return torch.where(inside, number.to(token.device)[token.clamp(max=len(number) - 1)], -1)

    def apart(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        a, b = patch(q), patch(k)
        table = table.to(q.device)
        return (a >= 0) & (b >= 0), table[a.clamp(min=0)] - table[b.clamp(min=0)]

    def at_hop(hops: int) -> Mod:
        def mod(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
            both, gap = apart(q, k, places)
            return both & (gap.abs().amax(-1) == hops)

        return mod

    def pixels(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        both, gap = apart(q, k, centres)
        return torch.where(both, gap.norm(dim=-1), 0.0)

    cls = -1 if grid.cls is None else grid.cls
    return {
        **{f"hop {hops}": at_hop(hops) for hops in range(max(grid.rows, grid.cols))},
        "pixels": pixels,
        "class": lambda b, h, q, k: (k == cls) & (q == q),
        "others": lambda b, h, q, k: (patch(k) < 0) & (k != cls) & (q == q),
    }
