"""``jobs`` commands that make tables of the results of a store: SQL, exports, comparisons."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps.commands.jobs_store import StoreOption, opened
from workbench.apps.inputs import JsonOption
from workbench.apps.live import flat, plural
from workbench.apps.terminal import answer, table, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

RowsOption = Annotated[int | None, typer.Option("--rows", min=1, help="Rows that are shown to people.")]
CsvOption = Annotated[bool, typer.Option("--csv", help="Print CSV on stdout, all rows.")]
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
