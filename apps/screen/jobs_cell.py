"""One cell of a store: its table and where its numbers come from, or why it failed."""

from __future__ import annotations

import streamlit as st

from workbench.apps.screen.shown import downloads
from workbench.apps.screen.text import literal
from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.store import SAVED, JobStore

_SHOWN = 1000
_LONG = 300


def cell_panel(store: JobStore, key: str, job: Job | None) -> None:
    """The cell in whichever state it is."""
    if not store.is_done(key):
        if key in store.failed_keys():
            failure(store, key, expanded=True)
        elif job is not None:
            damage = store.damage(key) if store.folder(key).exists() else ""
            st.info(literal(f"{title(job)}: not computed yet{f'; {damage}' if damage else ''}"))
        else:
            st.warning(literal(f"No cell {key} in {store.path}."))
        return
    with st.container(border=True):
        job = store.job(key)
        st.subheader(literal(title(job)), anchor=False)
        table = store.table(key).to_pandas()
        st.dataframe(table.head(_SHOWN), hide_index=True)
        if len(table) > _SHOWN:
            st.caption(f"first {_SHOWN:,} of {len(table):,} rows")
        saved = store.folder(key) / SAVED
        python = f"import workbench as wb\n\nstore = wb.JobStore({str(store.path)!r})\ntable = store.table({key!r}).to_pandas()"
        if saved.is_dir():
            python += f"\nfound = store.load({key!r})"
        downloads(table, name=f"cell-{key[:12]}", python=python)
        if saved.is_dir():
            st.text(f"saved: {saved}")
        with st.expander("where the numbers come from"):
            st.json(store.provenance(key))


def failure(store: JobStore, key: str, expanded: bool = False) -> None:
    """Why a cell failed; what it printed and where it broke."""
    try:
        record = store.failure(key)
        said = title(Job.of(record["job"]))
    except (WorkbenchError, KeyError) as error:  # tried again since the list was made, or damaged
        st.text(str(error))
        return
    with st.expander(f"failed: {literal(said)}", expanded=expanded, icon=":material/error:"):
        st.text(f"{record.get('kind', 'error')}: {record.get('message', '')}")
        for part in ("traceback", "log"):
            if record.get(part):
                st.code(record[part], language=None)


def title(job: Job) -> str:
    """The job in one line of bearable length."""
    return job.title if len(job.title) <= _LONG else f"{job.title[:_LONG]} ..."
