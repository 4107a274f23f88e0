"""What a person or a program sees of a running grid: a view on a terminal, plain lines elsewhere, or JSON lines."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from workbench.apps.terminal import stderr, to_json

if TYPE_CHECKING:
    from workbench.jobs.events import Counts, Event

WORKERS_SHOWN = 20
REFRESH = 0.2
"""Seconds between two drawings on a terminal, however many events come."""
LINE_EVERY = 5.0
"""Seconds between two lines of progress where there is no terminal."""
_MARGIN = 4
"""Columns left free at the right, so that the ``^C`` of a terminal does not begin a new line, which would shift the view."""
_TOLD = 20
"""Failures told one by one above the bar of a terminal; the bar counts all."""
_HALF_LIFE = 12
"""Cells after which an older one counts half in the pace."""
_FIRST = 0.1
"""Weight of a worker's first cell, which starts the process and loads the model."""


class View(Protocol):
    """Gets every event of a run, between ``__enter__`` and ``__exit__``."""

    def __call__(self, event: Event) -> None: ...

    def __enter__(self) -> View: ...

    def __exit__(self, *error: object) -> None: ...


def view(name: str, as_json: bool = False) -> View:
    """The view that fits: JSON lines on stdout, a live view where stderr is a terminal, plain lines on stderr elsewhere."""
    if as_json:
        return JsonLines()
    console = stderr()
    return Screen(name, console) if console.is_interactive else Lines(name)


class Pace:
    """How long a cell keeps a worker, as a mean in which recent cells weigh more, and what follows for the rest."""

    def __init__(self) -> None:
        self._started: dict[int, float] = {}
        self._seen: set[int] = set()
        self._sum = self._weight = 0.0
        self._busy = 0

    def see(self, event: Event) -> None:
        slot = event.slot
        if slot is None:
            return
        if event.kind == "started":
            self._started[slot] = event.elapsed
            self._busy = max(1, event.counts.running)
        elif event.kind == "elsewhere":
            self._started.pop(slot, None)
        elif event.kind in ("done", "failed", "lost") and slot in self._started:
            took = event.elapsed - self._started.pop(slot)
            weight = 1.0 if slot in self._seen else _FIRST
            self._seen.add(slot)
            keep = 0.5 ** (weight / (_HALF_LIFE + 2 * self._busy))
            self._sum = keep * self._sum + weight * took
            self._weight = keep * self._weight + weight

    @property
    def seconds(self) -> float:
        """Seconds that a cell keeps a worker; NaN before the first has ended."""
        return self._sum / self._weight if self._weight else math.nan

    @property
    def rate(self) -> float:
        """Cells per second of all workers together; NaN before the first cell has ended."""
        return self._busy / max(self.seconds, 1e-6)

    def left(self, counts: Counts, now: float) -> float:
        """Seconds to the end of the grid, ``now`` seconds after it began; NaN before the first cell has ended."""
        each = self.seconds
        if math.isnan(each):
            return math.nan
        rests = [max(0.0, each - (now - since)) for since in self._started.values()]
        shared = (counts.remaining * each + sum(rests)) / max(1, self._busy)
        return max([shared, *rests, each if counts.remaining else 0.0])


class JsonLines:
    """One JSON object per event on stdout, flushed. The end comes from ``end``, which knows more than the event.

    A reader that goes away is no reason to stop the grid: it is told on stderr, and what is computed stands in the store.
    """

    def __init__(self, out: IO[str] | None = None) -> None:
        self._out = out or sys.stdout
        self._gone = False
        self._last: dict[str, Any] = {"event": "end"}
        self.begun = False

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def __call__(self, event: Event) -> None:
        self.begun = True
        if event.kind == "end":
            self._last = event.dict()
        else:
            self._write(json.dumps(event.dict(), allow_nan=False))

    def end(self, summary: Mapping[str, Any]) -> None:
        """The last line: ``{"event": "end", ...}`` with the summary of the run."""
        self._write(to_json({**self._last, **summary}))

    def _write(self, line: str) -> None:
        if self._gone:
            return
        try:
            self._out.write(line + "\n")
            self._out.flush()
        except BrokenPipeError:
            self._gone = True
            print("workbench: nobody reads the events any more; the grid goes on", file=sys.stderr)


class Lines:
    """Plain lines: the begin, a line of progress every few seconds, every failure once, the end."""

    def __init__(self, name: str, out: IO[str] | None = None, every: float = LINE_EVERY) -> None:
        self._name, self._out, self._every = name, out or sys.stderr, every
        self._pace = Pace()
        self._next = every

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def __call__(self, event: Event) -> None:
        self._pace.see(event)
        if event.kind == "begin":
            self._say(f"{self._name}: {begun(event.counts)}")
        elif event.kind == "end":
            self._say(f"{self._name}: {counted(event.counts)} after {span(event.elapsed)}")
        elif told := remark(event):
            self._say(told)
        if event.kind != "end" and event.elapsed >= self._next:
            self._next = event.elapsed + self._every
            self._say(f"{self._name}: {counted(event.counts)}{_outlook(self._pace, event.counts, event.elapsed)}")

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # whoever read the progress has gone; the grid goes on
            print(line, file=self._out, flush=True)


