"""What gc removes, and above all what it leaves alone."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from job_cells import sleepers, write_cell

from workbench.errors import WorkbenchError
from workbench.jobs import index, index_packs, index_writing, running
from workbench.jobs.gc import DAY, GcReport, gc
from workbench.jobs.grids import put_grid
from workbench.jobs.job import Job
from workbench.jobs.store import PROVENANCE, TABLE, JobStore, Unwritable

HOST = socket.gethostname()
ME = f"{HOST}.{os.getpid()}"


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def dead() -> str:
    """``<host>.<pid>`` of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return f"{HOST}.{process.pid}"


@pytest.fixture
def jobs(store: JobStore) -> list[Job]:
    """Four finished cells of a grid, in the index."""
    found = sleepers(4)
    for job in found:
        write_cell(store, job)
    put_grid(store, "naps", found)
    index.refresh(store)
    return found


def old(path: Path, seconds: float) -> Path:
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def folder(path: Path, size: int = 100) -> Path:
    path.mkdir(parents=True)
    (path / "result.parquet").write_bytes(b"x" * size)
    return path


def everything(store: JobStore) -> list[str]:
    return sorted(str(p.relative_to(store.path)) for p in store.path.rglob("*") if p.name != ".merge")


def both(store: JobStore, orphans: bool = False) -> GcReport:
    """A dry run, which changes nothing, and the real one, which does what the dry one said."""
    before = everything(store)
    said = gc(store, orphans=orphans, dry=True)
    assert said.dry
    assert everything(store) == before
    found = gc(store, orphans=orphans)
    assert (found.removed, found.bytes, found.dry) == (said.removed, said.bytes, False)
    return found


def test_a_clean_store_stays_as_it_is(store: JobStore, jobs: list[Job]) -> None:
    before = everything(store)
    assert both(store) == GcReport({}, 0, False)
    assert both(store, orphans=True).count == 0
    assert everything(store) == before


def test_folders_of_dead_processes_go_and_those_of_living_ones_stay(
    store: JobStore, jobs: list[Job], dead: str
) -> None:
    part = store.hidden / "part"
    gone = [folder(part / f"{jobs[0].key}.{dead}"), folder(part / f"{jobs[1].key}.damaged.{dead}")]
    gone += [old(folder(part / f"{jobs[2].key}.elsewhere.org.77"), 1.1 * DAY)]
    kept = [
        folder(part / f"{jobs[0].key}.{ME}"),
        folder(part / f"{jobs[2].key}.elsewhere.org.78"),
        folder(part / "notes"),
    ]
    kept += [old(folder(part / f"{jobs[1].key}.{ME}"), 9 * DAY), old(folder(part / f"{jobs[1].key}.{HOST}.x"), 9 * DAY)]
    report = both(store)
    assert set(report.removed) == {"unfinished"}
    assert sorted(report.removed["unfinished"]) == sorted(p.name for p in gone)
    assert report.bytes == 300
    assert not any(p.exists() for p in gone)
    assert all(p.exists() for p in kept)


def test_a_folder_whose_cell_is_locked_stays(store: JobStore, jobs: list[Job], dead: str) -> None:
    """The host's name alone does not tell containers apart; the lock does."""
    part = folder(store.hidden / "part" / f"{jobs[0].key}.{dead}")
    with running.taken(store, jobs[0].key):
        assert both(store).count == 0
    assert part.exists()
    assert both(store).removed == {"unfinished": (part.name,)}


def test_running_files_that_nobody_locks(store: JobStore, jobs: list[Job]) -> None:
    at = store.hidden / "running"
    stale, young, locked, strange = (at / name for name in (jobs[0].key, jobs[1].key, jobs[2].key, "notes"))
    for path in (stale, young, locked, strange):
        path.write_text("{}")
        old(path, 0 if path == young else 60)
    program = (
        f"import fcntl, time; f = open({str(locked)!r}); fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True); "
    )
    program += "time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        assert both(store).removed == {"running": (stale.name,)}
        assert sorted(os.listdir(at)) == sorted([young.name, locked.name, "notes"])
    finally:
        holder.kill()
        holder.wait()
    old(young, 60)
    assert sorted(both(store).removed["running"]) == sorted([young.name, locked.name])


