"""One cell as the index keeps it: a row that tells how it came about, and its table with plain types and safe names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.jobs.job import KEY_LENGTH
from workbench.jobs.store import TABLE, JobStore

if TYPE_CHECKING:
    import pyarrow as pa

Mark = tuple[int, int]
"""What tells a cell from another under the same key: when its folder changed (ns), and the bytes of its table (-1: none)."""

SHOWN = {
    "key": "string",
    "model": "string",
    "revision": "string",
    "task": "string",
    "task_options": "string",
    "probe": "string",
    "args": "string",
    "seed": "int64",
    "dtype": "string",
    "title": "string",
    "started": "string",
    "seconds": "double",
    "peak_bytes": "int64",
    "rows": "int64",
    "engine": "string",
    "threads": "int64",
    "device": "string",
    "host": "string",
    "note": "string",
    "code_version": "string",
    "code_digest": "string",
    "table_digest": "string",
}
"""Columns of ``cells``. ``task_options`` and ``args`` are JSON with sorted names, ``rows`` counts the rows of the table."""

HIDDEN_COLUMNS = {"folder_changed": "int64", "table_size": "int64", "part": "int32"}
_KEY = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}").fullmatch
_TAKEN = ("key", "file_row_number", "filename", "file_index")
"""Names that DuckDB or the index itself gives to columns of a file."""

Column = tuple[str, str, str]
"""A column of a result: its name in the file of the pack (empty if every value is null and nothing is kept), its own name,
and its Arrow type."""


@cache
def schema() -> pa.Schema:
    """The columns of ``cells.parquet``."""
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in {**SHOWN, **HIDDEN_COLUMNS}.items()])


@dataclass(frozen=True)
class Cell:
    """What a pack holds of a cell. ``table`` has the cell's key as its first column."""

    row: Mapping[str, Any]
    probe: str
    columns: tuple[Column, ...]
    table: pa.Table


def marks(path: Path, keys: Iterable[str] | None = None) -> dict[str, Mark]:
    """Marks of the cells that have a folder: all, or those of ``keys``. Two calls of the system per cell, 5 microseconds."""
    found: dict[str, Mark] = {}
    try:
        root = os.open(path, os.O_RDONLY)  # paths from here are shorter to walk
    except FileNotFoundError:
        return found
    try:
        if keys is None:
            with os.scandir(root) as entries:
                keys = [entry.name for entry in entries if _KEY(entry.name)]
        stat = os.stat
        for key in keys:
            try:
                changed = stat(key, dir_fd=root).st_mtime_ns
            except OSError:
                continue
            try:
                found[key] = changed, stat(f"{key}/{TABLE}", dir_fd=root).st_size
            except OSError:
                found[key] = changed, -1
    finally:
        os.close(root)
    return found


def read_cell(store: JobStore, key: str) -> Cell:
    """Read a cell whole. Raises with the reason if it is damaged, and if it is gone."""
    seen = marks(store.path, [key]).get(
        key
    )  # before reading: a cell that changes meanwhile has another mark than its row
    if seen is None:
        raise WorkbenchError(f"no result {key} in {store.path}")
    if reason := store.damage(key):
        raise WorkbenchError(reason)
    job, how, table = store.job(key), store.provenance(key), _table(store, key)
    plan = _plan(table.schema)
    task = job.dict()["task"]
    options = {name: value for name, value in task.items() if name != "name"} if isinstance(task, dict) else {}
    row = {
        "key": key,
        "model": job.model,
        "revision": job.revision,
        "task": job.task_name,
        "task_options": _json(options),
        "probe": job.probe,
        "args": _json(job.dict()["args"]),
        "seed": job.seed,
        "dtype": job.dtype,
        "title": job.title,
        "started": _text(how.get("started")),
        "seconds": _number(how.get("seconds")),
        "peak_bytes": _whole(how.get("peak_bytes")),
        "rows": table.num_rows,
        "engine": _text(how.get("engine")),
        "threads": _whole(how.get("threads")),
        "device": _text(_in(how, "model", "device")),
        "host": _text(_in(how, "hardware", "host")),
        "note": _text(how.get("note")),
        "code_version": _text(_in(how, "code", "version")),
        "code_digest": _text(_in(how, "code", "digest")),
        "table_digest": _text(how["files"][TABLE][1]),
        "folder_changed": seen[0],
        "table_size": seen[1],
    }
    row = {name: _encodable(value) if isinstance(value, str) else value for name, value in row.items()}
    columns = tuple((stored, name, kind) for _, stored, name, kind, _ in plan)
    return Cell(row, job.probe, columns, _plain_table(key, table, plan))


def _table(store: JobStore, key: str) -> pa.Table:
    """The table of a cell; five times as fast as ``read_table``, which plans a scan of many files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    at = store.folder(key) / TABLE
    try:
        return pq.ParquetFile(pa.BufferReader(at.read_bytes())).read(use_threads=False)
    except Exception as error:
        raise WorkbenchError(f"{at} is damaged: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _plain_table(key: str, table: pa.Table, plan: tuple[tuple[int, str, str, str, Any], ...]) -> pa.Table:
    import pyarrow as pa

    columns = [pa.repeat(pa.scalar(key), table.num_rows)]
    for at, stored, _, _, wanted in plan:
        if stored:
            columns.append(table.column(at) if wanted is None else table.column(at).cast(wanted))
    return pa.table(columns, names=["key", *(stored for _, stored, *_ in plan if stored)])


@lru_cache(maxsize=256)
def _plan(found: pa.Schema) -> tuple[tuple[int, str, str, str, Any], ...]:
    """Per column of a table: its number, its name in the pack, its own name, its type, and what to cast it to (None: nothing).

    Names in a pack differ by more than upper and lower case, which is all that DuckDB sees."""
    import pyarrow as pa

    taken = set(_TAKEN)
    plan = []
    for at, field in enumerate(found):
        kind, stored = field.type, ""
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if pa.types.is_float16(kind):
            kind = pa.float32()
        if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            kind = pa.string()
        if not pa.types.is_null(kind):
            stored = field.name
            while not stored or stored.casefold() in taken:
                stored += "_"
            taken.add(stored.casefold())
        plan.append((at, stored, field.name, str(kind), None if kind == field.type else kind))
    return tuple(plan)


def _in(record: Mapping[str, Any], name: str, inner: str) -> Any:
    found = record.get(name)
    return found.get(inner) if isinstance(found, Mapping) else None


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and abs(value) < 2**63 else None


def _encodable(text: str) -> str:
    """``text`` with halves of surrogate pairs, which JSON can hold and UTF-8 cannot, written out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
