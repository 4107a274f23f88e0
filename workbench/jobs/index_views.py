"""SQL views over packs: nothing is read before a query asks for it, and a query can only read.

A view of results has one row per result row: the job's fields, the task's options as ``task.<name>``, each argument under its
own name, then the result's columns. A name that is taken, in upper or lower case, gets ``args.`` or ``result.`` before it. Cells
of one view may differ in columns, which are then null. They may differ in types: whole numbers of several widths become 64 bit,
whole numbers beside fractions become fractions, and anything else that clashes becomes text. A column that is null everywhere is
text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.index_cells import SHOWN, schema
from workbench.jobs.index_packs import Snapshot
from workbench.jobs.store import JobStore

if TYPE_CHECKING:
    import pyarrow as pa

OWN = ("cells", "results", "failures", "grids")
JOB = ("key", "model", "revision", "task", "probe", "seed", "dtype")
FAILURE = ("kind", "message", "attempts", "when", "traceback")
ROW = "#row"
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
_NUMBERS = (*_INTEGERS, "uint64", "float", "double")
_FIRST_WORD = re.compile(r"(?:\s|\(|--[^\n]*(?:\n|$)|/\*.*?\*/)*(\w*)", re.DOTALL)
_READING = ("select", "with", "from", "pivot", "unpivot", "pivot_wider", "pivot_longer")


@dataclass(frozen=True)
class View:
    """A view of results as it was made. ``names``: its columns in order; ``job``: the ones that are the job's;
    ``cells``: the table with one row per cell and the job's columns; ``rows``: the view with the column ``ROW`` too."""

    names: tuple[str, ...]
    job: tuple[str, ...]
    cells: str
    rows: str


