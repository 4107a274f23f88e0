"""An image whose patches are coloured by attention: from one patch to all, or from all to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.apps.components.component import Component
from workbench.apps.components.pixels import grid as numbers
from workbench.apps.components.pixels import largest, packed, png
from workbench.errors import UnknownName, WorkbenchError

PATCHES = Component("patches")
"""Event: ``query`` with the number of the token that was chosen: further tokens first, then patches row by row."""
DIRECTIONS = ("from", "to")
"""``from``: where the query looks; ``to``: which tokens look at it."""
HELD = 260
"""With at most so many tokens all their weights are sent at once, so that another query needs no answer from the host."""


def patches_data(
    image: Any,
    weights: Any,
    *,
    grid: Sequence[int],
    query: int,
    extra: Sequence[str] = (),
    direction: str = "from",
    top: float | None = None,
    tile: Any = None,
    windows: Sequence[Sequence[int]] = (),
    signed: bool = False,
    unit: str = "weight",
    title: str = "",
) -> dict[str, Any]:
    """What :data:`PATCHES` draws.

    ``image`` is 8-bit, ``[height, width]`` or ``[height, width, 3]``; ``grid`` says how many rows and columns of patches
    cover it. Tokens are numbered from the ``extra`` ones (names of tokens that are no patches, as a class token) to the
    last patch; ``weights`` ``[T]`` join the ``query`` with each token in ``direction``, NaN is what is not there. ``tile``
    ``[T, T]`` (queries x keys) holds those of every query, and is left out above ``HELD`` tokens. ``windows`` are outlined:
    first row, first column, last row and last column of patches, ends excluded. The strongest colour is that of the query's
    largest weight; ``top`` is the largest weight that ``tile`` can tell (by default that which there is), ``signed``
    colours negative weights apart.
    """
    pixels = np.asarray(image)
    rows, columns = (int(side) for side in grid)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise WorkbenchError(
            f"image: 8-bit numbers [height, width] or [height, width, 3] are needed; got {pixels.dtype} {pixels.shape}"
        )
    if rows < 1 or columns < 1:
        raise WorkbenchError(f"grid: at least one row and column of patches, got {rows} x {columns}")
    if direction not in DIRECTIONS:
        raise UnknownName("direction", direction, DIRECTIONS)
    if hasattr(weights, "detach"):
        weights = weights.detach().cpu().double()
    row = numbers(np.asarray(weights, dtype=np.float64)[None], "weights")[0]
    tokens = len(extra) + rows * columns
    if len(row) != tokens:
        raise WorkbenchError(
            f"weights: {len(row)} numbers for {rows} x {columns} patches and {len(extra)} further tokens, which are {tokens}"
        )
    if not 0 <= query < tokens:
        raise UnknownName("query", query, [f"0 .. {tokens - 1}"])
    for r0, c0, r1, c1 in windows:
        if not (0 <= r0 < r1 <= rows and 0 <= c0 < c1 <= columns):
            raise WorkbenchError(f"window {[r0, c0, r1, c1]} is no part of {rows} x {columns} patches")
    cells = None if tile is None or tokens > HELD else numbers(tile, "tile")
    if cells is not None and cells.shape != (tokens, tokens):
        raise WorkbenchError(f"tile {cells.shape} does not join the {tokens} tokens with each other")
    if top is None:
        top = largest(row if cells is None else np.append(row, cells))
    return {
        "image": png(pixels),
        "grid": [rows, columns],
        "extra": [str(name) for name in extra],
        "query": int(query),
        "direction": direction,
        "weights": [None if np.isnan(weight) else float(weight) for weight in row],
        "top": float(top),
        "tile": None if cells is None else packed(cells, top),
        "windows": [[int(edge) for edge in window] for window in windows],
        "signed": signed,
        "unit": unit,
        "title": title,
    }
