"""Pieces of HTML that a notebook shows: self-contained, escaped, in the colours of the page around them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ROWS, LETTERS = 60, 300
"""Rows of a table and letters of a cell that are shown."""
_LINE = "1px solid color-mix(in srgb, currentColor 18%, transparent)"
_STYLE = f"""
.workbench-view{{overflow-x:auto}}
.workbench-view p{{margin:4px 0}}
.workbench-view svg{{max-width:100%;height:auto}}
.workbench-view table{{border-collapse:collapse;margin:4px 0 8px;font-size:12px}}
.workbench-view th,.workbench-view td{{padding:2px 10px 2px 0;border:0;border-bottom:{_LINE};text-align:left;vertical-align:top}}
.workbench-view td{{max-width:48em;white-space:normal;overflow-wrap:anywhere}}
.workbench-view th{{font-weight:600}}
.workbench-view .rows{{max-height:26em;overflow:auto;display:inline-block;max-width:100%}}
.workbench-view .number{{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}}
"""


def view(title: str, *parts: str, said: str = "") -> str:
    """What an object shows of itself: its title, ``said`` behind it, and below them ``parts``, which are HTML already."""
    head = f"<p><b>{escape(title)}</b>{f': {escape(said)}' if said else ''}</p>"
    return f'<div class="workbench-view"><style>{_STYLE}</style>{head}{"".join(parts)}</div>'


def table_view(frame: pd.DataFrame, title: str, *parts: str, rows: int = ROWS) -> str:
    """``parts`` and the first ``rows`` rows of a table, under a line that says how many there are."""
    more = f", first {rows:,} shown" if len(frame) > rows else ""
    return view(title, *parts, table(frame, rows), said=f"{len(frame):,} rows{more}")


def table(frame: pd.DataFrame, rows: int = ROWS) -> str:
    """The first ``rows`` rows; numbers have four digits, what is not there is "undefined"."""
    part = frame.head(rows)
    columns = [part.iloc[:, i] for i in range(part.shape[1])]
    marks = [' class="number"' if column.dtype.kind in "iuf" else "" for column in columns]
    head = "".join(f"<th{mark}>{escape(str(name))}</th>" for mark, name in zip(marks, part.columns, strict=True))
    cells = [
        [f"<td{mark}>{_cell(value)}</td>" for value in column] for mark, column in zip(marks, columns, strict=True)
    ]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*cells, strict=True))
    return f'<div class="rows"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(known: Mapping[str, Any]) -> str:
    """What is known of an object, one line each; what is empty or None is left out."""
    rows = [
        f"<tr><th>{escape(name)}</th><td>{_cell(value)}</td></tr>"
        for name, value in known.items()
        if value is not None and value != ""
    ]
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def line(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "undefined" if value != value else f"{value:.4g}"
    if value is None:
        return "undefined"
    text = str(value)
    return escape(text if len(text) <= LETTERS else text[: LETTERS - 1] + "…")