def test_a_running_file_that_is_locked_at_the_last_moment_stays(
    store: JobStore, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.hidden / "running" / jobs[0].key
    path.write_text("{}")
    old(path, 60)
    monkeypatch.setattr(running, "is_taken", lambda store, key: False)
    with open(path) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert gc(store).count == 0
    assert path.exists()


def test_failures_of_finished_cells(store: JobStore, jobs: list[Job]) -> None:
    failed = Job("fail", seed=3)
    for job in (jobs[0], failed):
        store.fail(job, {"kind": "error", "message": "oh"})
    report = both(store)
    assert report.removed == {"failures": (jobs[0].key,)}
    assert report.bytes > 10
    assert store.failed_keys() == [failed.key]


def test_damaged_cells_are_moved_away_and_kept_for_a_week(store: JobStore, jobs: list[Job]) -> None:
    (store.folder(jobs[0].key) / PROVENANCE).unlink()
    os.truncate(store.folder(jobs[1].key) / TABLE, 5)
    content = (store.folder(jobs[2].key) / TABLE).read_bytes()
    (store.folder(jobs[2].key) / TABLE).write_bytes(b"x" * len(content))
    os.utime(store.folder(jobs[2].key))
    for job in jobs[:3]:
        old(store.folder(job.key), 9 * DAY)
    store.fail(jobs[0], {"kind": "error"})
    report = both(store)
    assert report.removed == {"damaged": tuple(sorted(job.key for job in jobs[:3]))}
    assert report.bytes == 0
    assert store.keys() == [jobs[3].key]
    assert store.failed_keys() == [jobs[0].key]
    away = sorted((store.hidden / "damaged").iterdir())
    assert [path.name.split(".")[0] for path in away] == sorted(job.key for job in jobs[:3])
    assert both(store).count == 0
    write_cell(store, jobs[0])
    assert store.is_done(jobs[0].key)
    old(away[0], 6.9 * DAY)
    assert both(store).count == 0
    old(away[0], 7.1 * DAY)
    assert both(store).removed == {"old damaged": (away[0].name,)}
    assert sorted((store.hidden / "damaged").iterdir()) == away[1:]


def test_a_damaged_cell_that_a_process_computes_again_stays(store: JobStore, jobs: list[Job]) -> None:
    (store.folder(jobs[0].key) / PROVENANCE).unlink()
    with running.taken(store, jobs[0].key):
        assert both(store).count == 0
    assert both(store).removed == {"damaged": (jobs[0].key,)}


def test_temporary_files(store: JobStore, jobs: list[Job], dead: str) -> None:
    gone, kept = [], []
    for place in (store.hidden, store.hidden / "grids", store.hidden / "failed"):
        gone += [place / f".some.json.{dead}", old_file(place / ".some.json.elsewhere.7", 2 * DAY)]
        kept += [place / f".some.json.{ME}", place / ".some.json.elsewhere.8", place / ".hidden"]
    gone += [old_file(store.hidden / "part" / ".write.12", 2 * DAY)]
    kept += [store.hidden / "part" / ".write.13"]
    for path in (*gone, *kept):
        if not path.exists():
            path.write_text("x")
    report = both(store)
    assert set(report.removed) == {"temporary"}
    assert (report.count, report.bytes) == (7, 7)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)


def old_file(path: Path, seconds: float) -> Path:
    path.write_text("x")
    return old(path, seconds)


