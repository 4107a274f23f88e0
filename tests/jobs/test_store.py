"""A cell is complete or not there at all: what is written, what is refused, who wins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pytest
from job_cells import digests, parquet, sleepers, write_cell

from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.store import JOB, PROVENANCE, TABLE, JobStore, Unwritable

JOB_A = Job("sleep", args={"seconds": 0.0}, seed=7)


def test_a_written_cell_reads_back(store: JobStore) -> None:
    assert write_cell(store, JOB_A, note="said")
    assert store.keys() == [JOB_A.key]
    assert store.is_done(JOB_A.key)
    assert store.job(JOB_A.key) == JOB_A
    assert store.table(JOB_A.key)["value"].to_pylist() == [1.5, 2.5]
    found = store.provenance(JOB_A.key)
    assert found["note"] == "said"
    assert set(found["files"]) == {TABLE, JOB}
    assert found["files"][TABLE][1] == digests(store)[JOB_A.key]
    assert not list((store.hidden / "part").iterdir())


def test_the_first_result_of_a_cell_stays(store: JobStore) -> None:
    assert write_cell(store, JOB_A)
    before = digests(store)
    assert not write_cell(store, JOB_A, pa.table({"value": [9.0]}))
    assert digests(store) == before
    assert not list((store.hidden / "part").iterdir())


@pytest.mark.parametrize("name", [TABLE, JOB, PROVENANCE])
@pytest.mark.parametrize("harm", ["remove", "cut", "empty"])
def test_a_harmed_cell_is_not_done_and_is_replaced(store: JobStore, name: str, harm: str) -> None:
    write_cell(store, JOB_A)
    before = digests(store)
    path = store.folder(JOB_A.key) / name
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20] if harm == "cut" else b"")
    assert not store.is_done(JOB_A.key)
    with pytest.raises(WorkbenchError, match=name):
        store.table(JOB_A.key)
    assert write_cell(store, JOB_A)
    assert store.is_done(JOB_A.key)
    assert digests(store) == before


def test_half_written_folders_are_no_results(store: JobStore) -> None:
    store.open_for_writing()
    with store.new_cell(JOB_A) as part:
        (part / TABLE).write_bytes(parquet(pa.table({"value": [1.0]})))
        assert store.keys() == []
    (store.path / JOB_A.key).mkdir()
    (store.path / JOB_A.key / TABLE).write_bytes(parquet(pa.table({"value": [1.0]})))
    assert not store.is_done(JOB_A.key)
    with pytest.raises(WorkbenchError, match="no complete result"):
        store.load(JOB_A.key)


def test_nothing_but_keys_is_taken_for_cells(store: JobStore) -> None:
    write_cell(store, JOB_A)
    for name in ("demo", "0" * 31, "g" * 32, ".jobs2", "A" * 32):
        (store.path / name).mkdir()
    assert store.keys() == [JOB_A.key]


def test_failures_are_recorded_forgiven_and_gone_with_a_result(store: JobStore) -> None:
    store.open_for_writing()
    other = Job("fail", seed=1)
    for job in (JOB_A, other):
        store.fail(job, {"kind": "error", "message": "no", "traceback": "where", "attempts": 1})
    assert set(store.failed_keys()) == {JOB_A.key, other.key}
    assert store.failure(other.key)["job"] == other.dict()
    store.forgive([other.key])
    assert store.failed_keys() == [JOB_A.key]
    write_cell(store, JOB_A)
    assert store.failed_keys() == []
    with pytest.raises(WorkbenchError, match="no failure"):
        store.failure(JOB_A.key)


def test_a_store_of_another_format_and_a_file_are_refused(store: JobStore, tmp_path: Path) -> None:
    store.open_for_writing()
    (store.hidden / "format.json").write_text('{"format": 99}')
    with pytest.raises(WorkbenchError, match="format 99"):
        store.open_for_writing()
    (store.hidden / "format.json").write_text("{")
    with pytest.raises(WorkbenchError, match="damaged"):
        store.check_format()
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkbenchError, match="is a file"):
        JobStore(tmp_path / "file").open_for_writing()


def test_a_write_that_the_file_system_refuses_leaves_no_trace(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cell(store, JOB_A)
    other = sleepers(1)[0]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unwritable, match="No space left on device"):
        write_cell(store, other)
    monkeypatch.undo()
    assert store.keys() == [JOB_A.key]
    assert store.is_done(JOB_A.key)
    assert write_cell(store, other)


IN_SMALL_DISK = """
    set -e
    mount -t tmpfs -o size={size} none {at}
    head -c {ballast} /dev/zero > {at}/ballast
    {python} -m workbench jobs run {spec} --store {at}/store --workers 2 > {out}/first 2>&1 || echo "exit $?" >> {out}/first
    rm -f {at}/ballast
    {python} -m workbench jobs run {spec} --store {at}/store --workers 2 > {out}/second 2>&1 || echo "exit $?" >> {out}/second
    {python} -m workbench jobs status --store {at}/store --json > {out}/status
    mount -o remount,ro {at}
    {python} -m workbench jobs run {spec} --store {at}/store --set seed=[99] > {out}/third 2>&1 || echo "exit $?" >> {out}/third
    {python} -m workbench jobs status --store {at}/store --json > {out}/frozen
    {python} -m workbench jobs sql "select count(*) as n from cells" --store {at}/store --json > {out}/rows
"""


def own_mounts() -> bool:
    """Whether this process may mount in a namespace of its own."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not own_mounts(), reason="mounting in a namespace of one's own is not allowed here")
def test_a_full_disk_and_a_read_only_store(tmp_path: Path) -> None:
    at, out, spec = tmp_path / "disk", tmp_path / "out", tmp_path / "spec.yaml"
    at.mkdir(), out.mkdir()
    spec.write_text("probe: sleep\nseed: [" + ", ".join(map(str, range(60))) + "]\nrows: 20000\n")
    names = {"size": "48m", "ballast": 44_000_000, "at": at, "python": sys.executable, "spec": spec, "out": out}
    script = textwrap.dedent(IN_SMALL_DISK).format(**names)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(["unshare", "-rm", "bash", "-c", script], check=True, env=env, timeout=240)
    first, second, third = ((out / name).read_text() for name in ("first", "second", "third"))
    assert "No space left on device" in first
    assert first.rstrip().endswith("exit 2")
    assert "Traceback" not in first + second + third
    assert "exit" not in second, second
    done = json.loads((out / "status").read_text())
    assert (done["done"], done["missing"], done["failed"]) == (60, 0, 0)
    assert "Read-only file system" in third
    assert third.rstrip().endswith("exit 2")
    assert json.loads((out / "frozen").read_text())["done"] == 60
    assert json.loads((out / "rows").read_text())["rows"] == [{"n": 60}]
