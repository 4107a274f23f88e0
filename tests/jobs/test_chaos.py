"""Workers and drivers killed at random: after running again, every cell has exactly one result, that of a quiet run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_cells import digests, sleepers

from workbench.jobs import running
from workbench.jobs.driver import run_jobs
from workbench.jobs.status import status
from workbench.jobs.store import JobStore

CELLS, KILLS = 200, 22
DRIVE = """
import sys
from workbench.jobs.driver import run_jobs
from workbench.jobs.job import Job
jobs = [Job("sleep", args={"seconds": 0.05, "rows": 2}, seed=i) for i in range(int(sys.argv[3]))]
run = run_jobs(jobs, sys.argv[1], workers=4, engine=sys.argv[2])
sys.exit(1 if run.left or run.failed else 0)
"""


def start(store: JobStore, engine: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", DRIVE, str(store.path), engine, str(CELLS)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "drivers"), [("local", 8), ("ray", 3)])
def test_killed_workers_and_drivers_lose_and_double_nothing(
    store: JobStore, tmp_path: Path, engine: str, drivers: int
) -> None:
    """``drivers`` of the kills hit the driver, the others a worker that is at work; they are spread over the grid's course."""
    dice = random.Random(0)
    victims = ["driver"] * drivers + ["worker"] * (KILLS - drivers)
    dice.shuffle(victims)
    marks = sorted(dice.sample(range(2, CELLS - 10), KILLS))
    killed = {"driver": 0, "worker": 0}
    driver = start(store, engine)
    deadline = time.time() + 300
    try:
        for mark, victim in zip(marks, victims, strict=True):
            while True:
                assert time.time() < deadline, f"no progress: {status(store)}, {killed}"
                if driver.poll() is not None:
                    driver = start(store, engine)
                at_work = running.running_keys(store) if len(store.keys()) >= mark else []
                pids = [pid for key in at_work if (pid := running.owner(store, key))]
                if pids:
                    break
                time.sleep(0.02)
            try:
                os.kill(driver.pid if victim == "driver" else dice.choice(pids), signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed[victim] += 1
            if victim == "driver":
                driver.wait(timeout=20)
        assert sum(killed.values()) >= 20
        assert min(killed.values()) >= 2
        for _ in range(4):
            if driver.wait(timeout=120) == 0:
                break
            driver = start(store, engine)
        assert driver.returncode == 0
    finally:
        if driver.poll() is None:
            driver.kill()
    jobs = sleepers(CELLS, 0.05)
    assert sorted(store.keys()) == sorted(job.key for job in jobs)
    assert [store.damage(key) for key in sorted(store.keys())] == [""] * CELLS
    state = status(store)
    assert (state.done, state.failed, state.running, state.missing, state.other) == (CELLS, 0, 0, 0, 0)
    quiet = JobStore(tmp_path / "quiet")
    run_jobs(jobs, quiet, workers=1)
    assert digests(store) == digests(quiet)
