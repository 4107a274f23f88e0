"""The app's page, run by Streamlit's own test harness."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import workbench.apps

PAGE = Path(next(iter(workbench.apps.__path__))) / "main.py"
TEXT = "When Mary and John went to the store, John gave a ring to"


@pytest.fixture
def page(monkeypatch):
    def run(store):
        monkeypatch.setattr(sys, "argv", ["main.py", "--store", str(store)])
        return AppTest.from_file(str(PAGE), default_timeout=60).run()

    return run


def test_page_lists_and_opens_what_is_stored(page, workbench, model, tmp_path):
    assert workbench("sinks", model, "--text", TEXT, "--out", tmp_path / "a" / "sinks", "--json").json["saved"]
    assert workbench("capture", model, "--text", TEXT, "--blocks", "4", "--out", tmp_path / "atlas", "--json").json[
        "saved"
    ]
    shown = page(tmp_path)
    assert not shown.exception
    assert shown.sidebar.radio[0].options == ["a/sinks", "atlas"]
    assert shown.header[0].value == "a/sinks"
    tables = [frame.value for frame in shown.dataframe]
    assert list(tables[-1]["share"])[:1] == [1.0] or len(tables[-1]) == 60
    for name in ("atlas", "a/sinks", "atlas", "a/sinks"):
        shown.sidebar.radio[0].set_value(name).run()
        assert shown.header[0].value == name
        assert name in shown.query_params["result"]
        assert not shown.exception
    shutil.rmtree(tmp_path / "a")
    assert shown.run().header[0].value == "atlas"


def test_page_opens_the_result_named_in_the_address(workbench, model, tmp_path, monkeypatch):
    for name in ("one", "two"):
        assert workbench("heads", model, "--text", TEXT, "--out", tmp_path / name).code == 0
    monkeypatch.setattr(sys, "argv", ["main.py", "--store", str(tmp_path)])
    page = AppTest.from_file(str(PAGE), default_timeout=60)
    page.query_params["result"] = "two"
    assert page.run().header[0].value == "two"


def test_page_of_an_empty_missing_or_half_written_store(page, half_written, tmp_path):
    (tmp_path / "none").mkdir()
    assert "Nothing is saved" in page(tmp_path / "none").info[0].value
    assert "no results folder" in page(tmp_path / "missing").error[0].value
    assert "tensors.safetensors missing" in page(half_written).error[0].value


def test_the_command_binds_to_this_machine_only(workbench, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("os.execv", lambda path, words: started.append(words))
    answer = workbench("app", "--store", tmp_path, "--port", "8599")
    assert answer.code == 0
    assert "http://127.0.0.1:8599" in answer.out
    words = started[0]
    assert words[words.index("--server.address") + 1] == "127.0.0.1"
    assert words[words.index("--server.port") + 1] == "8599"
    assert words[words.index("--browser.gatherUsageStats") + 1] == "false"
    assert words[-2:] == ["--store", str(tmp_path)]
