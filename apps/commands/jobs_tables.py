"""``jobs`` commands that make tables of the results of a store: SQL, exports, comparisons."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps.commands.jobs_store import StoreOption, opened
from workbench.apps.inputs import JsonOption
from workbench.apps.live import amount, flat, plural
from workbench.apps.terminal import answer, table, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from workbench.jobs.compare import Comparison

RowsOption = Annotated[int | None, typer.Option("--rows", min=1, help="Rows that are shown to people.")]
CsvOption = Annotated[bool, typer.Option("--csv", help="Print CSV on stdout, all rows.")]
WhereOption = Annotated[
    str | None, typer.Option("--where", help="Only where this SQL condition holds, as \"method = 'eap' and seed < 3\".")
]
ProbeOption = Annotated[str | None, typer.Option("--probe", help="Only cells of this probe.")]
_ROWS = 50
_LONG_ROWS = 5
"""Rows shown to people where nothing else is said: as a table, and where a row takes many lines."""


def sql(
    store: StoreOption,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="DuckDB SQL; `select * from cells` shows the cells.")],
    rows: RowsOption = None,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask the results of a store in SQL."""
    from workbench.jobs.index import sql as ask

    if as_csv and as_json:
        raise WorkbenchError("--csv and --json are two forms of the same answer; give one")
    with working("asking"):
        frame = ask(opened(store), query)
    put_frame(frame, "jobs sql", rows, as_csv, as_json)


