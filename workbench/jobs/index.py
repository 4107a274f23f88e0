"""Reading a store of many cells: as data frames and by SQL.

What queries read is an index in ``.jobs/index/`` (``workbench.jobs.index_packs``). The truth stays in the folders of the cells:
every query compares the two, so a cell that was removed is not shown, and one that is new or has changed is read from its
folder. A damaged cell is not shown and a warning names it. Where the store cannot be written, what the index lacks stands in a
temporary folder for as long as the process lives.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.index_cells import marks
from workbench.jobs.index_packs import MARKS, PLACES, Pack, Snapshot, matched, packs, unread
from workbench.jobs.index_views import ROW, View, Views, literal, quoted
from workbench.jobs.index_writing import Packed, merge, write_packs
from workbench.jobs.store import JobStore, Unwritable, writing

if TYPE_CHECKING:
    import pandas as pd

Answer = TypeVar("Answer")

FEW = 512
"""A query that finds at most so many cells not packed leaves the store as it is: packing is the driver's part."""
_TRIES = 8
_LISTED = 50
_temporary: dict[tuple[int, str], tempfile.TemporaryDirectory[str]] = {}
_making = threading.Lock()


def pack(store: JobStore, keys: Iterable[str]) -> None:
    """Put these cells into the index of the store, about 0.5 ms each for small ones, and merge packs if there are many.

    Any number of processes may do so at the same time. Cells that are not there or damaged are left out."""
    keys = list(keys)
    if keys:
        _write(store, keys, store.hidden / "index")


def refresh(store: JobStore) -> int:
    """Put every cell into the index that is not there or has changed since; how many these were.

    In a store that cannot be written they are kept for this process."""
    missing = unread(marks(store.path), _packs(store, MARKS))
    return _fill(store, missing, keep=True).count if missing else 0


def done_keys(store: JobStore) -> set[str]:
    """Keys of the cells that are whole. Cells in the index are known by the time of their folder and the size of their table,
    others by ``store.damage``."""
    disk = marks(store.path)
    missing = unread(disk, _packs(store, MARKS))
    return (disk.keys() - missing) | {key for key in missing if store.is_done(key)}


def damaged(store: JobStore) -> dict[str, str]:
    """Cells that have a folder and cannot be read, with the reason. ``gc`` moves them away, so that they are computed again."""
    return dict(current(store)[1])


def cells(store: JobStore) -> pd.DataFrame:
    """One row per finished cell, by key: what was computed, by what code, where, when, and how long it took (seconds, bytes)."""
    return answered(store, lambda views: ask(views, "SELECT * FROM cells ORDER BY key", ["cells"]))


def sql(store: JobStore, query: str) -> pd.DataFrame:
    """Answer one reading query in DuckDB's SQL over the views ``cells``, ``results`` (every result row of every probe), one view
    per probe under its name, ``failures`` and ``grids`` (``workbench.jobs.index_views``).

    Rows come in no order but the one that the query names. A wrong query raises with DuckDB's message and the names of the
    views. Nothing is written, and no other file is read."""
    import duckdb

    def work(views: Views) -> pd.DataFrame:
        try:
            return relation(views, query, views.asked(query)).df()
        except duckdb.Error as error:
            raise views.mistake(error) from None

    return answered(store, work)


def frame(store: JobStore, where: str | Mapping[str, Any] | None = None, probe: str | None = None) -> pd.DataFrame:
    """One row per result row, by key and then as the probe gave them. Floats are those of the cells, to the last bit.

    Columns: key, model, revision, task, ``task.<option>``, probe, every argument, seed, dtype, then the result's own; a result's
    column with a name that is taken is called ``result.<name>``. ``where`` is a condition in SQL (``"method = 'eap' AND seed <
    3"``), or a mapping from columns to a value or a list of values, where ones that do not exist raise. ``probe`` takes the
    cells of one probe, and the columns they have."""

    return answered(store, lambda views: ask(views, rows_of(views, where, probe)))


def selected(store: JobStore, where: str | Mapping[str, Any] | None = None, probe: str | None = None) -> pd.DataFrame:
    """The finished cells that ``where`` picks by the columns of the job, one row each, by key."""

    def work(views: Views) -> pd.DataFrame:
        view = views.view(views.of_probe(probe))
        only = condition(views, View(view.job, view.job, view.cells, view.cells), where)
        return ask(views, f'SELECT * FROM {view.cells} WHERE {only} ORDER BY "key"')

    return answered(store, work)


def rows_of(views: Views, where: str | Mapping[str, Any] | None, probe: str | None) -> str:
    """The query of ``frame``; the view it names is made."""
    view = views.view(views.of_probe(probe))
    shown = ", ".join(map(quoted, view.names))
    return f'SELECT {shown} FROM {view.rows} WHERE {condition(views, view, where)} ORDER BY "key", {quoted(ROW)}'


def condition(views: Views, view: View, where: str | Mapping[str, Any] | None) -> str:
    """``where`` as SQL. Columns and values of a mapping that do not exist raise."""
    if where is None or (isinstance(where, str) and not where.strip()):
        return "true"
    if isinstance(where, str):
        return f"(\n{where}\n)"
    said = []
    for name, wanted in where.items():
        if name not in view.names:
            raise UnknownName("column", name, view.names)
        values = wanted if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        source = view.cells if name in view.job else view.rows
        tests = [_equal(views, source, name, value) for value in values]
        said.append("(" + (" OR ".join(tests) or "false") + ")")
    return " AND ".join(said) or "true"


