"""What a running grid tells whoever watches it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from workbench.jobs.job import Job

KINDS = ("begin", "started", "done", "failed", "lost", "elsewhere", "note", "end")
"""``lost``: the worker died under the cell, which will be tried again. ``elsewhere``: another driver has or had it. ``note``: a
remark for the person."""


@dataclass(frozen=True)
class Counts:
    """Cells of the grid: ``total = done + failed + running + remaining``. ``stood`` of the done ones were there before."""

    total: int
    done: int
    failed: int
    running: int
    stood: int

    @property
    def remaining(self) -> int:
        return self.total - self.done - self.failed - self.running


@dataclass(frozen=True)
class Event:
    """One thing that happened, ``elapsed`` seconds after the run began. ``seconds`` is the time of the cell itself."""

    kind: str
    counts: Counts
    elapsed: float
    slot: int | None = None
    job: Job | None = None
    seconds: float = 0.0
    message: str = ""

    def dict(self) -> dict[str, Any]:
        """Plain JSON: the job as its key and title."""
        counts = {**asdict(self.counts), "remaining": self.counts.remaining}
        found = {"event": self.kind, "elapsed": round(self.elapsed, 3), "counts": counts}
        if self.job is not None:
            found |= {"key": self.job.key, "job": self.job.dict(), "title": self.job.title}
        if self.kind in ("done", "failed", "lost"):
            found["seconds"] = round(self.seconds, 4)
        if self.slot is not None:
            found["slot"] = self.slot
        if self.message:
            found["message"] = self.message
        return found