def export(
    store: StoreOption,
    to: Annotated[Path, typer.Option("--to", help="A file (.parquet, .csv), or a folder for circuits.")],
    form: Annotated[
        str | None,
        typer.Option("--form", help="parquet, csv, mib, neuronpedia or eap-json; by the suffix if not given."),
    ] = None,
    where: WhereOption = None,
    probe: ProbeOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write all result rows as one table, or the circuits as files."""
    from workbench.jobs.export import TABLES
    from workbench.jobs.export import export as write

    place = opened(store)
    with working(f"writing {to}") as tick:
        try:
            written = write(place, to, form=form, where=where, probe=probe, force=force, tick=tick)
        except WorkbenchError as error:
            raise _in_options(error) from error
        files = [written] if written.is_file() else [p for p in written.rglob("*") if p.is_file()]
        form = form or written.suffix.removeprefix(".").lower()
        rows = _rows_of(written, form) if form in TABLES else None
        size = sum(p.stat().st_size for p in files)
    payload = {
        "command": "jobs export",
        "store": store,
        "to": written,
        "rows": rows,
        "files": len(files),
        "bytes": size,
    }

    def show(console: Console) -> None:
        what = plural(rows, "row") if rows is not None else plural(len(files), "file")
        console.print(f"{what}, {amount(size)}: {written}", soft_wrap=True)

    answer(as_json, payload, show)


def _rows_of(path: Path, form: str) -> int:
    """Rows of an exported table."""
    if form == "csv":
        import csv

        with path.open(newline="", encoding="utf-8") as file:
            return sum(1 for _ in csv.reader(file)) - 1
    import pyarrow.parquet as pq

    return int(pq.ParquetFile(path).metadata.num_rows)


def compare(
    store: StoreOption,
    value: Annotated[
        str | None, typer.Option("--value", help="The number: a column of the results, seconds or peak_bytes.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="What is compared: a field or argument of the jobs, such as method.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option("--rows", help="What tells the groups apart, as a,b; by default all in which cells differ."),
    ] = None,
    over: Annotated[str | None, typer.Option("--over", help="What is averaged, as a,b; the seed by default.")] = None,
    best: Annotated[str | None, typer.Option("--best", help="max or min: name the best of each group.")] = None,
    reduce: Annotated[
        str | None,
        typer.Option("--reduce", help="mean, median, min, max or sum: what becomes of several rows of a cell."),
    ] = None,
    where: WhereOption = None,
    probe: ProbeOption = None,
    other: Annotated[
        Path | None, typer.Option("--with", help="Another store: tell the cells that differ from it, bit by bit.")
    ] = None,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare results between methods or models, or two stores.

    One number of the results, side by side for the values of one column; or with --with the cells of two stores, bit by bit.
    """
    if as_csv and as_json:
        raise WorkbenchError("--csv and --json are two forms of the same answer; give one")
    if other is not None:
        given = {
            "--value": value,
            "--columns": columns,
            "--rows": rows,
            "--over": over,
            "--best": best,
            "--reduce": reduce,
        }
        given |= {"--where": where, "--probe": probe}
        if said := [name for name, found in given.items() if found is not None]:
            raise WorkbenchError(f"--with compares two stores whole; it goes without {', '.join(said)}")
        _compare_stores(store, other, as_csv, as_json)
        return
    if value is None or columns is None:
        raise WorkbenchError(
            "compare wants --value and --columns, such as --value cpr --columns method; or --with STORE"
        )
    from workbench.jobs.compare import compare as find

    place = opened(store)
    with working("comparing"):
        names = None if rows is None else _names(rows)
        averaged = _names(over) if over is not None else [n for n in ("seed",) if n not in (columns, *(names or ()))]
        try:
            found = find(
                place, value=value, columns=columns, rows=names, over=averaged, best=best, reduce=reduce,
                probe=probe, where=where,
            )  # fmt: skip
        except WorkbenchError as error:
            raise _in_options(error) from error
        frame = found.frame()
    if as_csv:
        put_frame(frame, "jobs compare", None, True, False)
        return
    payload = {
        "command": "jobs compare", "store": store, "value": found.value, "columns": found.columns, "labels": found.labels,
        "rows": found.rows, "over": found.over, "aside": found.aside, "best": found.best, "table": simple(frame),
    }  # fmt: skip

    def show(console: Console) -> None:
        lines = [_comparison_row(found, i) for i in range(len(found.groups))]
        sides = {**dict.fromkeys(found.rows, "left"), **dict.fromkeys(found.labels, "right")}
        sides |= {"best": "left"} if found.best else {}
        averaged = f" over {', '.join(found.over)}" if found.over else ""
        console.print(table(f"{found.value} by {found.columns}: mean ±deviation (cells){averaged}", sides, lines))
        if found.aside:
            some = ", ".join(found.aside)
            console.print(f"only some of the compared have {some}, which is not told apart", soft_wrap=True)

    answer(as_json, payload, show)


def _comparison_row(found: Comparison, i: int) -> list[str]:
    """A group: its values, then mean, deviation and number of cells of each compared value, then the best."""
    cells = []
    for mean, sd, n in zip(found.mean[i].tolist(), found.sd[i].tolist(), found.n[i].tolist(), strict=True):
        spread = "" if math.isnan(sd) else f" ±{sd:.2g}"
        cells.append(f"{mean:.4g}{spread} ({n})" if n else "")
    return [*map(_short, found.groups[i]), *cells, *([found.winners[i]] if found.best else [])]


def _compare_stores(store: Path, other: Path, as_csv: bool, as_json: bool) -> None:
    from workbench.jobs.compare import differences

    first, second = opened(store), opened(other)
    with working("comparing"):
        frame = differences(first, second)
    if as_csv:
        put_frame(frame, "jobs compare", None, True, False)
        return

    def show(console: Console) -> None:
        if frame.empty:
            console.print(f"{store} and {other} hold the same cells with the same bits", soft_wrap=True)
        else:
            counts = ", ".join(f"{n:,} {what}" for what, n in frame["what"].value_counts().items())
            console.print(f"{plural(len(frame), 'cell')} of {store} and {other} differ: {counts}", soft_wrap=True)
            print_frame(console, frame.assign(key=frame["key"].str[:12]).dropna(axis="columns", how="all"), None)

    payload = {"command": "jobs compare", "store": store, "with": other, "same": frame.empty, "rows": simple(frame)}
    answer(as_json, payload, show)


def _names(text: str) -> list[str]:
    """``a,b`` as names."""
    return [name.strip() for name in text.split(",") if name.strip()]


_OPTIONS = {
    r"\bform=": "--form ",
    r"\bwith force\b": "with --force",
    r"\breduce=": "--reduce ",
    r"\brows=": "--rows",
    r"\bover=": "--over",
    r"\bwhere=": "--where",
    r"\bcolumns=": "--columns",
}


def _in_options(error: WorkbenchError) -> WorkbenchError:
    """An error of the library about its arguments, in the words of the command's options."""
    text = str(error)
    for argument, option in _OPTIONS.items():
        text = re.sub(argument, option, text)
    return WorkbenchError(text)


def put_frame(frame: pd.DataFrame, name: str, rows: int | None, as_csv: bool, as_json: bool, title: str = "") -> None:
    """A data frame as the answer of a command: for people, as CSV, or as JSON."""
    if as_csv:
        frame.to_csv(sys.stdout, index=False, lineterminator="\n")
        return
    payload: dict[str, Any] = {"command": name, "columns": list(map(str, frame.columns))}
    answer(
        as_json,
        payload | ({"rows": simple(frame)} if as_json else {}),
        lambda out: print_frame(out, frame, rows, title),
    )


def print_frame(console: Console, frame: pd.DataFrame, rows: int | None, title: str = "") -> None:
    """The first rows of a data frame, as a table if that fits the width, else each row as lines of names and values. Columns
    without any value are left out and named."""
    full = frame.dropna(axis="columns", how="all") if len(frame) else frame
    empty = [str(name) for name in frame.columns if name not in set(full.columns)]
    names = list(map(str, full.columns))
    found = [[_short(value) for value in row] for row in simple(full.head(rows or _ROWS)).values.tolist()]
    width = sum(max(map(len, column)) + 3 for column in zip(names, *found, strict=True)) + 1
    long = width > console.width
    found = found[: rows or (_LONG_ROWS if long else _ROWS)]
    count = plural(len(frame), "row") + (f", first {len(found):,} shown" if len(frame) > len(found) else "")
    heading = f"{title}: {count}" if title else count
    if long:
        wide = max(map(len, names))
        console.print(heading, style="bold")
        for row in found:
            console.print()
            for name, value in zip(names, row, strict=True):
                console.print(f"{name:{wide}}  {value}", soft_wrap=True)
    else:
        kinds = ["right" if full[name].dtype.kind in "fiu" else "left" for name in full.columns]
        console.print(table(heading, dict(zip(names, kinds, strict=True)), found))
    if empty:
        console.print(f"without any value: {', '.join(empty)}", soft_wrap=True)


def simple(frame: pd.DataFrame) -> pd.DataFrame:
    """Every value as what JSON knows, or as its text: times, decimals, bytes."""
    return frame.astype(object).map(_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if str(value) in ("NaT", "<NA>") else str(value)


def _short(value: Any) -> str:
    """A value in a table for people: six significant digits, nothing where there is nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else flat(str(value))
