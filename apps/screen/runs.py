"""Captured runs: which there are, the one that is looked at, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.screen import place, state
from workbench.apps.screen.need import Done, job, need
from workbench.apps.screen.text import literal
from workbench.errors import WorkbenchError
from workbench.jobs.job import Job, is_key
from workbench.jobs.store import JOB, SAVED

if TYPE_CHECKING:
    from workbench.probes.atlas import Atlas
    from workbench.run import Run

MODEL = "tiny-softmax"
FIRST: Mapping[str, Any] = {"needle": 192}
"""What is captured where nothing is yet: a text of the first model with facts in it, and a question for one of them."""


@dataclass(frozen=True)
class Captured:
    """A captured run by its cell's key."""

    key: str
    job: Job

    @property
    def title(self) -> str:
        """The model and its input, for people."""
        args = self.job.args
        if args.get("text") is not None:
            words = " ".join(args["text"].split())
            said = f"“{words[:40]}{'…' if len(words) > 40 else ''}”"
        elif self.job.task is not None:
            side = "" if args.get("side", "clean") == "clean" else ", corrupted"
            said = f"{self.job.task_name}, seed {self.job.seed}{side}"
        else:
            name = next((n for n in ("filler", "needle", "image") if args.get(n) is not None), "")
            unit = "" if name == "image" else " tokens"
            said = f"{name} {args.get(name, 0):,}{unit}, seed {self.job.seed}"
        model = self.job.model or ""
        return f"{Path(model).name}: {said}"

    @property
    def folder(self) -> Path:
        return place.cells().folder(self.key) / SAVED

    @property
    def python(self) -> str:
        """The code that opens the run."""
        return f"import workbench as wb\n\nrun = wb.open_run({str(self.folder)!r})"


def captured() -> list[Captured]:
    """All finished captures of the app's store, the newest first."""
    cells = place.cells()
    found = []
    for key in cells.keys():  # noqa: SIM118
        try:
            when = (cells.folder(key) / JOB).stat().st_mtime
            wanted = _job(str(cells.path), key)
        except (OSError, WorkbenchError):
            continue  # being written or damaged: opening it by its link says so
        if wanted.probe == "capture":
            found.append((when, Captured(key, wanted)))
    return [one for _, one in sorted(found, key=lambda pair: -pair[0])]


def first() -> Done:
    """The run that every page starts with; computed if it is not there yet."""
    return need(job("capture", MODEL, **FIRST), f"Capturing {MODEL}")


def current(key: str = "run", label: str = "Run", where: Any = None, models: Any = None) -> Captured:
    """The run that is looked at: a choice that stands in the address. ``models`` tells of a job's model name whether the page can
    look at it."""
    known = {one.key: one for one in captured() if models is None or models(one.job.model)}
    asked = st.query_params.get(key)
    if asked and asked not in known and is_key(asked) and (why := place.cells().damage(asked)):
        st.warning(literal(f"The run of this link is not complete: {why}"))
    if not known:
        done = first()
        known = {done.key: Captured(done.key, done.job)}
    chosen = state.choose(
        label,
        list(known),
        key,
        show=lambda k: known[k].title if k in known else k,
        where=where or st.container(width=560),
        always=True,
    )
    return known[chosen]


@st.cache_resource(max_entries=256)
def _job(store: str, key: str) -> Job:
    from workbench.jobs.store import JobStore

    return JobStore(store).job(key)


def opened(run: Captured) -> Run:
    """The run with its maps, which stay on disk until a part of them is asked for."""
    found: Run = _opened(str(run.folder), run.key)
    return found


def about(run: Captured) -> Mapping[str, Any]:
    """What the capture wrote down: ``text``, ``tokens``, ``blocks``, ``bytes``, ``seconds``, ``logit_difference``."""
    from workbench.stored_run import about_run

    return about_run(run.folder)


def atlas_of(run: Captured) -> Atlas:
    """Per-head numbers and block maps of the run."""
    found: Atlas = _atlas(str(run.folder), run.key)
    return found


@st.cache_resource(max_entries=4)
def _opened(folder: str, key: str) -> Any:
    from workbench.stored_run import open_run

    return open_run(folder)


@st.cache_resource(max_entries=4)
def _atlas(folder: str, key: str) -> Any:
    from workbench.probes.atlas import atlas
    from workbench.stored_run import about_run, open_run

    return atlas(open_run(folder), about_run(folder)["blocks"])


def disk_use() -> tuple[int, int]:
    """Bytes and number of the cells in the app's store, from what their provenance says."""
    cells = place.cells()
    sizes = [_size(str(cells.path), key) for key in cells.keys()]  # noqa: SIM118
    return sum(sizes), len(sizes)


@st.cache_data(max_entries=10_000, show_spinner=False)
def _size(store: str, key: str) -> int:
    from workbench.jobs.store import JobStore

    try:
        return sum(size for size, _ in JobStore(store).provenance(key)["files"].values())
    except (WorkbenchError, KeyError, TypeError, ValueError):
        return 0
