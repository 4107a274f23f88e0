"""Where grids stand in a results folder: stores of jobs, each a folder of its own."""

from __future__ import annotations

from pathlib import Path

from workbench.errors import WorkbenchError
from workbench.jobs.store import HIDDEN, JobStore

DEPTH = 2
"""How many folders deep stores of jobs are looked for."""


def job_stores(root: Path) -> list[JobStore]:
    """``root`` and the folders in it that hold jobs, by path; cells are not looked into, and neither are folders that cannot be
    read."""
    found, pending = [], [(root, 0)]
    while pending:
        at, depth = pending.pop()
        try:
            if (at / HIDDEN).is_dir():
                found.append(JobStore(at))
            elif depth < DEPTH and at.is_dir():
                pending += [(sub, depth + 1) for sub in at.iterdir() if sub.is_dir() and not sub.name.startswith(".")]
        except PermissionError:
            continue
    return sorted(found, key=lambda store: str(store.path))


def name_in(root: Path, store: JobStore) -> str:
    """The store's path relative to ``root``; the root's own name where it is that."""
    return root.name if store.path == root else str(store.path.relative_to(root))


def folder_for(root: Path, name: str, taken: tuple[str, ...] = ()) -> Path:
    """The folder of the grid ``name`` in ``root``: a store of jobs or a new one; what holds other things is refused."""
    at = root / name
    if name in taken or at.parent != root or name.startswith("."):
        raise WorkbenchError(f"a grid cannot stand in {name!r}; choose another name")
    if at.exists() and not (at / HIDDEN).is_dir() and (not at.is_dir() or any(at.iterdir())):
        raise WorkbenchError(f"{at} exists and holds something else; give the grid another name")
    return at
