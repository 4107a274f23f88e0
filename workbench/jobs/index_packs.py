"""Packs: the rows of many cells in few files, which is what queries read.

A pack is a folder ``.jobs/index/<id>/`` with ``cells.parquet`` (one row per cell) and one file per probe and form of table
(``0.parquet``, ``1.parquet`` ...: all result rows, the first column is the cell's key). It appears in one rename and never
changes. Two packs may hold the same cell, a reader takes it from one. Merging writes a new pack that names the ones it replaces,
and removes these after; a reader that finds a file gone lists the packs again. So nothing is locked for reading, and a process
may die anywhere: what it leaves is a folder whose name begins with a dot, which ``gc`` removes.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.jobs.index_cells import Column, Mark, marks, read_cell, schema
from workbench.jobs.store import JobStore, sync, writing

if TYPE_CHECKING:
    import pyarrow as pa

CELLS = "cells.parquet"
PACKS = 64
"""More small packs than this are merged."""
KEPT = 16
"""Merging leaves the largest of the small packs alone, so that a row is written again seldom."""
LARGE = 256 << 20
"""Bytes from which a pack is large: it is closed, and never merged."""
_LISTINGS = 10
_ROWS, _BYTES = 1 << 16, 32 << 20
"""What waits in memory before it is written: rows of one form, and bytes of all."""
_PARTS, _CELLS = 100, 1 << 13
"""A pack is closed when it has as many open files, or cells."""
MARKS = ("key", "folder_changed", "table_size")
PLACES = (*MARKS, "part")
_MARK = b"workbench"
_FORMAT = 1


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


@dataclass(frozen=True)
class Packed:
    """How many cells were packed, and what is wrong with the ones that could not be read, by key."""

    count: int
    damaged: Mapping[str, str]


def write_packs(store: JobStore, keys: Iterable[str], folder: Path) -> Packed:
    """Read cells and write them as packs into ``folder``. Cells that vanish or change meanwhile are left out."""
    damaged: dict[str, str] = {}
    count = 0
    open_pack: _Writer | None = None
    try:
        for key in sorted(set(keys)):
            seen = marks(store.path, [key])
            try:
                cell = read_cell(store, key)
            except Exception as error:
                if seen and marks(store.path, [key]) == seen:
                    known = isinstance(error, WorkbenchError)
                    damaged[key] = (
                        str(error) if known else f"{store.folder(key)} is damaged: {type(error).__name__}: {error}"
                    )
                continue
            open_pack = open_pack or _Writer(folder)
            part = open_pack.part(cell.probe, cell.columns, cell.table.schema)
            open_pack.rows(part, cell.table)
            open_pack.cell(cell.row, part)
            count += 1
            if open_pack.full:
                open_pack.commit()
                open_pack = None
        if open_pack is not None:
            open_pack.commit()
            open_pack = None
    finally:
        if open_pack is not None:
            open_pack.drop()
    return Packed(count, damaged)


def packs(folder: Path, columns: Sequence[str] = PLACES) -> list[Pack]:
    """The packs of a folder by name, with these columns of their cells; replaced and unreadable ones are left out."""
    for _ in range(_LISTINGS):
        found = {name: _readable(folder / name, columns) for name in _names(folder)}
        if all(pack is not None or (folder / name).is_dir() for name, pack in found.items()):
            break  # else one was merged away while they were read, and the one that replaces it may not have been listed
    replaced = {name for pack in found.values() if pack is not None for name in pack.replaces}
    return [pack for pack in found.values() if pack is not None and pack.path.name not in replaced]


def _names(folder: Path) -> list[str]:
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
        said = json.loads(file.schema_arrow.metadata[_MARK])
    if said["format"] != _FORMAT:
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


def merge(store: JobStore, folder: Path) -> None:
    """If there are many small packs in ``folder``, make one of the smallest. Rows of cells that are gone or have changed are left
    behind. Does nothing while another process merges."""
    if len(_names(folder)) <= PACKS:
        return
    with _alone(folder) as mine:
        if not mine:
            return
        tidy(folder)
        small = sorted((pack for pack in packs(folder) if pack.size < LARGE), key=lambda pack: pack.size)
        if len(small) <= PACKS:
            return
        chosen: list[Pack] = []
        for pack in small[: len(small) - KEPT]:
            if len(chosen) >= 2 and sum(p.size for p in chosen) + pack.size > 2 * LARGE:
                break
            chosen.append(pack)
        with suppress(FileNotFoundError):  # merged away by a process that this file system does not lock out
            _rewrite(store, folder, chosen)
        tidy(folder)


def _rewrite(store: JobStore, folder: Path, chosen: Sequence[Pack]) -> None:
    """One pack of several. Files of one form follow each other, so that one is open at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    keys = {key for pack in chosen for key in pack.cells.column("key").to_pylist()}
    snapshot = matched(marks(store.path, keys), chosen)
    keys_of, parts_of = snapshot.live.column("key"), snapshot.live.column("part").to_numpy()
    placed = [-1] * len(snapshot.parts)
    new = _Writer(folder)
    try:
        for i in sorted(range(len(placed)), key=lambda i: (snapshot.parts[i].probe, snapshot.parts[i].columns)):
            part = snapshot.parts[i]
            live = None if part.path in snapshot.whole else keys_of.filter(pa.array(parts_of == i)).combine_chunks()
            with pq.ParquetFile(part.path) as file:
                placed[i] = new.part(part.probe, part.columns, file.schema_arrow.remove_metadata(), alone=True)
                for batch in file.iter_batches(_ROWS, use_threads=False):
                    rows = pa.Table.from_batches([batch]).replace_schema_metadata()
                    new.rows(
                        placed[i], rows if live is None else rows.filter(pc.is_in(rows.column("key"), value_set=live))
                    )
        packs_of = snapshot.live.column("pack").to_numpy()
        for i, pack in enumerate(snapshot.packs):
            to = dict(
                zip(keys_of.filter(pa.array(packs_of == i)).to_pylist(), parts_of[packs_of == i].tolist(), strict=True)
            )
            for row in pq.ParquetFile(pack.told).read(use_threads=False).to_pylist():
                if row["key"] in to:
                    new.cell(row, placed[to[row["key"]]])
        new.commit(replaces=[pack.path.name for pack in chosen])
    finally:
        new.drop()


