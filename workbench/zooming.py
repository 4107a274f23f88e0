"""Any part of one head's map at a size that can be looked at: block maps from afar, exact weights near by.

A view of 32,768 x 32,768 tokens and one of 40 x 40 cost about the same: from afar the block maps that the capture stored are
taken, and near by the weights are computed from q and k and pooled. Nothing larger than ``EXACT`` numbers is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import GatedMap
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

EXACT = 2**22
"""Weights of one head that a view may compute: 2,048 x 2,048 tokens."""
WAYS = ("mass", "max")


@dataclass(frozen=True)
class Zoom(Result):
    """``values`` ``[rows, columns]`` float32: cells of ``size`` x ``size`` tokens of the view ``queries`` x ``keys`` (half-open
    ranges counted from the first row and column of the map; the last cells may be cut). NaN where no query sees a key.

    ``way`` ``"mass"``: the weight that a query gives to the keys of the cell, averaged over the cell's queries; ``"max"``: the
    largest single weight. With ``size`` 1 both are the weight itself. ``exact`` tells that they were computed from q and k now;
    otherwise they come from stored block maps, which are exact sums and maxima too."""

    values: Tensor
    queries: tuple[int, int]
    keys: tuple[int, int]
    size: int
    exact: bool
    way: str
    title: str = ""

    def frame(self) -> pd.DataFrame:
        """One row per cell that can be seen: ``query`` and ``key`` where it begins, ``value``."""
        import pandas as pd

        rows, columns = self.values.shape
        found = pd.DataFrame(
            {
                "query": (self.queries[0] + self.size * torch.arange(rows)).repeat_interleave(columns).numpy(),
                "key": (self.keys[0] + self.size * torch.arange(columns)).repeat(rows).numpy(),
                "value": self.values.flatten().numpy(),
            }
        )
        return found.dropna(subset=["value"]).reset_index(drop=True)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Queries downwards, keys to the right, in tokens; signed values from blue to orange."""
        ax = axis(ax, 6.0, 5.0)
        top = float(self.values.nan_to_num().abs().max()) or 1.0
        signed = bool((self.values.nan_to_num() < 0).any())
        extent = (self.keys[0], self.keys[1], self.queries[1], self.queries[0])
        colours, least = ("PuOr_r", -top) if signed else ("magma", 0.0)
        image = ax.imshow(
            self.values.numpy(),
            extent=extent,
            cmap=colours,
            vmin=least,
            vmax=top,
            aspect="auto",
            interpolation="nearest",
        )
        ax.set(xlabel="key", ylabel="query", title=self.title)
        unit = "weight" if self.size == 1 else "largest weight" if self.way == "max" else "mass per query"
        ax.figure.colorbar(image, ax=ax, label=unit)
        return ax


def zoom(
    amap: AttentionMap,
    heads: int | Sequence[int],
    queries: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
    *,
    cells: int = 512,
    way: str = "mass",
    hide: Sequence[int] = (),
    renormalise: bool = False,
    batch: int = 0,
) -> Zoom:
    """The part ``queries`` x ``keys`` of the map in at most about ``cells`` x ``cells`` cells.

    Several ``heads`` are averaged, as those of one kv group. ``hide`` takes keys (sinks) out: their weight counts as nothing.
    ``renormalise`` then divides each row of cells by what is left of its mass, so that the rest can be compared between rows; for
    cells of several queries it is their mean mass that is divided by. The view grows to whole cells of stored block maps.

    Raises ``WorkbenchError`` for views outside the map, ``UnknownName`` for heads and ways, and ``Refused`` where the view is
    too large to compute and no block maps were captured.
    """
    if way not in WAYS:
        raise UnknownName("way to fill a cell", way, WAYS)
    chosen = [heads] if isinstance(heads, int) else list(heads)
    for head in chosen:
        if not 0 <= head < amap.shape[1]:
            raise UnknownName("head", head, range(amap.shape[1]))
    if not chosen:
        raise WorkbenchError("a view shows at least one head; got none")
    _, _, q, k = amap.shape
    q0, q1 = _range("queries", queries, q)
    k0, k1 = _range("keys", keys, k)
    for key in hide:
        if not 0 <= key < k:
            raise UnknownName("key", key, [f"0 .. {k - 1}"])
    area, size = (q1 - q0) * (k1 - k0), _power(max(q1 - q0, k1 - k0), cells)
    if area <= EXACT and size not in stored_sizes(amap):
        values = _exact(amap, chosen, (q0, q1), (k0, k1), size, way, hide, batch)
        found = Zoom(values, (q0, q1), (k0, k1), size, True, way)
    else:
        found = _stored(amap, chosen, (q0, q1), (k0, k1), cells, way, hide, batch)
    values = found.values.masked_fill(_unseen(amap, found), float("nan"))
    if renormalise:
        left = 1 - _hidden_mass(amap, chosen, found, hide, batch)
        values = values / left.clamp(min=1e-12)[:, None]
    return Zoom(values, found.queries, found.keys, found.size, found.exact, way)


