"""A new grid: chosen in a form or written as YAML, checked, estimated, started."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.grids import process
from workbench.apps.grids.folders import folder_for
from workbench.apps.grids.spec_text import bundled, read_text, spec_text
from workbench.apps.live import plural
from workbench.apps.screen import place, state
from workbench.apps.screen.need import ask, job
from workbench.apps.screen.text import literal
from workbench.errors import WorkbenchError
from workbench.jobs.store import JobStore

if TYPE_CHECKING:
    from workbench.jobs.spec import Grid

_FORM = "a form"
_TEXT, _BEFORE, _FROM = "spec", "spec before", "spec from"
_SAID = "start said"
_SHOWN = 200
_FIRST = ("sinks", "head-scores", "retrieval-heads", "find_circuit", "circuit_score", "train_sae", "capture")
_HIDDEN = ("sleep", "fail")


def new_grid() -> None:
    """The tab where a grid is defined and started."""
    texts = bundled()
    chosen = state.choose(
        "Start from", [*texts, _FORM], "from", kind="segmented_control",
        help="Grids for the bundled models, to run as they are or to change; or a form that writes one.",
    )  # fmt: skip
    if st.session_state.get(_FROM) != chosen:
        st.session_state[_FROM] = chosen
        if chosen in texts:
            _write(texts[chosen])
    st.session_state.setdefault(_TEXT, texts["demo"])
    if chosen == _FORM:
        _form()
    text = st.text_area(
        "The grid", key=_TEXT, height=320, persist_state="session",
        help="YAML as `workbench jobs run` reads it: lists multiply, the last one fastest.",
    )  # fmt: skip
    before = st.session_state.get(_BEFORE, "")
    if before and before != text:
        st.button("Bring back the text before", icon=":material/undo:", on_click=lambda: _write(before))
    grid = _checked(text or "")
    if grid is not None:
        _begin(grid, text or "")


def _write(text: str) -> None:
    """Replace the text; the one before can be brought back."""
    st.session_state[_BEFORE] = st.session_state.get(_TEXT, "")
    st.session_state[_TEXT] = text


def _form() -> None:
    from workbench.jobs.probes import REQUIRED, probes

    known = probes()
    names = [*_FIRST, *sorted(set(known) - {*_FIRST, *_HIDDEN})]
    probe = known[state.choose("Probe", names, "probe", help="What is computed in every cell.")]
    if probe.description != probe.name:
        st.caption(literal(probe.description))
    left, middle, right = st.columns(3)
    with left:
        name = st.text_input("Name", "mine", key="grid name", persist_state="session") or ""
    with middle:
        seeds = state.number("Seeds", 1, 100, "seeds", default=1, kind="number_input", help="How often, from seed 0.")
    with right:
        models = (
            state.several("Models", place.models(), "models", default=["tiny-softmax"])
            if probe.needs_model != "no"
            else []
        )
    tasks = _tasks() if probe.needs_task != "no" else []
    arguments = {}
    own = {n: d for n, d in (probe.arguments or {}).items() if n != "text" or not tasks}
    with st.expander(f"Arguments of {literal(probe.name)}", expanded=any(d is REQUIRED for d in own.values())):
        st.caption(
            "A value, or a list of values to try each, as in YAML: `16`, `[eap, eap-ig]`. Empty takes the default."
        )
        columns = st.columns(3)
        for i, (argument, default) in enumerate(own.items()):
            given = columns[i % 3].text_input(
                argument, key=f"argument {probe.name} {argument}", persist_state="session",
                placeholder="needed" if default is REQUIRED else str(default),
            )  # fmt: skip
            arguments[argument] = given or ""
    if st.button("Write the grid", icon=":material/edit_note:", type="primary"):
        _write(spec_text(name, probe.name, models=models, tasks=tasks, seeds=seeds, arguments=arguments))


def _tasks() -> list[str]:
    import workbench as wb

    return state.several("Tasks", sorted(wb.tasks()), "tasks", default=["ioi"])


def _checked(text: str) -> Grid | None:
    """The grid, or None and its mistake in the page, with the line it is about."""
    try:
        grid: Grid = _read(text)
    except WorkbenchError as error:
        st.error(literal(str(error)), icon=":material/error:")
        line = re.match(r"spec\.yaml:(\d+): ", str(error))
        if line and int(line[1]) <= len(text.splitlines()):
            st.code(f"{line[1]}: {text.splitlines()[int(line[1]) - 1]}", language=None)
        return None
    with st.expander(f"{literal(grid.name)}: {plural(len(grid.jobs), 'cell')}, no mistakes", icon=":material/check:"):
        st.dataframe({"cell": [one.title[:500] for one in grid.jobs[:_SHOWN]]}, hide_index=False, height=240)
        if len(grid.jobs) > _SHOWN:
            st.caption(f"first {_SHOWN} of {len(grid.jobs):,}")
    return grid


@st.cache_resource(max_entries=4, ttl=60, show_spinner="Checking the grid")
def _read(text: str) -> Any:
    return read_text(text, place.confined)


def _begin(grid: Grid, text: str) -> None:
    """Where it goes and how it runs; estimate and start."""
    cores = os.cpu_count() or 1
    left, right = st.columns(2)
    with left:
        workers = state.number(
            "Workers", 1, max(2, 2 * cores), "workers", default=max(1, cores // 2), kind="number_input",
            help=f"Processes that compute cells; this machine has {plural(cores, 'core')}.",
        )  # fmt: skip
    with right:
        retry = state.flag(
            "Try failed cells again", "again", help="Cells that failed in an earlier run stay failed without."
        )
    store = folder_for(place.store(), grid.name, taken=(place.CELLS,))
    st.caption(
        f"Results go to {literal(str(store))}. Finished cells of an earlier run are kept and not computed again. "
        "The run is a process of its own: it goes on when this page or the app is closed."
    )
    with st.container(horizontal=True):
        if st.button(
            "Estimate", icon=":material/timer:", help="Computes one cell of every kind, for a minute at most."
        ):
            st.session_state["estimate"] = text
        st.button(
            "Start",
            icon=":material/play_arrow:",
            type="primary",
            on_click=_start,
            args=(grid, text, store, workers, retry),
        )
    if said := st.session_state.pop(_SAID, None):
        st.error(literal(said))
    if st.session_state.get("estimate") == text:
        _estimate(text, store, workers, retry)


def _estimate(text: str, store: Path, workers: int, retry: bool) -> None:
    place_ = JobStore(store)
    standing = [len(place_.keys()), len(place_.failed_keys())]
    wanted = job(
        "workbench.apps.work_grids:estimated",
        spec=text,
        store=str(store),
        workers=workers,
        retry=retry,
        standing=standing,
    )
    done = ask(wanted, "Estimating")
    if done is None:
        return
    for line in str(done.about.get("note", "")).splitlines():
        st.text(line)
    table = done.table()[["model", "probe", "method", "cells", "missing", "seconds", "bytes", "memory", "source"]]
    st.dataframe(
        table.rename(columns={"seconds": "seconds per cell", "bytes": "bytes per cell", "memory": "peak bytes"})
    )


def _start(grid: Grid, text: str, store: Path, workers: int, retry: bool) -> None:
    """Before the next run of the page: start, and show the progress; what is wrong is told there."""
    from workbench.jobs.grids import put_grid

    try:
        made = JobStore(store)
        made.open_for_writing()
        put_grid(made, grid.name, grid.jobs)
        spec = process.keep_spec(store, grid.name, text)
        process.start(store, run_words(spec, store, workers, retry))
    except (WorkbenchError, OSError) as error:
        st.session_state[_SAID] = str(error)
        return
    state.put("tab", "Progress")
    state.put("folder", grid.name)
    state.put("grid", grid.name)


def run_words(spec: Path, store: Path, workers: int, retry: bool = False) -> list[str]:
    """What stands after ``workbench jobs`` to run a spec."""
    words = ["run", str(spec), "--store", str(store), "--workers", str(workers)]
    return [*words, "--retry"] if retry else words