def tidy(folder: Path) -> None:
    """Remove the packs that a merged one replaces."""
    for path in superseded(folder):
        away = path.with_name(_temporary(f"gone-{path.name}"))
        with suppress(FileNotFoundError):
            path.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def superseded(folder: Path) -> list[Path]:
    """The packs that a readable pack replaces."""
    found = [pack for name in _names(folder) if (pack := _readable(folder / name, ("key",))) is not None]
    return [path for pack in found for name in pack.replaces if (path := folder / name).is_dir()]


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other process merges in ``folder`` during the block. Where files cannot be locked the answer is yes: two
    merges at once cost work, not rows."""
    with open(folder / ".merge", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True


def _temporary(name: str) -> str:
    return f".{name}.{socket.gethostname()}.{os.getpid()}"


class _Writer:
    """A pack in the making: a folder with a temporary name until ``commit``."""

    def __init__(self, folder: Path) -> None:
        self.id = f"{time.time_ns():016x}-{secrets.token_hex(4)}"
        self.final = folder / self.id
        self.at = folder / _temporary(self.id)
        with writing(folder):
            self.at.mkdir()
        self._parts: dict[tuple[str, tuple[Column, ...]], int] = {}
        self._files: list[Any] = []
        self._waiting: list[list[pa.Table]] = []
        self._cells: list[int] = []
        self._told: list[dict[str, Any]] = []
        self._bytes = self._lines = 0

    def part(self, probe: str, columns: tuple[Column, ...], kinds: pa.Schema, alone: bool = False) -> int:
        """The number of the file for tables of this form. ``alone``: the other files are finished."""
        import pyarrow.parquet as pq

        if (number := self._parts.get((probe, columns))) is None:
            with writing(self.at.parent):
                if alone:
                    self._close()
                number = self._parts[probe, columns] = len(self._files)
                self._files.append(pq.ParquetWriter(self._path(number), kinds, compression="zstd"))
            self._waiting.append([])
            self._cells.append(0)
        return number

    def rows(self, part: int, table: pa.Table) -> None:
        self._waiting[part].append(table)
        self._bytes += table.nbytes
        self._lines += table.num_rows
        if self._bytes > _BYTES or self._lines > _ROWS:
            with writing(self.at.parent):
                self._flush()

    def cell(self, row: Mapping[str, Any], part: int) -> None:
        self._told.append({**row, "part": part})
        self._cells[part] += 1

    @property
    def full(self) -> bool:
        if len(self._files) >= _PARTS or len(self._told) >= _CELLS:
            return True
        return sum(os.stat(self._path(i)).st_size for i in range(len(self._files))) > LARGE

    def commit(self, replaces: Sequence[str] = ()) -> None:
        """Make the pack durable and give it its name."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with writing(self.at.parent):
            self._close()
            parts = [
                (os.stat(self._path(i)).st_size, probe, columns, self._cells[i])
                for (probe, columns), i in self._parts.items()
            ]
            said = json.dumps({"format": _FORMAT, "replaces": list(replaces), "parts": parts})
            table = pa.Table.from_pylist(self._told, schema().with_metadata({_MARK: said.encode()}))
            pq.write_table(table, self.at / CELLS, compression="zstd")
            for path in (*map(self._path, range(len(parts))), self.at / CELLS, self.at):
                sync(path)
            self.at.rename(self.final)
            sync(self.final.parent)

    def drop(self) -> None:
        """Forget the pack if it has not got its name."""
        for file in self._files:
            with suppress(Exception):
                file.close()
        shutil.rmtree(self.at, ignore_errors=True)

    def _path(self, part: int) -> Path:
        return self.at / f"{part}.parquet"

    def _flush(self) -> None:
        import pyarrow as pa

        for file, tables in zip(self._files, self._waiting, strict=True):
            if tables:
                file.write_table(pa.concat_tables(tables).combine_chunks(), row_group_size=2 * _ROWS)
                tables.clear()
        self._bytes = self._lines = 0

    def _close(self) -> None:
        self._flush()
        for file in self._files:
            file.close()
