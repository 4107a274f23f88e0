"""Cleaning a store of what died processes, merges and damage leave behind. What a living process uses is left alone."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from workbench.errors import WorkbenchError
from workbench.jobs import index, index_packs, index_writing, running
from workbench.jobs.grids import grid_keys, grid_names
from workbench.jobs.index_cells import marks
from workbench.jobs.job import is_key
from workbench.jobs.store import HIDDEN, JobStore, writing

KINDS = {
    "unfinished": "cells that a process was writing when it died",
    "running": "notes of processes that died",
    "failures": "records of failures of cells that are finished since",
    "damaged": "cells with files missing or cut off; moved to .jobs/damaged, so that they run again",
    "old damaged": "damaged cells that were moved away a week ago or more",
    "index": "parts of the index that were merged, half-written or spoiled",
    "temporary": "files that a process was writing when it died",
    "orphans": "finished cells and failures that no grid of the store names",
}
DAY = 24 * 3600.0
_KEPT = 7 * DAY
_YOUNG = 5.0
"""Seconds in which a file in ``running/`` may not be locked yet."""


@dataclass(frozen=True)
class GcReport:
    """``removed`` holds names by kind (``KINDS``), ``bytes`` what that freed. With ``dry`` both say what would be."""

    removed: Mapping[str, tuple[str, ...]]
    bytes: int
    dry: bool

    @property
    def count(self) -> int:
        return sum(map(len, self.removed.values()))


@dataclass
class _Sweep:
    """Removes, or with ``dry`` only counts."""

    dry: bool
    removed: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    bytes: int = 0

    def take(self, kind: str, name: str, path: Path, remove: Callable[[Path], bool], frees: bool = True) -> None:
        """Remove ``path``; ``remove`` says whether it did."""
        size = _size(path) if frees else 0
        with suppress(FileNotFoundError):
            if self.dry or remove(path):
                self.removed[kind].append(name)
                self.bytes += size


def gc(store: JobStore, *, orphans: bool = False, dry: bool = False) -> GcReport:
    """Remove what nobody needs from the store, or with ``dry`` say what that would be.

    Traces of processes go if the process was of this machine and has died, or if they are older than a day and the cell is not
    locked. Damaged cells are moved to ``.jobs/damaged`` and removed from there after a week. With ``orphans`` finished cells
    that no grid of the store names go too; a store without any grid refuses that. Every file of every cell is looked at, about
    0.1 ms per cell."""
    if not (store.path / HIDDEN).is_dir():
        raise WorkbenchError(
            f"{store.path} is no store of jobs; `workbench jobs run SPEC --store {store.path}` makes one"
        )
    store.check_format()
    if orphans and not grid_names(store):
        raise WorkbenchError(
            f"{store.path} has no grid, so every cell would go; remove the folder itself if that is meant"
        )
    named = grid_keys(store) if orphans else set()
    sweep = _Sweep(dry)
    with writing(store.path):
        _traces(store, sweep)
        spoiled = _damaged(store, sweep)
        whole = index.done_keys(store) - spoiled
        for key in sorted(whole & set(store.failed_keys())):
            sweep.take("failures", key, store.hidden / "failed" / f"{key}.json", _unlink)
        if orphans:
            _orphans(store, sweep, whole, named)
        _index(store, sweep)
    return GcReport({kind: tuple(names) for kind, names in sweep.removed.items() if names}, sweep.bytes, dry)


def _traces(store: JobStore, sweep: _Sweep) -> None:
    """What processes leave in ``part/``, in ``running/``, and beside files that they were replacing."""
    for path in _listed(store.hidden / "part"):
        key = path.name.split(".")[0]
        if path.name.startswith("."):
            if _older(path, DAY):
                sweep.take("temporary", path.name, path, _unlink)
        elif is_key(key) and _left(path) and not running.is_taken(store, key):
            sweep.take("unfinished", path.name, path, _remove)
    for path in _listed(store.hidden / "running"):
        if is_key(path.name) and _older(path, _YOUNG) and not running.is_taken(store, path.name):
            sweep.take("running", path.name, path, _unlink_unlocked)
    for folder in (store.hidden, store.hidden / "grids", store.hidden / "failed"):
        for path in _listed(folder):
            if path.name.startswith(".") and path.is_file() and _left(path):
                sweep.take("temporary", path.name, path, _unlink)
    for path in _listed(store.hidden / "damaged"):
        if _older(path, _KEPT):
            sweep.take("old damaged", path.name, path, _remove)


def _damaged(store: JobStore, sweep: _Sweep) -> set[str]:
    """Move damaged cells away, except those that a process is about to write again; gives the keys of all."""
    seen = marks(store.path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unreadable = index.damaged(store)
    found = {key for key in sorted(store.keys()) if key in unreadable or store.damage(key)}
    away = store.hidden / "damaged"

    def move(path: Path) -> bool:
        if marks(store.path, [path.name]).get(path.name) != seen.get(path.name):
            return False  # written again since
        away.mkdir(exist_ok=True)
        to = away / f"{path.name}.{time.time_ns():x}"
        path.rename(to)
        os.utime(to)  # the week begins
        return True

    for key in sorted(found):
        if not running.is_taken(store, key):
            sweep.take("damaged", key, store.folder(key), move, frees=False)
    return found


def _orphans(store: JobStore, sweep: _Sweep, whole: set[str], named: set[str]) -> None:
    def remove(path: Path) -> bool:
        away = store.hidden / "part" / f"{path.name}.orphan.{_me()}"
        path.rename(away)  # in one step: a cell is there or not
        return _remove(away)

    for key in sorted(whole - named):
        if not running.is_taken(store, key):
            sweep.take("orphans", key, store.folder(key), remove)
    for key in sorted(set(store.failed_keys()) - named - whole):
        sweep.take("orphans", key, store.hidden / "failed" / f"{key}.json", _unlink)


def _index(store: JobStore, sweep: _Sweep) -> None:
    folder = store.hidden / "index"
    for path in _listed(folder):
        if path.name.startswith(".") and path.is_dir() and _left(path):
            sweep.take("index", path.name, path, _remove)
    for path in (*index_packs.superseded(folder), *index_packs.spoiled(folder)):
        sweep.take("index", path.name, path, index_writing.remove)
    if not sweep.dry and folder.is_dir():
        index_writing.shrink(store, folder)


def _listed(folder: Path) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (folder / name for name in names)


def _me() -> str:
    return f"{socket.gethostname()}.{os.getpid()}"


def _left(path: Path) -> bool:
    """Whether the process at the end of the name, ``<host>.<pid>``, has died or, of another machine, was here a day ago."""
    owner, _, pid = path.name.rpartition(".")
    if not pid.isdigit():
        return False
    if not owner.endswith(f".{socket.gethostname()}"):
        return _older(path, DAY)
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def _older(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:
        return False


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    found = 0
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        with suppress(FileNotFoundError):
            found += file.lstat().st_size if not file.is_dir() else 0
    return found


def _unlink(path: Path) -> bool:
    path.unlink()
    return True


def _remove(path: Path) -> bool:
    if path.is_dir():
        shutil.rmtree(path)
        return True
    return _unlink(path)


def _unlink_unlocked(path: Path) -> bool:
    """Remove a file while holding its lock, unless a process has locked or replaced it since."""
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino != path.stat().st_ino:
            return False
        return _unlink(path)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
