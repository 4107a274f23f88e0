"""Runs a grid: gives missing cells to workers until every cell has a result or a recorded failure.

The driver keeps nothing that matters: what is done stands in the store, so it may be killed at any time and started again.
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.jobs import running
from workbench.jobs.engines.protocol import Engine, Reply
from workbench.jobs.events import Counts, Event
from workbench.jobs.grids import put_grid
from workbench.jobs.job import Job
from workbench.jobs.queue import CellQueue
from workbench.jobs.settings import DEFAULTS, settled
from workbench.jobs.store import JobStore, Unwritable

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.jobs.spec import Grid

_POLL = 0.2
_ASK_AGAIN = 0.5
_PACK = 500
_START = 1800.0
"""Seconds that a worker may take to start and to load a model where a time limit is set."""


@dataclass(frozen=True)
class GridRun:
    """What a run did. ``total = done + failed + left``; ``stood`` of the done cells were there before, ``computed`` are new,
    ``elsewhere`` came from another driver on the same store. ``failed`` holds keys. ``stopped`` says why cells are left."""

    name: str
    total: int
    stood: int
    computed: int
    elsewhere: int
    failed: tuple[str, ...]
    seconds: float
    stopped: str = ""

    @property
    def done(self) -> int:
        return self.stood + self.computed + self.elsewhere

    @property
    def left(self) -> int:
        return self.total - self.done - len(self.failed)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run; ``run`` says how far it came. The same call continues."""

    def __init__(self, run: GridRun) -> None:
        super().__init__(run.stopped)
        self.run = run


def run_jobs(
    grid: Any,
    store: JobStore | str | Path,
    *,
    workers: int | None = None,
    engine: str | None = None,
    threads: int | None = None,
    timeout: float | None = None,
    memory: int | str | None = None,
    device: str | None = None,
    attempts: int | None = None,
    address: str | None = None,
    retry: bool = False,
    watch: Callable[[Event], None] | None = None,
) -> GridRun:
    """Compute every cell of ``grid`` that has no result in ``store`` yet.

    ``grid`` is a spec file, a mapping, a list of mappings or jobs, or what ``read_grid`` gave. ``workers`` processes (one per
    GPU, or as many as ``threads`` fit on the cores) compute on ``engine`` ``local`` or ``ray`` (with ``address`` on that
    cluster). A cell may take ``timeout`` seconds, its model's loading aside, and ``memory`` bytes (``"4GB"``; its share of the
    machine by default). A cell whose worker died is tried ``attempts`` times in all. Cells that failed stay failed without
    ``retry``, those whose worker died aside. ``watch`` is called with every ``Event``.

    Tables do not depend on ``workers`` and ``engine``. ``threads`` can change the last bits of a number, and so can ``device``.
    Raises ``Unwritable`` if the store cannot be written, and ``Stopped`` after Ctrl-C or SIGTERM; what is done stays.
    """
    grid = job_grid(grid)
    given = {
        "workers": workers, "engine": engine, "threads": threads, "timeout": timeout, "memory": memory, "device": device,
        "attempts": attempts, "address": address,
    }  # fmt: skip
    settings = settled(
        {**DEFAULTS, **grid.run, **{name: value for name, value in given.items() if value is not None}}, grid
    )
    place = store if isinstance(store, JobStore) else JobStore(store)
    place.open_for_writing()
    put_grid(place, grid.name, grid.jobs)
    return _Driver(grid, place, settings, watch or (lambda event: None)).run(retry)


def job_grid(source: Any, *, name: str | None = None, overrides: Mapping[str, Any] | None = None) -> Grid:
    """The cells of a spec as they will run: read (``workbench.jobs.spec.read_grid``), checked (``check_grid``), and with the
    revision of every model filled in, which is part of their keys. ``source`` is a spec's path, a mapping, a list of mappings or
    jobs, or a grid."""
    from workbench.jobs.check import check_grid, pinned
    from workbench.jobs.spec import Grid, read_grid

    grid = source if isinstance(source, Grid) else read_grid(source, name=name, overrides=overrides)
    check_grid(grid)
    return pinned(grid)


