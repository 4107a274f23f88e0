"""Frames and SQL over the cells of a store, and what they tell of damaged ones."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from index_truth import filled
from job_cells import write_cell

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs import index, index_writing
from workbench.jobs.grids import put_grid
from workbench.jobs.job import Job
from workbench.jobs.store import PROVENANCE, TABLE, JobStore


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """Tests write thousands of files that need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


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
