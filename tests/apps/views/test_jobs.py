"""The page of jobs: a grid from its definition to the comparison of its results, also while stores change or are harmed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from job_cells import sleepers, write_cell
from pages import drawn, open_page, python_of, settled
from streamlit.testing.v1 import AppTest

from workbench.apps.grids import process
from workbench.jobs import running
from workbench.jobs.grids import put_grid
from workbench.jobs.job import Job
from workbench.jobs.store import JobStore

POISON = Job("fail", args={"how": "error"})
SPEC = "name: night\nprobe: sleep\nseed: [0, 1, 2, 3]\n"


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    """Three cells of which one is done and one has failed."""
    store = JobStore(tmp_path / "grid one")
    done, missing = sleepers(2)
    write_cell(store, done)
    put_grid(store, "night", [done, missing, POISON])
    store.fail(
        POISON, {"kind": "error", "message": "<script>no</script>", "traceback": "line 1", "log": "said", "attempts": 1}
    )
    return store


@pytest.fixture
def methods(tmp_path: Path) -> JobStore:
    """Two methods on two models with two seeds each, in two rows per cell."""
    store = JobStore(tmp_path / "methods")
    for model in ("tiny-softmax", "tiny-gated"):
        for method in ("eap", "ifr"):
            for seed in (0, 1):
                job = Job("circuit_score", model=model, task="ioi", args={"method": method}, seed=seed)
                score = (method == "eap") + 0.1 * seed
                write_cell(store, job, pa.table({"cpr": [score, score + 1], "part": ["a", "b"]}))
    return store


def texts(page: AppTest) -> str:
    return "\n".join(str(part.value) for part in page.text)


def until(page: AppTest, true: Callable[[], Any]) -> AppTest:
    ends = time.monotonic() + 90
    while not true():
        assert time.monotonic() < ends, texts(page)
        time.sleep(0.2)
        settled(page.run())
    return page


def press(page: AppTest, label: str) -> AppTest:
    button = next(one for one in page.button if one.label == label)
    return settled(button.click().run())


def labels(page: AppTest) -> list[str]:
    return [one.label for one in page.button]


def test_progress_tells_counts_cells_and_failures(tmp_path: Path, store: JobStore) -> None:
    page = open_page("jobs", tmp_path)
    assert "1 failed, 0 running, 1 missing" in texts(page)
    assert drawn(page, "cells")["states"] == "dmf"
    assert drawn(page, "cells")["titles"][0] == sleepers(1)[0].title
    assert "error: <script>no</script>" in texts(page)
    assert {"line 1", "said"} <= {one.value for one in page.code}
    assert {"Continue", "Try all failed ones again", "Try again"} <= set(labels(page))


def test_progress_follows_the_store(tmp_path: Path, store: JobStore) -> None:
    page = open_page("jobs", tmp_path, tab="Progress")
    write_cell(store, sleepers(2)[1])
    with running.taken(store, POISON.key):
        page.run()
        assert "0 failed, 1 running, 0 missing" in texts(page)
        assert drawn(page, "cells")["states"] == "ddr"


def test_a_cell_is_a_link_to_its_numbers(tmp_path: Path, store: JobStore) -> None:
    page = open_page("jobs", tmp_path, tab="Progress", cell=sleepers(1)[0].key)
    assert page.dataframe[0].value["value"].tolist() == [1.5, 2.5]
    names: dict[str, Any] = {}
    exec(python_of(page)[0], names)
    assert names["table"]["value"].tolist() == [1.5, 2.5]
    page = open_page("jobs", tmp_path, tab="Progress", cell=POISON.key)
    assert "error: <script>no</script>" in texts(page)
    page = open_page("jobs", tmp_path, tab="Progress", cell=sleepers(2)[1].key)
    assert "not computed yet" in page.info[0].value
    page = open_page("jobs", tmp_path, tab="Progress", cell="0" * 32)
    assert "No cell" in page.warning[0].value
    page = open_page("jobs", tmp_path, tab="Progress", cell="../../etc", folder="../..")
    told = " ".join(one.value for one in page.warning)
    assert "no cell in the address" in told
    assert "no folder in the address" in told


def test_harmed_cells_and_damaged_stores_are_told(tmp_path: Path, store: JobStore) -> None:
    (store.folder(sleepers(1)[0].key) / "result.parquet").write_bytes(b"PAR1")
    (store.hidden / "failed" / f"{POISON.key}.json").write_text("{")
    page = open_page("jobs", tmp_path, cell=sleepers(1)[0].key)
    assert "1 failed, 0 running, 2 missing" in texts(page)
    assert "has not the size" in page.info[0].value
    assert "is damaged" in texts(page)
    (store.hidden / "grids" / "night.parquet").write_bytes(b"PAR1")
    page = open_page("jobs", tmp_path)
    assert "is damaged" in page.error[0].value
    (store.hidden / "format.json").write_text("{")
    for tab in ("Progress", "Compare", "SQL and export"):
        page = open_page("jobs", tmp_path, tab=tab)
        assert "format.json is damaged" in page.error[0].value.replace("\\", "")


def test_ten_thousand_cells(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "large")
    store.open_for_writing()
    put_grid(store, "large", sleepers(10_000))
    began = time.monotonic()
    page = open_page("jobs", tmp_path)
    assert time.monotonic() - began < 30
    assert "10,000 missing" in texts(page)
    data = drawn(page, "cells")
    assert len(data["states"]) == 10_000
    assert data["titles"] == []


def test_mistakes_have_their_line_and_start_nothing(tmp_path: Path) -> None:
    page = open_page("jobs", tmp_path)
    assert page.text_area(key="spec").value.startswith("# What `make demo` shows")
    page.text_area(key="spec").set_value("name: night\nprobe: sinkz\n")
    settled(page.run())
    assert "spec\\.yaml\\:2\\: no probe 'sinkz'" in page.error[0].value
    assert page.code[0].value == "2: probe: sinkz"
    assert "Start" not in labels(page)
    page.text_area(key="spec").set_value("name: app\nprobe: sleep\n")
    settled(page.run())
    assert "a grid cannot stand in 'app'" in page.error[0].value
    assert not (tmp_path / "night").exists()


def test_a_form_writes_the_grid_and_nothing_written_is_lost(tmp_path: Path) -> None:
    page = open_page("jobs", tmp_path, tab="New grid", **{"from": "a form"}, probe="head-scores", seeds="2")
    mine = SPEC + "# by hand\n"
    page.text_area(key="spec").set_value(mine)
    page.text_input(key="argument head-scores sequences").set_value("[4, 8]")
    settled(page.run())
    press(page, "Write the grid")
    text = page.text_area(key="spec").value
    assert text == ("name: mine\nprobe: head-scores\nmodel: tiny-softmax\ntask: ioi\nseed: [0, 1]\nsequences: [4, 8]\n")
    assert any("mine: 4 cells, no mistakes" in one.label for one in page.expander)
    press(page, "Bring back the text before")
    assert page.text_area(key="spec").value == mine


def test_a_grid_is_estimated_started_and_its_results_compared(tmp_path: Path) -> None:
    page = open_page("jobs", tmp_path)
    page.text_area(key="spec").set_value(SPEC + "rows: [1, 2]\n")
    settled(page.run())
    press(page, "Estimate")
    assert "workers" in texts(page) or "worker" in texts(page)
    press(page, "Start")
    assert page.session_state["tab"] == "Progress"
    until(page, lambda: "8 of 8 cells done" in str(page.get("progress")[0].proto.text))
    until(page, lambda: process.under_way(tmp_path / "night") is None)
    assert (tmp_path / "night" / ".app" / "night.yaml").read_text() == SPEC + "rows: [1, 2]\n"
    page = open_page("jobs", tmp_path, tab="Compare", reduce="max")
    assert page.dataframe[0].value.columns[:2].tolist() == ["1", "2"]


def test_a_run_is_stopped_and_continued_from_the_page(tmp_path: Path) -> None:
    page = open_page("jobs", tmp_path)
    page.text_area(key="spec").set_value("name: night\nprobe: sleep\nseconds: 0.5\nseed: [0, 1, 2, 3, 4, 5, 6, 7]\n")
    settled(page.run())
    page.number_input(key="workers").set_value(1)
    press(page, "Start")
    until(page, lambda: " 0 of 8" not in str(page.get("progress")[0].proto.text))
    assert "Stop" in labels(page)
    press(page, "Stop")
    until(page, lambda: process.under_way(tmp_path / "night") is None)
    settled(page.run())
    assert "8 of 8" not in str(page.get("progress")[0].proto.text)
    press(page, "Continue")
    until(page, lambda: "8 of 8 cells done" in str(page.get("progress")[0].proto.text))
    until(page, lambda: process.under_way(tmp_path / "night") is None)


def test_failed_cells_are_tried_again(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    store = JobStore(tmp_path / "night")
    once = Job("fail", args={"how": "once", "marker": str(marker)})
    store.open_for_writing()
    put_grid(store, "night", [once])
    store.fail(once, {"kind": "died", "message": "killed", "attempts": 1})
    marker.touch()
    page = open_page("jobs", tmp_path)
    press(page, "Try again")
    until(page, lambda: store.is_done(once.key))
    settled(page.run())
    assert "0 failed, 0 running, 0 missing" in texts(page)


def test_results_are_compared_by_columns_and_rows(tmp_path: Path, methods: JobStore) -> None:
    page = open_page("jobs", tmp_path, tab="Compare", value="cpr", columns="method", best="max", reduce="min")
    table = page.dataframe[0].value
    assert table["model"].tolist() == ["tiny-gated", "tiny-softmax"]
    assert table["eap"].tolist() == pytest.approx([1.05, 1.05])
    assert table["best"].tolist() == ["eap", "eap"]
    assert page.multiselect(key="over").value == ["seed"]
    names: dict[str, Any] = {}
    exec(python_of(page)[0], names)
    assert names["found"].frame()["ifr"].tolist() == pytest.approx([0.05, 0.05])
    page.selectbox(key="reduce").set_value("none")
    settled(page.run())
    assert "name the label that tells them apart in Rows" in page.warning[0].value.replace("\\", "")
    page.multiselect(key="rows").set_value(["model", "part"])
    settled(page.run())
    assert page.dataframe[0].value["part"].tolist() == ["a", "b", "a", "b"]


def test_two_stores_are_compared_bit_by_bit(tmp_path: Path, methods: JobStore) -> None:
    job = methods.job(methods.keys()[0])
    write_cell(JobStore(tmp_path / "other"), job, pa.table({"cpr": [9.0, 9.0], "part": ["a", "b"]}))
    page = open_page("jobs", tmp_path, tab="Compare", folder="methods", against="other")
    assert "8 cells differ: 7 only in first, 1 values" in texts(page)
    assert set(page.dataframe[0].value["what"]) == {"only in first", "values"}


def test_sql_reads_and_does_not_write(tmp_path: Path, methods: JobStore) -> None:
    page = open_page("jobs", tmp_path, tab="SQL and export")
    press(page, "Ask")
    assert page.dataframe[0].value["cells"].sum() == 8
    for query, told in (
        ("drop table cells", "a query over the store reads"),
        ("select * from nothing", "nothing"),
        ("select * from '/etc/passwd'", "/etc/passwd does not exist"),
        ("select * from read_text('/etc/passwd')", "disabled"),
        ("select '<b>' as \"<script>\"", ""),
    ):
        page.text_area[0].set_value(query)
        press(page, "Ask")
        if told:
            assert told in page.error[0].value.replace("\\", ""), query
        else:
            assert page.dataframe[0].value.columns.tolist() == ["<script>"]


def test_a_query_that_takes_too_long_is_ended(methods: JobStore) -> None:
    from workbench.apps.grids.ask import asked

    with pytest.raises(ValueError, match=r"took longer than 0\.1 s"):
        asked(methods.path, "select count(*) from range(1000000000000)", patience=0.1)


def test_exports(tmp_path: Path, methods: JobStore) -> None:
    import io
    import zipfile

    import pandas as pd

    from workbench.apps.grids.ask import exported

    name, content = exported(methods, "csv", "method = 'eap'", None)
    assert name == "methods.csv"
    assert len(pd.read_csv(io.BytesIO(content))) == 8
    assert len(pd.read_parquet(io.BytesIO(exported(methods, "parquet", "", "circuit_score")[1]))) == 16
    page = open_page("jobs", tmp_path, tab="SQL and export", form="mib")
    press(page, "Make the file")
    assert "circuit" in page.error[0].value
    page = open_page("jobs", tmp_path, tab="SQL and export", form="csv")
    press(page, "Make the file")
    assert any("methods.csv" in one.label for one in page.get("download_button"))
    assert zipfile.is_zipfile(io.BytesIO(exported(_circuits(tmp_path), "eap-json", "", None)[1]))


def _circuits(folder: Path) -> JobStore:
    from workbench.jobs.driver import run_jobs

    store = JobStore(folder / "circuits")
    spec = {"probe": "find_circuit", "model": "compiled-induction", "task": "induction", "method": "eap", "examples": 4}
    run_jobs(spec, store, workers=1)
    return store


def test_the_queue_of_the_pages_is_shown_and_stopped(tmp_path: Path) -> None:
    from workbench.apps.screen.work import Work

    page = open_page("jobs", tmp_path, tab="Queue")
    assert "Nothing is computed" in page.info[0].value
    work = _worker(tmp_path)
    assert isinstance(work, Work)
    hold, wait = Job("fail", args={"how": "hold"}), sleepers(1)[0]
    for job in (hold, wait):
        work.submit(job)
    settled(page.run())
    assert f"waits behind 1: {wait.title}" in texts(page)
    settled(page.button(key=f"queue {hold.key}").click().run())
    until(page, lambda: work.state(wait.key).kind == "done")
    assert work.state(hold.key).message == "it was stopped from the page"


def _worker(results: Path) -> Any:
    """The worker that the pages of a results folder share."""
    import sys

    from workbench.apps.screen.need import work

    sys.argv = ["main.py", "--store", str(results)]
    return work()
