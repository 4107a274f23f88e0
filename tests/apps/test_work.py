"""The worker behind the pages: order, stopping, death, memory, disks that cannot be written, and other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_cells import sleepers, write_cell

from workbench.apps.screen.work import Work
from workbench.errors import WorkbenchError
from workbench.jobs import running
from workbench.jobs.engines.protocol import Reply
from workbench.jobs.job import Job
from workbench.jobs.store import JobStore, Unwritable

_WAIT = 60.0


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    found = Work(JobStore(tmp_path / "store"))
    yield found
    found.close()


def until(true: Callable[[], Any]) -> None:
    """Wait for it; fails after a minute."""
    ends = time.monotonic() + _WAIT
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def ended(work: Work, job: Job) -> str:
    """The state of the cell when it is over, and why it failed."""
    until(lambda: work.state(job.key).kind in ("done", "failed"))
    state = work.state(job.key)
    return f"{state.kind} {state.message}".strip()


def test_cells_are_computed_in_the_order_they_are_asked_for(work: Work) -> None:
    first, *rest = jobs = sleepers(4, seconds=0.3)
    for job in jobs:
        work.submit(job)
        work.submit(job)
    until(lambda: work.state(first.key).kind == "running")
    assert [work.state(job.key).ahead for job in rest] == [1, 2, 3]
    assert work.queue() == jobs
    for job in jobs:
        assert ended(work, job) == "done"
    began = [work.store.provenance(job.key)["started"] for job in jobs]
    assert began == sorted(began)
    assert work.queue() == []


def test_sessions_that_ask_for_the_same_cell_at_once_share_it(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, same = sleepers(2, seconds=0.5)
    work.submit(slow)
    both, plain = threading.Barrier(2), work.store.open_for_writing
    monkeypatch.setattr(work.store, "open_for_writing", lambda: (both.wait(10), plain()))  # after both found it missing
    threads = [threading.Thread(target=work.submit, args=(same,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert work.queue().count(same) == 1
    assert ended(work, same) == "done"


def test_a_cell_is_stopped_while_it_waits_and_while_it_runs(work: Work) -> None:
    now, waits, last = Job("fail", args={"how": "hold"}), *sleepers(2)
    for job in (now, waits, last):
        work.submit(job)
    until(lambda: work.state(now.key).kind == "running")
    work.cancel(waits.key)
    assert work.state(waits.key).message == "it was stopped from the page"
    work.submit(waits)  # a page that is still open does not start it again
    assert waits not in work.queue()
    work.cancel(now.key)
    assert ended(work, now) == "failed it was stopped from the page"
    assert ended(work, last) == "done"
    work.retry(waits)
    assert ended(work, waits) == "done"


def test_a_stop_that_comes_too_late_stops_no_other_cell(work: Work) -> None:
    for job in sleepers(12):
        work.submit(job)
    for job in sleepers(12):
        until(lambda job=job: work.state(job.key).kind != "waiting")
        work.cancel(job.key)
    states = [ended(work, job) for job in sleepers(12)]
    assert set(states) <= {"done", "failed it was stopped from the page"}


def test_a_worker_that_is_killed_takes_one_cell_with_it(work: Work, tmp_path: Path) -> None:
    once, after = Job("fail", args={"how": "once", "marker": str(tmp_path / "marker")}), sleepers(1)[0]
    work.submit(once)
    work.submit(after)
    assert ended(work, once) == "failed the worker died: SIGKILL; nothing that was stored is lost"
    assert ended(work, after) == "done"
    work.retry(once)
    assert ended(work, once) == "done"


def test_a_cell_that_takes_too_much_memory_is_ended(tmp_path: Path) -> None:
    work = Work(JobStore(tmp_path / "store"), memory=2**30)
    job, after = Job("fail", args={"how": "memory"}), sleepers(1)[0]
    work.submit(job)
    work.submit(after)
    assert ended(work, job) == "failed the worker ended itself: it needed more than 1.0 GB of memory"
    assert ended(work, after) == "done"
    work.close()


def test_a_cell_of_another_process_is_waited_for(work: Work) -> None:
    job = sleepers(1)[0]
    work.store.open_for_writing()
    with running.taken(work.store, job.key):
        assert work.state(job.key).elsewhere
        work.submit(job)
        assert work.queue() == []
    assert work.state(job.key).kind == "missing"
    work.submit(job)
    assert ended(work, job) == "done"


def test_a_damaged_cell_is_computed_again(work: Work) -> None:
    job = sleepers(1)[0]
    write_cell(work.store, job)
    assert work.state(job.key).kind == "done"
    (work.store.folder(job.key) / "result.parquet").write_bytes(b"PAR1")
    assert work.state(job.key).kind == "missing"
    work.submit(job)
    assert ended(work, job) == "done"
    assert work.store.table(job.key).num_rows == 2


def test_a_damaged_record_of_a_failure_counts_for_nothing(work: Work) -> None:
    job = sleepers(1)[0]
    work.store.open_for_writing()
    (work.store.hidden / "failed" / f"{job.key}.json").write_text("{")
    work.submit(job)
    assert ended(work, job) == "done"


class Told:
    """An engine that answers what it is told to, once ``gate`` is set."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.given = 0
        self.gate = threading.Event()
        self.gate.set()

    def submit(self, slot: int, order: Any) -> None:
        self.given += 1

    def wait(self, timeout: float) -> list[Reply]:
        time.sleep(0.01)
        if not (self.given and self.gate.is_set()):
            return []
        self.given -= 1
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return [reply]

    def kill(self, slot: int) -> None: ...

    def close(self) -> None: ...