class Views:
    """An in-memory connection to the cells of ``snapshot``. ``make`` the views that a query needs, ``lock``, then ask."""

    def __init__(self, store: JobStore, snapshot: Snapshot) -> None:
        import duckdb

        self.store, self.snapshot = store, snapshot
        self.connection = duckdb.connect(config={"python_enable_replacements": False})
        self.connection.execute("CREATE SCHEMA hidden")
        self._files: set[str] = set()
        self._made: dict[str, View | None] = {}

    @cached_property
    def probes(self) -> dict[str, tuple[str, ...]]:
        """Views of results: the probes whose cells each shows."""
        found = sorted({part.probe for part in self.snapshot.parts})
        taken = {name.casefold() for name in OWN}
        views: dict[str, tuple[str, ...]] = {"results": tuple(found)}
        for probe in found:
            name = _free(probe, taken, "probe.")
            views[name] = (probe,)
        return views

    @property
    def names(self) -> list[str]:
        return [*OWN, *(name for name in self.probes if name != "results")]

    def of_probe(self, probe: str | None) -> str:
        """The view of a probe's results, or the one of all; unknown probes raise."""
        if probe is None:
            return "results"
        for name, shown in self.probes.items():
            if shown == (probe,) and name != "results":
                return name
        raise UnknownName("probe with finished cells", probe, self.probes["results"])

    def asked(self, query: str) -> list[str]:
        """The views that ``query`` names; all of them if that cannot be told."""
        import duckdb

        self.refuse(query)
        try:
            said = {name.casefold() for name in self.connection.get_table_names(query)}
        except duckdb.Error:
            said = set()
        found = [name for name in self.names if name.casefold() in said]
        return found or self.names

    def refuse(self, query: str) -> None:
        """Refuse what is not one reading query."""
        import duckdb

        try:
            statements = self.connection.extract_statements(query)
        except duckdb.Error as error:
            raise self.mistake(error) from None
        if len(statements) != 1:
            raise WorkbenchError(f"one query at a time; got {len(statements)}")
        kind = statements[0].type.name
        first = _FIRST_WORD.match(query)
        if kind != "SELECT" and not (kind == "MULTI" and first and first[1].casefold() in _READING):
            raise WorkbenchError(f"a query over the store reads, as SELECT does; got {kind}")

    def mistake(self, error: Exception) -> WorkbenchError:
        """DuckDB's complaint in one line, and what could be asked."""
        text = " ".join(re.split(r"\n\s*\nLINE ", str(error))[0].split())
        return WorkbenchError(f"{text}; views: {', '.join(self.names)}; columns: DESCRIBE <view>")

    def make(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._made:
                self._made[name] = self._make(name)

    def view(self, name: str) -> View:
        """The view of results ``name``, made if it was not."""
        self.make([name])
        found = self._made[name]
        assert found is not None
        return found

    def lock(self) -> None:
        """From here on no file but those of the views is read, and no setting changes."""
        paths = ", ".join(map(text, sorted(self._files)))
        for setting in (f"allowed_paths = [{paths}]", "enable_external_access = false", "lock_configuration = true"):
            self.connection.execute(f"SET {setting}")

    def _make(self, name: str) -> View | None:
        if name == "cells":
            self.connection.execute(f"CREATE VIEW cells AS {self._cells(SHOWN)}")
        elif name == "failures":
            self._table("main.failures", _failures(self.store, self.snapshot.keys))
        elif name == "grids":
            self._table("main.grids", _grids(self.store))
        else:
            return self._results(name, self.probes[name])
        return None

    def _table(self, name: str, content: pa.Table) -> None:
        self.connection.register("incoming", content)
        self.connection.execute(f"CREATE OR REPLACE TABLE {name} AS SELECT * FROM incoming")
        self.connection.unregister("incoming")

    def _results(self, name: str, probes: Collection[str]) -> View:
        told = ", ".join(map(text, probes)) or "''"
        found = self.connection.sql(f"{self._cells((*JOB, 'task_options', 'args'))} WHERE probe IN ({told})")
        jobs = _jobs(found.to_arrow_table())
        cells, rows = f"hidden.{quoted('cells of ' + name)}", f"hidden.{quoted('rows of ' + name)}"
        self._table(cells, jobs)
        taken = {column.casefold() for column in (*jobs.column_names, ROW)}
        kinds = self._kinds(probes)
        called = {column: _free(column, taken, "result.") for column in kinds}
        source = self._sources(probes, kinds)
        columns = [f"j.{quoted(column)}" for column in jobs.column_names]
        if source:
            columns += [f"r.c{i} AS {quoted(column)}" for i, column in enumerate(called.values())]
            joined = f"SELECT {', '.join(columns)}, r.{quoted(ROW)} FROM ({source}) r JOIN {cells} j ON r.key = j.key"
        else:
            joined = f"SELECT {', '.join(columns)}, 0 AS {quoted(ROW)} FROM {cells} j WHERE false"
        self.connection.execute(f"CREATE VIEW {rows} AS {joined}")
        self.connection.execute(f"CREATE VIEW {quoted(name)} AS SELECT * EXCLUDE ({quoted(ROW)}) FROM {rows}")
        return View((*jobs.column_names, *called.values()), tuple(jobs.column_names), cells, rows)

    def _kinds(self, probes: Collection[str]) -> dict[str, set[str]]:
        """Result columns of these probes and the types they have. The order does not depend on who packed what when."""
        forms = {tuple((name, kind) for _, name, kind in p.columns) for p in self.snapshot.parts if p.probe in probes}
        kinds: dict[str, set[str]] = {}
        for form in sorted(forms, key=lambda form: (-len(form), form)):
            for name, kind in form:
                kinds.setdefault(name, set()).add(kind)
        return kinds

    def _sources(self, probes: Collection[str], kinds: Mapping[str, set[str]]) -> str:
        """All result rows as columns ``key``, ``ROW``, ``c0``, ``c1`` ..., files of one form read together."""
        groups: dict[Any, list[int]] = {}
        for i, part in enumerate(self.snapshot.parts):
            if part.probe in probes:
                groups.setdefault((part.columns, -1 if part.path in self.snapshot.whole else i), []).append(i)
        said = []
        for (columns, _), numbers in groups.items():
            stored = {name: at for at, name, _ in reversed(columns)}
            picked = ["key", f"file_row_number AS {quoted(ROW)}"]
            for i, (name, types) in enumerate(kinds.items()):
                value = quoted(at) if (at := stored.get(name)) else "NULL"
                wanted = _common(types)
                picked.append(f"{f'CAST({value} AS {wanted})' if wanted else value} AS c{i}")
            files = {i: self.snapshot.parts[i].path for i in numbers}
            said.append(f"SELECT {', '.join(picked)} FROM {self._read('part', files)}")
        return " UNION ALL ".join(said)

    def _cells(self, columns: Iterable[str]) -> str:
        """The query for these columns of every cell."""
        groups: dict[int, dict[int, Path]] = {}
        for i, pack in enumerate(self.snapshot.packs):
            groups.setdefault(-1 if pack.told in self.snapshot.whole else i, {})[i] = pack.told
        picked = ", ".join(columns)
        if not groups:
            self._table("hidden.nothing", schema().empty_table())
            return f"SELECT {picked} FROM hidden.nothing"
        every = " UNION ALL ".join(f"SELECT {picked} FROM {self._read('pack', files)}" for files in groups.values())
        return f"SELECT {picked} FROM ({every})"

    def _read(self, what: str, files: Mapping[int, Path]) -> str:
        """The rows of these files that are to be taken from them. ``what`` is the column of ``live`` that counts them."""
        paths = [str(path.absolute()) for path in files.values()]
        self._files |= set(paths)
        said = f"read_parquet([{', '.join(map(text, paths))}], file_row_number = true, hive_partitioning = false)"
        if set(files.values()) <= self.snapshot.whole:
            return said
        self._live()
        (number,) = files
        return f"{said} WHERE key IN (SELECT key FROM hidden.live WHERE {what} = {number})"

    def _live(self) -> None:
        """Which files each cell is to be taken from, for files with cells that are not to be taken from them."""
        if "hidden.live" not in self._made:
            self._table("hidden.live", self.snapshot.live)
            self._made["hidden.live"] = None


def _common(kinds: set[str]) -> str | None:
    """What to cast a column of these Arrow types to in SQL; None if it can stay as it is."""
    kinds = kinds - {"null"}
    if len(kinds) == 1:
        return None
    if kinds <= set(_INTEGERS) and kinds:
        return "BIGINT"
    return "DOUBLE" if kinds <= set(_NUMBERS) and kinds else "VARCHAR"


def _jobs(cells: pa.Table) -> pa.Table:
    """The job's fields of these cells as columns, with the task's options and the arguments spread out."""
    import pyarrow as pa

    taken = {name.casefold() for name in (*JOB, ROW)}
    options, args = _spread(cells.column("task_options")), _spread(cells.column("args"))
    columns: dict[str, pa.Array] = {name: cells.column(name) for name in JOB[: JOB.index("task") + 1]}
    for name, values in options.items():
        columns[_free(f"task.{name}", taken, "task.")] = values
    columns["probe"] = cells.column("probe")
    for name, values in args.items():
        columns[_free(name, taken, "args.")] = values
    columns |= {name: cells.column(name) for name in ("seed", "dtype")}
    return pa.table(columns)


def _spread(records: pa.ChunkedArray) -> dict[str, pa.Array]:
    """A column of JSON objects as one typed column per name, in alphabetical order."""
    import pyarrow as pa

    encoded = records.combine_chunks().dictionary_encode()
    objects = [json.loads(record) for record in encoded.dictionary.to_pylist()]
    names = sorted({name for found in objects for name in found})
    return {
        name: _typed([found.get(name) for found in objects]).take(encoded.indices.cast(pa.int64())) for name in names
    }


def _typed(values: Sequence[Any]) -> pa.Array:
    """Plain JSON values as an Arrow column of one type; text if they have several."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pa.array(values, pa.int64())
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {float} or (kinds == {int, float} and all(value is None or value == float(value) for value in values)):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    said = [value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True) for value in values]
    return pa.array([None if v is None else v.encode("utf-8", "backslashreplace").decode() for v in said], pa.string())


def _free(name: str, taken: set[str], prefix: str) -> str:
    """``name``, with ``prefix`` before it as often as it is taken. DuckDB does not tell upper from lower case."""
    while not name or name.casefold() in taken:
        name = prefix + name
    taken.add(name.casefold())
    return name


def _failures(store: JobStore, done: Collection[str]) -> pa.Table:
    import pyarrow as pa

    from workbench.jobs.job import Job

    job = ("key", "model", "revision", "task", "task_options", "probe", "args", "seed", "dtype", "title")
    kinds = dict.fromkeys((*job, *FAILURE), "string") | {"seed": "int64", "attempts": "int64"}
    rows = []
    for key in sorted(set(store.failed_keys()) - set(done)):
        row: dict[str, Any] = {"key": key}
        try:
            record = store.failure(key)
            found = Job.of(record["job"])
        except (WorkbenchError, KeyError, TypeError) as error:
            if not (store.hidden / "failed" / f"{key}.json").exists():
                continue
            row |= {"kind": "unreadable", "message": str(error)}
        else:
            told = found.dict()
            task = told["task"] if isinstance(told["task"], dict) else {}
            row |= {name: told[name] for name in ("model", "revision", "probe", "seed", "dtype")}
            row |= {"task": found.task_name, "title": found.title, "args": json.dumps(told["args"], sort_keys=True)}
            row["task_options"] = json.dumps({k: v for k, v in task.items() if k != "name"}, sort_keys=True)
            row |= {name: None if (value := record.get(name)) is None else str(value) for name in FAILURE}
            attempts = record.get("attempts")
            row["attempts"] = attempts if isinstance(attempts, int) else None
            row["when"] = row["when"] or _changed(store.hidden / "failed" / f"{key}.json")
        rows.append(row)
    return pa.Table.from_pylist(rows, pa.schema([(name, pa.type_for_alias(kind)) for name, kind in kinds.items()]))


def _changed(path: Path) -> str | None:
    """When a file was written, in UTC."""
    from datetime import UTC, datetime

    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except FileNotFoundError:
        return None


def _grids(store: JobStore) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = pa.schema([("grid", pa.string()), ("key", pa.string())])
    tables = [kinds.empty_table()]
    for path in sorted((store.hidden / "grids").glob("*.parquet")):
        if path.name.startswith("."):
            continue
        try:
            keys = pq.ParquetFile(path).read(columns=["key"]).column("key").cast(pa.string())
        except Exception as error:
            raise WorkbenchError(f"{path} is damaged: {type(error).__name__}: {error}; run its grid again") from error
        tables.append(pa.table([pa.repeat(pa.scalar(path.stem), len(keys)), keys], schema=kinds))
    return pa.concat_tables(tables)


def quoted(name: str) -> str:
    """A name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """A text as SQL writes it."""
    return "'" + value.replace("'", "''") + "'"


def literal(value: Any) -> str:
    """A plain value as SQL writes it, floats to the last bit."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return f"CAST('{value!r}' AS DOUBLE)" if isinstance(value, float) else text(str(value))
