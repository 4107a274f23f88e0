"""What a page does to have something computed: it names the job and gets the finished cell, or says how far that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.screen import place
from workbench.apps.screen.text import literal
from workbench.apps.screen.warm import put_aside
from workbench.apps.screen.work import Work
from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.store import JobStore

if TYPE_CHECKING:
    import pandas as pd

_EVERY = 0.5


@dataclass(frozen=True)
class Done:
    """A finished cell. ``python`` is the code that reads it back, the start of every "copy as Python"."""

    job: Job
    key: str

    def table(self) -> pd.DataFrame:
        """The cell's table."""
        frame: pd.DataFrame = place.cells().table(self.key).to_pandas()
        return frame

    def load(self) -> Any:
        """What the probe saved beside the table: a result, a circuit, a run, a coder."""
        return place.cells().load(self.key)

    @property
    def folder(self) -> Any:
        """Where it stands."""
        return place.cells().folder(self.key) / "saved"

    @property
    def about(self) -> Mapping[str, Any]:
        """How the cell came about."""
        return place.cells().provenance(self.key)


def work() -> Work:
    """The one worker of this server, and of its results folder."""
    found: Work = _work(str(place.cells().path))
    return found


@st.cache_resource
def _work(store: str) -> Work:
    return Work(JobStore(store))


def job(probe: str, model: str | None = None, task: Any = None, *, seed: int = 0, **args: Any) -> Job:
    """The job as it will run: checked, with the model's revision filled in. Arguments that are None are left out.

    Raises ``WorkbenchError`` for a model, task, probe or argument that does not exist."""
    from workbench.jobs.driver import job_grid

    given = {name: value for name, value in args.items() if value is not None}
    found: Job = job_grid([Job(probe, model=model, task=task, args=given, seed=seed)]).jobs[0]
    return found


def ask(wanted: Job, what: str) -> Done | None:
    """The finished cell of ``wanted``; None while it is not there, and then the page says why: it waits, runs or failed."""
    worker = work()
    state = worker.state(wanted.key)
    if state.kind == "missing":
        worker.submit(wanted)
        state = worker.state(wanted.key)
    if state.kind == "done":
        return Done(wanted, wanted.key)
    if state.kind == "failed":
        _failed(wanted, what, state.message)
    else:
        _under_way(wanted, what)
    return None


def need(wanted: Job, what: str) -> Done:
    """As ``ask``, and the page ends here until the cell is there."""
    found = ask(wanted, what)
    if found is None:
        st.stop()
        raise AssertionError("the page has stopped")
    return found


def _failed(wanted: Job, what: str, message: str) -> None:
    st.error(f"{literal(what)} did not come to an end: {literal(message)}")
    columns = st.columns([1, 5])
    if columns[0].button("Try again", key=f"again {wanted.key}"):
        work().retry(wanted)
        st.rerun()
    try:
        trace = place.cells().failure(wanted.key).get("traceback")
    except WorkbenchError:
        return
    if trace:
        with columns[1].expander("what the worker said"):
            st.code(trace, language=None)


@st.fragment(run_every=_EVERY)
def _under_way(wanted: Job, what: str) -> None:
    guarded(lambda: _told(wanted, what))


def _told(wanted: Job, what: str) -> None:
    state = work().state(wanted.key)
    if state.kind in ("done", "failed"):
        st.rerun()
    if state.kind == "missing":
        work().submit(wanted)
    if state.kind == "running":
        said = f"{state.seconds:.0f} s" + (", in another process" if state.elsewhere else "")
    else:
        said = f"waits behind {state.ahead}" if state.ahead else "starts"
    left, right = st.columns([6, 1], vertical_alignment="center")
    left.info(
        f"{literal(what)}: {said}. The page stays usable; its link brings you back here.", icon=":material/hourglass:"
    )
    if state.elsewhere:
        return
    if right.button("Stop", key=f"stop {wanted.key}"):
        work().cancel(wanted.key)
        st.rerun()


def guarded(draw: Callable[[], None]) -> None:
    """Run a page or a fragment of it; a user's mistake, a damaged file or a disk that cannot be read is one line in the page."""
    put_aside()
    try:
        draw()
    except (WorkbenchError, OSError) as error:
        st.error(literal(str(error)))
