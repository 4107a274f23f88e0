"""The worker behind the pages: one warm process that computes cells in the order they are asked for.

A page never computes anything heavy itself. It names a ``Job``; the cell's folder in the store is the answer, so a page that is
opened again, by its link or by another person, finds it there. A worker that dies takes one cell with it, and is told so.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workbench.errors import WorkbenchError
from workbench.jobs import running
from workbench.jobs.engines.local import LocalEngine
from workbench.jobs.guard import total_memory
from workbench.jobs.job import Job
from workbench.jobs.store import JobStore, Unwritable

_POLL = 0.05
_MEMORY = 0.8
"""The part of the machine's memory that the worker may take."""
_AGAIN = 1.0
_STOPPED = "it was stopped from the page"


@dataclass(frozen=True)
class State:
    """How far a cell is: ``kind`` is ``done``, ``failed``, ``running`` (for ``seconds``), ``waiting`` (behind ``ahead``
    others) or ``missing``. ``message`` says why it failed. ``elsewhere``: another process computes it, which this one cannot
    stop."""

    kind: str
    message: str = ""
    seconds: float = 0.0
    ahead: int = 0
    elsewhere: bool = False


class Work:
    """The queue and its worker, which may take ``memory`` bytes. Safe to call from several sessions at once."""

    def __init__(self, store: JobStore, *, engine: Callable[[], Any] | None = None, memory: int | None = None) -> None:
        self.store = store
        self._engine = (engine or (lambda: LocalEngine(1, threads=os.cpu_count() or 1)))()
        self._memory = memory or int(_MEMORY * total_memory())
        self._waiting: deque[Job] = deque()
        self._now: tuple[Job, float] | None = None
        self._said: dict[str, str] = {}
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        self._asked = threading.Event()
        self._open = True
        self._thread = threading.Thread(target=self._loop, name="work", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Compute ``job`` unless it is done, failed before, or on its way. Raises ``Unwritable`` for a store that cannot be
        written."""
        if self.state(job.key).kind != "missing":
            return
        self.store.open_for_writing()
        with self._lock:
            if not self._on_its_way(job.key):
                self._waiting.append(job)
        self._asked.set()

    def retry(self, job: Job) -> None:
        """Forget that ``job`` failed and compute it."""
        self.store.forgive([job.key])
        self._said.pop(job.key, None)
        self.submit(job)

    def cancel(self, key: str) -> None:
        """Take a cell out of the queue; if it is being computed, end its worker. The cell then counts as failed until it is
        tried again, so that no page starts it once more by itself."""
        with self._lock:
            if self._now is not None and self._now[0].key == key:
                self._cancelled.add(key)
                self._engine.kill(0)  # under the lock: the worker of the next cell must not be the one that ends
            elif any(job.key == key for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if job.key != key)
                self._said[key] = _STOPPED

    def state(self, key: str) -> State:
        """How far the cell is."""
        if self.store.is_done(key):
            return State("done")
        with self._lock:
            if self._now is not None and self._now[0].key == key:
                return State("running", seconds=time.monotonic() - self._now[1])
            for ahead, job in enumerate(self._waiting):
                if job.key == key:
                    return State("waiting", ahead=ahead + (self._now is not None))
            if key in self._said:
                return State("failed", self._said[key])
        try:
            record = self.store.failure(key)
        except NotADirectoryError:  # the store is a file: ``submit`` refuses it
            return State("missing")
        except WorkbenchError:  # none, or a damaged one, which the next try replaces
            if running.is_taken(self.store, key):
                return State("running", seconds=running.since(self.store, key) or 0.0, elsewhere=True)
            return State("done" if self.store.is_done(key) else "missing")
        return State("failed", str(record.get("message", "nothing is known about why")))

    def queue(self) -> list[Job]:
        """The cell that is being computed, if any, and those that wait."""
        with self._lock:
            return [*([self._now[0]] if self._now else []), *self._waiting]

    def close(self) -> None:
        """End the worker."""
        self._open = False
        self._engine.close()

    def _on_its_way(self, key: str) -> bool:
        return (self._now is not None and self._now[0].key == key) or any(job.key == key for job in self._waiting)

    def _loop(self) -> None:
        while self._open:
            try:
                self._turn()
            except Exception as error:  # this thread must live: every later cell needs it
                traceback.print_exc(file=sys.stderr)
                if self._now is not None:
                    self._end(self._now[0], f"the queue met an error of its own: {type(error).__name__}: {error}")
                time.sleep(_POLL)

    def _turn(self) -> None:
        if self._now is None and not self._next():
            self._asked.wait(timeout=_AGAIN)
            return
        for reply in self._engine.wait(_POLL):
            self._hear(reply)

    def _next(self) -> bool:
        """Give the worker the cell that waits longest; whether there was one."""
        with self._lock:
            if not self._waiting:
                self._asked.clear()
                return False
            job = self._waiting.popleft()
            order = {
                "do": "cell",
                "store": str(self.store.path.absolute()),
                "job": job.dict(),
                "attempt": 1,
                "threads": os.cpu_count() or 1,
                "device": "cpu",
                "memory": self._memory,
                "engine": "app",
            }
            try:
                self._engine.submit(0, order)
                self._now = (job, time.monotonic())
            except Exception as error:
                self._said[job.key] = f"the worker did not start: {type(error).__name__}: {error}"
        return True

    def _hear(self, reply: Any) -> None:
        if self._now is None:
            return
        job = self._now[0]
        if reply.answer is not None:  # of a cell that is computed elsewhere its lock tells the state from now on
            self._end(job, reply.answer.get("message", "") if reply.answer["state"] == "unwritable" else "")
            return
        words = running.last_words(self.store, job.key)
        if job.key in self._cancelled:
            self._end(job, _STOPPED)
        elif words.get("ended") == "memory":
            limit = (words.get("limit") or 0) / 2**30
            self._record(job, "memory", f"the worker ended itself: it needed more than {limit:.1f} GB of memory")
        else:
            self._record(job, "died", f"the worker died: {reply.died or 'killed'}; nothing that was stored is lost")

    def _record(self, job: Job, kind: str, message: str) -> None:
        try:
            self.store.fail(job, {"kind": kind, "message": message, "attempts": 1})
            self._end(job, "")
        except Unwritable as error:
            self._end(job, f"{message}; and {error}")

    def _end(self, job: Job, message: str) -> None:
        """The cell is over. ``message``: why it did not come to be, where no record in the store says so."""
        with self._lock:
            if message:
                self._said[job.key] = message
            self._now = None
            self._cancelled.discard(job.key)
