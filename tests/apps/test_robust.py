"""What may go wrong around a page: odd texts and names, harmed files, dying workers, other people, disks, paths."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import build
from pages import open_page, settled, under_way
from streamlit.testing.v1 import AppTest

from workbench.apps.screen import place
from workbench.apps.screen.need import job, work
from workbench.apps.screen.text import literal
from workbench.errors import WorkbenchError
from workbench.jobs import running
from workbench.jobs.driver import run_jobs
from workbench.jobs.store import JobStore, Unwritable

NASTY = "<img src=x onerror=alert(1)> **b** :red[x] `c` $x$"
RIGHT_TO_LEFT, EMOJI = "שלום עולם مرحبا", "😀 👩‍👩‍👧 \N{OCTOPUS}"
OUTSIDE = ("../../../etc/passwd", "/etc/passwd", "~root/x", "..", "a\0b", "x" * 5000, "<script>alert(1)</script>")


def in_store(store: Path) -> None:
    """What is asked of ``screen`` from now on is asked of this results folder."""
    sys.argv = ["main.py", "--store", str(store)]


def asking(store: Path, model: str, **args: Any) -> AppTest:
    """A page that needs the capture of ``model``, as it is at its first run."""
    in_store(store)

    def script(model, args):
        import streamlit as st

        from workbench.apps.screen.need import guarded, job, need

        def page() -> None:
            done = need(job("capture", model, **args), f"Capturing {model}")
            st.text(f"rows: {len(done.table())}")

        guarded(page)

    return AppTest.from_function(script, args=(model, args), default_timeout=120).run()


def lines(page: AppTest) -> str:
    """The errors of the page as they are read."""
    return re.sub(r"\\(.)", r"\1", "\n".join(one.value for one in page.error))


def visible(page: AppTest) -> list[str]:
    """Every text of the page that Markdown reads."""
    parts = (page.markdown, page.caption, page.info, page.warning, page.error, page.success, page.title, page.header)
    return [one.value for part in parts for one in (*part, *getattr(page.sidebar, "markdown", ()))]


# texts and names


TEXTS = {
    "emoji": EMOJI,
    "right to left": RIGHT_TO_LEFT,
    "markup": NASTY,
    "long": "x" * 100_000 + " and",
    "control": "\u202e\u0000\x1b[31m",
    "lines": "a\r\nb\tc",
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a captured run of each of ``TEXTS``."""
    folder = tmp_path_factory.mktemp("odd")
    jobs = [{"probe": "capture", "model": "tiny-softmax", "text": text} for text in TEXTS.values()]
    assert not run_jobs(jobs, folder / "app", workers=1).failed
    return folder


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_is_captured_and_shown(odd: Path, name: str) -> None:
    in_store(odd)
    page = open_page("sinks", odd, run=job("capture", "tiny-softmax", text=TEXTS[name]).key)
    assert page.title[0].value == "Sinks"
    assert not page.error
    assert not page.warning
    assert max(map(len, page.selectbox(key="run").options)) < 100
    for said in visible(page):
        assert "<img" not in said
        assert len(said) < 5000


def test_a_prompt_that_is_too_long_for_the_model_is_one_line(tmp_path: Path) -> None:
    page = settled(asking(tmp_path, "compiled-induction", text="ab " * 33_334))
    assert "more than the model's context of 512" in lines(page)
    assert len(page.error[0].value) < 1000


def test_an_empty_prompt_is_one_line(tmp_path: Path) -> None:
    assert lines(asking(tmp_path, "tiny-softmax", text=" \n ")) == "the prompt is empty: it holds no words"


def test_a_name_of_a_model_is_never_markup(tmp_path: Path) -> None:
    folder = tmp_path / "models" / NASTY.replace("/", "")
    build("random").save(folder)
    in_store(tmp_path)
    wanted = job("capture", str(folder), text="a b a b")
    page = settled(asking(tmp_path, str(folder), text="a b a b"))
    assert page.text[0].value == "rows: 4"
    page = open_page("sinks", tmp_path, run=wanted.key)
    assert page.selectbox(key="run").options[0].startswith(NASTY.replace("/", ""))
    broken = str(tmp_path / "models" / "<b>none</b>")
    page = asking(tmp_path, broken, text="a")
    assert "<b>none</b> does not exist" in lines(page)
    assert all("<b>" not in one.value.replace("\\<b\\>", "") for one in page.error)


