"""Actors of a Ray cluster, one per slot: Ray places them, gives them their share of the machines and tells when they die.

A slot whose actor died gets a fresh one with its next order, on any node that has room. Ray's own restarts (``max_restarts``)
are not used: while an actor restarts Ray refuses its orders without running them, and it reports the death of one that it
may restart only after a second of waiting for better news.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.jobs.engines.protocol import Order, Reply
from workbench.jobs.engines.ray_cluster import Cluster, Share, last_line

PATIENCE = 120.0
"""Seconds without a worker that starts, while some have yet to, before somebody is told."""
_STARTS = 3
"""Workers in a row that may die before they are there."""


class RayEngine:
    """``slots`` actors with ``cpus`` threads, ``gpus`` GPUs (a share of one if below 1) and ``memory`` bytes each.

    ``address`` is None to start Ray on this machine for as long as the engine lives, ``auto`` for the cluster this machine
    is part of, or ``host:port`` of a cluster's head. ``memory`` only says where an actor fits; Ray does not enforce it.
    ``work`` is the ``module:function`` that carries out orders. Refuses a cluster that cannot hold all slots.

    Workers run in the driver's folder and find its modules, so a cluster's nodes need both under the same path.
    """

    name = "ray"

    def __init__(
        self,
        slots: int,
        *,
        address: str | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
        memory: int | None = None,
        work: str = "workbench.jobs.worker:work",
    ) -> None:
        if slots < 1:
            raise WorkbenchError(f"a Ray engine has at least one slot; got {slots}")
        self.slots = slots
        self._share = Share(cpus, gpus, memory)
        self._settings = {"work": work, "cwd": os.getcwd(), "path": _own_path(), "env": self._share.environment()}
        self._slots = {slot: _Slot() for slot in range(slots)}
        self._failed_starts = 0
        self._last_start = 0.0
        self._told = False
        self._heard: queue.SimpleQueue[tuple[str, int, Any, Any]] = queue.SimpleQueue()
        self._cluster = Cluster(slots, self._share, address)

    def submit(self, slot: int, order: Order) -> None:
        """Take the order for the slot's actor, which is made if need be. It is sent once the actor has answered, so that no
        order is lost because a worker does not start."""
        at = self._slots[slot]
        if at.order is not None:
            raise WorkbenchError(f"slot {slot} of the Ray engine has an order already; wait for its reply")
        at.order, at.serial = dict(order), at.serial + 1
        if at.actor is None:
            self._start(slot)
        elif at.place is not None:
            self._send(slot)

    def wait(self, timeout: float) -> list[Reply]:
        """See ``Engine.wait``. Raises when workers cannot start, or when all orders have waited ``PATIENCE`` seconds for theirs
        to start: neither is the fault of a cell."""
        deadline = time.monotonic() + timeout
        found: list[Reply] = []
        with contextlib.suppress(queue.Empty):
            while not found:
                found += self._hear(*self._heard.get(timeout=max(0.0, deadline - time.monotonic())))
            while True:
                found += self._hear(*self._heard.get_nowait())
        if not found:
            self._complain_of_waiting()
        return found

    def kill(self, slot: int) -> None:
        """See ``Engine.kill``. Ray kills the process from outside its interpreter, so that a stuck one dies as well."""
        if self._slots[slot].order is not None:  # first, so that the news of the death comes after it
            self._heard.put(("killed", slot, self._slots[slot].serial, None))
        self._drop(slot)

    def close(self) -> None:
        """See ``Engine.close``. Also ends the Ray that this engine started."""
        for slot in self._slots:
            self._drop(slot)
        self._cluster.leave()

    def pids(self) -> dict[int, list[int]]:
        """Process numbers by slot, each on the machine where it runs; slots without a started worker are left out."""
        return {slot: [at.place["pid"]] for slot, at in self._slots.items() if at.place is not None}

    def _start(self, slot: int) -> None:
        import ray

        at = self._slots[slot]
        worker = ray.remote(_Worker).options(max_restarts=0, max_task_retries=0, **self._share.options())
        at.actor, at.since = worker.remote(self._settings), time.monotonic()
        self._listen(at.actor.place.remote(), "placed", slot, at.actor)

    def _send(self, slot: int) -> None:
        at = self._slots[slot]
        self._listen(at.actor.work.remote(at.order), "ended", slot, at.serial)

    def _listen(self, result: Any, what: str, slot: int, which: Any) -> None:
        result.future().add_done_callback(lambda future: self._heard.put((what, slot, which, future)))

    def _hear(self, what: str, slot: int, which: Any, future: Any) -> list[Reply]:
        """The replies that come of one event: none of news about an actor that was killed, or an order that was answered."""
        at = self._slots[slot]
        if what == "placed":
            if which is at.actor:
                self._placed(slot, future)
            return []
        if at.order is None or which != at.serial:
            return []
        at.order = None
        if what == "killed":
            return [Reply(slot, None, "killed")]
        error = future.exception()
        if error is None:
            return [Reply(slot, future.result())]
        self._drop(slot)
        return [Reply(slot, None, _how(error))]

    def _placed(self, slot: int, future: Any) -> None:
        """An actor has answered for the first time, or never will."""
        at = self._slots[slot]
        error = future.exception()
        if error is None:
            at.place, self._failed_starts, self._last_start = future.result(), 0, time.monotonic()
            if at.order is not None:
                self._send(slot)
            return
        self._drop(slot)
        self._failed_starts += 1
        if getattr(error, "actor_init_failed", False) or self._failed_starts == _STARTS:
            raise WorkbenchError(f"a Ray worker cannot start: {last_line(error)}")
        if at.order is not None:
            self._start(slot)

    def _drop(self, slot: int) -> None:
        """Forget an actor and make sure that it is gone, even if only the connection to it is."""
        at = self._slots[slot]
        actor, at.actor, at.place = at.actor, None, None
        if actor is not None:
            _kill(actor)

    def _complain_of_waiting(self) -> None:
        busy = [at for at in self._slots.values() if at.order is not None]
        late = [at for at in busy if at.place is None and time.monotonic() - max(at.since, self._last_start) > PATIENCE]
        if not late:
            return
        said = f"{len(late)} of {self.slots} Ray workers do not start since {PATIENCE:g} s; there are {self._cluster.room()}"
        if len(late) == len(busy):
            raise WorkbenchError(f"{said}; run again when there is room, or ask for fewer or smaller workers")
        if not self._told:
            self._told = True
            warnings.warn(said, stacklevel=2)


@dataclass
class _Slot:
    """``place`` is None until the actor has answered; ``since`` is when it was asked for. ``order`` is None without one."""

    actor: Any = None
    place: Mapping[str, Any] | None = None
    since: float = 0.0
    order: dict[str, Any] | None = None
    serial: int = 0


class _Worker:
    """The actor of a slot: makes its process ready, then carries out orders."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import importlib

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
        os.environ.update(settings["env"])  # before anything that counts threads is imported
        try:
            os.chdir(settings["cwd"])
        except OSError as error:
            host = socket.gethostname()
            raise OSError(
                f"node {host} has no folder {settings['cwd']} ({error.strerror}); all nodes need it"
            ) from None
        sys.path[:0] = [part for part in settings["path"] if part not in sys.path]
        module, _, function = settings["work"].partition(":")
        self._work = getattr(importlib.import_module(module), function)

    def place(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "host": socket.gethostname()}

    def work(self, order: dict[str, Any]) -> dict[str, Any]:
        return self._work(order)


