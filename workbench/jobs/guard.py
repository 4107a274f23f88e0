"""A worker's guard: a thread that ends the process when it outlives its driver or takes more memory than it may."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

MEMORY_EXIT = 77
_EVERY = 0.1


class Guard(threading.Thread):
    """Watches this process ten times a second from ``start()`` on.

    ``parent`` is the process that must live on (None: any). ``limit`` is the most resident memory in bytes, None for no
    limit. ``last_words(used)`` is called just before the process ends itself for its memory. ``peak`` is the largest
    resident memory in bytes since ``reset()``.
    """

    def __init__(self, parent: int | None, last_words: Callable[[int], None]) -> None:
        super().__init__(daemon=True, name="guard")
        self.parent, self.last_words = parent, last_words
        self.limit: int | None = None
        self.peak = 0

    def run(self) -> None:
        while True:
            if self.parent is not None and os.getppid() != self.parent:
                os._exit(1)
            used = self.measure()
            if self.limit is not None and used > self.limit:
                try:
                    self.last_words(used)
                finally:
                    os._exit(MEMORY_EXIT)
            time.sleep(_EVERY)

    def reset(self) -> None:
        self.peak = 0
        self.measure()

    def measure(self) -> int:
        """Resident memory now, in bytes."""
        used = resident()
        self.peak = max(self.peak, used)
        return used


def resident() -> int:
    """Resident memory of this process in bytes."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import psutil

        return psutil.Process().memory_info().rss


def total_memory() -> int:
    """Bytes of memory that this machine, or the control group around this process, has."""
    import psutil

    found = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            found = min(found, int(text))
    return found


def die_first() -> None:
    """Ask the kernel to end this process before others when memory runs out, so that the driver lives."""
    try:
        Path("/proc/self/oom_score_adj").write_text("500")
    except OSError:
        return