def test_literal_text_is_what_was_given() -> None:
    assert literal("<b> *x* [a](b)\n# 1") == "\\<b\\> \\*x\\* \\[a\\]\\(b\\) \\# 1"
    for text in (NASTY, EMOJI, RIGHT_TO_LEFT, "# not a heading", "1. no list", "[a](javascript:alert(1))", "a\nb"):
        assert re.sub(r"\\(.)", r"\1", literal(text)) == text.replace("\n", " ")
    assert "100,000 characters" in re.sub(r"\\(.)", r"\1", literal("x" * 100_000))


# models that are broken


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "config.json"),
        ({"config.json": "{}"}, "names no model_type"),
        ({"config.json": '{"model_type": "llama"}'}, "safetensors"),
        ({"config.json": "{", "model.safetensors": "x"}, "config.json"),
        ({"config.json": '{"model_type": "nothing"}', "model.safetensors": "x"}, "did not come to an end"),
    ],
)
def test_a_broken_model_is_one_line(tmp_path: Path, files: dict[str, str], told: str) -> None:
    folder = tmp_path / "models" / "broken"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    page = settled(asking(tmp_path / "results", str(folder), text="a"))
    (line,) = [one.value for one in page.error]
    assert told in lines(page)
    assert "\n" not in line
    assert "Traceback" not in line


