"""A wall of heads: a small picture of every head's map, to see which are alike and which stand out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.apps.components.component import Component
from workbench.apps.components.pixels import grid, largest, png
from workbench.errors import Refused, WorkbenchError

WALL = Component("wall")
"""Events: ``open`` with an item's index (click, Enter); ``select`` with the indices that are now selected (Shift or
Ctrl and click, Space, a rectangle drawn with the pointer)."""
LIMIT = 1_200_000
"""Characters of the longest picture of a wall."""
LEAST, SMALL, LARGE = 4, 48, 96
"""Pixels a side of one head's picture: at least; at least and at most where nothing speaks against it."""
FIELDS = ("layer", "head", "text", "value")


def wall_data(
    pictures: Sequence[Any],
    items: Sequence[Mapping[str, Any]],
    *,
    selected: Iterable[int] = (),
    title: str = "",
    side: int | None = None,
) -> dict[str, Any]:
    """What :data:`WALL` draws: ``pictures[i] [rows, columns]`` of the head that ``items[i]`` names.

    An item holds ``layer``, ``head``, ``text`` (what is said about it) and ``value`` (the number it is sorted by, or
    None). Each picture is coloured on its own scale from 0 to its largest absolute value, by the square root; NaN is
    what is not there. A picture larger than ``side`` keeps the largest value of every region, so that a thin line
    stays visible. Without ``side`` the cells of a head take whole pixels, ``SMALL`` to ``LARGE`` a side, and fewer where
    the picture of the wall would be longer than ``LIMIT``.
    """
    if len(pictures) != len(items) or not items:
        raise WorkbenchError(f"a wall needs one picture per head, got {len(pictures)} pictures and {len(items)} heads")
    for item in items:
        if set(item) != set(FIELDS):
            raise WorkbenchError(
                f"an item of a wall has {', '.join(FIELDS)}; got {', '.join(map(str, item)) or 'nothing'}"
            )
    if side is not None and side < LEAST:
        raise WorkbenchError(f"side: a head's picture has at least {LEAST} pixels a side, got {side}")
    chosen = sorted(set(selected))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < len(items):
        raise WorkbenchError(f"selected {chosen} are not all heads of a wall of {len(items)}")
    grids = [grid(picture, f"picture {i}") for i, picture in enumerate(pictures)]
    columns = _columns(items)
    image = ""
    tried = side or _side(grids)
    while tried >= LEAST:
        image = png(_sprite([_square(values, tried) for values in grids], columns))
        if len(image) <= LIMIT or side is not None:
            break
        tried = min(tried - 2, int(tried * np.sqrt(LIMIT / len(image))))
    if not image or len(image) > LIMIT:
        raise Refused(
            f"the pictures of {len(items)} heads with {tried} pixels a side take {len(image) / 1e6:.1f} MB, more than "
            f"the {LIMIT / 1e6:.1f} MB of a wall; show fewer layers or a smaller side"
        )
    return {
        "image": image,
        "side": tried,
        "columns": columns,
        "items": [{**item, "value": _number(item["value"])} for item in items],
        "selected": chosen,
        "title": title,
    }


def _side(grids: Sequence[NDArray[np.float64]]) -> int:
    cells = max(max(values.shape) for values in grids)
    return LARGE if cells > LARGE else cells * -(-SMALL // cells)


def _columns(items: Sequence[Mapping[str, Any]]) -> int:
    """As many columns as a layer has heads, where the items are whole layers in order; else a square."""
    first = sum(item["layer"] == items[0]["layer"] for item in items)
    whole = all(item["layer"] == items[i - i % first]["layer"] for i, item in enumerate(items))
    return first if whole and len(items) % first == 0 and first > 1 else int(np.ceil(np.sqrt(len(items))))


def _square(values: NDArray[np.float64], side: int) -> NDArray[np.uint8]:
    """``values`` as grey ``[side, side]``: 0 is not there, 1 ... 255 the square root of the share of the largest."""
    size = np.where(np.isnan(values), -1.0, np.abs(values))
    for axis, cells in enumerate(size.shape):
        edges = np.arange(side) * cells // side
        size = np.maximum.reduceat(size, edges, axis) if cells > side else np.take(size, edges, axis)
    shade = 1 + np.rint(254 * np.sqrt(np.maximum(size, 0) / largest(values)))
    return np.where(size < 0, 0, shade).astype(np.uint8)


def _sprite(squares: list[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    side = len(squares[0])
    rows = -(-len(squares) // columns)
    sprite = np.zeros((rows * side, columns * side), np.uint8)
    for i, square in enumerate(squares):
        row, column = divmod(i, columns)
        sprite[row * side : (row + 1) * side, column * side : (column + 1) * side] = square
    return sprite


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
