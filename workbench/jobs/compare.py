"""Which method, model or setting is better by a number of the results; and whether two stores hold the same results."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.index import answered, ask, condition, done_keys
from workbench.jobs.index_views import ROW, View, Views, quoted
from workbench.jobs.store import TABLE, JobStore
from workbench.results import Result, axis, wrapped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BEST = ("max", "min")
REDUCE = ("mean", "median", "min", "max", "sum")
MEASURES = ("seconds", "peak_bytes")
"""Numbers of every cell that can be compared where no result or argument has that name: its time and its largest memory."""
_SHOWN = 60
_VALUE = "#value"


@dataclass(frozen=True)
class Comparison(Result):
    """A number of the results, side by side for each value of one column of the jobs.

    ``mean``, ``sd`` and ``n`` are ``[R, C]`` for ``R`` groups of cells and ``C`` values of ``columns``: over the ``n`` cells of
    the group that have the number, with the deviation of a sample (NaN for fewer than two). ``rows`` names what tells the
    groups apart and ``groups`` holds their values; ``over`` names what was averaged; ``aside`` names arguments that only some
    of the compared values have. ``best`` is ``max``, ``min`` or None; ``reduce`` tells how the rows of a cell became one.
    """

    value: str
    columns: str
    labels: tuple[str, ...]
    rows: tuple[str, ...]
    groups: tuple[tuple[Any, ...], ...]
    mean: Tensor
    sd: Tensor
    n: Tensor
    over: tuple[str, ...]
    aside: tuple[str, ...] = ()
    best: str | None = None
    reduce: str | None = None

    @property
    def winners(self) -> tuple[str, ...]:
        """Per group the value of ``columns`` with the best mean; several joined by `` = `` if they are equal, empty if no
        cell of the group has the number or nothing was said to be best."""
        if self.best is None:
            return ("",) * len(self.groups)
        found = []
        for row in self.mean.tolist():
            known = [value for value in row if not math.isnan(value)]
            top = (max if self.best == "max" else min)(known, default=None)
            found.append(" = ".join(label for label, value in zip(self.labels, row, strict=True) if value == top))
        return tuple(found)

    def frame(self) -> pd.DataFrame:
        """One row per group: what it is, the mean of each compared value under the value's name, the ``best`` one if that was
        asked for, then deviations (``<value> sd``) and numbers of cells (``<value> n``)."""
        import pandas as pd

        found: dict[str, Any] = {name: [group[i] for group in self.groups] for i, name in enumerate(self.rows)}
        taken = {*self.rows, "best"}
        names = [label if label not in taken else f"{self.columns}={label}" for label in self.labels]
        found |= {name: self.mean[:, i].tolist() for i, name in enumerate(names)}
        found |= {"best": list(self.winners)} if self.best else {}
        found |= {f"{name} sd": self.sd[:, i].tolist() for i, name in enumerate(names)}
        found |= {f"{name} n": self.n[:, i].tolist() for i, name in enumerate(names)}
        return pd.DataFrame(found)

    def plot(self, ax: Axes | None = None) -> Axes:
        """A line per group, a dot per compared value at its mean, with one deviation to both sides."""
        shown = self.groups[:_SHOWN]
        ax = axis(ax, 7.0, 1.6 + 0.35 * len(shown))
        step = 0.6 / max(1, len(self.labels))
        for i, label in enumerate(self.labels):
            places = [y + step * (i - (len(self.labels) - 1) / 2) for y in range(len(shown))]
            sd = torch.nan_to_num(self.sd[: len(shown), i]).tolist()
            ax.errorbar(self.mean[: len(shown), i].tolist(), places, xerr=sd, fmt="o", capsize=2, label=label)
        ax.set_yticks(range(len(shown)), [" ".join(map(str, group)) or "all" for group in shown])
        ax.invert_yaxis()
        more = f", first {len(shown)} of {len(self.groups)} groups" if len(shown) < len(self.groups) else ""
        ax.set(
            xlabel=self.value, ylabel=", ".join(self.rows), title=wrapped(f"{self.value} by {self.columns}{more}", 5.5)
        )
        ax.legend(title=self.columns, fontsize="small")
        return ax


def compare(
    store: JobStore,
    *,
    value: str,
    columns: str,
    rows: Sequence[str] | None = None,
    over: Sequence[str] = ("seed",),
    best: str | None = None,
    reduce: str | None = None,
    probe: str | None = None,
    where: str | Mapping[str, Any] | None = None,
) -> Comparison:
    """Compare the number ``value`` between the values of ``columns``, as in ``value="cpr", columns="method"``.

    ``value`` is a column of the results, or the cell's ``seconds`` or ``peak_bytes``. Cells that differ only in ``over`` are
    averaged. ``rows`` names what tells the groups apart, columns of the job or labels of the result such as ``layer``; without
    it everything else in which the cells differ. What the cells differ in is in one of the three, so that nothing is averaged
    unsaid. Exempt are a revision that goes with its model, and arguments that only some of the compared values have. Several
    result rows per cell and label are refused unless ``reduce`` says what becomes of them: mean, median, min, max or sum.
    Numbers that are undefined do not count. ``probe`` and ``where`` choose as in ``index.frame``.
    """
    averaged, chosen = _names(over), None if rows is None else _names(rows)
    for what, name, known in (("best", best, BEST), ("reduction", reduce, REDUCE)):
        if name is not None and name not in known:
            raise UnknownName(what, name, known)
    named = (columns, *averaged, *(chosen or ()))
    if twice := [name for name in named if named.count(name) > 1]:
        raise WorkbenchError(f"{twice[0]} is named more than once in columns=, rows= and over=")
    table, job = answered(store, lambda views: _table(views, value, named, probe, where))
    table = _with_numbers(table, value)
    differing = [name for name in job if name not in ("key", columns, *averaged) and len(_values(table, name)) > 1]
    aside = tuple(name for name in differing if _belongs(table, name, columns))
    rest = tuple(name for name in differing if name not in aside and not _follows_model(table, name))
    groups = rest if chosen is None else chosen
    if left := [name for name in rest if name not in groups]:
        some = ", ".join(map(str, _values(table, left[0])[:8]))
        raise WorkbenchError(
            f"the cells also differ in {left[0]} ({some}): name it in rows= or over=, or choose one by where="
        )
    labels = [name for name in (columns, *groups, *averaged) if name not in job]
    table = _one_row_each(table, value, labels, reduce)
    spread = _spread(table, columns, groups)
    aside = tuple(name for name in aside if name not in groups)
    return Comparison(value, columns, *spread, over=averaged, aside=aside, best=best, reduce=reduce)


def _names(given: Sequence[str] | str) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _table(
    views: Views, value: str, named: Iterable[str], probe: str | None, where: str | Mapping[str, Any] | None
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The job's columns, those that are ``named``, and ``value`` as the column ``_VALUE``; and which are the job's."""
    view = views.view(views.of_probe(probe))
    measured = value in MEASURES and value not in view.names
    if measured:
        view = View(view.job, view.job, view.cells, view.cells)
    elif value in view.job:
        raise WorkbenchError(f"{value} is a setting of the jobs; compare a result: {_results(view)}")
    elif value not in view.names:
        raise UnknownName("result", value, [*view.names[len(view.job) :], *MEASURES])
    for name in named:
        if name not in view.names:
            raise UnknownName("column", name, view.names)
    shown = [quoted(name) for name in dict.fromkeys((*view.job, *named))]
    only = condition(views, view, where)
    if measured:
        views.make(["cells"])
        told = f'SELECT key AS "#key", {value} AS {quoted(_VALUE)} FROM cells'
        source = f'(SELECT * FROM {view.cells} WHERE {only}) JOIN ({told}) ON key = "#key"'
        query = f"SELECT {', '.join(shown)}, {quoted(_VALUE)} FROM {source} ORDER BY key"
    else:
        taken = f"{', '.join(shown)}, {quoted(value)} AS {quoted(_VALUE)}"
        query = f"SELECT {taken} FROM {view.rows} WHERE {only} ORDER BY key, {quoted(ROW)}"
    return ask(views, query), view.job