def test_weights_that_are_cut_off_are_one_line(tmp_path: Path) -> None:
    folder = Path(build("cut").save(tmp_path / "models" / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    page = settled(asking(tmp_path / "results", str(folder), text="a"))
    assert "did not come to an end" in lines(page)
    assert len(page.error) == 1


# harmed results


def test_half_written_and_damaged_cells_do_not_harm_a_page(tmp_path: Path) -> None:
    page = open_page("sinks", tmp_path)
    key = page.query_params["run"]
    key = key[0] if isinstance(key, list) else key
    store = JobStore(tmp_path / "app")
    (store.path / ("a" * 32)).mkdir()
    (store.path / ("b" * 32)).write_text("no folder")
    (store.path / ("c" * 32)).mkdir()
    (store.path / ("c" * 32) / "job.json").write_text("{")
    page = open_page("sinks", tmp_path, run=key)
    assert page.title[0].value == "Sinks"
    assert not page.error
    page = open_page("sinks", tmp_path, run="c" * 32)
    assert "not complete" in re.sub(r"\\(.)", r"\1", page.warning[0].value)


def test_a_run_with_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "app")
    assert not run_jobs([{"probe": "capture", "model": "compiled-induction", "text": "a b"}], store, workers=1).failed
    (key,) = store.keys()
    (store.folder(key) / "saved" / "run.json").write_text("{")
    page = open_page("sinks", tmp_path, run=key)
    assert len(page.error) == 1
    assert "run.json" in lines(page)


def test_a_disk_that_goes_away_is_one_line() -> None:
    def script():
        from workbench.apps.screen.need import guarded

        def page():
            raise OSError(5, "Input/output error", "/results/<b>")

        guarded(page)

    page = AppTest.from_function(script).run()
    assert not page.exception
    assert lines(page) == "[Errno 5] Input/output error: '/results/<b>'"


def test_a_store_that_is_a_file_or_of_another_format_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    page = asking(tmp_path / "file", "tiny-softmax", text="a")
    assert len(page.error) == 1
    assert "Not a directory" in lines(page)
    hidden = tmp_path / "new" / "app" / ".jobs"
    hidden.mkdir(parents=True)
    (hidden / "format.json").write_text('{"format": 99}')
    assert "has store format 99" in lines(asking(tmp_path / "new", "tiny-softmax", text="a"))


# workers, other sessions, other processes


def test_sessions_share_cells_and_the_queue(tmp_path: Path) -> None:
    first, same = (asking(tmp_path, "tiny-softmax", filler=64) for _ in range(2))
    other = asking(tmp_path, "compiled-induction", text="a b a b")
    assert all(under_way(page) for page in (first, same, other))
    assert len(work().queue()) == 2
    assert "waits behind 1" in other.info[0].value
    for page in (other, same, first):
        assert settled(page).text[0].value.startswith("rows: ")


def test_a_killed_worker_is_told_and_tried_again(tmp_path: Path) -> None:
    page = asking(tmp_path, "tiny-softmax", filler=1500)
    wanted = job("capture", "tiny-softmax", filler=1500)
    ends = time.monotonic() + 60
    while not running.owner(work().store, wanted.key):
        assert time.monotonic() < ends
        time.sleep(0.02)
    os.kill(running.owner(work().store, wanted.key) or 0, signal.SIGKILL)
    settled(page)
    assert "the worker died: SIGKILL" in lines(page)
    again = next(one for one in page.button if one.label == "Try again")
    assert settled(again.click().run()).text[0].value.startswith("rows: ")
    assert not page.error


def test_stopped_from_the_page(tmp_path: Path) -> None:
    page = asking(tmp_path, "tiny-softmax", filler=1500)
    next(one for one in page.button if one.label == "Stop").click().run()
    settled(page)
    assert "it was stopped from the page" in lines(page)
    assert any(one.label == "Try again" for one in page.button)
    page.run()
    assert work().queue() == []


def test_a_cell_of_another_process_is_waited_for(tmp_path: Path) -> None:
    in_store(tmp_path)
    wanted = job("capture", "compiled-induction", text="a b a b")
    store = place.cells()
    store.open_for_writing()
    with running.taken(store, wanted.key):
        page = asking(tmp_path, "compiled-induction", text="a b a b")
        assert "in another process" in page.info[0].value
        assert not page.button
        assert work().queue() == []
    assert settled(page.run()).text[0].value.startswith("rows: ")


def test_a_cell_that_takes_too_much_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.jobs.guard import total_memory

    monkeypatch.setattr("workbench.apps.screen.work._MEMORY", 2.0e8 / total_memory())
    page = settled(asking(tmp_path, "tiny-softmax", filler=64))
    assert "it needed more than 0.2 GB of memory" in lines(page)


def test_a_disk_that_cannot_be_written_is_one_line_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settled(asking(tmp_path, "compiled-induction", text="a b")).text[0].value.startswith("rows: ")

    def full(self: JobStore) -> None:
        raise Unwritable(f"cannot write to the store {self.path}: Read-only file system")

    monkeypatch.setattr(JobStore, "open_for_writing", full)
    assert asking(tmp_path, "compiled-induction", text="a b").text[0].value.startswith("rows: ")
    assert "Read-only file system" in lines(asking(tmp_path, "compiled-induction", text="b a"))


# addresses and paths


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sinks", "run"),
        ("results", "result"),
        ("jobs", "folder"),
        ("jobs", "cell"),
        ("jobs", "grid"),
        ("report", "cells"),
    ],
)
def test_no_address_leads_out_of_the_store(tmp_path: Path, name: str, key: str) -> None:
    store = JobStore(tmp_path / "app")
    from job_cells import sleepers, write_cell

    write_cell(store, sleepers(1)[0])
    for value in OUTSIDE:
        query = {key: value} | ({"tab": "Progress"} if name == "jobs" else {})
        page = open_page(name, tmp_path, **query)
        for said in visible(page):
            assert "root:" not in said
            assert "<script>" not in said
    assert not (tmp_path.parent / "app").exists()


def test_paths_are_confined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "models"
    models.mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "out").symlink_to("/etc")
    sys.argv = ["main.py", "--store", str(tmp_path / "results"), "--models", str(models)]
    for inside in ("results", "results/../results/x", models / "a", tmp_path / "results" / "b"):
        assert place.confined(inside).is_absolute()
    for outside in (*OUTSIDE, tmp_path, "results/../x", "results/out/passwd", "/proc/self/environ", "~nobody-here/x"):
        with pytest.raises(WorkbenchError, match="lies outside|names no file"):
            place.confined(outside)
    assert place.confined("/etc/hosts", Path("/etc")) == Path("/etc/hosts").resolve()


def test_models_are_those_of_the_given_folders(tmp_path: Path) -> None:
    build("one").save(tmp_path / "many" / "one")
    build("two").save(tmp_path / "two")
    (tmp_path / "many" / "none").mkdir()
    sys.argv = ["main.py", "--models", str(tmp_path / "many"), "--models", str(tmp_path / "two")]
    assert place.models()[0] == "tiny-softmax"
    assert place.models()[-2:] == [str(tmp_path / "many" / "one"), str(tmp_path / "two")]
