"""Results side by side: a number of the cells for each value of one column, or the cells of two stores bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from workbench.apps.grids.ask import Choices, choices, probes_of
from workbench.apps.grids.folders import name_in
from workbench.apps.screen import place, state
from workbench.apps.screen.shown import downloads, figure
from workbench.apps.screen.text import literal
from workbench.errors import WorkbenchError
from workbench.jobs.compare import BEST, REDUCE
from workbench.jobs.store import JobStore

_NONE, _ALL = "none", "all that differ"


def comparison(store: JobStore, stores: Sequence[JobStore]) -> None:
    """The tab."""
    store.check_format()
    names = {name_in(place.store(), one): one for one in stores if one.path != store.path}
    left, right = st.columns(2)
    against = state.choose(
        "With another store", [_NONE, *names], "against", where=left,
        help="Tells the cells in which two stores differ, by the bits of their tables.",
    )  # fmt: skip
    if against != _NONE:
        _differences(store, names[against])
        return
    if not store.keys():
        st.info("No cell is done yet. The tab Progress tells how far it is.")
        return
    signature = _signature(store)
    found = _probes(str(store.path), signature)
    if not found:
        st.info("No cell that can be read is done yet. The tab Progress tells how far it is.")
        return
    probe = state.choose("Probe", found, "results of", where=right)
    given = _asked(_choices(str(store.path), signature, probe))
    if given is None:
        st.info("The cells do not differ in any setting; there is nothing to compare.")
        return
    try:
        table = _compared(str(store.path), signature, probe, tuple(given.items()))
    except WorkbenchError as error:
        st.warning(literal(_in_words(str(error))))
        return
    words = ", ".join(f"{name}={value!r}" for name, value in {**given, "probe": probe}.items() if value is not None)
    python = (
        "import workbench as wb\nfrom workbench.jobs.compare import compare\n\n"
        f"found = compare(wb.JobStore({str(store.path)!r}), {words})\nfound.plot()\nfound.frame()"
    )
    frame = table.frame()
    st.dataframe(frame, hide_index=True)
    if table.aside:
        st.caption(literal(f"Only some of the compared have {', '.join(table.aside)}, which is not told apart."))
    figure(
        table.plot,
        frame,
        name="comparison",
        python=python,
        caption="Mean over cells, with one deviation to both sides.",
        width=720,
    )


def _asked(known: Choices) -> dict[str, Any] | None:
    """The arguments of the comparison; None where there is nothing to compare."""
    if not known.fields:
        return None
    columns = st.columns(3)
    value = state.choose("Value", known.values, "value", where=columns[0], help="A number of the results.")
    across = state.choose("Columns", known.fields, "columns", where=columns[1], help="What is compared.")
    rest = [name for name in (*known.fields, *known.labels) if name not in (across, value)]
    reduce = state.choose(
        "Rows of a cell", [*REDUCE, _NONE], "reduce", where=columns[2],
        help="What becomes of several result rows of one cell; none asks for one row each.",
    )  # fmt: skip
    rows = state.several(
        "Rows",
        rest,
        "rows",
        where=columns[0],
        help="What tells the groups apart; empty: all in which the cells differ.",
    )
    over = state.several(
        "Average over", [n for n in rest if n not in rows], "over", default=["seed"] if "seed" in rest else [],
        where=columns[1], help="Cells that differ only in these are averaged.",
    )  # fmt: skip
    best = state.choose("Best", [_NONE, *BEST], "best", where=columns[2], help="Names the best of every group.")
    return {
        "value": value, "columns": across, "rows": tuple(rows) or None, "over": tuple(over),
        "best": None if best == _NONE else best, "reduce": None if reduce == _NONE else reduce,
    }  # fmt: skip


def _in_words(text: str) -> str:
    """The library's message about its arguments, in the words of the page."""
    for argument, label in (
        ("rows=", "Rows"),
        ("over=", "Average over"),
        ("reduce=", "Rows of a cell:"),
        ("columns=", "Columns"),
    ):
        text = text.replace(argument, label)
    return text


def _differences(store: JobStore, other: JobStore) -> None:
    frame = _apart(str(store.path), _signature(store), str(other.path), _signature(other))
    if frame.empty:
        st.success("Both stores hold the same cells with the same bits.")
        return
    counts = ", ".join(f"{n:,} {what}" for what, n in frame["what"].value_counts().items())
    st.text(f"{len(frame):,} cells differ: {counts}")
    st.dataframe(frame.head(1000), hide_index=True)
    python = (
        "import workbench as wb\nfrom workbench.jobs.compare import differences\n\n"
        f"found = differences(wb.JobStore({str(store.path)!r}), wb.JobStore({str(other.path)!r}))"
    )
    downloads(frame, name="differences", python=python)


def _signature(store: JobStore) -> tuple[int, int]:
    """Changes when a cell comes or goes."""
    return len(store.keys()), store.path.stat().st_mtime_ns


@st.cache_resource(max_entries=8, show_spinner=False)
def _probes(store: str, signature: Any) -> list[str]:
    return probes_of(JobStore(store))


@st.cache_resource(max_entries=8, show_spinner=False)
def _choices(store: str, signature: Any, probe: str) -> Any:
    return choices(JobStore(store), probe)


@st.cache_resource(max_entries=16, show_spinner="Comparing")
def _compared(store: str, signature: Any, probe: str, given: tuple[tuple[str, Any], ...]) -> Any:
    from workbench.jobs.compare import compare

    return compare(JobStore(store), probe=probe, **dict(given))


@st.cache_resource(max_entries=4, show_spinner="Comparing")
def _apart(store: str, signature: Any, other: str, theirs: Any) -> Any:
    from workbench.jobs.compare import differences

    return differences(JobStore(store), JobStore(other))
