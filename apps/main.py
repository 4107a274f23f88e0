"""The app's first page: what a results folder holds, each result with its figures and its whole table.

Run by ``workbench app --store results``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import streamlit as st

from workbench.apps.jobs_view import job_stores, jobs_page
from workbench.apps.report import Numbers, Picture, Prose
from workbench.apps.sections import parts_of
from workbench.apps.store import Stored, account, stored
from workbench.apps.svg import style
from workbench.errors import WorkbenchError


def folder() -> Path:
    """The results folder given after ``--`` on Streamlit's command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path, default=Path("results"))
    return parser.parse_known_args()[0].store


def show(thing: Stored) -> None:
    """One result: figures, the tables beside them, then all of its rows."""
    saved = thing.load()
    with style():
        for part in parts_of({thing.name: saved}):
            if isinstance(part, Picture):
                part.figure.set_facecolor("white")
                st.pyplot(part.figure, width="content")
                st.caption(part.caption)
            elif isinstance(part, Numbers):
                st.dataframe(part.frame.head(part.rows), hide_index=True)
                st.caption(part.note)
            elif isinstance(part, Prose):
                for line in part.lines:
                    st.text(line)
    frame = saved.frame()
    with st.expander(f"all {len(frame):,} rows"):
        st.dataframe(frame, hide_index=True)
        st.download_button("CSV", frame.to_csv(index=False), f"{thing.path.name}.csv", "text/csv")


def page() -> None:
    """Draw the page."""
    st.set_page_config(page_title="attention workbench", layout="wide")
    store = folder()
    try:
        told, things = account(store), stored(store)
    except WorkbenchError as error:
        st.error(str(error))
        return
    st.title("attention workbench")
    grids = job_stores(store)
    if grids and st.sidebar.toggle("batch jobs", value="jobs" in st.query_params or not things):
        st.query_params["jobs"] = ""
        jobs_page(grids)
        return
    st.query_params.pop("jobs", None)
    if not things:
        st.info(f"Nothing is saved in {store} yet. `make demo` saves results, and so does a command with `--out`.")
        return
    if told is not None:
        with st.expander("what the demo found", expanded="result" not in st.query_params):
            for step in told["steps"]:
                st.markdown(f"**{step['title']}**")
                st.text("\n".join(step["lines"]) if not step.get("error") else f"failed: {step['error']}")
    names = {thing.name: thing for thing in things}
    if st.session_state.get("result") not in names:
        asked = st.query_params.get("result", "")
        st.session_state["result"] = asked if asked in names else next(iter(names))
    chosen = st.sidebar.radio("results", list(names), key="result")
    st.query_params["result"] = chosen
    st.header(chosen)
    try:
        show(names[chosen])
    except WorkbenchError as error:
        st.error(str(error))


page()
