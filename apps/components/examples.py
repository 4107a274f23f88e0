"""Pieces of text whose tokens are coloured by one number each: where a feature is active, and how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from workbench.apps.components.component import Component
from workbench.errors import WorkbenchError

EXAMPLES = Component("examples")
"""No events: a token tells its number under the pointer or the keyboard."""


def example_row(tokens: Sequence[str], values: Sequence[float], *, at: int = -1, note: str = "") -> dict[str, Any]:
    """One piece of text: ``values[i]`` belongs to ``tokens[i]``, NaN counts as 0; the token ``at`` is framed,
    -1 for none; ``note`` stands before it."""
    if len(tokens) != len(values):
        raise WorkbenchError(f"{len(values)} numbers for {len(tokens)} tokens")
    if not -1 <= at < len(tokens):
        raise WorkbenchError(f"at is one of the {len(tokens)} tokens, or -1; got {at}")
    return {
        "tokens": [str(token) for token in tokens],
        "values": [0.0 if math.isnan(value) else float(value) for value in values],
        "at": at,
        "note": note,
    }


def examples_data(
    groups: Sequence[tuple[str, Sequence[dict[str, Any]]]],
    *,
    top: float | None = None,
    unit: str = "activation",
    title: str = "",
) -> dict[str, Any]:
    """What :data:`EXAMPLES` draws: ``groups`` of rows made by :func:`example_row`, each with a name. ``top`` is the value of the
    strongest colour, by default the largest there is; negative values have a colour of their own."""
    values = [abs(value) for _, rows in groups for row in rows for value in row["values"]]
    largest = max(values, default=0.0) or 1.0
    if top is not None and not (math.isfinite(top) and top > 0):
        raise WorkbenchError(f"top: the value of the strongest colour must be a positive number, got {top}")
    return {
        "groups": [{"name": name, "rows": list(rows)} for name, rows in groups],
        "top": largest if top is None else float(top),
        "unit": unit,
        "title": title,
    }
