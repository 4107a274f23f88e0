"""Jobs: many cells at once, from the definition of a grid to the comparison of its results."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from workbench.apps.grids.folders import job_stores, name_in
from workbench.apps.screen import place, state
from workbench.apps.screen.jobs_ask import questions
from workbench.apps.screen.jobs_compare import comparison
from workbench.apps.screen.jobs_new import new_grid
from workbench.apps.screen.jobs_progress import progress
from workbench.apps.screen.jobs_queue import queue
from workbench.apps.screen.need import guarded
from workbench.jobs.store import JobStore

_TABS = ("New grid", "Progress", "Compare", "SQL and export", "Queue")


def page() -> None:
    st.title("Jobs")
    st.caption(
        "A grid is one computation with every combination of its settings; each combination is a cell, computed once and kept."
    )
    stores = job_stores(place.store())
    tab = state.choose(
        "Part", _TABS, "tab", kind="segmented_control", default="Progress" if _grids(stores) else _TABS[0]
    )
    if tab == "New grid":
        new_grid()
    elif tab == "Queue":
        queue(stores)
    elif not stores:
        st.info(
            "There is no grid yet. Define one in the part New grid; the ones that come with the app run as they are."
        )
    else:
        store = _chosen(stores)
        {"Progress": progress, "SQL and export": questions}.get(tab, lambda one: comparison(one, stores))(store)


def _grids(stores: Sequence[JobStore]) -> list[JobStore]:
    return [store for store in stores if store.path != place.cells().path]


def _chosen(stores: Sequence[JobStore]) -> JobStore:
    """The store that is looked at; what pages computed comes last."""
    own = place.cells().path
    named = {name_in(place.store(), one): one for one in sorted(stores, key=lambda one: one.path == own)}
    name = state.choose(
        "Folder",
        list(named),
        "folder",
        always=True,
        show=lambda n: "computed by the pages of the app" if named[n].path == own else n,
    )
    return named[name]


guarded(page)
