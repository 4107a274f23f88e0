"""How far the grids of a store are, while they run: every cell, what failed, stopping and going on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import streamlit as st

from workbench.apps.components.cells import CELLS, cells_data
from workbench.apps.grids import process
from workbench.apps.grids.cells import cell_states
from workbench.apps.live import plural
from workbench.apps.screen import state
from workbench.apps.screen.jobs_cell import cell_panel, failure, title
from workbench.apps.screen.jobs_new import run_words
from workbench.apps.screen.need import guarded
from workbench.apps.screen.text import literal
from workbench.errors import WorkbenchError
from workbench.jobs.grids import grid_jobs, grid_names
from workbench.jobs.job import Job, is_key
from workbench.jobs.store import JobStore

_BUSY, _IDLE = 2.0, 10.0
_CALM = 4000
"""Cells that are looked at per second of waiting, so that following a large grid takes a small part of one core."""
_FAILED = 20
_SAID = "progress said"


def progress(store: JobStore) -> None:
    """The tab of one store: its grids while they run, and the cell that was chosen."""
    store.check_format()
    names = grid_names(store)
    grid = state.choose("Grid", names, "grid") if len(names) > 1 else names[0] if names else None
    jobs = _jobs(store, grid) if grid is not None else []
    wait = max(_BUSY if process.under_way(store.path) else _IDLE, len(jobs) / _CALM)
    st.fragment(_live, run_every=wait)(store, grid, jobs)


def _jobs(store: JobStore, grid: str) -> Sequence[Job]:
    path = store.hidden / "grids" / f"{grid}.parquet"
    found: Sequence[Job] = _cached_jobs(str(store.path), grid, path.stat().st_mtime_ns)
    return found


@st.cache_resource(max_entries=8, show_spinner=False)
def _cached_jobs(store: str, grid: str, changed: int) -> Any:
    return grid_jobs(JobStore(store), grid)


def _live(store: JobStore, grid: str | None, jobs: Sequence[Job]) -> None:
    guarded(lambda: _draw(store, grid, jobs))


def _draw(store: JobStore, grid: str | None, jobs: Sequence[Job]) -> None:
    states = cell_states(store, jobs)
    if grid is not None:
        _counts(store, grid, states)
    if said := st.session_state.pop(_SAID, None):
        st.error(literal(said))
    keys = [job.key for job in jobs]
    chosen = state.held("cell", lambda asked: asked if asked == "" or is_key(asked) else None, "")
    if jobs:
        CELLS.show(
            cells_data(
                states,
                titles=[title(job) for job in jobs] if len(jobs) <= _CALM else [],
                selected=keys.index(chosen) if chosen in keys else None,
            ),
            key="cells",
            on={"cell": lambda i: state.put("cell", keys[i])},
        )
        if not chosen:
            st.caption(
                "A square is a cell, in the grid's order. Choose one to see its numbers and where they come from."
            )
    if chosen:
        cell_panel(store, chosen, next((job for job in jobs if job.key == chosen), None))
    failed = [key for key, found in zip(keys, states, strict=True) if found == "failed" and key != chosen]
    if failed:
        st.subheader(f"{plural(len(failed), 'cell')} failed", anchor=False)
        for key in failed[:_FAILED]:
            failure(store, key)
            _again(store, key)
        if len(failed) > _FAILED:
            st.text(f"and {len(failed) - _FAILED:,} more; choose a cell above to see why")
    if told := process.log(store.path):
        with st.expander("What the run says"):
            st.code(told, language=None, height=300)


def _counts(store: JobStore, grid: str, states: Sequence[str]) -> None:
    """Progress and the buttons that fit it."""
    count = {name: states.count(name) for name in ("done", "failed", "running", "missing")}
    total = len(states)
    st.progress(
        count["done"] / total if total else 1.0, text=f"{literal(grid)}: {count['done']:,} of {total:,} cells done"
    )
    st.text(f"{count['failed']:,} failed, {count['running']:,} running, {count['missing']:,} missing")
    run = process.under_way(store.path)
    spec = process.spec_path(store.path, grid)
    left = count["missing"] + count["failed"]
    with st.container(horizontal=True, vertical_alignment="center"):
        if run is not None:
            st.button("Stop", icon=":material/stop:", on_click=_do, args=(lambda: process.stop(store.path),))
            st.caption(f"runs as process {run.pid} since {literal(run.began)}")
            return
        if count["missing"]:
            words = (
                run_words(spec, store.path, state_workers())
                if spec.is_file()
                else ["retry", "--missing", "--store", str(store.path)]
            )
            st.button("Continue", icon=":material/play_arrow:", on_click=_do, args=(lambda: process.start(store.path, words),),
                      help=None if spec.is_file() else "Failed cells are tried again with it.")  # fmt: skip
        if count["failed"]:
            again = ["retry", "--store", str(store.path)]
            st.button("Try all failed ones again", icon=":material/replay:", on_click=_do,
                      args=(lambda: process.start(store.path, again),))  # fmt: skip
        if left:
            st.caption(literal(f"or in a shell: workbench jobs retry --missing --store {shlex.quote(str(store.path))}"))


def state_workers() -> int:
    """Workers of the last start from this session, else one."""
    found = st.session_state.get("workers", 1)
    return found if isinstance(found, int) else 1


def _again(store: JobStore, key: str) -> None:
    if process.under_way(store.path) is None:
        words = ["retry", key, "--store", str(store.path)]
        st.button("Try again", key=f"again {key}", icon=":material/replay:", on_click=_do,
                  args=(lambda: process.start(store.path, words),))  # fmt: skip


def _do(action: Any) -> None:
    """A button's action; what is wrong with it is told in the page."""
    try:
        action()
    except (WorkbenchError, OSError) as error:
        st.session_state[_SAID] = str(error)
