"""The cells of a grid of jobs by their state: one small square each, ten thousand at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.apps.components.component import Component
from workbench.errors import UnknownName, WorkbenchError

CELLS = Component("cells")
"""Event: ``cell`` with a cell's number (click, Enter)."""
STATES = ("done", "failed", "running", "missing")
TITLED = 100_000
"""Characters of all titles together up to which they are sent with the states."""


def cells_data(
    states: Sequence[str], *, titles: Sequence[str] = (), selected: int | None = None, title: str = ""
) -> dict[str, Any]:
    """What :data:`CELLS` draws: one of ``STATES`` per cell, in the grid's order, and what each cell is, if that is not too long
    altogether. ``selected`` is the number of the cell that is framed."""
    letters = {name: name[0] for name in STATES}
    for state in dict.fromkeys(states):
        if state not in letters:
            raise UnknownName("state of a cell", state, STATES)
    if titles and len(titles) != len(states):
        raise WorkbenchError(f"{len(titles)} titles for {len(states)} cells")
    if selected is not None and not 0 <= selected < len(states):
        raise WorkbenchError(f"cell {selected} is not one of the {len(states)} cells")
    short = sum(map(len, titles)) <= TITLED
    return {
        "states": "".join(letters[state] for state in states),
        "titles": list(titles) if short else [],
        "selected": selected,
        "title": title,
    }
