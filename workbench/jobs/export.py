"""Results of a store for other tools: one table of all result rows, or the circuits of its cells as files.

Everything is written under a temporary name and renamed, so a file or folder with the final name is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.index import answered, relation, rows_of, selected
from workbench.jobs.index_views import JOB, Views
from workbench.jobs.store import SAVED, JobStore, sync

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from workbench.circuits import Circuit

TABLES = ("parquet", "csv")
CIRCUITS = ("mib", "neuronpedia", "eap-json")
FORMS = (*TABLES, *CIRCUITS)
"""``mib``: submissions of the MIB circuit track. ``neuronpedia``: an attribution graph per cell. ``eap-json``: an EAP-IG graph
per cell."""
_ROWS = 1 << 17
_LONGEST = 120
Tick = Callable[[int, int], None]


def export(
    store: JobStore,
    to: str | Path,
    *,
    form: str | None = None,
    where: str | Mapping[str, Any] | None = None,
    probe: str | None = None,
    force: bool = False,
    tick: Tick | None = None,
) -> Path:
    """Write results of the finished cells to ``to`` and give its path.

    ``form``: ``parquet`` or ``csv`` (one row per result row with the job's fields as columns, as ``index.frame`` has them; the
    suffix tells which), or a folder of the cells' circuits: ``mib``, ``neuronpedia`` or ``eap-json``. ``where`` and ``probe``
    choose as in ``index.frame``; circuits are chosen by the columns of the job. An existing target is refused, or replaced with
    ``force``. ``tick(done, total)`` is called for every circuit.
    """
    to = Path(to)
    form = _form(to, form)
    _refuse_existing(to, form, force)
    with _replacing(to) as part:
        if form in TABLES:
            rows = answered(store, lambda views: _write_table(views, part, form, where, probe))
            if not rows:
                raise WorkbenchError(f"nothing to export: no result row in {store.path}{_asked(where, probe)}")
        else:
            cells = selected(store, where, probe)
            _refuse_without_circuit(store, cells, where, probe)
            (_write_mib if form == "mib" else _write_graphs)(
                store, cells, part, form, tick or (lambda done, total: None)
            )
    return to


def _form(to: Path, form: str | None) -> str:
    if form is None and (form := to.suffix.removeprefix(".").lower()) not in TABLES:
        circuits = ", ".join(CIRCUITS)
        raise WorkbenchError(f"the form of {to} is not told: call it .parquet or .csv, or give form= one of {circuits}")
    if form not in FORMS:
        raise UnknownName("form of export", form, FORMS)
    return form


def _refuse_existing(to: Path, form: str, force: bool) -> None:
    if not (to.exists() or to.is_symlink()):
        return
    if not force:
        raise WorkbenchError(f"{to} exists already; choose another name, or replace it with force")
    if form in TABLES:
        if to.is_dir():
            raise WorkbenchError(f"{to} is a folder and is not replaced by a file; choose another name")
        return
    strange = (
        [to]
        if not to.is_dir()
        else [p for p in to.rglob("*") if p.is_symlink() or (p.is_file() and p.suffix != ".json")]
    )
    if strange:
        raise WorkbenchError(f"{to} is no earlier export and is not replaced: it has {strange[0]}; choose another name")


@contextmanager
def _replacing(to: Path) -> Iterator[Path]:
    """A temporary path beside ``to`` that takes its place at the end of the block, and is gone if the block raises."""
    mine = f"{socket.gethostname()}.{os.getpid()}"
    part, old = to.with_name(f".{to.name}.{mine}"), to.with_name(f".{to.name}.old.{mine}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        yield part
        if part.is_file():
            sync(part)
        if part.is_dir() and to.is_dir():
            to.rename(old)
        part.replace(to)
    except OSError as error:
        raise WorkbenchError(f"cannot write {to}: {error.strerror or error}") from error
    finally:
        _remove(part)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _asked(where: Any, probe: str | None) -> str:
    said = [f"probe {probe}" if probe else "", f"where {where}" if where else ""]
    return "".join(f", {part}" for part in said if part) + "; `workbench jobs status` tells what is finished"


# tables


def _write_table(views: Views, part: Path, form: str, where: str | Mapping[str, Any] | None, probe: str | None) -> int:
    """Stream the rows into the file; how many these are."""
    import duckdb
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    found = relation(views, rows_of(views, where, probe))
    try:
        reader = (getattr(found, "to_arrow_reader", None) or found.fetch_arrow_reader)(_ROWS)
        count = 0
        if form == "parquet":
            with pq.ParquetWriter(part, reader.schema, compression="zstd") as out:
                for table in _even(reader):
                    out.write_table(table, row_group_size=_ROWS)
                    count += table.num_rows
        else:
            with csv.CSVWriter(part, _flat(reader.schema.empty_table()).schema) as out:
                for table in _even(reader):
                    out.write_table(_flat(table))
                    count += table.num_rows
    except duckdb.Error as error:
        raise views.mistake(error) from None
    return count


def _even(batches: Any) -> Iterator[pa.Table]:
    """The rows in pieces of one size, so that the file does not depend on how they were read."""
    import pyarrow as pa

    waiting = batches.schema.empty_table()
    for batch in batches:
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
        while waiting.num_rows >= _ROWS:
            yield waiting.slice(0, _ROWS)
            waiting = waiting.slice(_ROWS)
    if waiting.num_rows:
        yield waiting


def _flat(table: pa.Table) -> pa.Table:
    """Columns that CSV has no form for as text: lists and records in JSON, bytes in hexadecimal digits."""
    import pyarrow as pa

    for i, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            values = [
                None if value is None else json.dumps(value, default=str) for value in table.column(i).to_pylist()
            ]
        elif pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            values = [None if value is None else value.hex() for value in table.column(i).to_pylist()]
        else:
            continue
        table = table.set_column(i, field.name, pa.array(values, pa.string()))
    return table


# circuits


def _refuse_without_circuit(store: JobStore, cells: pd.DataFrame, where: Any, probe: str | None) -> None:
    if cells.empty:
        raise WorkbenchError(f"nothing to export: no finished cell in {store.path}{_asked(where, probe)}")
    without = [key for key in cells["key"] if not (store.folder(key) / SAVED / "circuit.json").is_file()]
    if without:
        first = f"{store.job(without[0]).title} ({without[0][:12]})"
        raise WorkbenchError(
            f"{len(without):,} of {len(cells):,} cells saved no circuit, the first: {first}; choose the ones that did with "
            "probe= or where=, or export the rows as .parquet"
        )


def _circuit(store: JobStore, key: str) -> Circuit:
    from workbench.circuits import Circuit

    found = store.load(key)
    if not isinstance(found, Circuit):
        raise WorkbenchError(f"cell {key} saved a {type(found).__name__}, not a circuit")
    return found


def _write_graphs(store: JobStore, cells: pd.DataFrame, part: Path, form: str, tick: Tick) -> None:
    """A JSON file per cell, called after what tells the cells apart."""
    from workbench.interchange import write_eap_json, write_graph_json

    part.mkdir()
    for i, (key, label) in enumerate(
        zip(cells["key"], _labels(cells, ("model", "task", *_varying(cells))), strict=True)
    ):
        with _naming(store, key):
            circuit = _circuit(store, key)
            if form == "eap-json":
                write_eap_json(circuit, part / f"{label}.json")
            else:
                write_graph_json(circuit, part / f"{label}.json", slug=label)
        tick(i + 1, len(cells))


def _write_mib(store: JobStore, cells: pd.DataFrame, part: Path, form: str, tick: Tick) -> None:
    """One submission folder; where several cells are about the same task and model, one per combination of what else differs."""
    from workbench.interchange import write_mib

    models = _models(cells)
    pairs = [
        (_slug(task or "no-task"), models[model])
        for task, model in zip(_texts(cells, "task"), _texts(cells, "model"), strict=True)
    ]
    other = [name for name in _varying(cells) if name not in ("model", "task")]
    groups = [""] * len(cells) if len(set(pairs)) == len(pairs) else _labels(cells, other, unique=False)
    if len(set(zip(groups, pairs, strict=True))) < len(cells):
        groups = [f"{group}-{key[:12]}" for group, key in zip(groups, cells["key"], strict=True)]
    part.mkdir()
    for i, (key, pair, group) in enumerate(zip(cells["key"], pairs, groups, strict=True)):
        with _naming(store, key):
            written = write_mib({pair: _circuit(store, key)}, part / ".one")
        (part / group).mkdir(exist_ok=True)
        for folder in written.iterdir():
            folder.rename(part / group / folder.name)
        written.rmdir()
        tick(i + 1, len(cells))


@contextmanager
def _naming(store: JobStore, key: str) -> Iterator[None]:
    """Refusals in the block say which cell they are about."""
    try:
        yield
    except WorkbenchError as error:
        raise WorkbenchError(f"cell {key[:12]} ({store.job(key).title}): {error}") from error


def _varying(cells: pd.DataFrame) -> list[str]:
    """Columns of the job in which the cells differ."""
    return [name for name in cells.columns if name not in ("key", "revision") and cells[name].nunique(dropna=False) > 1]


def _labels(cells: pd.DataFrame, names: Any, unique: bool = True) -> list[str]:
    """A file name per cell from its values of these columns."""
    models = _models(cells)
    said: list[list[str]] = [[] for _ in range(len(cells))]
    for name in dict.fromkeys(names):
        for parts, value in zip(said, _texts(cells, name), strict=True):
            if value:
                value = models[value] if name == "model" else value
                parts.append(value if name in JOB and name != "seed" else f"{name}-{value}")
    found = [_slug("-".join(parts)) for parts in said]
    if unique and len(set(found)) < len(found):
        return [f"{label}-{key[:12]}" for label, key in zip(found, cells["key"], strict=True)]
    return found


def _texts(cells: pd.DataFrame, name: str) -> list[str]:
    """A column as texts; empty where it is null."""
    return ["" if missing else str(value) for value, missing in zip(cells[name], cells[name].isna(), strict=True)]


def _models(cells: pd.DataFrame) -> dict[str, str]:
    """A short name for each model: the last part of its path, all of it where two would be the same."""
    names = sorted({name for name in _texts(cells, "model") if name})
    short = {name: name.rstrip("/").rsplit("/", 1)[-1] for name in names}
    alike = len(set(short.values())) < len(short)
    return {"": "no-model"} | {name: _slug(name if alike else short[name], r"[^\w.-]+") for name in names}


def _slug(text: str, other: str = r"[^\w-]+") -> str:
    """``text`` as a file name, with ``-`` for ``other`` characters: what is left may also name a graph."""
    return re.sub(other, "-", text)[:_LONGEST].strip("-.") or "circuit"
