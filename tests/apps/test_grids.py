"""Grids from the app: where they stand, their text and its mistakes, and runs that outlive whoever started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_cells import sleepers, write_cell

from workbench.apps.grids import process
from workbench.apps.grids.folders import folder_for, job_stores, name_in
from workbench.apps.grids.spec_text import bundled, read_text, spec_text
from workbench.apps.store import stored
from workbench.errors import WorkbenchError
from workbench.jobs.store import JobStore


def anything(path: str) -> None:
    """No path is refused."""


def nothing(path: str) -> None:
    raise WorkbenchError(f"{path} lies outside")


def until(true: Callable[[], Any]) -> None:
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_stores_are_found_and_their_cells_are_no_results(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "deep" / "grid one")
    write_cell(store, sleepers(1)[0])
    assert [found.path for found in job_stores(tmp_path)] == [store.path]
    assert [found.path for found in job_stores(store.path)] == [store.path]
    assert (name_in(tmp_path, store), name_in(store.path, store)) == ("deep/grid one", "grid one")
    assert stored(tmp_path) == []
    assert job_stores(tmp_path / "nothing") == []


def test_a_grid_takes_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    write_cell(JobStore(tmp_path / "old"), sleepers(1)[0])
    assert folder_for(tmp_path, "new") == tmp_path / "new"
    assert folder_for(tmp_path, "old") == tmp_path / "old"
    for name in ("full", "../out", "a/b", "..", "", ".hidden", "app"):
        with pytest.raises(WorkbenchError, match="another name"):
            folder_for(tmp_path, name, taken=("app",))


def test_a_form_is_written_as_a_spec_that_reads_back() -> None:
    text = spec_text(
        "night",
        "head-scores",
        models=["tiny-softmax", "compiled-induction"],
        tasks=["induction"],
        seeds=3,
        arguments={"kinds": "[[previous, induction]]", "sequences": "[4, 8]", "raw": ""},
    )
    grid = read_text(text, nothing)
    assert grid.name == "night"
    assert len(grid.jobs) == 2 * 3 * 2
    assert {job.seed for job in grid.jobs} == {0, 1, 2}
    assert grid.jobs[0].args["kinds"] == ["previous", "induction"]
    assert {job.args["sequences"] for job in grid.jobs} == {4, 8}


@pytest.mark.parametrize("name", ["null", "no", "/a path/to: [it] #1", '"quoted"', "ünï \N{OCTOPUS}", "2024-01-01"])
def test_any_name_of_a_model_is_written_as_a_text(name: str, tmp_path: Path) -> None:
    from workbench.jobs.spec_files import read

    (tmp_path / "s.yaml").write_text(spec_text("x", "sinks", models=[name]), encoding="utf-8")
    assert read(tmp_path / "s.yaml").plain()["model"] == name


def test_an_argument_cannot_write_other_lines() -> None:
    with pytest.raises(WorkbenchError, match="more than one line"):
        spec_text("x", "sinks", arguments={"epsilon": "0.3\nmodel: /etc"})


def test_bundled_grids_are_starting_points() -> None:
    assert list(bundled()) == ["demo", "leaderboard", "retrieval", "sae"]
    for text in bundled().values():
        assert read_text(text, nothing).jobs


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "spec.yaml is empty"),
        ("name: x\nprobe: [sinks", "spec.yaml:2: not valid YAML"),
        ("name: x\nprobe: sinkz\n", "spec.yaml:2: no probe 'sinkz'"),
        ("name: x\nprobe: sinks\nmodel: tiny-sofmax\n", "spec.yaml:3: no bundled model 'tiny-sofmax'"),
        ("name: x\nprobe: sleep\nrows: many\n", "spec.yaml:3: argument rows of sleep is a whole number"),
        ("probe: sleep\nextends: /etc/passwd\n", "spec.yaml:2: extends: /etc/passwd lies outside"),
        ("probe: sinks\nmodel: /root\n", "spec.yaml:2: model: /root lies outside"),
        ("probe: sinks\nmodel: ~\nmodel: x\n", "given twice"),
        ("probe: train_sae\nmodel: tiny-softmax\nsite: x\ndata: /etc/passwd\n", "spec.yaml:4: data: /etc/passwd lies"),
        ("probe: train_sae\nmodel: tiny-softmax\nsite: x\ndata: [a, ../../b]\n", "spec.yaml:4: data: ../../b lies"),
        ("probe: os:system\ncommand: ls\n", "spec.yaml:1: os:system is a function of your own"),
        ("probe: sleep\nrows: \ud800\n", "half of a character"),
    ],
)
def test_mistakes_have_their_line_and_no_file_outside_is_read(text: str, told: str) -> None:
    with pytest.raises(WorkbenchError) as error:
        read_text(text, nothing)
    assert told in str(error.value)
    assert "/tmp" not in str(error.value)


def run_words(store: Path, text: str, workers: int = 1) -> list[str]:
    spec = process.keep_spec(store, "g", text)
    return ["run", str(spec), "--store", str(store), "--workers", str(workers)]


def test_a_run_is_started_stopped_and_continued(tmp_path: Path) -> None:
    store = tmp_path / "grid"
    words = run_words(store, "name: g\nprobe: sleep\nseconds: 0.2\nseed: [" + ", ".join(map(str, range(40))) + "]\n")
    assert process.under_way(store) is None
    assert process.log(store) == ""
    process.stop(store)
    run = process.start(store, words)
    assert process.under_way(store) == run
    with pytest.raises(WorkbenchError, match="a run is under way"):
        process.start(store, words)
    until(lambda: JobStore(store).keys())
    process.stop(store)
    until(lambda: process.under_way(store) is None)
    done = len(JobStore(store).keys())
    assert 0 < done < 40
    assert "workbench jobs run" in process.log(store)
    assert "stopped after" in process.log(store)
    process.start(store, [*words[:-1], "4"])
    until(lambda: process.under_way(store) is None)
    assert JobStore(store).status().done == 40
    assert f"{done} before" in process.log(store)


def test_a_run_outlives_its_starter_and_is_known_to_the_next(tmp_path: Path) -> None:
    store = tmp_path / "grid"
    words = run_words(store, "name: g\nprobe: sleep\nseconds: 30\n")
    script = f"from workbench.apps.grids import process; from pathlib import Path; process.start(Path({str(store)!r}), {words!r})"
    subprocess.run([sys.executable, "-c", script], check=True)
    run = process.under_way(store)
    assert run is not None
    assert run.words == tuple(words)
    until(lambda: (store / ".jobs").is_dir() and JobStore(store).status().running)
    os.kill(run.pid, signal.SIGKILL)
    until(lambda: process.under_way(store) is None)
    assert JobStore(store).status().running == 0


def test_only_a_run_of_this_machine_is_stopped(tmp_path: Path) -> None:
    store = tmp_path / "grid"
    run = process.start(store, run_words(store, "name: g\nprobe: sleep\nseconds: 30\n"))
    who = store / process.FOLDER / "run.json"
    for told in ({**run.__dict__, "host": "elsewhere"}, "no mapping"):
        who.write_text(json.dumps(told))
        with pytest.raises(WorkbenchError, match="stop it there"):
            process.stop(store)
    assert process.under_way(store) is not None
    who.write_text(json.dumps(run.__dict__))
    process.stop(store)
    until(lambda: process.under_way(store) is None)


def test_a_mistake_of_the_run_stands_in_its_log(tmp_path: Path) -> None:
    process.start(tmp_path, ["run", str(tmp_path / "nothing.yaml"), "--store", str(tmp_path / "s")])
    until(lambda: process.under_way(tmp_path) is None)
    assert "workbench: cannot read" in process.log(tmp_path)
