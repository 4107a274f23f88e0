"""What this app computes for its pages now, and what waits."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from workbench.apps.grids import process
from workbench.apps.grids.folders import name_in
from workbench.apps.screen import place
from workbench.apps.screen.jobs_cell import title
from workbench.apps.screen.need import guarded, work
from workbench.apps.screen.text import literal
from workbench.jobs.store import JobStore


def queue(stores: Sequence[JobStore]) -> None:
    """The tab: one line per cell of the queue, and per grid that runs."""
    st.caption("Pages ask for cells one at a time and in order; grids run beside them, each as a process of its own.")
    _live(stores)


@st.fragment(run_every=1.0)
def _live(stores: Sequence[JobStore]) -> None:
    guarded(lambda: _draw(stores))


def _draw(stores: Sequence[JobStore]) -> None:
    waiting = work().queue()
    if not waiting:
        st.info("Nothing is computed for pages now.")
    for job in waiting:
        state = work().state(job.key)
        left, right = st.columns([6, 1], vertical_alignment="center")
        said = f"{state.seconds:.0f} s" if state.kind == "running" else f"waits behind {state.ahead}"
        left.text(f"{said}: {title(job)}")
        right.button("Stop", key=f"queue {job.key}", on_click=work().cancel, args=(job.key,))
    for store in stores:
        run = process.under_way(store.path)
        if run is not None:
            left, right = st.columns([6, 1], vertical_alignment="center")
            left.text(f"grid {name_in(place.store(), store)}: process {run.pid} on {run.host}, since {run.began}")
            right.button("Stop", key=f"run {store.path}", on_click=_stop, args=(store,))
    if said := st.session_state.pop("queue said", None):
        st.error(literal(said))


def _stop(store: JobStore) -> None:
    from workbench.errors import WorkbenchError

    try:
        process.stop(store.path)
    except (WorkbenchError, OSError) as error:
        st.session_state["queue said"] = str(error)
