"""Text whose tokens are coloured by attention, from one token to all or from all to one, a page at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.apps.components.component import Component
from workbench.apps.components.pixels import grid, largest, packed
from workbench.errors import UnknownName, WorkbenchError

TOKENS = Component("tokens")
"""Events: ``focus`` with the position of the token that was chosen, ``page`` with the first position of the page that
is asked for. A token chosen by its number may lie on another page; ``page`` is then sent before ``focus``."""
PAGE = 256
"""Tokens on a page at most."""
DIRECTIONS = ("from", "to")
"""``from``: what the focus attends to; ``to``: which tokens attend to it."""


def tokens_data(
    labels: Sequence[str],
    *,
    start: int,
    total: int,
    focus: int,
    direction: str,
    weights: Any,
    top: float | None = None,
    tile: Any = None,
    signed: bool = False,
    title: str = "",
    size: int = PAGE,
) -> dict[str, Any]:
    """What :data:`TOKENS` draws: the page of ``labels`` that begins at position ``start`` of ``total`` tokens.

    ``weights[i]`` joins the token ``focus`` (a position in the whole text) with token ``start + i`` in ``direction``;
    NaN or None is what is not there. ``tile [queries, keys]`` of the tokens of the page colours them by whichever the
    pointer is on, without asking. ``top`` is the value of the strongest colour, by default the largest weight given;
    ``signed`` colours negative weights apart. Pages are of ``size`` tokens, the last one may be shorter.
    """
    if not labels or len(labels) > min(size, PAGE):
        raise WorkbenchError(f"a page holds 1 to {min(size, PAGE)} tokens, got {len(labels)}")
    if not 0 <= start <= start + len(labels) <= total:
        raise WorkbenchError(f"a page of {len(labels)} tokens from {start} on does not lie in a text of {total}")
    if not 0 <= focus < total:
        raise WorkbenchError(f"focus {focus} is not a token of a text of {total}")
    if direction not in DIRECTIONS:
        raise UnknownName("direction", direction, DIRECTIONS)
    if hasattr(weights, "detach"):
        weights = weights.detach().cpu().double()
    row = grid(np.asarray(weights, dtype=np.float64)[None], "weights")[0]
    if len(row) != len(labels):
        raise WorkbenchError(f"weights: {len(row)} numbers for the {len(labels)} tokens of the page")
    cells = None if tile is None else grid(tile, "tile")
    if cells is not None and cells.shape != (len(labels), len(labels)):
        raise WorkbenchError(f"tile {cells.shape} does not join the {len(labels)} tokens of the page with each other")
    if top is None:
        top = largest(row if cells is None else np.append(row, cells))
    return {
        "labels": [str(label) for label in labels],
        "start": start,
        "total": total,
        "focus": focus,
        "direction": direction,
        "weights": [None if np.isnan(weight) else float(weight) for weight in row],
        "top": float(top),
        "tile": None if cells is None else packed(cells, top),
        "signed": signed,
        "title": title,
        "size": size,
    }