def _equal(views: Views, source: str, name: str, value: Any) -> str:
    import duckdb

    column = quoted(name)
    ask_for = views.connection.execute
    test = f"{column} IS NULL" if value is None else f"{column} = {literal(value)}"
    if value is not None and not isinstance(value, str):
        (kind,) = ask_for(f"SELECT typeof(any_value({column})) FROM {source}").fetchone() or ("",)
        test = f"{column} = {literal(json.dumps(value))}" if kind == "VARCHAR" else test
    try:
        found = ask_for(f"SELECT 1 FROM {source} WHERE {test} LIMIT 1").fetchone()
    except duckdb.Error as error:
        raise views.mistake(error) from None
    if found is None:
        known = ask_for(f"SELECT DISTINCT {column} FROM {source} ORDER BY 1 LIMIT {_LISTED + 1}").fetchall()
        names = [str(row[0]) for row in known[:_LISTED]]
        raise UnknownName(name, value, [*names, *(["..."] if len(known) > _LISTED else [])])
    return test


def ask(views: Views, query: str, names: Iterable[str] = ()) -> pd.DataFrame:
    """The answer to a query over the views that are made already and ``names``. Columns of whole numbers and of truth values in
    which some are null are pandas's nullable ones."""
    import duckdb
    import pandas as pd
    import pyarrow as pa

    try:
        table = relation(views, query, names).to_arrow_table()
    except duckdb.Error as error:
        raise views.mistake(error) from None
    words = pd.Series([""]).dtype  # what pandas makes of texts depends on its version, but not on whether there are any
    always = {} if pd.api.types.is_object_dtype(words) else {pa.string(): words}
    gaps = {pa.bool_(): pd.BooleanDtype(), **always}
    for kind in ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64"):
        gaps[pa.type_for_alias(kind.lower())] = pd.api.types.pandas_dtype(kind)
    found = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        found[name] = column.to_pandas(types_mapper=(gaps if column.null_count else always).get)
    return pd.DataFrame(found, copy=False)


def relation(views: Views, query: str, names: Iterable[str] = ()) -> Any:
    """DuckDB's answer to a query, before it is read."""
    import duckdb

    views.make(names)
    views.refuse(query)
    views.lock()
    try:
        return views.connection.sql(query)
    except duckdb.Error as error:
        raise views.mistake(error) from None


def answered(store: JobStore, work: Callable[[Views], Answer]) -> Answer:
    """What ``work`` makes of the cells as they stand; again from the start if a pack it reads is merged away meanwhile."""
    for _ in range(_TRIES):
        snapshot, _ = current(store)
        views = Views(store, snapshot)
        try:
            return work(views)
        except Exception:
            if snapshot.stands():
                raise
        finally:
            views.connection.close()
    raise WorkbenchError(f"the index of {store.path} kept changing while it was read; ask again")


def current(store: JobStore) -> tuple[Snapshot, Mapping[str, str]]:
    """The index against the cells on disk, what it lacks packed, and the reasons of the cells that cannot be."""
    if not store.path.is_dir():
        raise WorkbenchError(f"no store {store.path}; workbench jobs run SPEC --store {store.path} makes it")
    store.check_format()
    disk = marks(store.path)
    found = matched(disk, _packs(store))
    if not found.unread:
        return found, {}
    told = _fill(store, found.unread, keep=len(found.unread) > FEW).damaged
    disk = {key: seen for key, seen in disk.items() if key not in set(found.unread)} | marks(store.path, found.unread)
    if told:
        what = f"{len(told)} damaged cells are left out, the first: {next(iter(told.values()))}"
        warnings.warn(f"{what}; workbench jobs gc --store {store.path} moves them away", stacklevel=2)
    return matched(disk, _packs(store)), told


def _packs(store: JobStore, columns: Sequence[str] = PLACES) -> list[Pack]:
    found = packs(store.hidden / "index", columns)
    mine = _temporary.get(_here(store))
    return found if mine is None else [*found, *packs(Path(mine.name), columns)]


def _fill(store: JobStore, keys: Sequence[str], keep: bool) -> Packed:
    """Pack cells into the store if they are to be kept and it can be written, else for this process."""
    if keep:
        with suppress(Unwritable):
            return _write(store, keys, store.hidden / "index")
    with _making:
        if (here := _here(store)) not in _temporary:
            _remove_left()
            _temporary[here] = tempfile.TemporaryDirectory(
                prefix=f"{_prefix()}{os.getpid()}-", ignore_cleanup_errors=True
            )
    return _write(store, keys, Path(_temporary[here].name))


def _prefix() -> str:
    return f"workbench-index-{socket.gethostname()}-"


def _remove_left() -> None:
    """Remove the folders of processes that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_prefix()}*"):
        pid = path.name.removeprefix(_prefix()).split("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError, OverflowError):
            continue  # another user's, or no process


def _here(store: JobStore) -> tuple[int, str]:
    return os.getpid(), os.path.abspath(store.path)


def _write(store: JobStore, keys: Iterable[str], folder: Path) -> Packed:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        packed = write_packs(store, keys, folder)
        merge(store, folder)
    return packed
