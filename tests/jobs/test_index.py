"""The index against the folders of the cells: whatever was packed, merged, killed or removed, a query tells what stands."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_cells import sleepers, write_cell

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs import index, index_packs, index_writing
from workbench.jobs.grids import put_grid
from workbench.jobs.job import Job
from workbench.jobs.store import PROVENANCE, TABLE, JobStore, Unwritable

FORMS = {
    "whole": pa.table({"value": [1, 2, 3], "label": ["a", "b", "c"]}),
    "fraction": pa.table({"value": [0.1, -2.5]}),
    "text": pa.table({"value": ["x", None], "seed": [7, 8]}),
    "null": pa.table({"value": pa.nulls(2), "truth": [True, False]}),
    "none": pa.table({"value": pa.array([], pa.float64())}),
    "wide": pa.table({"other": [1.5], "label": pa.array(["q"]).dictionary_encode()}),
}


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """Tests write thousands of files that need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def job(i: int, probe: str = "sleep") -> Job:
    return Job(probe, "m", args={"form": i % 3, "deep": i} if i % 2 else {"form": "text"}, task="ioi", seed=i)


def one_by_one(store: JobStore) -> list[dict[str, Any]]:
    """The rows of ``frame`` from the folders themselves, without any index."""
    keys = [key for key in sorted(store.keys()) if store.is_done(key)]
    tables = {key: store.table(key) for key in keys}
    kinds: dict[str, set[str]] = {}
    for table in tables.values():
        for field in table.schema:
            kinds.setdefault(field.name, set()).add(str(field.type))
    for found in kinds.values():
        if "dictionary<values=string, indices=int32, ordered=0>" in found:
            found.remove("dictionary<values=string, indices=int32, ordered=0>")
            found.add("string")
    args = [dict(store.job(key).args) for key in keys]
    mixed = {
        name
        for name in {name for found in args for name in found}
        if len({type(a[name]) for a in args if name in a}) > 1
    }
    rows = []
    for key in keys:
        told = store.job(key)
        own = {"key": key, "model": told.model, "task": told.task_name, "probe": told.probe, "seed": told.seed}
        own |= {name: str(value) if name in mixed else value for name, value in told.args.items()}
        for row in tables[key].to_pylist():
            values = {name: _united(row.get(name), found - {"null"}) for name, found in kinds.items()}
            rows.append(own | {"result.seed" if name == "seed" else name: value for name, value in values.items()})
    return rows


def _united(value: Any, kinds: set[str]) -> Any:
    if value is None or len(kinds) < 2:
        return value
    return str(value) if "string" in kinds else float(value)


def plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows = [{str(k): _none(v) for k, v in row.items()} for row in frame.to_dict("records")]
    return [{k: v for k, v in row.items() if k not in ("revision", "dtype")} for row in rows]


def _none(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if hasattr(value, "item") else value


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """Equal rows in equal order; columns that are nowhere there count as null."""
    names = {name for row in (*found, *wanted) for name in row}
    return [[r.get(n) for n in sorted(names)] for r in found] == [[r.get(n) for n in sorted(names)] for r in wanted]


# the property


class Clock:
    """Folders of cells change at different times even when a test makes them within one tick of the file system's clock."""

    def __init__(self) -> None:
        self.now = 10**18

    def touch(self, folder: Path) -> None:
        self.now += 1
        os.utime(folder, ns=(self.now, self.now))


CELLS = st.integers(0, 3)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), CELLS, st.sampled_from(sorted(FORMS))),
        st.tuples(st.just("delete"), CELLS),
        st.tuples(st.just("damage"), CELLS),
        st.tuples(st.just("pack"), st.sets(CELLS, min_size=1)),
        st.tuples(st.just("merge")),
        st.tuples(st.just("refresh")),
        st.tuples(st.just("lose a pack"), st.integers(0, 9)),
        st.tuples(st.just("ask")),
    ),
    max_size=16,
)