def stored_sizes(amap: AttentionMap, way: str = "mass") -> list[int]:
    """Sides of the block maps that the map holds, in tokens, ascending: those that a view of that ``way`` is made from."""
    reduce = "max" if way == "max" else "sum"
    return sorted(key[1] for key in amap._memo if key[0] == "blocks" and key[2] == reduce)


def row(amap: AttentionMap, heads: int | Sequence[int], query: int, batch: int = 0) -> Tensor:
    """Weights of one query on every key ``[K]``, exact, averaged over ``heads``."""
    return _weights(amap, _heads(heads), slice(query, query + 1), slice(0, amap.shape[3]), batch)[0]


def column(amap: AttentionMap, heads: int | Sequence[int], key: int, batch: int = 0) -> Tensor:
    """Weights of every query on one key ``[Q]``, exact, averaged over ``heads``."""
    return _weights(amap, _heads(heads), slice(0, amap.shape[2]), slice(key, key + 1), batch)[:, 0]


def _heads(heads: int | Sequence[int]) -> list[int]:
    return [heads] if isinstance(heads, int) else list(heads)


def _weights(amap: AttentionMap, heads: list[int], queries: slice, keys: slice, batch: int) -> Tensor:
    return amap.heads(heads).tile(queries, keys)[batch].detach().float().mean(0).cpu()


def _exact(
    amap: AttentionMap,
    heads: list[int],
    queries: tuple[int, int],
    keys: tuple[int, int],
    size: int,
    way: str,
    hide: Sequence[int],
    batch: int,
) -> Tensor:
    weights = _weights(amap, heads, slice(*queries), slice(*keys), batch)
    at = [key - keys[0] for key in hide if keys[0] <= key < keys[1]]
    if at:
        weights[:, at] = 0
    return weights if size == 1 else _pooled(weights, size, way)