def _own_path() -> list[str]:
    """Where this process finds modules that are not installed with Python: the same folders for the workers."""
    installed = tuple(str(Path(prefix).resolve()) + os.sep for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix})
    found = [os.path.abspath(part) if part else os.getcwd() for part in ["", *sys.path]]
    return [p for p in dict.fromkeys(found) if os.path.exists(p) and not str(Path(p).resolve()).startswith(installed)]


def _kill(actor: Any) -> None:
    import ray

    if ray.is_initialized():  # else Ray would join whatever cluster it finds
        with contextlib.suppress(Exception):  # it is gone already, or the whole cluster is
            ray.kill(actor)


def _how(error: BaseException) -> str:
    """How a worker ended, in a few words."""
    text, kind = str(error), type(error).__name__
    if code := re.search(r"exit code (-?\d+)", text):
        return f"exit code {code[1]}"
    if "node has died" in text or "node was terminated" in text or kind == "NodeDiedError":
        return "its node died"
    if kind == "OutOfMemoryError" or "memory pressure" in text:
        return "killed by Ray, as its node ran out of memory"
    if kind == "ActorUnavailableError":
        return "the connection to it was lost"
    if "worker process has died" in text:
        return "its process was killed or crashed"
    return f"{type(getattr(error, 'cause', None) or error).__name__}: {last_line(error)}"
