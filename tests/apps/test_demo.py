"""The demo on random models with few examples: what it saves, what it does when a step fails, and its report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch

from workbench.apps import demo_steps
from workbench.apps.demo import demo, summary
from workbench.apps.figures import heads_grid
from workbench.apps.report import Numbers, Picture, Prose, Section, render, write_report
from workbench.apps.terminal import percent
from workbench.errors import WorkbenchError
from workbench.figure_html import style
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

LONG = 300


def random_model(name: str) -> NativeModel:
    from workbench.datasets.tokenizer import vocabulary, word_tokenizer

    torch.manual_seed(0)
    mixer = "gated-softmax" if name == "tiny-gated" else "softmax"
    sizes = {"layers": 2, "heads": 2, "width": 16, "head_width": 8, "mlp_width": 16, "vocab": len(vocabulary())}
    return NativeModel(NativeNet(NativeConfig(**sizes, mixer=mixer)).eval(), word_tokenizer(), name=name)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo_steps, "TEXTS", 2)
    monkeypatch.setattr(demo_steps, "TEXT_TOKENS", 31)
    monkeypatch.setattr(demo_steps, "RETRIEVAL_LENGTHS", (48,))
    monkeypatch.setattr(demo_steps, "DEPTHS", 2)
    monkeypatch.setattr(demo_steps, "EXAMPLES", 8)
    options = {"discrete-sae": {"epochs": 5, "trials": 1}, "eap-ig": {"steps": 1}}
    monkeypatch.setattr(demo_steps, "OPTIONS", options)


class Page(HTMLParser):
    """Ids, attributes that fetch, and the visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.fetched.append(value)

    def handle_data(self, data):
        self.words.append(data)


def assert_alone(text: str) -> Page:
    """The page fetches nothing: only fragments of itself and data."""
    page = Page(text)
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.fetched), page.fetched
    assert not re.search(r"https?://|@import|<script|<link|<iframe", text)
    assert all(target.startswith(("#", "'#", '"#')) for target in re.findall(r"url\(([^)]*)", text))
    assert len(page.ids) == len(set(page.ids))
    assert {v.removeprefix("#") for v in page.fetched if v.startswith("#")} <= set(page.ids)
    return page


def test_demo_saves_reports_and_replaces_itself(small, tmp_path, capsys, workbench):
    out = tmp_path / "results"
    done, report = demo(out, LONG, load=random_model)
    assert [step.error for step in done] == [""] * 8
    names = {p.name for p in (out / "demo").iterdir() if p.is_dir()}
    assert {"sinks-tiny-softmax", "sinks-tiny-gated", "heads", "retrieval", "long", "prompt"} <= names
    assert {f"{kind}-{m}" for kind in ("circuit", "faithfulness") for m in ("discrete-sae", "eap-ig")} <= names
    told = json.loads((out / "demo" / "demo.json").read_text())
    assert told["facts"]["max |delta logits|, tiny-softmax"] == "0"
    assert told["versions"]["torch"]
    assert (out / "demo" / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in out.iterdir()} == {"demo", "report.html"}
    page = assert_alone(report.read_text())
    shown = " ".join(page.words)
    for step in done:
        assert step.title in shown
        assert all(line in shown for line in step.lines)
    assert page.tags.count("svg") >= 7
    summary(done, report)
    said = capsys.readouterr().out
    assert re.search(r"head \d\.\d .*'<bos>'|head \d\.\d gives", said)
    assert "max |delta logits| with capture on and off: 0" in said

    (out / "demo" / "stale").write_text("of the former run")
    (out / "mine.txt").write_text("mine")
    demo(out, LONG, load=random_model)
    assert not (out / "demo" / "stale").exists()
    assert {p.name for p in out.iterdir()} == {"demo", "report.html", "mine.txt"}

    got = workbench("report", out, "--out", tmp_path / "page", "--json").json
    again = Path(got["saved"]).read_text()
    assert_alone(again)
    assert all(step.title in again.replace("&#39;", "'") for step in done)
    (out / "demo" / "heads" / "table.parquet").unlink()
    assert "demo/heads is not a complete result: table.parquet missing" in workbench("report", out).mistake()
    import shutil

    shutil.rmtree(out / "demo" / "heads")
    assert "lists demo/heads, which is not there" in workbench("report", out).mistake()


def test_a_failing_step_is_told_and_the_others_go_on(small, tmp_path, monkeypatch, capsys):
    def refuse(*args, **options):
        raise WorkbenchError("no circuits <today>")

    monkeypatch.setattr(demo_steps.wb, "find_circuit", refuse, raising=False)
    monkeypatch.setattr(demo_steps.wb, "head_scores", lambda *a, **k: 1 / 0, raising=False)
    done, report = demo(tmp_path / "results", LONG, load=random_model)
    failed = {step.title: step.error for step in done if step.error}
    assert failed == {
        "Induction and other known heads": "ZeroDivisionError: division by zero",
        "A circuit by discrete sparse autoencoder": "no circuits <today>",
        "A circuit by EAP-IG": "no circuits <today>",
        "How faithful the circuits are": "there is no circuit by discrete-sae: its step failed",
    }
    assert (tmp_path / "results" / "demo" / "long" / "result.json").is_file()
    assert "This step failed: no circuits &lt;today&gt;" in report.read_text()
    summary(done, report)
    printed = capsys.readouterr()
    assert "FAILED: no circuits <today>" in printed.out
    assert "ZeroDivisionError" in printed.err