def _results(view: View) -> str:
    return ", ".join([*view.names[len(view.job) :], *MEASURES])


def _with_numbers(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """The rows of the probes that have the number, which is a float."""
    import pandas as pd

    found = table[_VALUE]
    if found.isna().all():
        raise WorkbenchError(f"no finished cell that was chosen has a {value}")
    if not pd.api.types.is_numeric_dtype(found):
        raise WorkbenchError(f"{value} is not a number: it holds {found.dropna().iloc[0]!r}")
    table = table.assign(**{_VALUE: pd.to_numeric(found).astype("float64")})
    return table[table["probe"].isin(table["probe"][found.notna()].unique())]


def _values(table: pd.DataFrame, name: str) -> list[Any]:
    """The different values of a column in order, at the end None for null."""
    known = sorted(_plain(table[name].dropna().unique().tolist()))
    return [*known, *([None] if table[name].isna().any() else [])]


def _plain(values: Iterable[Any]) -> list[Any]:
    import pandas as pd

    return [None if pd.isna(value) else value.item() if hasattr(value, "item") else value for value in values]


def _belongs(table: pd.DataFrame, name: str, columns: str) -> bool:
    """Whether ``name`` is set for some values of ``columns`` alone, and then always the same."""
    if len(table[name].dropna().unique()) != 1:
        return False
    there = table[name].notna().groupby(table[columns], dropna=False).agg(["any", "all"])
    return bool((there["any"] == there["all"]).all())


def _follows_model(table: pd.DataFrame, name: str) -> bool:
    """Whether ``name`` is the revision and every model has one."""
    return name == "revision" and int(table.groupby("model", dropna=False)["revision"].nunique(dropna=False).max()) == 1


def _one_row_each(table: pd.DataFrame, value: str, labels: Sequence[str], reduce: str | None) -> pd.DataFrame:
    """One row per cell and labels of the result."""
    grouped = table.groupby(["key", *labels], dropna=False, sort=False)
    sizes = grouped.size()
    if reduce is None:
        if int(sizes.max()) > 1:
            most: Any = sizes.idxmax()
            key = most[0] if isinstance(most, tuple) else most
            raise WorkbenchError(
                f"cell {key[:12]} has {int(sizes.max()):,} rows of {value}: say reduce= one of {', '.join(REDUCE)}, or name the "
                "label that tells them apart in rows="
            )
        return table
    first = grouped.head(1)
    numbers = grouped[_VALUE].sum(min_count=1) if reduce == "sum" else grouped[_VALUE].agg(reduce)
    return first.assign(**{_VALUE: numbers.to_numpy()})


def _spread(
    table: pd.DataFrame, columns: str, groups: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[Any, ...], ...], Tensor, Tensor, Tensor]:
    """Labels, names and values of the groups, then mean, deviation and number of the cells of each."""
    values = _values(table, columns)
    cells: dict[tuple[Any, ...], list[list[float]]] = {}
    told = zip(*(_plain(table[name]) for name in (columns, *groups)), table[_VALUE], strict=True)
    for label, *group, number in told:
        found = cells.setdefault(tuple(group), [[] for _ in values])[values.index(label)]
        if not math.isnan(number):
            found.append(number)
    order = sorted(cells, key=lambda group: [(value is None, value if value is not None else 0) for value in group])
    n = torch.tensor([[len(found) for found in cells[group]] for group in order], dtype=torch.int64)
    mean = [[_mean(found) for found in cells[group]] for group in order]
    sd = [[_sd(found) for found in cells[group]] for group in order]
    labels = tuple("none" if value is None else str(value) for value in values)
    return (
        labels,
        groups,
        tuple(order),
        torch.tensor(mean, dtype=torch.float64),
        torch.tensor(sd, dtype=torch.float64),
        n,
    )


