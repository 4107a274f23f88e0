"""How far the grids of a store are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workbench.errors import WorkbenchError
from workbench.jobs.grids import grid_keys, grid_names
from workbench.jobs.running import running_keys
from workbench.jobs.store import HIDDEN, JobStore


@dataclass(frozen=True)
class Status:
    """Cells of the grids of a store by state: each is in one. ``other`` counts finished cells that no grid names. ``failures``
    and ``computing`` hold keys."""

    done: int
    failed: int
    running: int
    missing: int
    other: int
    failures: tuple[str, ...]
    computing: tuple[str, ...]

    def dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "failed": self.failed,
            "running": self.running,
            "missing": self.missing,
            "other": self.other,
        }


def status(store: JobStore, grid: str | None = None) -> Status:
    """The state of every cell of ``grid``, of all grids without a name, read from the store alone."""
    from workbench.jobs.index import done_keys

    if not (store.path / HIDDEN).is_dir():
        raise WorkbenchError(
            f"{store.path} is no store of jobs; `workbench jobs run SPEC --store {store.path}` makes one"
        )
    store.check_format()
    asked = grid_keys(store, grid)
    whole = done_keys(store)
    done = whole & asked
    at_work = set(running_keys(store)) & asked - done
    failed = set(store.failed_keys()) & asked - done - at_work
    other = len(whole - (asked if grid is None else grid_keys(store)))
    missing = len(asked) - len(done) - len(at_work) - len(failed)
    return Status(len(done), len(failed), len(at_work), missing, other, tuple(sorted(failed)), tuple(sorted(at_work)))


def status_by_grid(store: JobStore) -> dict[str, Status]:
    """The state of each grid by its name."""
    return {name: status(store, name) for name in grid_names(store)}