def test_the_index(store: JobStore, jobs: list[Job], dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = store.hidden / "index"
    index.pack(store, [job.key for job in jobs[:2]])
    (old_pack,) = (p.path for p in index_packs.packs(at) if p.cells.num_rows == 2)
    (whole,) = (p.path for p in index_packs.packs(at) if p.cells.num_rows == 4)
    new = index_writing._Writer(at)
    new.commit(replaces=[old_pack.name])
    spoiled = folder(at / "0000-spoiled")
    half = [folder(at / f".0001.{dead}"), folder(at / f".gone-0002.{dead}")]
    kept = [folder(at / f".0003.{ME}")]
    report = both(store)
    assert set(report.removed) == {"index"}
    assert sorted(report.removed["index"]) == sorted(p.name for p in (*half, spoiled, old_pack))
    assert whole.exists()
    assert kept[0].exists()
    assert len(index.cells(store)) == 4


def test_packs_of_cells_that_are_gone_are_written_again(store: JobStore, jobs: list[Job]) -> None:
    for job in jobs[:3]:
        shutil.rmtree(store.folder(job.key))
    assert gc(store).count == 0
    (pack,) = index_packs.packs(store.hidden / "index")
    assert pack.cells.column("key").to_pylist() == [jobs[3].key]
    assert index.frame(store)["key"].tolist() == [jobs[3].key] * 2


def test_orphans(store: JobStore, jobs: list[Job], dead: str) -> None:
    others = [Job("sleep", seed=100 + i) for i in range(3)]
    for job in others:
        write_cell(store, job, pa.table({"x": [1]}))
    failed, asked = Job("fail", seed=3), Job("fail", seed=4)
    for job in (failed, asked):
        store.fail(job, {"kind": "error"})
    put_grid(store, "failing", [asked])
    folder(store.hidden / "part" / f"{others[0].key}.orphan.{dead}")
    assert set(both(store).removed) == {"unfinished"}
    with running.taken(store, others[0].key):
        report = both(store, orphans=True)
    assert sorted(report.removed["orphans"]) == sorted([others[1].key, others[2].key, failed.key])
    assert report.bytes > 1000
    assert sorted(store.keys()) == sorted([others[0].key, *(job.key for job in jobs)])
    assert store.failed_keys() == [asked.key]
    assert os.listdir(store.hidden / "part") == []
    assert len(index.cells(store)) == 5
    put_grid(store, "others", others[:1])
    assert both(store, orphans=True).count == 0


def test_orphans_are_not_told_without_a_grid(store: JobStore) -> None:
    write_cell(store, sleepers(1)[0])
    with pytest.raises(WorkbenchError, match="has no grid, so every cell would go"):
        gc(store, orphans=True)
    put_grid(store, "naps", sleepers(1))
    (store.hidden / "grids" / "naps.parquet").write_bytes(b"PAR1")
    with pytest.raises(WorkbenchError, match="damaged"):
        gc(store, orphans=True)
    assert len(store.keys()) == 1


def test_no_store_and_one_of_another_format(store: JobStore, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="no store of jobs; `workbench jobs run SPEC --store"):
        gc(JobStore(tmp_path))
    store.open_for_writing()
    (store.hidden / "format.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(WorkbenchError, match="format 99"):
        gc(store)


def test_a_store_that_cannot_be_written(
    store: JobStore, jobs: list[Job], dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(store.hidden / "part" / f"{jobs[0].key}.{dead}")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(Unwritable, match="Permission denied"):
        gc(store)
    assert gc(store, dry=True).removed == {"unfinished": (f"{jobs[0].key}.{dead}",)}


def test_what_vanishes_meanwhile_is_no_error(
    store: JobStore, jobs: list[Job], dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(store.hidden / "part" / f"{jobs[0].key}.{dead}")
    rmtree = shutil.rmtree

    def twice(path: Path, *words: object, **more: object) -> None:
        rmtree(path)
        rmtree(path, *words, **more)

    monkeypatch.setattr(shutil, "rmtree", twice)
    assert gc(store).count == 0


def test_a_cell_that_is_finished_since_it_was_looked_at_stays(
    store: JobStore, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = store.folder(jobs[0].key) / TABLE
    content = table.read_bytes()
    table.write_bytes(content[:-1])
    is_taken = running.is_taken

    def finished(where: JobStore, key: str) -> bool:
        table.write_bytes(content)
        return is_taken(where, key)

    monkeypatch.setattr(running, "is_taken", finished)
    assert gc(store).count == 0
    assert store.is_done(jobs[0].key)