def test_a_report_that_cannot_be_drawn_costs_no_results(small, tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.apps.sections.report_of", lambda *a: 1 / 0)
    (tmp_path / "report.html").write_text("of the former run")
    done, report = demo(tmp_path, LONG, load=random_model)
    assert [(step.title, step.error) for step in done if step.error] == [
        ("Report", "ZeroDivisionError: division by zero")
    ]
    assert (tmp_path / "demo" / "long" / "result.json").is_file()
    assert not report.exists()


def test_demo_main_exits_with_1_when_a_step_failed(monkeypatch, tmp_path, capsys):
    from workbench.apps import demo as module

    step = module.Step("Capture", error="broken")
    monkeypatch.setattr(module, "demo", lambda out: ([step], out / "report.html"))
    with pytest.raises(module.typer.Exit) as left:
        module.main(tmp_path)
    assert left.value.exit_code == 1
    assert "1 of 1 steps failed: Capture" in capsys.readouterr().err


def test_demo_leaves_the_former_results_when_it_is_stopped(small, tmp_path, monkeypatch):
    out = tmp_path / "results"
    (out / "demo").mkdir(parents=True)
    (out / "demo" / "demo.json").write_text("{}")

    def stop(model, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_steps.wb, "head_scores", stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        demo(out, LONG, load=random_model)
    assert [p.name for p in out.iterdir()] == ["demo"]
    assert (out / "demo" / "demo.json").read_text() == "{}"


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("mine")
    with pytest.raises(WorkbenchError, match="is not the demo's"):
        demo(tmp_path, LONG, load=random_model)
    assert (tmp_path / "demo" / "thesis.tex").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkbenchError, match="cannot write to"):
        demo(tmp_path / "file" / "results", LONG, load=random_model)


def test_a_damaged_account_is_refused(workbench, model, tmp_path):
    workbench("heads", model, "--text", "Mary and Mary", "--out", tmp_path / "store" / "heads")
    step = {"title": "t", "lines": [], "results": ["heads"], "seconds": 1.0}
    good = {"title": "t", "facts": {}, "versions": {}, "steps": [step]}
    bad = [{k: v for k, v in good.items() if k != name} for name in good]
    bad += [{**good, "steps": [{k: v for k, v in step.items() if k != name}]} for name in step]
    for told in (*bad, {**good, "versions": [1]}, [], 3):
        (tmp_path / "store" / "demo.json").write_text(json.dumps(told))
        assert "demo.json is damaged" in workbench("report", tmp_path / "store").mistake()
    (tmp_path / "store" / "demo.json").write_text(json.dumps(good))
    assert workbench("report", tmp_path / "store").code == 0


def test_report_of_one_result_is_called_by_its_name(workbench, model, tmp_path):
    workbench("heads", model, "--text", "Mary and Mary", "--out", tmp_path / "my-heads")
    assert workbench("report", tmp_path / "my-heads", "--out", tmp_path).code == 0
    assert '<h2 id="s0">my-heads</h2>' in (tmp_path / "report.html").read_text()


def test_report_escapes_everything(tmp_path):
    from matplotlib.figure import Figure

    bad = '<script>alert(1)</script> "quoted" & \'single\' $x_1$ url(#x) id="q" #010203'
    with style():
        figure = Figure()
        ax = figure.subplots()
        ax.set_title(bad)
        ax.set_xticks([0, 1], [bad, "b"])
        frame = pd.DataFrame({bad: [bad], "n": [float("nan")]})
        sections = [Section(bad, (Prose((bad,)), Numbers(frame, bad), Picture(figure, bad, bad)))]
        path = write_report(sections, tmp_path / "r" / "report.html", title=bad, facts=[(bad, bad)])
    page = assert_alone(path.read_text())
    assert "script" not in page.tags
    assert sum(words == bad for words in page.words) == 12
    assert "undefined" in page.words


def test_report_replaces_a_page_in_one_step_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(
        "workbench.apps.report.os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(WorkbenchError, match="No space left"):
        write_report([], path, title="new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_numbers_say_how_many_rows_are_left_out():
    text = render([Section("s", (Numbers(pd.DataFrame({"a": range(100)}), rows=5),))], title="t")
    assert "first 5 of 100 rows" in text
    assert text.count("<tr>") == 6


@pytest.mark.parametrize(("heads", "kinds"), [(8, 3), (12, 2), (4, 1), (32, 2)])
def test_head_grids_fit_the_column(heads, kinds):
    frame = pd.DataFrame({"layer": [0] * heads, "head": range(heads), "value": [0.5] * heads})
    figure = heads_grid({str(kind): frame for kind in range(kinds)}, "value", "share")
    assert figure.get_figwidth() <= max(9.5, 1 + 0.42 * heads)
    assert sum(ax.get_title() != "" for ax in figure.axes) == kinds


def test_little_does_not_read_as_nothing():
    shares = (0.0, 4e-4, 0.0011, 0.004, 0.01, 0.5, 1.0, float("nan"))
    assert [percent(share) for share in shares] == ["0%", "<0.1%", "0.1%", "0.4%", "1%", "50%", "100%", "undefined"]
