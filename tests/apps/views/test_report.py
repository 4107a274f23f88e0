"""The page of reports: one file of what was computed or saved, made by the worker, shown and given away."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT
from job_cells import write_cell
from pages import open_page, python_of, settled

from workbench.apps.cell_sections import cell_sections, title_of
from workbench.apps.report import Link, Numbers, Picture, Prose
from workbench.errors import WorkbenchError
from workbench.jobs.driver import run_jobs
from workbench.jobs.job import Job
from workbench.jobs.store import JobStore


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder in which pages computed a run, sinks and a circuit."""
    folder = tmp_path_factory.mktemp("results")
    jobs = [
        {"probe": "capture", "model": "compiled-induction", "text": "a b <script>alert(1)</script> a b", "blocks": 4},
        {"probe": "head-scores", "model": "compiled-induction", "sequences": 2, "batches": 1},
        {"probe": "find_circuit", "model": "compiled-induction", "task": "induction", "method": "eap", "examples": 4},
    ]
    ended = run_jobs(jobs, folder / "app", workers=1)
    assert not ended.failed
    return folder


def html(page: Any) -> str:
    """The report that is previewed."""
    frame = page.get("iframe")[0].proto.src
    assert frame.startswith("data:text/html;charset=utf-8;base64,")
    return base64.b64decode(frame.partition(",")[2]).decode()


def _keys(store: JobStore) -> list[str]:
    """The cells of the store without the reports that were made from them."""
    return [key for key in sorted(store.keys()) if ":" not in store.job(key).probe]


def press(page: Any, label: str) -> Any:
    return settled(next(one for one in page.button if one.label == label).click().run())


def test_a_report_of_what_pages_computed(computed: Path) -> None:
    page = open_page("report", computed)
    assert not page.get("iframe")
    assert len(page.multiselect(key="cells").value) == 3
    press(page, "Make the report")
    text = html(page)
    assert text.count("<section>") == 4
    assert text.count("<svg") >= 3
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text
    assert "logit difference" in text
    assert "<td>0</td>" in text
    assert "torch" in text
    assert page.get("download_button")[0].label.startswith("Download")
    for key in page.multiselect(key="cells").value:
        assert key[:12] in text


def test_the_cells_are_chosen_and_stand_in_the_address(computed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    store = JobStore(computed / "app")
    (key,) = [key for key in _keys(store) if store.job(key).probe == "find_circuit"]
    page = open_page("report", computed, cells=key)
    assert page.multiselect(key="cells").value == [key]
    press(page, "Make the report")
    assert html(page).count("<section>") == 2
    monkeypatch.chdir(tmp_path)
    exec(python_of(page)[0], {})
    assert key[:12] in (tmp_path / "report.html").read_text()
    page.multiselect(key="cells").set_value([])
    settled(page.run())
    assert "Choose at least one cell" in page.info[0].value
    page = open_page("report", computed, cells="../../etc")
    assert "no cells in the address" in page.warning[0].value


def test_links_lead_back_to_the_app(computed: Path) -> None:
    store = JobStore(computed / "app")
    keys = _keys(store)
    assert len(keys) == 3
    for section in cell_sections(store, keys, "http://127.0.0.1:8501")[:-1]:
        (link,) = (part for part in section.parts if isinstance(part, Link))
        assert link.address.startswith(("http://127.0.0.1:8501/atlas?run=", "http://127.0.0.1:8501/jobs?tab=Progress"))
        assert any(isinstance(part, Picture) for part in section.parts)
    with pytest.raises(WorkbenchError, match="http or https"):
        Link("x", "javascript:alert(1)")


def test_a_cell_that_cannot_be_read_is_told_in_its_place(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    good, bad = Job("sleep"), Job("sleep", seed=1)
    write_cell(store, good)
    write_cell(store, bad)
    (store.folder(bad.key) / "result.parquet").unlink()
    first, second, *_ = cell_sections(store, [good.key, bad.key])
    assert any(isinstance(part, Numbers) for part in first.parts)
    (said,) = second.parts
    assert isinstance(said, Prose)
    assert said.failed
    assert "result.parquet is missing" in said.lines[0]


def test_titles_are_short(tmp_path: Path) -> None:
    long = Job("capture", model="/models/" + "x" * 200, args={"text": "word\n" * 50_000})
    assert len(title_of(long)) <= 90
    assert "\n" not in title_of(long)


def test_a_report_of_the_results_folder_follows_it(workbench, model, tmp_path: Path, monkeypatch: Any) -> None:
    store = tmp_path / "results"
    assert workbench("sinks", model, "--text", TEXT, "--out", store / "sinks").code == 0
    page = open_page("report", store)
    press(page, "Make the report")
    assert html(page).count("<section>") == 1
    assert workbench("heads", model, "--text", TEXT, "--out", store / "heads").code == 0
    settled(page.run())
    assert not page.get("iframe")
    press(page, "Make the report")
    assert html(page).count("<section>") == 2
    monkeypatch.chdir(tmp_path)
    exec(python_of(page)[0], {})
    assert (tmp_path / "report.html").read_text().count("<section>") == 2
    (store / "sinks" / "tensors.safetensors").unlink()
    settled(page.run())
    press(page, "Make the report")
    assert "tensors.safetensors missing" in page.error[0].value.replace("\\", "")


def test_nothing_to_report_says_what_to_do(tmp_path: Path) -> None:
    assert "nothing to report yet" in open_page("report", tmp_path / "missing").info[0].value