def _pooled(weights: Tensor, size: int, way: str) -> Tensor:
    """Weights ``[Q, K]`` in cells of ``size``: mass per query, or the largest."""
    q, k = weights.shape
    rows, columns = -(-q // size), -(-k // size)
    padded = torch.nn.functional.pad(weights, (0, columns * size - k, 0, rows * size - q))
    cells = padded.view(rows, size, columns, size)
    if way == "max":
        return cells.amax((1, 3))
    return cells.sum((1, 3)) / _rows(q, size)[:, None]


def _rows(queries: int, size: int) -> Tensor:
    """How many queries each row of cells holds."""
    return torch.tensor([min(size, queries - at) for at in range(0, queries, size)], dtype=torch.float32)


def _stored(
    amap: AttentionMap,
    heads: list[int],
    queries: tuple[int, int],
    keys: tuple[int, int],
    cells: int,
    way: str,
    hide: Sequence[int],
    batch: int,
) -> Zoom:
    sizes = stored_sizes(amap, way)
    if not sizes:
        area = (queries[1] - queries[0]) * (keys[1] - keys[0])
        raise Refused(
            f"a view of {area:,} weights is more than the {EXACT:,} that are computed at once, and this map holds no block "
            f"maps; capture with blocks=64, reduce={'max' if way == 'max' else 'sum'!r}, or look at a smaller part"
        )
    longest = max(queries[1] - queries[0], keys[1] - keys[0])
    size = next((s for s in reversed(sizes) if longest / s >= cells / 2), sizes[0])
    grow = _power(-(-longest // size), cells)  # stored cells per shown cell, on a side
    step = size * grow
    _, _, q, k = amap.shape
    q0, k0 = queries[0] // step * step, keys[0] // step * step
    q1, k1 = min(q, -(-queries[1] // step) * step), min(k, -(-keys[1] // step) * step)
    part = (slice(q0 // size, -(-q1 // size)), slice(k0 // size, -(-k1 // size)))
    if way == "max":
        found = amap.blocks(size, "max")[batch, heads][:, part[0], part[1]].float().mean(0).cpu()
    else:
        found = amap.blocks(size, "sum")[batch, heads][:, part[0], part[1]].float().mean(0).cpu()
    for at in sorted({key // size for key in hide if k0 <= key < k1}):
        # Only the columns of cells that hold a hidden key are computed again.
        strip = slice(at * size, min(k, (at + 1) * size))
        weights = _weights(amap, heads, slice(q0, q1), strip, batch)
        weights[:, [key - strip.start for key in hide if strip.start <= key < strip.stop]] = 0
        again = _pooled(weights, size, "max" if way == "max" else "mass")[:, 0]
        found[:, at - k0 // size] = again if way == "max" else again * _rows(q1 - q0, size)
    if way == "max":
        values = found if grow == 1 else _pooled(found.nan_to_num(neginf=0.0), grow, "max")
    else:
        rows, columns = -(-found.shape[0] // grow), -(-found.shape[1] // grow)
        padded = torch.nn.functional.pad(found, (0, columns * grow - found.shape[1], 0, rows * grow - found.shape[0]))
        values = padded.view(rows, grow, columns, grow).sum((1, 3)) / _rows(q1 - q0, step)[:, None]
    return Zoom(values, (q0, q1), (k0, k1), step, False, way)


def _unseen(amap: AttentionMap, view: Zoom) -> Tensor:
    """Cells in which causality lets no query see a key, ``[rows, columns]`` bool."""
    rows, columns = view.values.shape
    mask = getattr(amap.raw if isinstance(amap, GatedMap) else amap, "mask", None)
    if mask is None or not mask.causal:
        return torch.zeros(rows, columns, dtype=torch.bool)
    last = torch.tensor([min(view.queries[0] + (i + 1) * view.size, view.queries[1]) - 1 for i in range(rows)])
    first = torch.tensor([view.keys[0] + j * view.size for j in range(columns)])
    return first[None, :] > last[:, None] + amap.offset


def _hidden_mass(amap: AttentionMap, heads: list[int], view: Zoom, hide: Sequence[int], batch: int) -> Tensor:
    """Mean mass on the hidden keys per row of cells."""
    q0, q1 = view.queries
    total = torch.zeros(view.values.shape[0])
    for key in hide:
        weights = _weights(amap, heads, slice(q0, q1), slice(key, key + 1), batch)
        total += _pooled(weights, view.size, "mass")[:, 0]
    return total


def _range(what: str, given: tuple[int, int] | None, length: int) -> tuple[int, int]:
    lo, hi = (0, length) if given is None else (int(given[0]), int(given[1]))
    if not 0 <= lo < hi <= length:
        raise WorkbenchError(f"{what} of a view are a part of 0 .. {length}; got {lo} .. {hi}")
    return lo, hi


def _power(length: int, cells: int) -> int:
    """The smallest power of two that brings ``length`` under ``cells``."""
    size = 1
    while length / size > cells:
        size *= 2
    return size