class _Driver:
    def __init__(
        self, grid: Grid, store: JobStore, settings: Mapping[str, Any], watch: Callable[[Event], None]
    ) -> None:
        self.grid, self.store, self.settings, self.watch = grid, store, settings, watch
        self.began = time.perf_counter()
        self.busy: dict[int, tuple[Job | None, float]] = {}
        self.deaths: dict[str, int] = {}
        self.failed: dict[str, None] = {}
        self.timed_out: set[int] = set()
        self.others: set[str] = set()
        self.later: list[tuple[float, Job]] = []
        self.stood = self.computed = self.elsewhere = 0
        self.unpacked: list[str] = []
        self.engine: Engine | None = None

    def run(self, retry: bool) -> GridRun:
        from workbench.jobs.index import done_keys

        keys = {job.key for job in self.grid.jobs}
        done = done_keys(self.store) & keys
        self.stood = len(done)
        self.failed = dict.fromkeys(sorted(self._old_failures(keys - done, retry)))
        self.waiting = CellQueue(j for j in self.grid.jobs if j.key not in done and j.key not in self.failed)
        self._tell("begin")
        self._tell_of_damage(keys - done)
        self._tell_of_other_code(done)
        if not self.waiting:
            return self._end()
        try:
            with _sigterm_stops():
                self._loop()
        except KeyboardInterrupt:
            if self.engine is not None:
                self.engine.close()
            stopped = self._end("interrupted")
            raise Stopped(stopped) from None
        except BaseException:
            if self.engine is not None:
                self.engine.close()
            raise
        return self._end()

    def _old_failures(self, missing: set[str], retry: bool) -> set[str]:
        """Failures that stand; those to be tried again are forgotten."""
        failed = set(self.store.failed_keys()) & missing
        again = failed if retry else {key for key in failed if self.store.failure(key).get("kind") == "died"}
        self.store.forgive(again)
        return failed - again

    def _loop(self) -> None:
        self.engine = self._start()
        slots = range(self.engine.slots)
        while self.waiting or self.busy or self.later:
            self._ask_again()
            for slot in slots:
                if slot not in self.busy:
                    self._give(slot)
            for reply in self.engine.wait(_POLL):
                self._hear(reply)
            self._stop_overdue()
        if self.unpacked:
            self._pack(0)
            while self.busy:
                for reply in self.engine.wait(_POLL):
                    self._hear(reply)
        self.engine.close()

    def _start(self) -> Engine:
        s = self.settings
        slots = min(s["workers"], len(self.waiting))
        if s["engine"] == "ray":
            from workbench.jobs.engines.ray import RayEngine

            gpus = 1.0 if s["device"] == "cuda" else 0.0
            return RayEngine(slots, address=s["address"], cpus=float(s["threads"]), gpus=gpus, memory=s["memory"])
        from workbench.jobs.engines.local import LocalEngine

        return LocalEngine(slots, threads=s["threads"], gpus=s["gpus"])

    def _give(self, slot: int) -> None:
        assert self.engine is not None
        if len(self.unpacked) >= _PACK:
            self._pack(slot)
            return
        job = self.waiting.take(slot)
        if job is None:
            return
        self.busy[slot] = (job, time.monotonic())
        order = {
            "do": "cell",
            "store": str(self.store.path.absolute()),
            "job": job.dict(),
            "attempt": self.deaths.get(job.key, 0) + 1,
            **{name: self.settings[name] for name in ("threads", "device", "memory", "engine")},
        }
        self.engine.submit(slot, order)
        if job.key not in self.others:
            self._tell("started", slot, job)

    def _ask_again(self) -> None:
        """Cells that another driver had a while ago wait again: it may have finished or died."""
        now = time.monotonic()
        for when, job in self.later:
            if when <= now:
                self.waiting.put_back(job, last=True)
        self.later = [(when, job) for when, job in self.later if when > now]

    def _pack(self, slot: int) -> None:
        assert self.engine is not None
        self.busy[slot] = (None, time.monotonic())
        self.engine.submit(slot, {"do": "index", "store": str(self.store.path.absolute()), "keys": self.unpacked})
        self.unpacked = []

    def _hear(self, reply: Reply) -> None:
        job, _ = self.busy.pop(reply.slot)
        if reply.answer is None:
            self.waiting.forget(reply.slot)
            if job is not None:
                self._death(reply, job)
            return
        self.timed_out.discard(reply.slot)
        answer = reply.answer
        state, seconds = answer["state"], answer.get("seconds", 0.0)
        if state == "unwritable":
            raise Unwritable(answer["message"])
        if job is None:
            return
        if state == "elsewhere":
            if job.key not in self.others:
                self.others.add(job.key)
                self._tell("elsewhere", reply.slot, job)
            self.later.append((time.monotonic() + _ASK_AGAIN, job))
        elif state == "failed":
            self.failed[job.key] = None
            self._tell("failed", reply.slot, job, seconds, answer["message"])
        else:
            if state == "done":
                self.computed += 1
            else:
                self.elsewhere += 1
            self.unpacked.append(job.key)
            self._tell("done", reply.slot, job, seconds)

    def _death(self, reply: Reply, job: Job) -> None:
        """A worker died under a cell: another try, or a failure with all that is known."""
        words = running.last_words(self.store, job.key)
        late, limit = reply.slot in self.timed_out, self.settings["timeout"]
        self.timed_out.discard(reply.slot)
        self.deaths[job.key] = tries = self.deaths.get(job.key, 0) + 1
        if self.store.is_done(job.key):  # it died after the rename
            self.computed += 1
            self.unpacked.append(job.key)
            self._tell("done", reply.slot, job)
            return
        if late:
            kind, message = "timeout", f"took longer than {limit:g} s and was ended"
        elif words.get("ended") == "memory":
            kind = "memory"
            message = (
                f"used {words['used'] / 1e9:.2f} GB of the {words['limit'] / 1e9:.2f} GB that a worker may use; give more "
                "memory, or fewer workers"
            )
        else:
            kind, message = "died", f"its worker died ({reply.died}) in {tries} of {tries} tries"
            if tries < self.settings["attempts"]:
                self.waiting.put_back(job)
                self._tell("lost", reply.slot, job, message=f"its worker died ({reply.died}); tried again")
                return
        self.store.fail(
            job, {"kind": kind, "message": message, "traceback": "", "attempts": tries, "host": words.get("host", "")}
        )
        self.failed[job.key] = None
        self._tell("failed", reply.slot, job, message=message)

    def _stop_overdue(self) -> None:
        """End workers whose cell takes too long, counted from when the worker says that it began."""
        limit = self.settings["timeout"]
        if limit is None or self.engine is None:
            return
        now = time.monotonic()
        for slot, (job, given) in self.busy.items():
            if job is None or slot in self.timed_out or now - given < limit:
                continue
            lasted = running.since(self.store, job.key)
            if now - given > _START if lasted is None else lasted > limit:
                self.timed_out.add(slot)
                self.engine.kill(slot)

    def _tell_of_damage(self, missing: set[str]) -> None:
        spoiled = sorted(missing & set(self.store.keys()))
        if spoiled:
            said = f"{len(spoiled):,} damaged cells are computed again; the first: {self.store.damage(spoiled[0])}"
            self._tell("note", message=said)

    def _tell_of_other_code(self, done: set[str]) -> None:
        """Cells of one grid that different code computed are not told apart by their keys: say so."""
        if not done:
            return
        from workbench.jobs.index import sql
        from workbench.jobs.revisions import code_version

        with warnings.catch_warnings():  # of damaged cells, which this run computes again
            warnings.simplefilter("ignore")
            known = sql(self.store, "SELECT key, code_digest FROM cells")
        other = int((known["key"].isin(done) & (known["code_digest"] != code_version()["digest"])).sum())
        if other:
            said = (
                f"{other:,} of the cells that stand were computed by other code than this: see code_digest in `cells`"
            )
            self._tell("note", message=said)

    def _counts(self) -> Counts:
        at_work = sum(job is not None for job, _ in self.busy.values())
        done = self.stood + self.computed + self.elsewhere
        return Counts(len(self.grid.jobs), done, len(self.failed), at_work, self.stood)

    def _tell(
        self, kind: str, slot: int | None = None, job: Job | None = None, seconds: float = 0.0, message: str = ""
    ) -> None:
        self.watch(Event(kind, self._counts(), time.perf_counter() - self.began, slot, job, seconds, message))

    def _end(self, stopped: str = "") -> GridRun:
        self.busy.clear()
        self._tell("end", message=stopped)
        return GridRun(
            self.grid.name,
            len(self.grid.jobs),
            self.stood,
            self.computed,
            self.elsewhere,
            tuple(self.failed),
            time.perf_counter() - self.began,
            stopped,
        )


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """SIGTERM as Ctrl-C, where signals can be handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
