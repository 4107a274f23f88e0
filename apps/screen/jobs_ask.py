"""Questions in SQL, and exports."""

from __future__ import annotations

import streamlit as st

from workbench.apps.grids.ask import asked, exported, probes_of
from workbench.apps.live import amount
from workbench.apps.screen import state
from workbench.apps.screen.shown import downloads
from workbench.apps.screen.text import literal
from workbench.errors import WorkbenchError
from workbench.jobs.export import CIRCUITS, TABLES
from workbench.jobs.store import JobStore

_FIRST = "select probe, model, task, count(*) as cells, round(avg(seconds), 3) as seconds\nfrom cells group by all order by all"
_SHOWN = 1000
_ALL = "all"


def questions(store: JobStore) -> None:
    """The tab."""
    store.check_format()
    if not store.keys():
        st.info("No cell is done yet. The tab Progress tells how far it is.")
        return
    _sql(store)
    st.divider()
    _export(store)


def _sql(store: JobStore) -> None:
    st.subheader("Ask in SQL", anchor=False)
    st.caption(
        "DuckDB's SQL over the views cells, results, failures, grids and one per probe (`-` as `_`). It only reads; "
        "a query that takes longer than a minute is ended."
    )
    kept = state.held("query", str, _FIRST)
    with st.form("sql", border=False):
        query = st.text_area("Query", kept, height=120)
        if st.form_submit_button("Ask", icon=":material/search:"):
            state.put("query", query)
            st.session_state["asked"] = query
            st.rerun()
    if st.session_state.get("asked") != kept:
        return
    with st.spinner("Asking"):
        frame = asked(store.path, kept)
    st.dataframe(frame.head(_SHOWN), hide_index=True)
    if len(frame) > _SHOWN:
        st.caption(f"first {_SHOWN:,} of {len(frame):,} rows; the files hold all of them")
    python = f"import workbench as wb\n\nfound = wb.JobStore({str(store.path)!r}).sql({kept!r})"
    downloads(frame, name="query", python=python)


def _export(store: JobStore) -> None:
    st.subheader("Export", anchor=False)
    left, middle, right = st.columns(3)
    form = state.choose(
        "Form", [*TABLES, *CIRCUITS], "form", where=left,
        help="All result rows as one table; or every circuit as a file of another tool, in a zip file.",
    )  # fmt: skip
    probe = state.choose("Probe", [_ALL, *probes_of(store)], "export of", where=middle)
    where = right.text_input(
        "Only where", key="where", persist_state="session", placeholder="method = 'eap' and seed < 3"
    )
    if st.button("Make the file", icon=":material/file_export:"):
        try:
            with st.spinner("Writing"):
                name, content = exported(store, form, where or "", None if probe == _ALL else probe)
        except WorkbenchError as error:
            st.error(literal(str(error).replace("where=", "Only where")))
            return
        st.download_button(
            f"{name}, {amount(len(content))}", content, name, on_click="ignore", icon=":material/download:"
        )
