"""Writing packs (``workbench.jobs.index_packs``): from the folders of cells, and from other packs."""

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
from workbench.jobs.index_cells import Column, marks, read_cell, schema
from workbench.jobs.index_packs import CELLS, FORMAT, NOTE, Pack, matched, names, packs, superseded
from workbench.jobs.store import JobStore, sync, writing

if TYPE_CHECKING:
    import pyarrow as pa

PACKS = 64
"""More small packs than this are merged."""
KEPT = 16
"""Merging leaves the largest of the small packs alone, so that a row is written again seldom."""
LARGE = 256 << 20
"""Bytes from which a pack is large: it is closed, and never merged."""
_ROWS, _BYTES = 1 << 16, 32 << 20
"""What waits in memory before it is written: rows of one form, and bytes of all."""
_PARTS, _CELLS = 100, 1 << 13
"""A pack is closed when it has as many open files, or cells."""


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


def merge(store: JobStore, folder: Path) -> None:
    """If there are many small packs in ``folder``, make one of the smallest. Rows of cells that are gone or have changed are left
    behind. Does nothing while another process merges."""
    if len(names(folder)) <= PACKS:
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


def shrink(store: JobStore, folder: Path) -> None:
    """Write packs again of which most cells are gone or have changed. Does nothing while another process merges."""
    with _alone(folder) as mine:
        if not mine:
            return
        found = packs(folder)
        live = set(matched(marks(store.path), found).keys)
        mostly = [
            p for p in found if 2 * sum(key in live for key in p.cells.column("key").to_pylist()) < p.cells.num_rows
        ]
        if mostly:
            _rewrite(store, folder, mostly)
            tidy(folder)


def tidy(folder: Path) -> None:
    """Remove the packs that a merged one replaces."""
    for path in superseded(folder):
        remove(path)


def remove(path: Path) -> bool:
    """Remove a pack in one step, as readers see it."""
    away = path.with_name(_temporary(f"gone-{path.name}"))
    try:
        path.rename(away)
    except FileNotFoundError:
        return False
    shutil.rmtree(away, ignore_errors=True)
    return True


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
            said = json.dumps({"format": FORMAT, "replaces": list(replaces), "parts": parts})
            table = pa.Table.from_pylist(self._told, schema().with_metadata({NOTE: said.encode()}))
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
