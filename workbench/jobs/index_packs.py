"""Packs: the rows of many cells in few files, which is what queries read.

A pack is a folder ``.jobs/index/<id>/`` with ``cells.parquet`` (one row per cell) and one file per probe and form of table
(``0.parquet``, ``1.parquet`` ...: all result rows, the first column is the cell's key). It appears in one rename and never
changes. Two packs may hold the same cell, a reader takes it from one. Merging writes a new pack that names the ones it replaces,
and removes these after; a reader that finds a file gone lists the packs again. So nothing is locked for reading, and a process
may die anywhere: what it leaves is a folder whose name begins with a dot, which ``gc`` removes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.jobs.index_cells import Column, Mark

if TYPE_CHECKING:
    import pyarrow as pa

CELLS = "cells.parquet"
_LISTINGS = 10
MARKS = ("key", "folder_changed", "table_size")
PLACES = (*MARKS, "part")
NOTE = b"workbench"
"""Where ``cells.parquet`` keeps what it says of its pack."""
FORMAT = 1


@dataclass(frozen=True)
class Part:
    """One file of result rows: the ``cells`` cells of ``probe`` in it share ``columns``."""

    path: Path
    probe: str
    columns: tuple[Column, ...]
    cells: int


@dataclass(frozen=True)
class Pack:
    """``cells`` has one row per cell with the columns that were asked for; its column ``part`` counts ``parts``."""

    path: Path
    size: int
    parts: tuple[Part, ...]
    replaces: tuple[str, ...]
    cells: pa.Table

    @property
    def told(self) -> Path:
        """The file with one row per cell."""
        return self.path / CELLS


@dataclass(frozen=True)
class Snapshot:
    """The index against the folders that stand at one moment.

    ``live`` has one row per cell that is as it was when it was packed, by key: ``pack`` counts ``packs`` and ``part`` counts
    ``parts``, which are those with such cells. ``whole`` holds the paths of the files of which every cell is to be taken.
    ``unread``: cells that have a folder and are in no pack, or have changed since."""

    live: pa.Table
    packs: tuple[Pack, ...]
    parts: tuple[Part, ...]
    whole: frozenset[Path]
    unread: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        return self.live.column("key").to_pylist()

    def stands(self) -> bool:
        """Whether every file is still there."""
        return all(path.exists() for path in (*(pack.told for pack in self.packs), *(part.path for part in self.parts)))


def packs(folder: Path, columns: Sequence[str] = PLACES) -> list[Pack]:
    """The packs of a folder by name, with these columns of their cells; replaced and unreadable ones are left out."""
    for _ in range(_LISTINGS):
        found = {name: _readable(folder / name, columns) for name in names(folder)}
        if all(pack is not None or (folder / name).is_dir() for name, pack in found.items()):
            break  # else one was merged away while they were read, and the one that replaces it may not have been listed
    replaced = {name for pack in found.values() if pack is not None for name in pack.replaces}
    return [pack for pack in found.values() if pack is not None and pack.path.name not in replaced]


def names(folder: Path) -> list[str]:
    """Names of the packs of a folder, readable or not."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _readable(at: Path, columns: Sequence[str]) -> Pack | None:
    """The pack, or None if it is damaged, gone or of another format: its cells count as not packed."""
    try:
        return _read(at, columns)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(at: Path, columns: Sequence[str]) -> Pack:
    import pyarrow.parquet as pq

    with pq.ParquetFile(at / CELLS) as file:
        cells = file.read(columns=list(columns), use_threads=False).replace_schema_metadata()
        said = json.loads(file.schema_arrow.metadata[NOTE])
    if said["format"] != FORMAT:
        raise ValueError("a pack of another format")
    parts = []
    for i, (size, probe, kinds, count) in enumerate(said["parts"]):
        path = at / f"{i}.parquet"
        if os.stat(path).st_size != size:
            raise ValueError("a pack with a file that is cut off")
        parts.append(Part(path, probe, tuple((stored, name, kind) for stored, name, kind in kinds), count))
    size = os.stat(at / CELLS).st_size + sum(size for size, *_ in said["parts"])
    return Pack(at, size, tuple(parts), tuple(said["replaces"]), cells)


def unread(disk: Mapping[str, Mark], found: Sequence[Pack]) -> list[str]:
    """Cells that have a folder and are in no pack as they are."""
    return sorted(disk.keys() - _chosen(disk, found).keys())


def matched(disk: Mapping[str, Mark], found: Sequence[Pack]) -> Snapshot:
    """The packs' rows that belong to the cells on disk, each cell once."""
    import numpy as np
    import pyarrow as pa

    chosen = dict(sorted(_chosen(disk, found).items()))
    rows = np.fromiter(chosen.values(), dtype=np.int64, count=len(chosen))
    starts = np.cumsum([0, *(pack.cells.num_rows for pack in found)])
    firsts = np.cumsum([0, *(len(pack.parts) for pack in found)])
    places = [pack.cells.column("part").to_numpy() + firsts[i] for i, pack in enumerate(found)]
    pack_used, pack_at, pack_count = _numbered(np.searchsorted(starts, rows, side="right") - 1)
    part_used, part_at, part_count = _numbered(np.concatenate([*places, np.zeros(0, np.int64)])[rows])
    every = [part for pack in found for part in pack.parts]
    packs, parts = [found[i] for i in pack_used], [every[i] for i in part_used]
    whole = {pack.told for pack, count in zip(packs, pack_count, strict=True) if pack.cells.num_rows == count}
    whole |= {part.path for part, count in zip(parts, part_count, strict=True) if part.cells == count}
    live = pa.table({"key": pa.array(chosen, pa.string()), "pack": pack_at, "part": part_at})
    return Snapshot(live, tuple(packs), tuple(parts), frozenset(whole), tuple(sorted(disk.keys() - chosen.keys())))


def _numbered(values: Any) -> tuple[Any, Any, Any]:
    """The different values, each value as a number among them, and how often each occurs."""
    import numpy as np

    return np.unique(values.astype(np.int64), return_inverse=True, return_counts=True)


def _chosen(disk: Mapping[str, Mark], found: Sequence[Pack]) -> dict[str, int]:
    """The row of each cell among the rows of all packs."""
    chosen: dict[str, int] = {}
    first = 0
    for pack in found:
        keys, changed, sizes = (pack.cells.column(name).to_pylist() for name in MARKS)
        for row, (key, seen) in enumerate(zip(keys, zip(changed, sizes, strict=True), strict=True), first):
            if disk.get(key) == seen:
                chosen[key] = row
        first += len(keys)
    return chosen


def superseded(folder: Path) -> list[Path]:
    """The packs that a readable pack replaces."""
    found = [pack for name in names(folder) if (pack := _readable(folder / name, ("key",))) is not None]
    return [path for pack in found for name in pack.replaces if (path := folder / name).is_dir()]


def spoiled(folder: Path) -> list[Path]:
    """The packs that cannot be read."""
    return [path for name in names(folder) if (path := folder / name).is_dir() and _readable(path, ("key",)) is None]
