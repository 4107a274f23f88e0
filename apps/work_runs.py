"""What a worker reads of a captured run: its folder in the store that the cell itself goes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.errors import WorkbenchError
from workbench.jobs.job import is_key
from workbench.jobs.store import SAVED

if TYPE_CHECKING:
    from workbench.jobs.probes import Cell
    from workbench.run import Run


def stored_run(cell: Cell, key: str) -> Run:
    """The run that the capture with this key saved in the cell's own store; a key is no path, so nothing else can be read."""
    from workbench.stored_run import open_run

    if not is_key(key):
        raise WorkbenchError(f"a run is named by its key, 32 hexadecimal digits; got {key!r}")
    return open_run(cell.uploads.parent / key / SAVED)
