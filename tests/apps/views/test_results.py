"""The page of saved results: each with its figures and numbers; what is half-written or damaged is named, the rest works."""

from __future__ import annotations

import json
import shutil
from typing import Any

from conftest import TEXT
from pages import open_page, python_of, settled

import workbench as wb


def told(page: Any) -> str:
    return " ".join(one.value.replace("\\", "") for one in page.error)


def test_every_saved_result_is_listed_and_opened(workbench, model, tmp_path):
    assert workbench("sinks", model, "--text", TEXT, "--out", tmp_path / "a" / "sinks", "--json").json["saved"]
    assert workbench("capture", model, "--text", TEXT, "--blocks", "4", "--out", tmp_path / "wall", "--json").json[
        "saved"
    ]
    words = ("circuit", "compiled-induction", "induction", "-n", "2", "--method", "eap", "--level", "node")
    assert workbench(*words, "--out", tmp_path / "circuit", "--json").json["saved"]
    page = open_page("results", tmp_path)
    choice = page.selectbox(key="result")
    assert choice.options == ["a/sinks", "circuit", "wall"]
    for name in ("wall", "circuit", "a/sinks"):
        page.selectbox(key="result").set_value(name)
        settled(page.run())
        assert page.subheader[0].value == name
        assert page.query_params["result"] == name
        assert not page.error
        assert page.image
        names: dict[str, Any] = {}
        exec(python_of(page)[0], names)
        assert len(names["parts"]) > 1
        assert any(len(table.value) == len(names["found"].frame()) for table in page.dataframe)
    table = next(t.value for t in page.dataframe if "share" in t.value and len(t.value) == 60)
    assert table["share"].tolist() == wb.load_result(tmp_path / "a" / "sinks").frame()["share"].tolist()
    shutil.rmtree(tmp_path / "a")
    assert settled(page.run()).subheader[0].value == "circuit"


def test_a_result_is_a_link(workbench, model, tmp_path):
    for name in ("one", "two"):
        assert workbench("heads", model, "--text", TEXT, "--out", tmp_path / name).code == 0
    assert open_page("results", tmp_path, result="two").subheader[0].value == "two"
    page = open_page("results", tmp_path, result="../two")
    assert "no result in the address" in page.warning[0].value
    assert page.subheader[0].value == "one"


def test_damaged_results_are_named_and_the_rest_works(workbench, model, half_written):
    assert workbench("heads", model, "--text", TEXT, "--out", half_written / "whole").code == 0
    assert workbench("heads", model, "--text", TEXT, "--out", half_written / "spoiled").code == 0
    (half_written / "spoiled" / "table.parquet").write_bytes(b"PAR1")
    page = open_page("results", half_written)
    assert [one.value.split(" ")[0] for one in page.error] == ["sinks", "spoiled"]
    assert "tensors.safetensors missing" in told(page)
    assert "table.parquet" in told(page)
    assert page.subheader[0].value == "whole"
    assert page.selectbox(key="result").options == ["whole"]


def test_a_store_with_nothing_says_what_to_do(tmp_path):
    for store in (tmp_path, tmp_path / "missing"):
        page = open_page("results", store)
        assert "Nothing is saved" in page.info[0].value
        assert "make demo" in page.info[0].value


def test_what_the_demo_found_is_told_as_text(workbench, model, tmp_path):
    assert workbench("heads", model, "--text", TEXT, "--out", tmp_path / "demo" / "heads").code == 0
    steps = [
        {"title": "Sinks <b>", "lines": ["found <script>x</script>"], "results": ["heads"], "seconds": 1},
        {"title": "Circuits", "lines": [], "results": [], "seconds": 1, "error": "no luck"},
    ]
    account = {"title": "Demo", "facts": {}, "versions": {}, "steps": steps}
    (tmp_path / "demo" / "demo.json").write_text(json.dumps(account))
    page = open_page("results", tmp_path)
    texts = [one.value for one in page.text]
    assert "found <script>x</script>" in texts
    assert "failed: no luck" in texts
    assert "**Sinks \\<b\\>**" in [one.value for one in page.markdown]
    (tmp_path / "demo" / "demo.json").write_text("{")
    page = open_page("results", tmp_path)
    assert "demo.json is damaged" in told(page)
    assert page.subheader[0].value == "demo/heads"
