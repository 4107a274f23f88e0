"""The grids in ``apps/jobs`` are right, and one cell of each of their kinds runs on the bundled models."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.jobs.driver import job_grid, run_jobs
from workbench.jobs.store import JobStore

GRIDS = sorted((Path(__file__).parents[2] / "apps" / "jobs").glob("*.yaml"))
SMALL = {
    "demo": {},
    "leaderboard": {"examples": 4},
    "retrieval": {"trials": 1},
    "sae": {"steps": 3, "judged": 4, "features": 64},
}


def test_the_four_are_there() -> None:
    assert [path.stem for path in GRIDS] == ["demo", "leaderboard", "retrieval", "sae"]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_grid_is_right(path: Path) -> None:
    grid = job_grid(path)
    assert grid.name == path.stem
    assert len(grid.jobs) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_one_cell_of_each_kind_runs(path: Path, store: JobStore) -> None:
    """Kinds are told apart by probe and method; the smallest model of each is enough, whole grids take minutes."""
    grid = job_grid(path, overrides=SMALL[path.stem])
    kinds = {(job.probe, job.args.get("method"), job.args.get("kind")): job for job in reversed(grid.jobs)}
    run = run_jobs(list(kinds.values()), store, workers=2)
    assert not run.failed, [store.failure(key)["message"] for key in run.failed]
    assert run.done == len(kinds)
    assert all(store.table(job.key).num_rows for job in kinds.values())
