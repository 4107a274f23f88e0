"""What is seen of a running grid, drawn from events that no engine made."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from workbench.apps import live
from workbench.apps.live import JsonLines, Lines, Pace, Screen, amount, per_time, span
from workbench.jobs.events import Counts, Event
from workbench.jobs.job import Job


def job(number: int = 0) -> Job:
    return Job(probe="sleep", args={"seconds": 0.1}, seed=number)


class Grid:
    """A grid whose time passes as the test says."""

    def __init__(self, total: int, workers: int, stood: int = 0) -> None:
        self.total, self.workers, self.stood = total, workers, stood
        self.done, self.failed, self.running, self.next = stood, 0, 0, 0

    def event(self, kind: str, elapsed: float, slot: int | None = None, **more: object) -> Event:
        if kind == "started":
            self.running, self.next = self.running + 1, self.next + 1
            more = {"job": job(self.next), **more}
        elif kind in ("done", "failed", "lost"):
            self.running -= 1
            self.done += kind == "done"
            self.failed += kind == "failed"
            more = {"job": job(self.next), **more}
        return Event(kind, Counts(self.total, self.done, self.failed, self.running, self.stood), elapsed, slot, **more)

    def rounds(self, each: float, count: int | None = None, start: float = 0.0) -> list[Event]:
        """All workers in step: every cell takes ``each`` seconds."""
        found, at = [], start
        left = (self.total - self.done - self.failed) if count is None else count
        while left > 0:
            slots = range(min(self.workers, left))
            found += [self.event("started", at, slot) for slot in slots]
            at += each
            found += [self.event("done", at, slot, seconds=each) for slot in slots]
            left -= len(slots)
        return found


@pytest.mark.parametrize("workers", [1, 4, 100])
def test_the_time_left_counts_parallel_workers(workers):
    grid, pace = Grid(total=1000, workers=workers), Pace()
    assert math.isnan(pace.left(grid.event("begin", 0.0).counts, 0.0))
    for event in grid.rounds(each=2.0, count=500):
        pace.see(event)
    assert pace.seconds == pytest.approx(2.0)
    assert pace.left(event.counts, event.elapsed) == pytest.approx(500 * 2.0 / workers)
    assert pace.rate == pytest.approx(workers / 2.0)


def test_recent_cells_weigh_more_and_the_start_of_a_worker_little():
    grid, pace = Grid(total=100, workers=1), Pace()
    events = grid.rounds(each=60.0, count=1) + grid.rounds(each=1.0, count=4, start=60.0)
    for event in events:
        pace.see(event)
    assert pace.seconds < 4.0
    for event in grid.rounds(each=1.0, count=40, start=64.0) + grid.rounds(each=10.0, count=20, start=104.0):
        pace.see(event)
    assert 6.0 < pace.seconds < 10.0


def test_the_last_cells_last_as_long_as_each_needs():
    """At the end the rest is the longest rest of a cell, not a share of all."""
    grid, pace = Grid(total=8, workers=4), Pace()
    early = grid.rounds(each=8.0, count=4)
    late = [grid.event("started", at, slot) for slot, at in enumerate((8.0, 8.0, 8.0, 12.0))]
    for event in [*early, *late]:
        pace.see(event)
    assert pace.left(late[-1].counts, 15.0) == pytest.approx(5.0)
    assert pace.left(late[-1].counts, 1000.0) == 0.0


def test_lines_tell_begin_every_failure_once_and_little_else():
    grid, out = Grid(total=1000, workers=2, stood=10), io.StringIO()
    shown = Lines("demo", out)
    with shown:
        shown(grid.event("begin", 0.0))
        for event in grid.rounds(each=0.01, count=500):
            shown(event)
        for at in (2.6, 2.7):
            shown(grid.event("started", at, 0))
            shown(grid.event("failed", at, 0, message="ValueError: no such thing\nand its second line"))
        shown(grid.event("started", 6.0, 1))
        shown(grid.event("lost", 6.1, 1, message="its worker died (SIGKILL); tried again"))
        shown(grid.event("note", 6.2, message="the disk is nearly full"))
        for event in grid.rounds(each=0.01, start=6.2):
            shown(event)
        shown(grid.event("end", 10.0))
    lines = out.getvalue().splitlines()
    assert lines[0] == "demo: 1,000 cells, 10 done before, 990 to compute"
    failures = [line for line in lines if line.startswith("failed: sleep seconds=0.1 seed=")]
    assert len(failures) == 2
    assert failures[0].endswith(": ValueError: no such thing")
    assert [line for line in lines if line.startswith("lost: sleep ") and line.endswith("tried again")]
    assert "the disk is nearly full" in lines
    progress = [line for line in lines if " left" in line]
    assert len(progress) == 1
    assert "510 of 1,000 done, 2 failed, 1 running, 487 remaining, " in progress[0]
    assert "cells/s, about " in progress[0]
    assert lines[-1] == "demo: 998 of 1,000 done, 2 failed after 10 s"
    assert len(lines) == 7


def test_lines_end_quietly_when_nobody_reads_them(closed_pipe):
    shown = Lines("demo", closed_pipe)
    shown(Grid(1, 1).event("begin", 0.0))
    shown(Grid(1, 1).event("end", 1.0))


def test_json_lines_parse_and_the_last_is_the_summary():
    grid, out = Grid(total=3, workers=1), io.StringIO()
    shown = JsonLines(out)
    with shown:
        for event in [grid.event("begin", 0.0), *grid.rounds(each=0.5), grid.event("end", 1.5)]:
            shown(event)
        shown.end({"grid": "demo", "failed": 0})
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["begin", *["started", "done"] * 3, "end"]
    assert lines[-1]["grid"] == "demo"
    assert lines[-1]["counts"] == {"total": 3, "done": 3, "failed": 0, "running": 0, "stood": 0, "remaining": 0}
    assert lines[2] | {"key": job(1).key, "title": job(1).title, "seconds": 0.5, "slot": 0} == lines[2]


def test_json_lines_without_a_reader_let_the_grid_go_on(closed_pipe, capsys):
    grid, shown = Grid(2, 1), JsonLines(closed_pipe)
    for event in [grid.event("begin", 0.0), *grid.rounds(each=0.5)]:
        shown(event)
    shown.end({})
    assert capsys.readouterr().err == "workbench: nobody reads the events any more; the grid goes on\n"


@pytest.fixture
def closed_pipe():
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    return Closed()


class Stage:
    """A ``Screen`` on a terminal of text whose clock the test moves; nothing is drawn but by ``drawn``."""

    def __init__(self, width: int = 80, height: int = 24) -> None:
        self.now = 100.0
        self.console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
        self.screen = Screen("demo", self.console, clock=lambda: self.now)

    def drawn(self) -> list[str]:
        with self.console.capture() as got:
            self.console.print(self.screen._draw())
        return got.get().splitlines()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_screen_shows_a_bar_the_outlook_and_every_worker(width):
    stage, grid = Stage(width), Grid(total=40, workers=3)
    assert stage.drawn() == ["demo: starting"]
    for event in [grid.event("begin", 0.0), *grid.rounds(each=2.0, count=12), grid.event("started", 8.0, 1)]:
        stage.screen(event)
    stage.now += 11.0
    lines = stage.drawn()
    assert all(len(line) <= width - 4 for line in lines), "room for ^C, which must not begin a new line"
    assert lines[0].startswith("demo ━")
    assert lines[0].endswith("12 of 40 done")
    said = "1 running, 27 remaining, 30 cells/min, about 54 s left, 11 s so far"
    assert lines[1] == said if width > 70 else lines[1].rstrip("… ") in said
    assert [line.split()[:3] for line in lines[2:]] == [
        ["worker", "0", "idle"],
        ["worker", "1", "sleep"],
        ["worker", "2", "idle"],
    ]
    assert [line.split()[-2:] for line in lines[2:]] == [["3.0", "s"]] * 3


def test_two_hundred_workers_fit_on_the_screen():
    for height, shown in ((50, 19), (12, 6), (4, 1)):
        stage, grid = Stage(height=height), Grid(total=1000, workers=200)
        for slot in range(200):
            stage.screen(grid.event("started", 0.1, slot))
        stage.screen(grid.event("done", 0.2, 199, seconds=0.1))
        lines = stage.drawn()
        workers = [line for line in lines if line.lstrip().startswith("worker")]
        assert len(workers) == shown
        assert lines[-1] == f"and {200 - shown} more workers, {199 - shown} of them busy"


def test_failures_stand_above_the_bar_once_and_not_without_end():
    stage, grid = Stage(), Grid(total=100, workers=1)
    with stage.screen as shown:
        shown(grid.event("begin", 0.0))
        for i in range(50):
            shown(grid.event("started", i, 0))
            shown(grid.event("failed", i, 0, message=f"ValueError: [bold]number {i}[/bold]"))
    out = stage.console.file.getvalue()
    assert out.count("failed: sleep") == live._TOLD
    assert out.count("[bold]number 3[/bold]") == 1
    assert "number 30" not in out
    assert out.count("more failures are counted below") == 1
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1, "the cursor is hidden once and shown again"


def test_titles_draw_no_control_characters():
    stage = Stage()
    wild = Job(probe="sleep", args={"text": "a\x1b[31m\nb [red]c"})
    stage.screen(Event("started", Counts(1, 0, 0, 1, 0), 0.0, 0, wild))
    assert "\x1b" not in "".join(stage.drawn())
    assert "[red]c" in stage.drawn()[-1]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0.0 s"),
        (0.0001, "<1 ms"),
        (0.0354, "35 ms"),
        (0.0996, "0.1 s"),
        (1.25, "1.2 s"),
        (9.97, "10 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3 * 3600 + 125, "3 h 2 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
        (400 * 86400 + 3600, "400 d"),
        (math.nan, "unknown time"),
    ],
)
def test_times_for_people(seconds, said):
    assert span(seconds) == said


def test_amounts_and_rates_for_people():
    assert [amount(n) for n in (0, 1, 999, 1000, 12_345, 999_600, 3.4e9, 5e18)] == [
        "0 bytes", "1 byte", "999 bytes", "1.0 kB", "12 kB", "1.0 MB", "3.4 GB", "5,000 PB",
    ]  # fmt: skip
    assert [per_time(r) for r in (1234.0, 2.0, 0.5, 0.01, 1e-5)] == [
        "1,234 cells/s", "2.0 cells/s", "30 cells/min", "36 cells/h", "0.9 cells/day",
    ]  # fmt: skip