@given(st.lists(st.sampled_from(sorted(FORMS)), min_size=4, max_size=4), ACTIONS)
@settings(max_examples=25, deadline=None)
def test_any_order_of_writing_packing_merging_and_removing_gives_what_stands(
    begin: list[str], actions: list[tuple[Any, ...]]
) -> None:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(index_writing, "PACKS", 2)
        patch.setattr(index_writing, "KEPT", 1)
        store = JobStore(Path(folder) / "store")
        store.open_for_writing()
        packs = store.hidden / "index"
        jobs = [job(i, "sleep" if i < 3 else "other") for i in range(4)]
        first = [("write", number, form) for number, form in enumerate(begin)]
        for what, *given_ in (*first, ("pack", {0, 1, 2}), *actions):
            if what == "write":
                number, form = given_
                if not store.is_done(jobs[number].key) and write_cell(store, jobs[number], FORMS[form]):
                    clock.touch(store.folder(jobs[number].key))
            elif what == "delete":
                shutil.rmtree(store.folder(jobs[given_[0]].key), ignore_errors=True)
            elif what == "damage":
                table = store.folder(jobs[given_[0]].key) / TABLE
                if table.exists():
                    table.write_bytes(b"PAR1")
            elif what == "pack":
                index.pack(store, [jobs[i].key for i in given_[0]])
            elif what == "merge":
                index_writing.merge(store, packs)
            elif what == "refresh":
                index.refresh(store)
            elif what == "lose a pack" and (names := sorted(n for n in os.listdir(packs) if not n.startswith("."))):
                shutil.rmtree(packs / names[given_[0] % len(names)])
            elif what == "ask":
                check(store)
        check(store)


def check(store: JobStore) -> None:
    wanted = one_by_one(store)
    whole = set(filter(store.is_done, store.keys()))
    assert index.done_keys(store) == whole
    assert same(plain(index.frame(store)), wanted)
    cells = index.cells(store)
    assert cells["key"].tolist() == sorted(whole)
    assert cells["rows"].sum() == len(wanted)
    counted = index.sql(store, "SELECT key, count(*) AS n FROM results GROUP BY key ORDER BY key")
    assert counted.values.tolist() == [[key, n] for key, n in _counts(wanted).items()]


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(row["key"] == key for row in rows) for key in sorted({row["key"] for row in rows})}


# packs


def filled(store: JobStore, n: int = 6) -> list[Job]:
    jobs = sleepers(n)
    for i, each in enumerate(jobs):
        write_cell(store, each, pa.table({"value": [i + 0.1, i + 0.2], "i": [i, i]}))
    return jobs


def pack_names(store: JobStore) -> list[str]:
    return sorted(name for name in os.listdir(store.hidden / "index") if not name.startswith("."))


def test_refresh_packs_what_is_not_packed_and_counts_it(store: JobStore) -> None:
    jobs = filled(store)
    index.pack(store, [j.key for j in jobs[:2]])
    assert index.refresh(store) == 4
    assert index.refresh(store) == 0
    assert len(pack_names(store)) == 2
    shutil.rmtree(store.folder(jobs[0].key))
    write_cell(store, jobs[0], pa.table({"value": [9.0]}))
    os.utime(store.folder(jobs[0].key), ns=(1, 1))
    assert index.refresh(store) == 1
    assert index.frame(store, where={"seed": 0})["value"].tolist() == [9.0]