class Screen:
    """The live view of a terminal: a bar, the outlook, and what every worker does. Drawn a few times a second by a thread of its
    own, so that an event costs a few microseconds; nothing of it is left on the terminal but the failures."""

    def __init__(self, name: str, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._console, self._clock = name, console, clock
        self._lock = threading.Lock()
        self._pace = Pace()
        self._counts: Counts | None = None
        self._begun = clock()
        self._workers: dict[int, tuple[str, float]] = {}
        self._pending: list[str] = []
        self._failures = 0
        self._over = threading.Event()
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, get_renderable=self._draw
        )
        self._thread = threading.Thread(target=self._keep_drawing, name="live view", daemon=True)

    def __enter__(self) -> Screen:
        self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # the terminal itself may have gone
            self._tell()
            self._live.stop()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._pace.see(event)
            self._counts = event.counts
            if event.kind == "begin":
                self._begun = self._clock() - event.elapsed
            if event.slot is not None:
                doing = event.job.title if event.kind == "started" and event.job is not None else ""
                self._workers[event.slot] = (flat(doing), event.elapsed)
            if told := remark(event):
                self._failures += event.kind in ("failed", "lost")
                if event.kind == "note" or self._failures <= _TOLD:
                    self._pending.append(told)
                elif self._failures == _TOLD + 1:
                    self._pending.append("more failures are counted below and told by: workbench jobs status")

    def _keep_drawing(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over.wait(REFRESH):
                self._tell()
                self._live.refresh()

    def _tell(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        if pending:
            self._console.print(Text("\n".join(pending)), soft_wrap=True)

    def _draw(self) -> RenderableType:
        with self._lock:
            if self._counts is None:
                return Text(f"{self._name}: starting")
            counts, now = self._counts, self._clock() - self._begun
            outlook = _outlook(self._pace, counts, now)
            workers = sorted(self._workers.items())
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        ended = counts.done + counts.failed
        share = ProgressBar(total=max(1, counts.total), completed=ended if counts.total else 1, style="bar.back")
        failed = f", {counts.failed:,} failed" if counts.failed else ""
        bar.add_row(Text(self._name, style="bold"), share, Text(f"{counts.done:,} of {counts.total:,} done{failed}"))
        rest = Text(
            f"{counts.running:,} running, {counts.remaining:,} remaining{outlook}, {span(now)} so far", no_wrap=True
        )
        rest.overflow = "ellipsis"
        whole = Group(bar, rest, *self._rows(workers, now))
        return Constrain(whole, max(8, self._console.width - _MARGIN))

    def _rows(self, workers: list[tuple[int, tuple[str, float]]], now: float) -> list[RenderableType]:
        room = max(1, min(WORKERS_SHOWN, self._console.size.height - 5))
        shown = workers if len(workers) <= room else workers[: max(1, room - 1)]
        rows = Table.grid(padding=(0, 1), expand=True)
        rows.add_column(justify="right", style="dim", no_wrap=True)
        rows.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        rows.add_column(justify="right", no_wrap=True)
        for slot, (doing, since) in shown:
            rows.add_row(
                Text(f"worker {slot}"), Text(doing or "idle", style="" if doing else "dim"), span(max(0.0, now - since))
            )
        hidden = workers[len(shown) :]
        busy = sum(bool(doing) for _, (doing, _) in hidden)
        more = [Text(f"and {len(hidden):,} more workers, {busy:,} of them busy", style="dim")] if hidden else []
        return [rows, *more] if workers else []


def begun(counts: Counts) -> str:
    stood = f", {counts.stood:,} done before" if counts.stood else ""
    failed = f", {counts.failed:,} failed before" if counts.failed else ""
    to_do = counts.remaining + counts.running
    return f"{plural(counts.total, 'cell')}{stood}{failed}, " + (
        f"{to_do:,} to compute" if to_do else "nothing to compute"
    )


def counted(counts: Counts) -> str:
    """``7 of 16 done, 1 failed, 4 running, 4 remaining``; what is zero is left out, but for the first."""
    rest = (("failed", counts.failed), ("running", counts.running), ("remaining", counts.remaining))
    return ", ".join([f"{counts.done:,} of {counts.total:,} done", *(f"{n:,} {word}" for word, n in rest if n)])


def remark(event: Event) -> str:
    """The line that an event deserves by itself, in whichever view; empty for most."""
    first = flat((event.message.splitlines() or [""])[0])
    title = flat(event.job.title) if event.job is not None else "a cell"
    if event.kind == "failed":
        return f"failed: {title}: {first}"
    if event.kind == "lost":
        return f"lost: {title}: {first}"
    return first if event.kind == "note" else ""


def _outlook(pace: Pace, counts: Counts, now: float) -> str:
    left = pace.left(counts, now)
    if math.isnan(left) or not (counts.remaining or counts.running):
        return ""
    return f", {per_time(pace.rate)}, about {span(left)} left"


def span(seconds: float) -> str:
    """A time for people: ``35 ms``, ``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    if math.isnan(seconds):
        return "unknown time"
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.0005 else "<1 ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, small, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest and whole < 100 * size else "")
    return f"{whole} s"


def amount(count: float) -> str:
    """Bytes for people: ``850 bytes``, ``12 kB``, ``3.4 MB``."""
    if math.isnan(count):
        return "unknown size"
    if count < 1000:
        return plural(round(count), "byte")
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        count /= 1000
        if count < 999.5 or unit == "PB":
            return f"{count:.1f} {unit}" if count < 9.95 else f"{count:,.0f} {unit}"
    raise AssertionError


def per_time(rate: float) -> str:
    """A rate in the unit that makes it at least one: ``12 cells/s``, ``4.1 cells/min``, ``2.3 cells/h``."""
    for factor, unit in ((1, "s"), (60, "min"), (3600, "h"), (86400, "day")):
        if rate * factor >= 1 or unit == "day":
            number = rate * factor
            return f"{number:,.0f} cells/{unit}" if number >= 9.95 else f"{number:.1f} cells/{unit}"
    raise AssertionError


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def flat(text: str) -> str:
    """One line without control characters: a title may hold whatever the spec says."""
    return "".join(c if c.isprintable() else " " for c in text)
