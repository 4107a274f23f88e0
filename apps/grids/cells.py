"""The cells of a grid with the state of each, read from the store alone."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.jobs.job import Job
from workbench.jobs.store import JobStore


def cell_states(store: JobStore, jobs: Sequence[Job]) -> list[str]:
    """``done``, ``failed``, ``running`` or ``missing`` for each of ``jobs``: a done cell is done whatever else is said of it, a
    running one is no failure any more."""
    from workbench.jobs.index import done_keys
    from workbench.jobs.running import running_keys

    done, failed, running = done_keys(store), set(store.failed_keys()), set(running_keys(store))
    return [
        "done" if job.key in done else "running" if job.key in running else "failed" if job.key in failed else "missing"
        for job in jobs
    ]
