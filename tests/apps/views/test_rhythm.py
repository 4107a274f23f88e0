"""The page of rhythm: lines that lose no peak, the text in its colours, and the run that a worker may read."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from pages import computed, drawn, links, open_page, plotted, python_of, settled

import workbench as wb
from workbench.apps.screen import rhythm_view
from workbench.apps.screen.need import job
from workbench.apps.work_runs import stored_run
from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.probes import Cell


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One store for the module: what one test had computed, the next one finds."""
    return tmp_path_factory.mktemp("store")


def test_a_long_line_keeps_its_peaks():
    table = pd.DataFrame({"position": range(10), "token": list("abcdefghij"), "waad": [0, 1, 9, 1, 0, 0, 0, 0, 5, 0]})
    table["anchor"] = (table["waad"] > 4).astype(int)
    points = rhythm_view.line(table, "waad", points=4)
    assert points["position"].tolist() == [2, 3, 8, 9]
    assert points["value"].tolist() == [9, 1, 5, 0]
    assert points["anchor"].tolist() == [1, 0, 1, 0]
    assert rhythm_view.line(table, "waad")["token"].tolist() == list("abcdefghij")


def test_stretches_without_any_number_do_not_end_the_line():
    table = pd.DataFrame({"position": range(4), "token": list("abcd"), "fai": [float("nan"), float("nan"), 1.0, 2.0]})
    assert rhythm_view.line(table, "fai", points=2)["position"].tolist() == [0, 3]


def test_a_saved_rhythm_comes_back_for_its_couplings(tmp_path):
    model = wb.load("tiny-softmax")
    run = model.run("Mary and John went to the store . John gave a book to Mary . " * 4, maps=wb.capture())
    found = wb.rhythm(run, prompt=4)
    saved = wb.load_result(found.save(tmp_path / "rhythm"))
    again = rhythm_view.rebuilt(saved)
    assert again.local == found.local
    assert again.provenance.model == "tiny-softmax"
    pd.testing.assert_frame_equal(wb.couplings(again).frame(), wb.couplings(found).frame())


def test_a_worker_reads_runs_of_its_own_store_only(tmp_path):
    cell = Cell(Job("workbench.apps.work_rhythm:rhythm_of_run"), lambda: None, uploads=tmp_path / "uploads")
    for path in ("../elsewhere", str(tmp_path), "0" * 31, ""):
        with pytest.raises(WorkbenchError, match="key"):
            stored_run(cell, path)
    with pytest.raises(WorkbenchError, match="holds no run"):
        stored_run(cell, "0" * 32)


def test_the_rhythm_of_the_first_run(store):
    page = open_page("rhythm", store)
    line = plotted(page, "rhythm line")
    codes = python_of(page)
    exec(codes[0], names := {})
    frame = names["found"].frame()
    assert line["value"].max() == pytest.approx(frame["waad"].max())
    assert len(line) == len(frame)
    assert (line["preplan"] == 1).sum() == (frame["preplan"] == 1).sum()
    (group,) = drawn(page, "rhythm text")["groups"]
    assert group["name"] == f"tokens 0 to {len(frame) - 1} of {len(frame)}"
    (row,) = group["rows"]
    assert row["tokens"] == frame["token"].tolist()
    assert row["values"][100] == pytest.approx(frame["waad"][100] - frame["waad"].median())
    assert row["values"][0] == 0  # left out
    assert len(plotted(page, "spans grid")) == 32
    for code in codes[1:]:
        exec(code, {})


def test_the_second_page_of_the_text(store):
    run = computed(store, lambda: job("capture", "tiny-softmax", filler=299))
    page = open_page("rhythm", store, run=run, value="fai", page="1", token="270")
    (group,) = drawn(page, "rhythm text")["groups"]
    assert group["name"].startswith("tokens 256 to ")
    assert group["rows"][0]["at"] == 14
    assert len(group["rows"][0]["tokens"]) == 300 - 256
    assert "anchor" in plotted(page, "rhythm line")


def test_one_head(store):
    page = open_page("rhythm", store, of="one", layer="2", head="3", value="fai")
    line = plotted(page, "rhythm line")
    (code,) = python_of(page)
    exec(code, names := {})
    assert line["value"].max() == pytest.approx(float(names["values"].nan_to_num(0).max()))
    assert "layer=2&head=3" in links(page)["Look at head 2.3"]
    page.selectbox(key="head").set_value(0)
    other = plotted(settled(page.run()), "rhythm line")
    assert other["value"].tolist() != line["value"].tolist()


def test_the_coloured_page_is_marked_on_the_line():
    points = pd.DataFrame({"position": [0], "token": ["a"], "value": [1.0]})
    spec = rhythm_view.chart(points, "tokens", (256, 512), "anchor", "pick")
    assert spec["layer"][0]["data"]["values"] == [{"from": 256, "to": 511}]
    assert "datum['anchor'] == 1" in json.dumps(spec)


def test_values_in_the_address_that_do_not_exist_are_told(store):
    page = open_page("rhythm", store, token="x", value="beat")
    told = " ".join(one.value for one in page.warning)
    assert "'x'" in told
    assert "'beat'" in told