def test_the_queue_outlives_an_error_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Told(RuntimeError("lost"), Reply(0, {"state": "unwritable", "message": "the disk is full"}))
    work = Work(JobStore(tmp_path / "store"), engine=lambda: engine)
    first, second = sleepers(2)
    work.submit(first)
    work.submit(second)
    assert ended(work, first) == "failed the queue met an error of its own: RuntimeError: lost"
    assert ended(work, second) == "failed the disk is full"
    assert "RuntimeError: lost" in capsys.readouterr().err
    work.close()


def test_a_stop_is_about_one_try(tmp_path: Path) -> None:
    engine = Told(Reply(0, {"state": "unwritable", "message": "full"}), Reply(0, None, "SIGKILL(-9)"))
    work = Work(JobStore(tmp_path / "store"), engine=lambda: engine)
    job = sleepers(1)[0]
    engine.gate.clear()
    work.submit(job)
    until(lambda: work.state(job.key).kind == "running")
    work.cancel(job.key)  # and it ends by itself at the same moment
    engine.gate.set()
    assert ended(work, job) == "failed full"
    work.retry(job)
    assert "the worker died: SIGKILL(-9)" in ended(work, job)
    work.close()


def test_a_death_that_cannot_be_recorded_is_told_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(JobStore(tmp_path / "store"), engine=lambda: Told(Reply(0, None, "SIGKILL(-9)")))

    def full(*_: Any) -> None:
        raise Unwritable("the disk is full")

    monkeypatch.setattr(work.store, "fail", full)
    job = sleepers(1)[0]
    work.submit(job)
    assert ended(work, job) == (
        "failed the worker died: SIGKILL(-9); nothing that was stored is lost; and the disk is full"
    )
    work.close()


def test_a_store_that_is_a_file_or_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "new" / ".jobs").mkdir(parents=True)
    (tmp_path / "new" / ".jobs" / "format.json").write_text('{"format": 99}')
    for name, why in (("file", "is a file"), ("new", "has store format 99")):
        work = Work(JobStore(tmp_path / name))
        with pytest.raises(WorkbenchError, match=why):
            work.submit(sleepers(1)[0])
        work.close()


ON_A_SMALL_DISK = """
    import subprocess, sys, time
    from workbench.apps.screen.work import Work
    from workbench.jobs.job import Job
    from workbench.jobs.store import JobStore, Unwritable

    at = sys.argv[1]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", at], check=True)
    work = Work(JobStore(f"{at}/store"))

    def ended(job):
        while work.state(job.key).kind not in ("done", "failed"):
            time.sleep(0.02)
        return work.state(job.key)

    small, large = Job("sleep", args={"rows": 10}), Job("sleep", args={"rows": 1_000_000})
    work.submit(small)
    print("small:", ended(small).kind)
    work.submit(large)
    print("large:", ended(large).kind, ended(large).message)
    work.submit(Job("sleep", seed=1))
    print("again:", ended(Job("sleep", seed=1)).kind)
    subprocess.run(["mount", "-o", "remount,ro", at], check=True)
    print("there:", work.state(small.key).kind)
    try:
        work.submit(Job("sleep", seed=2))
    except Unwritable as error:
        print("refused:", error)
    work.close()
"""


def _own_mounts() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not _own_mounts(), reason="mounting in a namespace of one's own is not allowed here")
def test_a_full_disk_and_a_read_only_one(tmp_path: Path) -> None:
    script = tmp_path / "small.py"
    script.write_text(textwrap.dedent(ON_A_SMALL_DISK))
    (tmp_path / "disk").mkdir()
    command = ["unshare", "-rm", sys.executable, str(script), str(tmp_path / "disk")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    told = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=True).stdout
    assert "small: done\nlarge: failed cannot write to the store" in told
    assert "No space left on device" in told
    assert "again: done\nthere: done\nrefused: cannot write to the store" in told
    assert "Read-only file system" in told