def _mean(values: Sequence[float]) -> float:
    import numpy as np

    with np.errstate(all="ignore"):
        return float(np.mean(values)) if values else math.nan


def _sd(values: Sequence[float]) -> float:
    import numpy as np

    with np.errstate(all="ignore"):
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def differences(first: JobStore, second: JobStore) -> pd.DataFrame:
    """How the finished cells of two stores differ: one row per cell that does, none if they hold the same bits.

    ``what``: ``only in first``, ``only in second``; or for tables that are not the same bytes the first difference: of the
    ``columns``, of the ``types``, of the number of ``rows``, of the ``values`` (with ``column`` and ``row``), or of the
    ``bytes`` alone. ``first`` and ``second`` say what stands there."""
    import pandas as pd

    ours, theirs = done_keys(first), done_keys(second)
    found = []
    for key in sorted(ours | theirs):
        if key not in ours or key not in theirs:
            what: tuple[Any, ...] = ("only in first" if key in ours else "only in second", None, None, None, None)
        elif (first.folder(key) / TABLE).read_bytes() == (second.folder(key) / TABLE).read_bytes():
            continue
        else:
            what = _difference(first.table(key), second.table(key))
        found.append((key, (first if key in ours else second).job(key).title, *what))
    told = pd.DataFrame(found, columns=["key", "title", "what", "column", "row", "first", "second"])
    return told.astype({"row": "Int64"})


def _difference(ours: Any, theirs: Any) -> tuple[str, str | None, int | None, str | None, str | None]:
    """What differs first between two tables, where, and what stands there in each."""
    if ours.column_names != theirs.column_names:
        return "columns", None, None, ", ".join(ours.column_names), ", ".join(theirs.column_names)
    for field, other in zip(ours.schema, theirs.schema, strict=True):
        if field.type != other.type:
            return "types", field.name, None, str(field.type), str(other.type)
    if ours.num_rows != theirs.num_rows:
        return "rows", None, None, str(ours.num_rows), str(theirs.num_rows)
    for name, column, other in zip(ours.column_names, ours.columns, theirs.columns, strict=True):
        for row, (one, two) in enumerate(zip(column.to_pylist(), other.to_pylist(), strict=True)):
            if _bits(one) != _bits(two):
                return "values", name, row, repr(one), repr(two)
    return "bytes", None, None, None, None


def _bits(value: Any) -> Any:
    """``value`` so that floats are equal if their bits are."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, list):
        return [_bits(item) for item in value]
    return {name: _bits(item) for name, item in value.items()} if isinstance(value, dict) else value
