"""Batch jobs in the app: how far the grids of a store are while they run, what failed, and any cell's table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import streamlit as st

from workbench.errors import WorkbenchError
from workbench.jobs.store import HIDDEN, SAVED, JobStore

DEPTH = 2
"""How many folders deep stores of jobs are looked for."""
_EVERY = 3.0
_SHOWN = 1000


def job_stores(root: Path) -> list[JobStore]:
    """``root`` and the folders in it that hold jobs, by path; cells are not looked into."""
    found, pending = [], [(root, 0)]
    while pending:
        at, depth = pending.pop()
        if (at / HIDDEN).is_dir():
            found.append(JobStore(at))
        elif depth < DEPTH and at.is_dir():
            pending += [(sub, depth + 1) for sub in at.iterdir() if sub.is_dir() and not sub.name.startswith(".")]
    return sorted(found, key=lambda store: str(store.path))


def jobs_page(stores: Iterable[JobStore]) -> None:
    """One panel per store. The counts renew themselves while the page is open."""
    for store in stores:
        st.header(store.path.name)
        try:
            _progress(store)
            _cells(store)
        except WorkbenchError as error:
            st.error(str(error))


@st.fragment(run_every=_EVERY)
def _progress(store: JobStore) -> None:
    from workbench.jobs.status import status_by_grid

    try:
        grids = status_by_grid(store)
    except WorkbenchError as error:
        st.error(str(error))
        return
    for name, state in grids.items():
        total = state.done + state.failed + state.running + state.missing
        st.progress(state.done / total if total else 1.0, text=f"{name}: {state.done:,} of {total:,} cells done")
        st.text(f"{state.failed:,} failed, {state.running:,} running, {state.missing:,} missing")
        for key in state.failures[:20]:
            _failure(store, key)
        if len(state.failures) > 20:
            st.text(f"and {len(state.failures) - 20:,} more that failed: workbench jobs status --store {store.path}")


def _failure(store: JobStore, key: str) -> None:
    from workbench.jobs.job import Job

    try:
        record = store.failure(key)
        title = Job.of(record["job"]).title
    except WorkbenchError as error:  # forgiven since the list was made
        st.text(str(error))
        return
    with st.expander(f"failed: {_literal(title)}"):
        st.text(f"{record['kind']}: {record['message']}")
        if record.get("traceback"):
            st.code(record["traceback"], language=None)


def _cells(store: JobStore) -> None:
    found = store.cells()
    if found.empty:
        st.info("No cell is done yet.")
        return
    shown = found[["title", "seconds", "rows", "host", "key"]].sort_values("title", kind="stable")
    event = st.dataframe(
        shown.head(_SHOWN), hide_index=True, on_select="rerun", selection_mode="single-row", key=f"cells {store.path}"
    )
    if len(shown) > _SHOWN:
        st.caption(f"{_SHOWN:,} of {len(shown):,} cells; workbench jobs sql looks at all of them")
    for row in event["selection"]["rows"]:
        _cell(store, str(shown.iloc[row]["key"]))


def _cell(store: JobStore, key: str) -> None:
    table = store.table(key).to_pandas()
    st.subheader(_literal(store.job(key).title))
    st.dataframe(table.head(_SHOWN), hide_index=True)
    st.download_button("CSV", table.to_csv(index=False), f"{key}.csv", "text/csv")
    if (store.folder(key) / SAVED).is_dir():
        st.text(f"saved: {store.folder(key) / SAVED}")
    with st.expander("where the numbers come from"):
        st.json(store.provenance(key))


def _literal(text: str) -> str:
    """Names of models and tasks are shown, never formatted."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-.!|<>~$:&" else c for c in text)
