"""The index against the folders of the cells: whatever was packed, merged, killed or removed, a query tells what stands."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_truth import FORMS, filled, job, one_by_one, plain, same
from job_cells import write_cell

from workbench.jobs import index, index_packs, index_writing
from workbench.jobs.store import TABLE, JobStore, Unwritable


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """Tests write thousands of files that need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


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
