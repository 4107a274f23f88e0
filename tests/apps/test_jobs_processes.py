"""``jobs run`` as a process of its own: Ctrl-C, a terminal, a reader that goes away."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def written(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text)
    return path


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# processes and terminals


class Process:
    """``workbench jobs ...`` in a process group of its own, its stdout and stderr as pipes or one terminal."""

    def __init__(self, *words: object, terminal: bool = False) -> None:
        self.terminal = terminal
        command = [sys.executable, "-m", "workbench", "jobs", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        if terminal:
            self.master, slave = pty.openpty()
            out = err = slave
        else:
            out = err = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
        )
        if terminal:
            os.close(slave)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def screen(self, until: str = "", limit: float = 60.0) -> str:
        """What comes out of the terminal until it says ``until``, to its end without it."""
        found, end = b"", time.monotonic() + limit
        while time.monotonic() < end and not (until and until in found.decode(errors="replace")):
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    part = os.read(self.master, 65536)
                except OSError:  # Linux's end of a terminal
                    break
                if not part:
                    break
                found += part
        return found.decode(errors="replace")

    def end(self, limit: float = 60.0) -> int:
        return self.process.wait(limit)


@pytest.fixture
def start() -> Iterator[type[Process]]:
    """Starts processes and ends them after the test, however it ends."""
    running: list[Process] = []

    def begin(*words: object, terminal: bool = False) -> Process:
        running.append(Process(*words, terminal=terminal))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        if one.terminal:
            os.close(one.master)


def test_ctrl_c_stops_and_the_same_command_continues(start, tmp_path, workbench):
    path = written(tmp_path, NAPS.format(seconds=0.3, seeds=list(range(12))))
    words = ("run", path, "--store", tmp_path / "store", "--workers", "2", "--json")
    first = start(*words)
    assert first.process.stdout is not None
    lines = []
    for line in first.process.stdout:
        lines.append(json.loads(line))
        if lines[-1]["event"] == "done":
            break
    first.interrupt()
    out, err = first.process.communicate(timeout=30)
    assert first.process.returncode == 130
    assert err.decode().splitlines() == ["workbench: interrupted"]
    last = lines_of(out.decode())[-1]
    assert last | {"event": "end", "stopped": "interrupted", "total": 12} == last
    assert 1 <= last["done"] < 12
    assert last["done"] + last["left"] == 12
    state = workbench("jobs", "status", "--store", tmp_path / "store", "--json").json
    assert last["done"] <= state["done"] <= last["done"] + 2  # what a worker finished before it heard of the end stays
    assert (state["done"] + state["missing"], state["running"]) == (12, 0)
    assert workbench("jobs", *words, "--set", "seed=[0,1,2,3]").code == 0


def test_ctrl_c_tells_people_how_far_it_came(start, tmp_path):
    path = written(tmp_path, NAPS.format(seconds=0.3, seeds=list(range(12))))
    one = start("run", path, "--store", tmp_path / "store", "--workers", "1", terminal=True)
    shown = one.screen(until="1 of 12 done")
    assert "worker 0 sleep seconds=0.3 seed=" in COLOURS.sub("", shown)
    one.interrupt()
    rest = one.screen()
    assert one.end() == 130
    assert "of 12 cells; the same command continues" in rest
    assert (shown + rest).count("\x1b[?25l") == (shown + rest).count("\x1b[?25h"), "the cursor is shown again"
    assert "Traceback" not in shown + rest


def test_the_live_view_leaves_the_terminal_clean(start, tmp_path):
    path = written(tmp_path, NAPS.format(seconds=0.5, seeds=[0, 1]))
    one = start("run", path, "--store", tmp_path / "store", "--workers", "1", terminal=True)
    shown = one.screen()
    assert one.end() == 0
    assert "━" in shown
    assert "1 running, 1 remaining" in shown
    summary = shown[shown.rindex("\x1b[?25h") :]
    assert "naps: 2 of 2 cells done in " in summary
    assert "\x1b[2K" in summary, "the lines of the view are erased"
    assert "worker" not in summary


def test_a_reader_that_goes_away_does_not_stop_the_grid(start, tmp_path, workbench):
    path = written(tmp_path, MIXED.replace("rows: 2", "seconds: 0.1"))
    one = start("run", path, "--store", tmp_path / "store", "--workers", "1", "--json")
    assert one.process.stdout is not None
    assert json.loads(one.process.stdout.readline())["event"] == "begin"
    one.process.stdout.close()
    assert one.end() == 1, "some cells failed"
    assert one.process.stderr is not None
    assert one.process.stderr.read().decode().splitlines() == [
        "workbench: nobody reads the events any more; the grid goes on"
    ]
    got = workbench("jobs", "status", "--store", tmp_path / "store", "--json").json
    assert (got["done"], got["failed"], got["missing"]) == (2, 3, 0)
