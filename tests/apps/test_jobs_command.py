"""The ``jobs`` commands, on cells that cost nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from workbench.jobs.grids import put_grid
from workbench.jobs.job import Job
from workbench.jobs.store import JobStore

NAPS = """\
name: naps
probe: sleep
seconds: {seconds}
seed: {seeds}
"""
MIXED = """\
name: mixed
grids:
  - {probe: sleep, rows: 2, seed: [0, 1]}
  - {probe: fail, how: error, seed: [0, 1, 2]}
run: {workers: 1}
"""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """Four cells that sleep for no time."""
    return written(tmp_path, NAPS.format(seconds=0.0, seeds=[0, 1, 2, 3]))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, workbench) -> Path:
    """A folder with ``spec.yaml`` and the ``store`` that its run left: two cells done, three failed."""
    folder = tmp_path_factory.mktemp("mixed")
    answer = workbench("jobs", "run", written(folder, MIXED), "--store", folder / "store")
    assert answer.code == 1
    (folder / "said.json").write_text(json.dumps([answer.out, answer.err]))
    return folder


def written(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text)
    return path


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# run


def test_a_run_tells_begin_and_end_on_stderr_and_the_summary_on_stdout(workbench, spec, tmp_path):
    answer = workbench("jobs", "run", spec, "--store", tmp_path / "a store", "--workers", "1")
    assert answer.code == 0, answer.err
    assert answer.err.splitlines()[0] == "naps: 4 cells, 4 to compute"
    assert answer.err.splitlines()[-1].startswith("naps: 4 of 4 done after ")
    out = answer.out.splitlines()
    assert out[0].startswith("naps: 4 of 4 cells done in ")
    assert out[1] == f"results as one table: workbench jobs export --store '{tmp_path}/a store' --to table.parquet"
    again = workbench("jobs", "run", spec, "--store", tmp_path / "a store")
    assert again.code == 0
    assert again.err.splitlines()[0] == "naps: 4 cells, 4 done before, nothing to compute"
    assert "(4 before, 0 now)" in again.out


def test_json_is_a_line_per_event_and_a_summary(workbench, spec, tmp_path):
    answer = workbench("jobs", "run", spec, "--store", tmp_path / "store", "--workers", "1", "--json")
    assert answer.code == 0, answer.err
    lines = lines_of(answer.out)
    assert [line["event"] for line in lines] == ["begin", *["started", "done"] * 4, "end"]
    assert answer.err == ""
    last = lines[-1]
    assert last | {"grid": "naps", "total": 4, "done": 4, "computed": 4, "failed": 0, "left": 0, "stopped": ""} == last
    assert {line["key"] for line in lines if line["event"] == "done"} == set(JobStore(tmp_path / "store").keys())


def test_failed_cells_give_exit_code_1_and_the_next_commands(mixed):
    out, err = json.loads((mixed / "said.json").read_text())
    failed = [line for line in err.splitlines() if line.startswith("failed: fail how=error seed=")]
    assert len(failed) == 3
    assert "RuntimeError" in failed[0]
    assert out.splitlines()[0].startswith("mixed: 2 of 5 cells done, 3 failed in ")
    assert len([line for line in out.splitlines() if line.startswith("  failed: fail how=error")]) == 3
    assert f"what happened: workbench jobs status --store {mixed / 'store'}" in out
    assert f"try the failed ones again: workbench jobs retry --store {mixed / 'store'}" in out


def test_values_are_replaced_and_options_win_over_the_spec(workbench, tmp_path):
    path = written(tmp_path, NAPS.format(seconds=0.0, seeds=[0, 1]) + "run: {workers: 3, timeout: 60}\n")
    words = ("jobs", "run", path, "--store", tmp_path / "store", "--dry-run", "--no-calibrate", "--json")
    got = workbench(*words).json
    assert (got["workers"], got["total"], got["grid"]) == (3, 2, "naps")
    got = workbench(*words, "--set", "seed=[4,5,6]", "--set", "rows=2", "--set", "name=other", "--workers", "2").json
    assert (got["workers"], got["total"], got["grid"]) == (2, 3, "other")
    assert [cell["job"]["seed"] for cell in got["cells"]] == [4, 5, 6]
    assert {cell["job"]["args"]["rows"] for cell in got["cells"]} == {2}


@pytest.mark.parametrize(
    ("text", "extra", "said"),
    [
        (None, (), "cannot read"),
        ("probe: slep\n", (), "spec.yaml:1: no probe 'slep'"),
        ("name: x\nprobe: sleep\nsecnods: 1\n", (), "spec.yaml:3: "),
        ("name: x\nprobe: [\n", (), "spec.yaml:"),
        ("probe: sleep\nseed: [0, -1]\n", (), "spec.yaml:2: seed of a job is a whole number from 0"),
        ("probe: sleep\nmodel: tiny-sotfmax\n", (), "tiny-sotfmax"),
        ("probe: sleep\n", ("--engine", "slurm"), "no engine 'slurm'; known: local, ray"),
        ("probe: sleep\n", ("--memory", "much"), "an amount of memory is a number and a unit, such as 4GB"),
        ("probe: sleep\n", ("--timeout", "-1"), "timeout"),
        ("probe: sleep\n", ("--workers", "0"), "Invalid value for '--workers'"),
        ("probe: sleep\n", ("--set", "seed"), "--set wants name=value"),
        ("probe: sleep\n", ("--set", "run=1"), "run cannot be overridden"),
        ("probe: sleep\n", ("--address", "127.0.0.1:6379"), "address names a Ray cluster"),
    ],
)
@pytest.mark.parametrize("form", [(), ("--json",), ("--dry-run",)])
def test_a_mistake_is_one_line_and_makes_no_store(workbench, tmp_path, text, extra, said, form):
    path = written(tmp_path, text) if text is not None else tmp_path / "nosuch.yaml"
    line = workbench("jobs", "run", path, "--store", tmp_path / "store", *extra, *form).mistake()
    assert said in line
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_written_is_one_line(workbench, spec, tmp_path):
    (tmp_path / "file").write_text("")
    line = workbench("jobs", "run", spec, "--store", tmp_path / "file").mistake()
    assert "is a file; --store wants a folder" in line


def test_a_store_that_fills_up_ends_json_with_the_reason(workbench, spec, tmp_path, monkeypatch):
    from workbench.jobs.events import Counts, Event
    from workbench.jobs.store import Unwritable

    def full(grid, store, *, watch, **settings):
        watch(Event("begin", Counts(4, 0, 0, 0, 0), 0.0))
        raise Unwritable("cannot write to the store x: No space left on device")

    monkeypatch.setattr("workbench.jobs.driver.run_jobs", full)
    answer = workbench("jobs", "run", spec, "--store", tmp_path / "store", "--json")
    assert answer.code == 2
    assert answer.err.splitlines() == ["workbench: cannot write to the store x: No space left on device"]
    assert [line["event"] for line in lines_of(answer.out)] == ["begin", "end"]
    assert "No space left" in lines_of(answer.out)[-1]["error"]


# dry run


def test_a_dry_run_tells_cells_kinds_and_totals_and_writes_nothing(workbench, tmp_path):
    path = written(tmp_path, NAPS.format(seconds=0.01, seeds=list(range(30))))
    words = ("jobs", "run", path, "--store", tmp_path / "store", "--dry-run", "--workers", "2")
    out = workbench(*words).out
    assert not (tmp_path / "store").exists()
    assert out.splitlines()[:3] == [
        "naps: 30 cells: 30 to compute",
        "  sleep seconds=0.01 seed=0",
        "  sleep seconds=0.01 seed=1",
    ]
    assert "  and 10 more; --json tells all" in out.splitlines()
    assert "1 tried" in out
    assert "with 2 workers" in out
    assert "a worker starts and loads a model in " in out


def test_a_dry_run_knows_what_stands(workbench, mixed, tmp_path):
    words = ("jobs", "run", mixed / "spec.yaml", "--store", mixed / "store", "--dry-run", "--set", "seed=[0,1,2,3]")
    got = workbench(*words, "--no-calibrate", "--json").json
    assert (got["total"], got["done"], got["failed"], got["missing"], got["unknown"]) == (8, 2, 3, 3, 1)
    assert [cell["state"] for cell in got["cells"]] == ["done"] * 2 + ["missing"] * 2 + ["failed"] * 3 + ["missing"]
    kinds = {kind["probe"]: kind for kind in got["kinds"]}
    assert (kinds["sleep"]["source"], kinds["sleep"]["measured"]) == ("store", 2)
    assert kinds["fail"]["seconds"] is None
    out = workbench(*words, "--no-calibrate").out
    assert out.splitlines()[0] == "mixed: 8 cells: 2 done, 3 failed, 3 to compute"
    assert "  sleep rows=2 seed=0  [done]" in out.splitlines()
    assert "at least " in out
    assert "nothing is known about 1 cell, left out of the totals" in out
    assert workbench(*words, "--no-calibrate", "--retry", "--json").json["missing"] == 6


# status, show, retry


def test_status_counts_and_tells_failures(workbench, mixed):
    got = workbench("jobs", "status", "--store", mixed / "store", "--json").json
    assert got | {"done": 2, "failed": 3, "running": 0, "missing": 0, "other": 0} == got
    assert got["grids"] == {"mixed": {"done": 2, "failed": 3, "running": 0, "missing": 0}}
    assert len(got["failures"]) == 3
    one = got["failures"][0]
    assert (one["kind"], one["attempts"]) == ("error", 1)
    assert one["title"].startswith("fail how=error seed=")
    assert "RuntimeError" in one["message"]
    out = workbench("jobs", "status", "--store", mixed / "store").out
    assert f"{one['key'][:12]} error: {one['title']}: {one['message']}" in out.splitlines()
    assert "Traceback" not in out
    full = workbench("jobs", "status", "--store", mixed / "store", "--full").out
    assert full.count("Traceback (most recent call last)") == 3
    named = workbench("jobs", "status", "--store", mixed / "store", "--grid", "mixed", "--json").json
    assert named["failed"] == 3


def test_the_traceback_of_a_failure_is_found_by_the_beginning_of_its_key(workbench, mixed):
    key = JobStore(mixed / "store").failed_keys()[0]
    out = workbench("jobs", "status", "--store", mixed / "store", "--traceback", key[:8]).out
    assert out.startswith(f"{key} error: fail how=error seed=")
    assert "Traceback (most recent call last)" in out
    got = workbench("jobs", "status", "--store", mixed / "store", "--traceback", key, "--json").json
    assert got["key"] == key
    assert "Traceback" in got["traceback"]
    assert workbench("jobs", "show", "--store", mixed / "store", key[:8]).out == out


def test_status_of_many_failures_tells_the_first(workbench, tmp_path):
    store = JobStore(tmp_path / "store")
    store.open_for_writing()
    jobs = [Job("fail", seed=i) for i in range(30)]
    put_grid(store, "many", jobs)
    for job in jobs[:25]:
        store.fail(job, {"kind": "timeout", "message": "took\ntoo long", "attempts": 2})
    out = workbench("jobs", "status", "--store", store.path).out
    assert out.count("timeout (2 tries): fail seed=") == 20
    assert "and 5 more; --full tells all" in out
    assert len(workbench("jobs", "status", "--store", store.path, "--json").json["failures"]) == 25


def test_a_cell_is_shown_with_its_provenance_and_first_rows(workbench, mixed):
    key = JobStore(mixed / "store").keys()[0]
    out = workbench("jobs", "show", "--store", mixed / "store", key[:6], "--rows", "1").out
    assert out.splitlines()[0].startswith(f"{key}: sleep rows=2 seed=")
    for text in (
        "  computed: ",
        "  memory: ",
        "  code: ",
        "  versions: python ",
        "2 rows, first 1 shown",
        f"files: {mixed}",
    ):
        assert text in out
    got = workbench("jobs", "show", "--store", mixed / "store", key, "--json").json
    assert (got["key"], got["job"]["probe"], len(got["rows"])) == (key, "sleep", 2)
    assert got["provenance"]["seed"] == got["job"]["seed"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("status", "--store", "NOSUCH"), "is no store of jobs; `workbench jobs run SPEC --store"),
        (("status", "--store", "."), "is no store of jobs"),
        (("show", "--store", "NOSUCH", "ab"), "is no store of jobs"),
        (("retry", "--store", "NOSUCH"), "is no store of jobs"),
        (("sql", "--store", "NOSUCH", "select 1"), "is no store of jobs"),
        (("status", "--store", "STORE", "--grid", "nosuch"), "no grid 'nosuch'; known: mixed"),
        (("status", "--store", "STORE", "--traceback", "zz"), "no failed cell 'zz'"),
        (("show", "--store", "STORE", "zz"), "no cell 'zz'"),
        (("show", "--store", "STORE", ""), "no cell ''"),
        (("retry", "--store", "STORE", "zz"), "no failed cell 'zz'"),
        (("retry", "--store", "STORE", "--kind", "tiemout"), "no kind of failure 'tiemout'; known: error, timeout"),
        (("sql", "--store", "STORE", "select * from nosuch"), "nosuch"),
        (("sql", "--store", "STORE", "select 1", "--csv", "--json"), "give one"),
        (("export", "--store", "NOSUCH", "--to", "t.csv"), "is no store of jobs"),
        (("export", "--store", "STORE", "--to", "t"), "or give --form one of mib, neuronpedia, eap-json"),
        (("export", "--store", "STORE", "--to", "t.csv", "--form", "excel"), "no form of export 'excel'"),
        (("export", "--store", "STORE", "--to", "t", "--form", "mib"), "circuit"),
        (("compare", "--store", "STORE"), "compare wants --value and --columns"),
        (("compare", "--store", "STORE", "--value", "x", "--columns", "seed"), "no result 'x'"),
        (("compare", "--store", "STORE", "--with", "NOSUCH"), "is no store of jobs"),
        (("compare", "--store", "STORE", "--with", "STORE", "--value", "value"), "it goes without --value"),
        (("gc", "--store", "NOSUCH"), "is no store of jobs"),
        (("status",), "Missing option '--store'"),
        (("nosuch",), "No such command 'nosuch'"),
    ],
)
def test_mistakes_about_a_store_are_one_line(workbench, mixed, tmp_path, words, said):
    places = {"STORE": mixed / "store", "NOSUCH": tmp_path / "nosuch"}
    assert said in workbench("jobs", *(places.get(word, word) for word in words)).mistake()


def test_an_ambiguous_key_is_refused_with_the_candidates(workbench, tmp_path):
    store = JobStore(tmp_path / "store")
    store.open_for_writing()
    jobs = [Job("fail", seed=i) for i in range(40)]
    put_grid(store, "many", jobs)
    for job in jobs:
        store.fail(job, {"kind": "error", "message": "no"})
    first = max("0123456789abcdef", key=lambda digit: sum(job.key.startswith(digit) for job in jobs))
    line = workbench("jobs", "show", "--store", store.path, first).mistake()
    for key in sorted(job.key for job in jobs if job.key.startswith(first))[:3]:
        assert key in line


def test_retry_computes_failed_cells_again_from_the_store_alone(workbench, tmp_path):
    marker = tmp_path / "marker"
    text = f"name: once\nprobe: fail\nhow: once\nmarker: {json.dumps(str(marker))}\nrun: {{attempts: 1, workers: 1}}\n"
    first = workbench("jobs", "run", written(tmp_path, text), "--store", tmp_path / "store")
    assert first.code == 1
    assert marker.exists()
    (tmp_path / "spec.yaml").unlink()
    nothing = workbench("jobs", "retry", "--store", tmp_path / "store", "--kind", "timeout")
    assert (nothing.code, nothing.out) == (0, f"no such failures in {tmp_path / 'store'}\n")
    lines = lines_of(workbench("jobs", "retry", "--store", tmp_path / "store", "--workers", "1", "--json").out)
    assert lines[-1] | {"grid": "once", "done": 1, "failed": 0} == lines[-1]
    again = workbench("jobs", "retry", "--store", tmp_path / "store")
    assert (again.code, again.out) == (0, f"no failures in {tmp_path / 'store'}\n")


def test_retry_takes_one_cell_or_what_is_missing(workbench, tmp_path):
    store = JobStore(tmp_path / "store")
    store.open_for_writing()
    jobs = [Job("sleep", seed=i) for i in range(4)]
    put_grid(store, "first", jobs[:2])
    put_grid(store, "second", jobs[2:])
    for job in (jobs[0], jobs[1]):
        store.fail(job, {"kind": "error", "message": "no"})
    ran = workbench("jobs", "retry", "--store", store.path, jobs[0].key[:10], "--workers", "1")
    assert ran.out.startswith("first: 1 of 2 cells done, 1 failed in ")
    assert ran.code == 1
    assert set(store.keys()) == {jobs[0].key}
    store.forgive([jobs[1].key])
    told = workbench("jobs", "retry", "--store", store.path).out
    assert told.splitlines() == [
        f"no failures in {store.path}",
        f"3 cells missing; to compute them: workbench jobs retry --store {store.path} --missing",
    ]
    assert workbench("jobs", "retry", "--store", store.path, "--missing", "--workers", "1").code == 0
    assert set(store.keys()) == {job.key for job in jobs}


# sql


def test_sql_answers_as_a_table_csv_and_json(workbench, mixed):
    query = "select seed, count(*) as n, avg(value) as mean from sleep group by seed order by seed"
    rows = workbench("jobs", "sql", "--store", mixed / "store", query, "--json").json["rows"]
    assert [(row["seed"], row["n"]) for row in rows] == [(0, 2), (1, 2)]
    csv = workbench("jobs", "sql", "--store", mixed / "store", query, "--csv").out.splitlines()
    assert csv[0] == "seed,n,mean"
    assert float(csv[1].split(",")[2]) == rows[0]["mean"]
    out = workbench("jobs", "sql", "--store", mixed / "store", query).out
    assert out.startswith("2 rows\n")
    assert f"{rows[1]['mean']:.6g}" in out


def test_a_wide_table_is_told_row_by_row_without_empty_columns(workbench, mixed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = workbench("jobs", "sql", "--store", mixed / "store", "select * from cells").out
    assert out.startswith("2 rows\n\nkey ")
    assert max(len(line) for line in out.splitlines() if not line.startswith(("args", "without"))) < 90
    assert out.splitlines()[-1].startswith("without any value: model, revision, task, dtype")


def test_values_that_json_does_not_know_are_texts(workbench, mixed):
    query = "select timestamp '2026-01-02 03:04:05' t, 1.5::decimal(4,2) d, [1, null] l, 'nan'::double x, null n"
    (row,) = workbench("jobs", "sql", "--store", mixed / "store", query, "--json").json["rows"]
    assert row["t"].startswith("2026-01-02 03:04:05")
    assert row | {"d": 1.5, "l": [1, None], "x": None, "n": None} == row


# export, compare, gc


def test_exports_are_tables_of_all_rows(workbench, mixed, tmp_path):
    import pandas as pd

    got = workbench("jobs", "export", "--store", mixed / "store", "--to", tmp_path / "t.parquet", "--json").json
    frame = pd.read_parquet(tmp_path / "t.parquet")
    assert (got["rows"], len(frame), got["files"]) == (4, 4, 1)
    assert {"key", "probe", "seed", "rows", "value"} <= set(frame.columns)
    words = ("jobs", "export", "--store", mixed / "store", "--to", tmp_path / "t.csv", "--where", "seed = 1")
    out = workbench(*words, "--probe", "sleep").out
    assert out.startswith("2 rows, ")
    assert out.endswith(f": {tmp_path / 't.csv'}\n")
    assert pd.read_csv(tmp_path / "t.csv")["seed"].tolist() == [1, 1]
    assert "or replace it with --force" in workbench(*words).mistake()
    assert workbench(*words, "--force").code == 0
    odd = workbench("jobs", "export", "--store", mixed / "store", "--to", tmp_path / "odd", "--form", "csv")
    assert odd.out.startswith("4 rows, ")


def test_comparisons_name_the_best_of_each_group(workbench, tmp_path):
    path = written(tmp_path, "name: c\nprobe: sleep\nrows: [1, 2]\nseconds: [0.0, 0.001]\nseed: [0, 1, 2]\n")
    assert workbench("jobs", "run", path, "--store", tmp_path / "store", "--workers", "1").code == 0
    words = ("jobs", "compare", "--store", tmp_path / "store", "--value", "value", "--columns", "rows")
    got = workbench(*words, "--reduce", "max", "--best", "max", "--json").json
    assert (got["rows"], got["labels"], got["over"]) == (["seconds"], ["1", "2"], ["seed"])
    assert [row["seconds"] for row in got["table"]] == [0.0, 0.001]
    assert [row["1 n"] for row in got["table"]] == [3, 3]
    assert {row["best"] for row in got["table"]} <= {"1", "2", "1 = 2"}
    out = workbench(*words, "--reduce", "max", "--best", "max", "--rows", "seconds").out
    assert out.startswith("value by rows: mean ±deviation (cells) over seed\n")
    assert f"{got['table'][0]['1']:.4g} ±" in out
    assert " (3) " in out
    csv = workbench(*words, "--reduce", "max", "--csv").out.splitlines()
    assert csv[0] == "seconds,1,2,1 sd,2 sd,1 n,2 n"
    assert "say --reduce one of mean, median, min, max, sum" in workbench(*words).mistake()
    assert "name it in --rows or --over" in workbench(*words, "--reduce", "max", "--rows", "").mistake()


def test_two_stores_are_compared_bit_by_bit(workbench, mixed, spec, tmp_path):
    words = ("jobs", "compare", "--store", mixed / "store", "--with")
    assert "hold the same cells with the same bits" in workbench(*words, mixed / "store").out
    assert workbench(*words, mixed / "store", "--json").json["same"]
    other = JobStore(tmp_path / "other")
    other.open_for_writing()
    got = workbench(*words, other.path, "--json").json
    assert (got["same"], [row["what"] for row in got["rows"]]) == (False, ["only in first"] * 2)
    assert "2 cells of " in workbench(*words, other.path).out


def test_gc_tells_what_goes_and_removes_orphans_only_if_asked(workbench, tmp_path):
    path = written(tmp_path, "name: naps\nprobe: sleep\nseed: [0, 1]\n")
    store = JobStore(tmp_path / "store")
    assert workbench("jobs", "run", path, "--store", store.path, "--workers", "1").code == 0
    assert workbench("jobs", "gc", "--store", store.path).out == "nothing to remove\n"
    assert workbench("jobs", "run", path, "--store", store.path, "--set", "seed=[1]", "--workers", "1").code == 0
    assert workbench("jobs", "status", "--store", store.path).out.splitlines()[-1] == "1 finished cell of no grid"
    assert workbench("jobs", "gc", "--store", store.path, "--json").json["removed"] == {}
    dry = workbench("jobs", "gc", "--store", store.path, "--orphans", "--dry-run", "--json").json
    assert (dry["count"], dry["dry_run"], len(dry["removed"]["orphans"])) == (1, True, 1)
    assert len(store.keys()) == 2
    out = workbench("jobs", "gc", "--store", store.path, "--orphans").out
    assert out.splitlines()[0] == "1 orphans: finished cells and failures that no grid of the store names"
    assert out.splitlines()[1].startswith("freed ")
    assert len(store.keys()) == 1


def test_bundled_grids_run_by_name(workbench, tmp_path):
    told = workbench(
        "jobs", "run", "retrieval", "--store", tmp_path / "store", "--dry-run", "--no-calibrate", "--json"
    ).json
    assert told["grid"] == "retrieval"
    assert told["cells"]
    wrong = workbench("jobs", "run", "retrievl", "--store", tmp_path / "store").mistake()
    assert "no grid 'retrievl'; known: demo, leaderboard, retrieval, sae" in wrong
