"""Grids on this machine: results once, poison alone, deaths survived, warm models, stops that lose nothing."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from job_cells import digests, sleepers, write_cell

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs import running
from workbench.jobs.driver import Stopped, run_jobs
from workbench.jobs.events import Event
from workbench.jobs.job import Job
from workbench.jobs.status import status
from workbench.jobs.store import JobStore


def test_every_cell_gets_one_result_and_is_not_computed_twice(store: JobStore) -> None:
    events: list[Event] = []
    jobs = sleepers(12)
    first = run_jobs(jobs, store, workers=3, watch=events.append)
    assert (first.total, first.computed, first.stood, first.left, first.failed) == (12, 12, 0, 0, ())
    assert {e.kind for e in events} == {"begin", "started", "done", "end"}
    assert sorted(store.keys()) == sorted(job.key for job in jobs)
    assert all(
        e.counts.total == e.counts.done + e.counts.running + e.counts.failed + e.counts.remaining for e in events
    )
    before = digests(store)
    events.clear()
    again = run_jobs(jobs, store, watch=events.append)
    assert (again.computed, again.stood) == (0, 12)
    assert [e.kind for e in events] == ["begin", "end"]
    assert digests(store) == before
    assert not list((store.hidden / "running").iterdir())
    assert not list((store.hidden / "part").iterdir())


def test_only_what_is_missing_or_damaged_is_computed(store: JobStore) -> None:
    jobs = sleepers(6)
    run_jobs(jobs[:3], store, workers=1)
    before = digests(store)
    (store.folder(jobs[0].key) / "result.parquet").write_bytes(b"PAR1")
    (store.folder(jobs[1].key) / "provenance.json").unlink()
    found = run_jobs(jobs, store, workers=2)
    assert (found.stood, found.computed) == (1, 5)
    assert before.items() <= digests(store).items()


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("error", "error", "RuntimeError"),
        ("exit", "died", "exit code 3"),
        ("kill", "died", "SIGKILL"),
        ("memory", "memory", "GB that a worker may use"),
        ("loop", "timeout", "longer than 1.5 s"),
        ("hold", "timeout", "longer than 1.5 s"),
    ],
)
def test_a_poisoned_cell_fails_alone(store: JobStore, how: str, kind: str, says: str) -> None:
    poison, healthy = Job("fail", args={"how": how}), sleepers(8)
    jobs = [*healthy[:4], poison, *healthy[4:]]
    timeout = 1.5 if kind == "timeout" else 60.0  # filling 700 MB may take longer than 1.5 s
    found = run_jobs(jobs, store, workers=2, timeout=timeout, memory="700MB", attempts=2)
    assert (found.computed, found.failed, found.left) == (8, (poison.key,), 0)
    record = store.failure(poison.key)
    assert record["kind"] == kind
    assert says in record["message"]
    assert record["attempts"] == (2 if kind == "died" else 1)
    if kind == "error":
        assert "Traceback" in record["traceback"]
    state = status(store)
    assert (state.done, state.failed, state.running, state.missing) == (8, 1, 0, 0)


def test_failures_stay_until_they_are_retried(store: JobStore, tmp_path: Path) -> None:
    poison = Job("fail", args={"how": "error"})
    lucky = Job("fail", args={"how": "once", "marker": str(tmp_path / "been")})
    assert set(run_jobs([poison, lucky], store, workers=1, attempts=1).failed) == {poison.key, lucky.key}
    second = run_jobs([poison, lucky], store, workers=1)
    assert second.failed == (poison.key,), "a cell whose worker died is tried again, one that raised is not"
    stamp = os.stat(store.hidden / "failed" / f"{poison.key}.json").st_mtime_ns
    assert run_jobs([poison, lucky], store, workers=1, retry=True).failed == (poison.key,)
    assert os.stat(store.hidden / "failed" / f"{poison.key}.json").st_mtime_ns > stamp


def test_a_cell_that_kills_its_worker_once_is_computed_by_the_next(store: JobStore, tmp_path: Path) -> None:
    events: list[Event] = []
    job = Job("fail", args={"how": "once", "marker": str(tmp_path / "been")})
    found = run_jobs([job], store, watch=events.append)
    assert (found.computed, found.failed) == (1, ())
    assert [e.kind for e in events] == ["begin", "started", "lost", "started", "done", "end"]


def test_workers_keep_their_model_and_take_cells_of_one_model(store: JobStore) -> None:
    jobs = [
        Job("find_circuit", model=model, task="induction", args={"method": "eap", "examples": 4}, seed=seed)
        for seed in range(3)
        for model in ("compiled-induction", "tiny-softmax")
    ]
    order: list[str | None] = []
    run_jobs(
        jobs, store, workers=1, watch=lambda e: order.append(e.job.model) if e.kind == "started" and e.job else None
    )
    assert order == ["compiled-induction"] * 3 + ["tiny-softmax"] * 3
    found = store.provenance(jobs[0].key) if store.is_done(jobs[0].key) else store.provenance(store.keys()[0])
    assert found["threads"] == 1
    assert found["model"]["digest"].startswith("sha256:")
    assert found["versions"]["torch"]


def test_another_driver_has_the_cell(store: JobStore) -> None:
    job, free = sleepers(2)
    store.open_for_writing()
    events: list[Event] = []
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with running.taken(store, job.key):
            entered.set()
            leave.wait(30)
            write_cell(store, job)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(5)

    def watch(event: Event) -> None:
        events.append(event)
        if event.kind == "elsewhere":
            leave.set()

    found = run_jobs([job, free], store, workers=1, watch=watch)
    holder.join()
    assert (found.computed, found.elsewhere) == (1, 1)
    assert [e.kind for e in events].count("elsewhere") == 1


def test_two_drivers_at_once_share_the_work(store: JobStore) -> None:
    jobs = sleepers(40, 0.02)
    found = []

    def drive() -> None:
        found.append(run_jobs(jobs, store, workers=2))

    drivers = [threading.Thread(target=drive) for _ in range(2)]
    for each in drivers:
        each.start()
    for each in drivers:
        each.join()
    assert all(run.done == 40 and not run.failed for run in found)
    assert sum(run.computed for run in found) == 40, "no cell was computed twice"
    assert sorted(store.keys()) == sorted(job.key for job in jobs)


DRIVE = """
import sys
from workbench.jobs.driver import Stopped, run_jobs
from workbench.jobs.job import Job
jobs = [Job("sleep", args={"seconds": 0.2}, seed=i) for i in range(50)]
try:
    run_jobs(jobs, sys.argv[1], workers=2, watch=lambda e: print(e.kind, flush=True))