def test_a_query_packs_little_for_itself_and_much_for_all(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(store)
    assert len(index.cells(store)) == 6
    assert pack_names(store) == []
    monkeypatch.setattr(index, "FEW", 3)
    monkeypatch.setattr(index, "_temporary", {})
    assert len(index.cells(store)) == 6
    assert len(pack_names(store)) == 1


def test_a_cell_in_several_packs_is_taken_once(store: JobStore) -> None:
    jobs = filled(store)
    for chosen in (jobs[:4], jobs[2:], jobs[3:4]):
        index.pack(store, [j.key for j in chosen])
    assert len(index.cells(store)) == 6
    assert sorted(index.frame(store)["i"]) == sorted([*range(6), *range(6)])
    assert index.sql(store, "SELECT count(*) AS n FROM sleep")["n"].tolist() == [12]


def test_cells_that_are_gone_are_not_shown_and_the_others_of_their_pack_are(store: JobStore) -> None:
    jobs = filled(store, 4)
    index.refresh(store)
    shutil.rmtree(store.folder(jobs[1].key))
    assert sorted(index.cells(store)["seed"]) == [0, 2, 3]
    assert sorted(index.sql(store, "SELECT DISTINCT seed FROM results")["seed"]) == [0, 2, 3]
    assert index.done_keys(store) == {jobs[i].key for i in (0, 2, 3)}
    assert index.sql(store, "SELECT count(*) AS n FROM cells WHERE probe = 'sleep'")["n"].tolist() == [3]


def test_merging_leaves_behind_what_has_changed(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = filled(store, 4)
    index.pack(store, [j.key for j in jobs])
    shutil.rmtree(store.folder(jobs[0].key))
    write_cell(store, jobs[0], pa.table({"value": [9.0], "i": [9]}))
    os.utime(store.folder(jobs[0].key), ns=(1, 1))
    index.pack(store, [jobs[1].key])
    index.pack(store, [jobs[2].key])
    monkeypatch.setattr(index_writing, "PACKS", 2)
    monkeypatch.setattr(index_writing, "KEPT", 0)
    index_writing.merge(store, store.hidden / "index")
    assert len(pack_names(store)) == 1
    index.pack(store, [jobs[0].key])
    check(store)


def test_a_cell_that_vanishes_while_it_is_packed_is_not_damaged(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = filled(store, 2)
    read = index_writing.read_cell

    def removed(store: JobStore, key: str) -> Any:
        if key == jobs[0].key:
            shutil.rmtree(store.folder(key))
        return read(store, key)

    monkeypatch.setattr(index_writing, "read_cell", removed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert index.cells(store)["key"].tolist() == [jobs[1].key]


def test_cells_that_are_not_there_cannot_be_packed(store: JobStore) -> None:
    jobs = filled(store, 2)
    index.pack(store, ["0" * 32, jobs[0].key])
    assert len(index.cells(store)) == 2
    index.pack(store, [])


def test_many_packs_are_merged_into_few(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_writing, "PACKS", 4)
    monkeypatch.setattr(index_writing, "KEPT", 2)
    jobs = filled(store, 9)
    for each in jobs:
        index.pack(store, [each.key])
        assert len(pack_names(store)) <= 4
    assert not [name for name in os.listdir(store.hidden / "index") if name.startswith(".") and name != ".merge"]
    check(store)


def test_a_merge_that_died_loses_and_doubles_nothing(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the new pack has its name, and before the old ones are removed."""
    jobs = filled(store, 4)
    for each in jobs:
        index.pack(store, [each.key])
    monkeypatch.setattr(index_writing, "PACKS", 2)
    monkeypatch.setattr(index_writing, "KEPT", 1)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_writing._Writer, "commit", die)
        with pytest.raises(KeyboardInterrupt):
            index_writing.merge(store, store.hidden / "index")
    assert len(pack_names(store)) == 4
    check(store)
    with monkeypatch.context() as patch:
        removals = iter([lambda folder: None, die])
        patch.setattr(index_writing, "tidy", lambda folder: next(removals)(folder))
        with pytest.raises(KeyboardInterrupt):
            index_writing.merge(store, store.hidden / "index")
    assert len(pack_names(store)) == 5
    check(store)
    assert len(index_packs.packs(store.hidden / "index")) == 2
    index_writing.merge(store, store.hidden / "index")
    assert len(pack_names(store)) == 2
    check(store)


def test_large_packs_are_closed_and_left_alone(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_writing, "PACKS", 2)
    monkeypatch.setattr(index_writing, "KEPT", 1)
    jobs = filled(store, 5)
    monkeypatch.setattr(index_writing, "LARGE", 1)
    monkeypatch.setattr(index_writing, "_ROWS", 1)
    index.pack(store, [j.key for j in jobs])
    assert len(pack_names(store)) == 5
    check(store)


def test_a_long_table_is_written_in_pieces(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr(index_writing, "_ROWS", 100)
    for i in range(4):
        write_cell(store, job(2 * i), pa.table({"n": list(range(70))}))
    index.refresh(store)
    (pack,) = pack_names(store)
    file = pq.ParquetFile(store.hidden / "index" / pack / "0.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [140, 140]
    assert index.frame(store)["n"].tolist() == list(range(70)) * 4


def test_a_spoiled_pack_is_packed_again(store: JobStore) -> None:
    jobs = filled(store, 4)
    index.pack(store, [j.key for j in jobs[:2]])
    index.pack(store, [j.key for j in jobs[2:]])
    first, second = (store.hidden / "index" / name for name in pack_names(store))
    (first / "cells.parquet").write_bytes(b"")
    os.truncate(second / "0.parquet", 100)
    check(store)
    assert index.refresh(store) == 0  # in the packs of this process
    (store.hidden / "index" / "other").write_text("not a pack")
    check(store)


def test_an_index_that_cannot_be_written_serves_this_process(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(store, 3)
    shutil.rmtree(store.hidden / "index")
    (store.hidden / "index").write_text("in the way")
    with pytest.raises(Unwritable, match="index"):
        index.pack(store, store.keys())
    monkeypatch.setattr(index, "FEW", 0)
    assert index.refresh(store) == 3
    assert index.refresh(store) == 0
    check(store)
    (folder,) = (found.name for (_, path), found in index._temporary.items() if path == str(store.path))
    assert len(os.listdir(folder)) == 1


def test_folders_of_killed_processes_go_with_the_next_one(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(index, "_temporary", {})
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, living = (tmp_path / f"{index._prefix()}{pid}-abc" for pid in (dead.pid, os.getppid()))
    others = (tmp_path / f"workbench-index-else-{dead.pid}-abc", tmp_path / f"{index._prefix()}x")
    for folder in (left, living, *others):
        (folder / "pack").mkdir(parents=True)
    filled(store, 1)
    assert len(index.cells(store)) == 1
    assert not left.exists()
    assert all(folder.exists() for folder in (living, *others))
    assert len(list(tmp_path.glob(f"{index._prefix()}{os.getpid()}-*"))) == 1


def test_packers_that_are_killed_and_readers_beside_them(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(store, 40)
    program = textwrap.dedent("""
        import os, random, sys
        from workbench.jobs import index, index_writing
        from workbench.jobs.store import JobStore
        os.fsync = lambda handle: None
        index_writing.PACKS, index_writing.KEPT = 3, 1
        store, chance = JobStore(sys.argv[1]), random.Random(int(sys.argv[2]))
        keys = sorted(store.keys())
        print("ready", flush=True)
        while True:
            index.pack(store, chance.sample(keys, 12))
    """)
    monkeypatch.setattr(index_writing, "PACKS", 3)
    workers: list[subprocess.Popen[str]] = []

    def start(seed: int) -> None:
        words = [sys.executable, "-c", program, str(store.path), str(seed)]
        workers.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert workers[-1].stdout.readline() == "ready\n"

    try:
        for seed in range(3):
            start(seed)
        chance = random.Random(0)
        for round_ in range(6):
            until = time.monotonic() + chance.uniform(0.1, 0.3)
            while time.monotonic() < until:
                assert index.sql(
                    store, "SELECT count(*) AS n, count(DISTINCT key) AS k FROM sleep"
                ).values.tolist() == [[80, 40]]
                assert len(index.done_keys(store)) == 40
            victim = workers.pop(0)
            victim.kill()
            victim.wait()
            start(10 + round_)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    check(store)


# damage


def test_damaged_cells_are_left_out_and_told(store: JobStore) -> None:
    jobs = filled(store, 4)
    index.pack(store, [jobs[0].key])
    os.truncate(store.folder(jobs[0].key) / TABLE, 10)
    (store.folder(jobs[1].key) / PROVENANCE).write_text("{")
    content = (store.folder(jobs[2].key) / TABLE).read_bytes()
    (store.folder(jobs[2].key) / TABLE).write_bytes(b"x" * len(content))
    with pytest.warns(UserWarning, match="3 damaged cells are left out, the first: .*jobs gc --store") as told:
        assert index.cells(store)["key"].tolist() == [jobs[3].key]
    assert len(told) == 1
    with pytest.warns(UserWarning, match="damaged"):
        assert index.frame(store)["key"].unique().tolist() == [jobs[3].key]
    (store.folder(jobs[3].key) / TABLE).unlink()
    with pytest.warns(UserWarning, match="4 damaged"):
        reasons = index.damaged(store)
    assert sorted(reasons) == sorted(j.key for j in jobs)
    assert "is missing" in reasons[jobs[3].key]
    assert "has not the size" in reasons[jobs[0].key]
    assert index.done_keys(store) == {jobs[2].key}  # the sizes of its files are right


def test_a_job_that_is_no_job_is_damage(store: JobStore) -> None:
    (one,) = filled(store, 1)
    at = store.folder(one.key)
    for content in (b"[1, 2]", b'{"probe": 3}', b'{"probe": "sleep", "nosuch": 1}'):
        (at / "job.json").write_bytes(content)
        record = json.loads((at / PROVENANCE).read_text())
        record["files"]["job.json"][0] = len(content)
        (at / PROVENANCE).write_text(json.dumps(record))
        with pytest.warns(UserWarning, match="1 damaged"):
            assert index.cells(store).empty


def test_provenance_of_another_kind_is_read_as_far_as_it_goes(store: JobStore) -> None:
    told = {
        "seconds": "long",
        "peak_bytes": 2**70,
        "threads": 2.5,
        "hardware": None,
        "model": [],
        "engine": 7,
        "note": "\ud800",
    }
    write_cell(store, Job("sleep", args={"name": "\ud800"}), **told)
    (row,) = index.cells(store).to_dict("records")
    assert (row["engine"], row["note"]) == ("7", "\\ud800")
    assert all(pd.isna(row[name]) for name in ("seconds", "peak_bytes", "threads", "host", "device"))
    assert index.frame(store)["name"].tolist() == ["\\ud800"] * 2


def test_no_store_is_told_and_an_empty_one_is_empty(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="no store .*nosuch; workbench jobs run"):
        index.frame(JobStore(tmp_path / "nosuch"))
    assert index.done_keys(JobStore(tmp_path / "nosuch")) == set()
    assert index.cells(JobStore(tmp_path)).empty
    assert list(index.cells(JobStore(tmp_path)).columns)[:3] == ["key", "model", "revision"]
    assert index.frame(JobStore(tmp_path)).empty
    assert index.sql(JobStore(tmp_path), "SELECT count(*) AS n FROM results")["n"].tolist() == [0]
    assert os.listdir(tmp_path) == []


# frames


def test_the_columns_of_a_frame(store: JobStore) -> None:
    task = {"name": "ioi", "split": "test"}
    given_ = Job(
        "find_circuit", "m", "r1", task, {"method": "eap", "top": None, "lengths": [1, 2], "seed": 3}, 5, "float32"
    )
    write_cell(store, given_, pa.table({"score": [0.5], "METHOD": ["x"], "key": ["k"], "task.split": ["q"]}))
    (row,) = index.frame(store).to_dict("records")
    assert list(row) == [
        *("key", "model", "revision", "task", "task.split", "probe"),
        *("lengths", "method", "args.seed", "top", "seed", "dtype"),
        *("score", "result.METHOD", "result.key", "result.task.split"),
    ]
    assert {k: v for k, v in row.items() if k not in ("key", "top")} == {
        "model": "m",
        "revision": "r1",
        "task": "ioi",
        "task.split": "test",
        "probe": "find_circuit",
        "lengths": "[1, 2]",
        "method": "eap",
        "args.seed": 3,
        "seed": 5,
        "dtype": "float32",
        "score": 0.5,
        "result.METHOD": "x",
        "result.key": "k",
        "result.task.split": "q",
    }
    assert index.sql(store, "SELECT * FROM find_circuit").columns.tolist() == list(row)


def test_a_probe_has_the_columns_of_its_own_cells(store: JobStore) -> None:
    write_cell(store, Job("a", args={"layer": 1}), pa.table({"x": [1]}))
    write_cell(store, Job("b", args={"y": 1}), pa.table({"layer": [2]}))
    assert list(index.frame(store, probe="b").columns) == [
        "key",
        "model",
        "revision",
        "task",
        "probe",
        "y",
        "seed",
        "dtype",
        "layer",
    ]
    assert {"layer", "result.layer", "x", "y"} <= set(index.frame(store).columns)
    with pytest.raises(UnknownName, match="no probe with finished cells 'c'; known: a, b"):
        index.frame(store, probe="c")


def test_floats_come_back_to_the_last_bit(store: JobStore) -> None:
    chance = random.Random(1)
    wanted = [struct.unpack("<d", chance.randbytes(8))[0] for _ in range(500)]
    wanted = [v for v in wanted if not math.isnan(v)] + [0.0, -0.0, math.inf, -math.inf, 5e-324]
    write_cell(
        store, Job("a"), pa.table({"x": wanted, "f": pa.array(wanted, pa.float64()).cast(pa.float32(), safe=False)})
    )
    write_cell(store, Job("b", seed=1), pa.table({"x": [1.0]}))
    found = index.frame(store, probe="a")
    assert struct.pack(f"<{len(wanted)}d", *found["x"]) == struct.pack(f"<{len(wanted)}d", *wanted)
    assert str(found["f"].dtype) == "float32"
    assert index.frame(store)["x"].tolist().count(0.0) >= 2


def test_columns_of_several_types(store: JobStore) -> None:
    for i, values in enumerate([[1], [2.5], ["three"], [True]]):
        write_cell(
            store, Job("a", seed=i), pa.table({"x": values, "z": pa.array([i], pa.int32() if i else pa.int64())})
        )
        write_cell(store, Job("b", seed=i), pa.table({"x": values if i < 2 else [3.0]}))
        index.refresh(store)
    found = index.frame(store, probe="a").sort_values("seed")
    assert found["x"].tolist() == ["1", "2.5", "three", "true"]
    assert str(found["z"].dtype) == "int64"
    assert index.sql(store, "SELECT typeof(any_value(x)) AS t FROM b")["t"].tolist() == ["DOUBLE"]


def test_columns_come_in_one_order_whoever_packed_first(store: JobStore) -> None:
    for i, names in enumerate([["a"], ["d"], ["c", "b", "a"], ["e", "a"]]):
        write_cell(store, Job("p", seed=i), pa.table({name: [i] for name in names}))
        index.refresh(store)
    assert " ".join(index.frame(store).columns[-5:]) == "c b a e d"


def test_whole_numbers_with_gaps_stay_whole(store: JobStore) -> None:
    write_cell(store, Job("a", args={"n": 2**60 + 1}), pa.table({"x": [2**60 + 1]}))
    write_cell(store, Job("a", seed=1), pa.table({"y": [True]}))
    found = index.frame(store).sort_values("seed")
    assert found["x"].tolist()[0] == 2**60 + 1
    assert found["n"].tolist()[0] == 2**60 + 1
    assert [str(found[name].dtype) for name in ("x", "n", "y")] == ["Int64", "Int64", "boolean"]


def test_names_that_sql_cannot_tell_apart(store: JobStore) -> None:
    write_cell(
        store, Job("a"), pa.table({"n": [1], "N": [2], "file_row_number": [3], "filename": [4], 'with "quotes"': [5]})
    )
    (row,) = index.frame(store).to_dict("records")
    assert [row[n] for n in ("n", "result.N", "file_row_number", "filename", 'with "quotes"')] == [1, 2, 3, 4, 5]


def test_where_by_mapping_and_by_sql(store: JobStore) -> None:
    for i in range(4):
        write_cell(
            store, Job("a", args={"method": "eap" if i % 2 else "acdc", "t": i / 10}, seed=i), pa.table({"x": [i, -i]})
        )

    def seeds(where: Any) -> list[int]:
        return sorted(set(index.frame(store, where=where)["seed"].tolist()))

    assert seeds({"method": "eap"}) == [1, 3]
    assert seeds({"method": "eap", "seed": [1, 2]}) == [1]
    assert seeds({"t": 0.3}) == [3]
    assert seeds({"x": [2, -3]}) == [2, 3]
    assert seeds({"model": None}) == [0, 1, 2, 3]
    assert seeds("method = 'eap' AND x < 0 -- all") == [1, 3]
    assert seeds("") == seeds(None) == seeds({}) == [0, 1, 2, 3]
    write_cell(store, Job("a", args={"method": 7, "t": None}, seed=9), pa.table({"x": [0]}))
    assert seeds({"method": 7}) == [9]
    assert seeds({"method": ["eap", 7]}) == [1, 3, 9]
    assert seeds({"t": None}) == [9]
    assert index.selected(store, where={"method": "eap"})["seed"].tolist() in ([1, 3], [3, 1])
    with pytest.raises(UnknownName, match="no column 'metod'; known: .*nearest: method"):
        seeds({"metod": "eap"})
    with pytest.raises(UnknownName, match="no method 'eapp'; known: 7, acdc, eap; nearest: eap"):
        seeds({"method": "eapp"})
    with pytest.raises(UnknownName, match="no x '77'; known: -3, -2, -1, 0, 1, 2, 3"):
        seeds({"x": 77})
    with pytest.raises(WorkbenchError, match=r"Binder Error: .*nosuch.*views: cells, results"):
        seeds("nosuch = 1")
    with pytest.raises(UnknownName, match="no column 'x'"):
        index.selected(store, where={"x": 1})


# SQL


def test_views(store: JobStore) -> None:
    jobs = filled(store, 3)
    write_cell(store, Job("my.module:function", args={"n": 1}, seed=8), pa.table({"score": [0.5]}))
    write_cell(store, Job("cells", seed=9))
    put_grid(store, "naps", jobs)
    store.fail(
        Job("fail", "m", task={"name": "ioi", "n": 2}),
        {"kind": "error", "message": "oh", "traceback": "T", "attempts": 2},
    )
    store.fail(jobs[0], {"kind": "error", "message": "finished since"})
    ask = lambda query: index.sql(store, query)  # noqa: E731
    assert ask("SELECT probe, count(*) FROM cells GROUP BY 1 ORDER BY 1").values.tolist() == [
        *(["cells", 1], ["my.module:function", 1], ["sleep", 3]),
    ]
    assert ask('SELECT n, score FROM "my.module:function"').values.tolist() == [[1, 0.5]]
    assert len(ask('FROM "probe.cells"')) == 2
    assert ask("SELECT count(*) AS n FROM Results JOIN grids USING (key) WHERE grid = 'naps'")["n"].tolist() == [6]
    (failure,) = ask("FROM failures").to_dict("records")
    told = ("probe", "model", "task", "task_options", "kind", "message", "attempts", "traceback")
    assert [failure[name] for name in told] == ["fail", "m", "ioi", '{"n": 2}', "error", "oh", 2, "T"]
    assert failure["when"].endswith("+00:00")
    assert ask("SHOW TABLES")["name"].tolist() == [
        *("cells", "failures", "grids", "my.module:function", "probe.cells", "results", "sleep")
    ]
    assert "value" in ask("DESCRIBE sleep")["column_name"].tolist()
    assert ask("PIVOT sleep ON i USING max(value)").shape[0] == 3
    assert ask("SELECT current_setting('python_enable_replacements') AS s")["s"].tolist() == [False]
    assert ask("SELECT args->>'seconds' AS s FROM cells WHERE probe = 'sleep'")["s"].tolist() == ["0.0"] * 3


def test_a_record_of_failure_that_cannot_be_read_is_shown(store: JobStore) -> None:
    filled(store, 1)
    (store.hidden / "failed" / f"{'a' * 32}.json").write_text("{")
    (row,) = index.sql(store, "FROM failures").to_dict("records")
    assert row["kind"] == "unreadable"
    assert "damaged" in row["message"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT nosuch FROM sleep", r"Binder Error: .*nosuch.*; views: cells, results, failures, grids, sleep"),
        ("SELECT * FROM slep", r"Catalog Error: .*slep does not exist.*; views: "),
        ("SELEC", "Parser Error: syntax error"),
        ("", "one query at a time; got 0"),
        ("SELECT 1; SELECT 2", "one query at a time; got 2"),
        ("COPY (SELECT 1) TO '{to}'", "reads, as SELECT does; got COPY"),
        ("COPY (PIVOT sleep ON i USING count(*)) TO '{to}'", "reads, as SELECT does; got MULTI"),
        ("/* x */ COPY (PIVOT sleep ON i USING count(*)) TO '{to}'", "reads, as SELECT does; got MULTI"),
        ("EXPLAIN ANALYZE COPY (SELECT 1) TO '{to}'", "reads, as SELECT does; got EXPLAIN"),
        ("ATTACH '{to}'", "reads, as SELECT does; got ATTACH"),
        ("CREATE TABLE x AS SELECT 1", "reads, as SELECT does; got CREATE"),
        ("SET threads = 1", "reads, as SELECT does; got SET"),
        ("INSTALL httpfs", "reads, as SELECT does; got"),
        ("SELECT * FROM read_csv('/etc/passwd')", "Permission Error"),
        ("SELECT * FROM '/etc/passwd'", "Catalog Error"),
        ("SELECT * FROM glob('/etc/*')", "Permission Error"),
        ("SELECT * FROM read_text('{job}')", "Permission Error"),
        ("SELECT * FROM outside", "Catalog Error"),
    ],
)
def test_wrong_queries_and_ones_that_reach_outside(store: JobStore, tmp_path: Path, query: str, said: str) -> None:
    outside = pd.DataFrame({"a": [1]})
    (one,) = filled(store, 1)
    with pytest.raises(WorkbenchError, match=said) as error:
        index.sql(store, query.format(to=tmp_path / "out", job=store.folder(one.key) / "job.json"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert len(outside) == 1


def test_a_query_over_cells_reads_no_results(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.jobs.index_views import Views

    filled(store, 2)
    made: list[str] = []
    make = Views._make
    monkeypatch.setattr(Views, "_make", lambda self, name: (made.append(name), make(self, name))[1])
    index.sql(store, "SELECT probe, count(*) FROM cells GROUP BY 1")
    assert made == ["cells"]
    index.sql(store, "WITH x AS (SELECT * FROM sleep) SELECT * FROM x")
    assert made == ["cells", "sleep"]


def test_a_pack_that_is_merged_away_under_a_query(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that a query was going to read are gone when it does: it is asked again."""
    jobs = filled(store, 4)
    for each in jobs:
        index.pack(store, [each.key])
    monkeypatch.setattr(index_writing, "PACKS", 2)
    monkeypatch.setattr(index_writing, "KEPT", 1)
    times = iter([True, False])
    current = index.current

    def merging(where: JobStore) -> Any:
        found = current(where)
        if next(times):
            index_writing.merge(where, where.hidden / "index")
            assert not found[0].stands()
        return found

    monkeypatch.setattr(index, "current", merging)
    assert index.sql(store, "SELECT count(*) AS n FROM sleep")["n"].tolist() == [8]


@pytest.mark.parametrize("name", ["it's", "we[ir]d", "st*r?", "a=b", 'q"q', "mit Leer"])
def test_stores_with_strange_names(tmp_path: Path, name: str) -> None:
    store = JobStore(tmp_path / name)
    filled(store, 2)
    index.refresh(store)
    assert index.sql(store, "SELECT count(*) AS n FROM sleep")["n"].tolist() == [4]


def test_reading_needs_no_torch(store: JobStore) -> None:
    filled(store, 1)
    program = textwrap.dedent(f"""
        import sys
        from workbench.jobs import index
        from workbench.jobs.store import JobStore
        assert "pandas" not in sys.modules and "duckdb" not in sys.modules
        store = JobStore({str(store.path)!r})
        assert len(index.done_keys(store)) == 1 and len(index.frame(store)) == 2
        assert "torch" not in sys.modules
    """)
    subprocess.run([sys.executable, "-c", program], check=True)
