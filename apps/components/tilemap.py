"""A map of who attends to whom, of any size: one picture of the part in view, at the resolution that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.apps.components.component import Component
from workbench.apps.components.pixels import grid, largest, packed
from workbench.errors import UnknownName, WorkbenchError

TILEMAP = Component("tilemap")
"""Events: ``view`` ``[q0, q1, k0, k1]`` when the user has moved or zoomed, ``cell`` ``[q, k]`` on click or Enter."""
SCALES = ("linear", "sqrt", "log")
LABELLED = 64
"""A side of at most so many tokens shows them as text."""


def tilemap_data(
    values: Any,
    *,
    queries: int,
    keys: int,
    view: Sequence[int],
    size: int,
    exact: bool,
    top: float | None = None,
    signed: bool = False,
    scale: str = "sqrt",
    cross: Sequence[int] | None = None,
    query_labels: Sequence[str] = (),
    key_labels: Sequence[str] = (),
    unit: str = "weight",
    title: str = "",
    source: str = "",
) -> dict[str, Any]:
    """What :data:`TILEMAP` draws.

    ``values [rows, columns]``, in ``unit``, cover the ``view`` ``[q0, q1, k0, k1]`` (ends excluded) of a map of
    ``queries x keys`` tokens with cells of ``size x size`` tokens, the last row and column cut at the view; NaN is
    what is not there. ``exact`` says that the values are weights, not summaries of blocks. ``top`` is the value of the
    strongest colour (by default the largest in view), ``signed`` colours negative values apart, ``cross`` marks a cell.
    Labels are the tokens of the view, and are kept for at most ``LABELLED`` of them. Pictures with the same
    ``source`` (any text that names the map they are parts of) are shown under each other until the next one comes;
    without it, each picture replaces the one before.
    """
    array = grid(values)
    q0, q1, k0, k1 = (int(edge) for edge in view)
    if not (0 <= q0 < q1 <= queries and 0 <= k0 < k1 <= keys):
        raise WorkbenchError(f"view {[q0, q1, k0, k1]} is not inside the map of {queries} queries x {keys} keys")
    if size < 1:
        raise WorkbenchError(f"size: a cell covers at least one token, got {size}")
    expected = (-(-(q1 - q0) // size), -(-(k1 - k0) // size))
    if array.shape != expected:
        raise WorkbenchError(
            f"values {array.shape} do not cover the view {[q0, q1, k0, k1]} in cells of {size} tokens: {expected} do"
        )
    if scale not in SCALES:
        raise UnknownName("scale", scale, SCALES)
    if cross is not None and not (0 <= cross[0] < queries and 0 <= cross[1] < keys):
        raise WorkbenchError(f"cross {list(cross)} is not a cell of the map of {queries} queries x {keys} keys")
    top = largest(array) if top is None else float(top)
    return {
        "queries": queries,
        "keys": keys,
        "view": [q0, q1, k0, k1],
        "image": packed(array, top),
        "rows": array.shape[0],
        "columns": array.shape[1],
        "size": size,
        "top": top,
        "signed": signed,
        "scale": scale,
        "exact": exact,
        "cross": None if cross is None else [int(cross[0]), int(cross[1])],
        "query_labels": _labels(query_labels, q1 - q0, "query_labels"),
        "key_labels": _labels(key_labels, k1 - k0, "key_labels"),
        "unit": unit,
        "title": title,
        "source": source,
    }


def _labels(labels: Sequence[str], tokens: int, what: str) -> list[str]:
    if labels and len(labels) != tokens:
        raise WorkbenchError(f"{what}: {len(labels)} labels for the {tokens} tokens in view")
    return [str(label) for label in labels] if tokens <= LABELLED else []