except Stopped as stopped:
    print("stopped", stopped.run.computed, stopped.run.left)
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_driver_takes_its_workers_along_and_loses_nothing(store: JobStore, sign: signal.Signals) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVE, str(store.path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert driver.stdout is not None
    done = 0
    for line in driver.stdout:
        done += line == "done\n"
        if done == 6:
            break
    deadline = time.time() + 10
    workers: set[int] = set()
    while not workers and time.time() < deadline:  # between two cells nobody is at work
        workers = {pid for key in running.running_keys(store) if (pid := running.owner(store, key))}
    assert workers
    os.killpg(driver.pid, sign) if sign == signal.SIGINT else os.kill(driver.pid, sign)
    rest = driver.stdout.read()
    driver.wait(timeout=20)
    deadline = time.time() + 10
    while any(alive(pid) for pid in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
    if sign != signal.SIGKILL:
        assert "stopped" in rest
    kept = digests(store)
    assert 6 <= len(kept) < 50
    assert status(store).running == 0
    found = run_jobs([Job("sleep", args={"seconds": 0.2}, seed=i) for i in range(50)], store, workers=4)
    assert (found.stood, found.done) == (len(kept), 50)
    assert kept.items() <= digests(store).items()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_full_disk_stops_the_run_with_one_error(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.jobs import driver
    from workbench.jobs.store import Unwritable

    def full(self: object, timeout: float) -> list[driver.Reply]:
        return [driver.Reply(0, {"state": "unwritable", "message": "cannot write to the store: full"})]

    monkeypatch.setattr("workbench.jobs.engines.local.LocalEngine.wait", full)
    with pytest.raises(Unwritable, match="full"):
        run_jobs(sleepers(3), store, workers=1)
    monkeypatch.undo()
    assert run_jobs(sleepers(3), store, workers=1).done == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"workers": 0}, "workers is a whole number above 0; got 0"),
        ({"threads": 1.5}, "threads is a whole number above 0; got 1.5"),
        ({"timeout": -1}, "timeout is a number above 0; got -1"),
        ({"engine": "slurm"}, "no engine 'slurm'; known: local, ray"),
        ({"device": "tpu"}, "no device 'tpu'; known: cpu, cuda"),
        ({"address": "auto"}, "needs engine ray"),
        ({"memory": "lots"}, "lots"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_made(store: JobStore, settings: dict, says: str) -> None:
    with pytest.raises((WorkbenchError, UnknownName), match=says):
        run_jobs(sleepers(1), store, **settings)
    assert not store.path.exists()


def test_watching_can_stop_a_run(store: JobStore) -> None:
    def watch(event: Event) -> None:
        if event.kind == "done":
            raise KeyboardInterrupt

    with pytest.raises(Stopped) as stopped:
        run_jobs(sleepers(5, 0.05), store, workers=1, watch=watch)
    assert stopped.value.run.stopped == "interrupted"
    assert stopped.value.run.computed == 1
    assert run_jobs(sleepers(5, 0.05), store, workers=1).stood >= 1


def test_what_a_cell_read_beside_its_job_is_told(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_probes.py").write_text("def words(path):\n    return {'words': len(open(path).read().split())}\n")
    (tmp_path / "text.txt").write_text("three small words")
    job = Job("my_probes:words", args={"path": "text.txt"})
    assert run_jobs([job], store, workers=1).computed == 1
    assert store.table(job.key)["words"].to_pylist() == [3]
    inputs = store.provenance(job.key)["data"]["inputs"]
    assert inputs["text.txt"] == hashlib.sha256(b"three small words").hexdigest()
    assert str(tmp_path / "my_probes.py") in inputs
