"""Report: one HTML file of what was saved or computed, with figures, numbers and where they come from."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import streamlit as st

from workbench.apps.cell_sections import title_of
from workbench.apps.live import amount
from workbench.apps.screen import place, state
from workbench.apps.screen.need import guarded, job, need, work
from workbench.apps.screen.text import literal
from workbench.apps.store import ACCOUNT, FOLDER, stored
from workbench.apps.work_report import FILE
from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.store import JOB, JobStore

_COMPUTED, _SAVED = "What pages computed", "What commands saved"
_OWN = "workbench.apps.work_"
_NEWEST, _MOST = 8, 500
_PREVIEW = 1_400_000
"""Bytes of the longest report that is shown in the page: a message to the browser has at most 2 MB."""


def page() -> None:
    st.title("Report")
    st.caption(
        "One HTML file that opens anywhere, without network: every figure and table that you choose, with settings, versions and "
        "whether looking changed the model."
    )
    cells = _cells()
    saved = stored(place.store()) if place.store().is_dir() else []
    if not cells and not saved:
        st.info(
            "There is nothing to report yet. Open a page such as Sinks, or run `make demo`; what they compute can then be chosen."
        )
        return
    offered = [name for name, there in ((_COMPUTED, cells), (_SAVED, saved)) if there]
    what = state.choose("Report on", offered, "of", kind="segmented_control")
    wanted = _of_cells(cells) if what == _COMPUTED else _of_folder()
    if wanted is None:
        return
    if st.button("Make the report", type="primary", icon=":material/description:"):
        st.session_state["report"] = wanted.key
        if work().state(wanted.key).kind == "failed":
            work().retry(wanted)
    if work().state(wanted.key).kind == "done" or st.session_state.get("report") == wanted.key:
        _show(need(wanted, "Writing the report").folder / FILE, wanted)


def _of_cells(cells: dict[str, Job]) -> Job | None:
    chosen = state.several(
        "Cells", list(cells), "cells", default=list(cells)[:_NEWEST], always=True, show=lambda key: title_of(cells[key]),
        help="What pages computed, the newest first.",
    )  # fmt: skip
    if not chosen:
        st.info("Choose at least one cell.")
        return None
    return job("workbench.apps.work_report:cells_report", store=str(place.cells().path), cells=chosen, link=_here())


def _of_folder() -> Job:
    """The report of the folder as it stands now."""
    root = place.store()
    told = [(thing.name, path.name, path.stat()) for thing in stored(root) for path in sorted(thing.path.iterdir())]
    told += [("", ACCOUNT, path.stat()) for path in (root / ACCOUNT, root / FOLDER / ACCOUNT) if path.is_file()]
    text = "\n".join(f"{name}/{file} {about.st_size} {about.st_mtime_ns}" for name, file, about in told)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return job("workbench.apps.work_report:folder_report", store=str(root), state=digest)


def _show(path: Path, wanted: Job) -> None:
    found = place.confined(path)
    content = found.read_bytes()
    left, right = st.columns([1, 3], vertical_alignment="center")
    left.download_button(
        f"Download, {amount(len(content))}",
        content,
        FILE,
        "text/html",
        type="primary",
        on_click="ignore",
        icon=":material/download:",
    )
    right.caption(literal(str(found)))
    if len(content) > _PREVIEW:
        st.info(f"The report has {amount(len(content))}, which is too much to show here; the file holds all of it.")
    else:  # a page of its own origin: whatever it holds, it cannot reach the app
        shown = base64.b64encode(content).decode()
        st.iframe(f"data:text/html;charset=utf-8;base64,{shown}", height=800, alt="The report")
    with st.expander("Python"):
        st.code(_python(wanted), language="python")


def _python(wanted: Job) -> str:
    """The code that writes the report of the same things again."""
    args = wanted.args
    if wanted.probe.endswith("folder_report"):
        return f"from workbench.apps.sections import report_of\n\npath = report_of({args['store']!r}, 'report.html')"
    return (
        "import workbench as wb\nfrom workbench.apps.cell_sections import cell_sections\n"
        "from workbench.apps.report import write_report\nfrom workbench.figure_html import style\n\nwith style():\n"
        f"    sections = cell_sections(wb.JobStore({args['store']!r}), {args['cells']!r})\n"
        "    path = write_report(sections, 'report.html', title='What the workbench computed')"
    )


def _cells() -> dict[str, Job]:
    """Finished cells that pages computed, the newest first; reports and the app's own bookkeeping are none."""
    cells = place.cells()
    found = []
    for key in cells.keys():  # noqa: SIM118
        try:
            job_ = _job(str(cells.path), key)
            when = os.stat(cells.folder(key) / JOB).st_mtime
        except (OSError, WorkbenchError):
            continue  # half-written or damaged: nothing that can be reported
        if not job_.probe.startswith((f"{_OWN}report", f"{_OWN}grids")):
            found.append((when, key, job_))
    return {key: job_ for _, key, job_ in sorted(found, key=lambda one: -one[0])[:_MOST]}


@st.cache_resource(max_entries=1000, show_spinner=False)
def _job(store: str, key: str) -> Any:
    return JobStore(store).job(key)


def _here() -> str:
    """The address of the app, without that of the page."""
    url = str(st.context.url or "")
    return url.rsplit("/", 1)[0] if url.startswith("http") else ""


guarded(page)
