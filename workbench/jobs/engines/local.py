"""Worker processes of this machine: one loky executor with one process per slot.

An executor that loses its process is broken as a whole, so each slot has its own: a death ends one order, and which one is
known.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from workbench.jobs.engines.protocol import Order, Reply
from workbench.jobs.worker import work

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class LocalEngine:
    """``slots`` processes with ``threads`` threads each. With ``gpus``, slot i sees only GPU ``i % gpus``."""

    name = "local"

    def __init__(self, slots: int, *, threads: int = 1, gpus: int = 0) -> None:
        self.slots = slots
        self._threads, self._gpus = threads, gpus
        self._executors: dict[int, Any] = {}
        self._ended: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._open = True

    def submit(self, slot: int, order: Order) -> None:
        """Hand the order to the slot's process, which is started if need be."""
        order = {**order, "parent": os.getpid()}
        for attempt in (0, 1):
            try:
                with _no_interrupts() if slot not in self._executors else contextlib.nullcontext():
                    future = self._executor(slot).submit(work, order)
                break
            except Exception:  # the idle process died: loky tells on the next call
                self._drop(slot)
                if attempt:
                    raise
        future.add_done_callback(partial(self._note, slot))

    def wait(self, timeout: float) -> list[Reply]:
        """See ``Engine.wait``."""
        found = []
        try:
            found.append(self._ended.get(timeout=timeout))
            while True:
                found.append(self._ended.get_nowait())
        except queue.Empty:
            pass
        return [self._reply(slot, future) for slot, future in found]

    def kill(self, slot: int) -> None:
        """See ``Engine.kill``."""
        executor = self._executors.pop(slot, None)
        if executor is not None:
            executor.shutdown(wait=False, kill_workers=True)

    def close(self) -> None:
        """See ``Engine.close``."""
        self._open = False
        ends = [
            threading.Thread(target=executor.shutdown, kwargs={"wait": True, "kill_workers": True}, daemon=True)
            for executor in self._executors.values()
        ]
        self._executors.clear()
        for end in ends:
            end.start()
        for end in ends:
            end.join(timeout=10)

    def pids(self) -> dict[int, list[int]]:
        """Process numbers by slot."""
        return {slot: list(executor._processes) for slot, executor in self._executors.items()}

    def _executor(self, slot: int) -> Any:
        if slot not in self._executors:
            from loky import ProcessPoolExecutor

            self._executors[slot] = ProcessPoolExecutor(
                max_workers=1, timeout=None, env=self._environment(slot), initializer=_keep_large_processes
            )
        return self._executors[slot]

    def _environment(self, slot: int) -> Mapping[str, str]:
        found = {name: str(self._threads) for name in _THREADS} | {"TOKENIZERS_PARALLELISM": "false"}
        if self._gpus:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = seen.split(",") if seen else [str(i) for i in range(self._gpus)]
            found |= {"CUDA_VISIBLE_DEVICES": names[slot % self._gpus], "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        return found

    def _note(self, slot: int, future: Any) -> None:
        self._ended.put((slot, future))

    def _reply(self, slot: int, future: Any) -> Reply:
        error = None if future.cancelled() else future.exception()
        if error is None and not future.cancelled():
            return Reply(slot, future.result())
        self._drop(slot)
        codes = re.findall(r"(SIG\w+|EXIT)\((-?\d+)\)", str(error))
        how = ", ".join(name if name != "EXIT" else f"exit code {number}" for name, number in codes)
        kind = type(error).__name__ if error is not None else "cancelled"
        return Reply(slot, None, how or ("killed" if "Shutdown" in kind or error is None else f"{kind}: {error}"))

    def _drop(self, slot: int) -> None:
        executor = self._executors.pop(slot, None)
        if executor is not None:
            threading.Thread(
                target=executor.shutdown, kwargs={"wait": False, "kill_workers": True}, daemon=True
            ).start()


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes that start in this block ignore Ctrl-C from their first moment; it is the driver's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _keep_large_processes() -> None:
    """loky restarts a process that grew since its first call; ours grows when it loads the next model, and has its own guard."""
    import loky.process_executor

    loky.process_executor._USE_PSUTIL = False
