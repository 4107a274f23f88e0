"""In which order cells go to workers: those of one model together, so that each worker loads as few models as possible."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from workbench.jobs.job import Job

Group = tuple[str | None, str | None, str | None]


def group(job: Job) -> Group:
    """What a worker must load for the cell."""
    return (job.model, job.revision, job.dtype)


class CellQueue:
    """Cells by model. A worker gets a cell of the model it has; when none is left, one of the model with the most cells
    waiting for each worker that has it."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._waiting: dict[Group, deque[Job]] = {}
        self._has: dict[int, Group] = {}
        for job in jobs:
            self._waiting.setdefault(group(job), deque()).append(job)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __bool__(self) -> bool:
        return any(self._waiting.values())

    def take(self, slot: int) -> Job | None:
        """The next cell for this worker; None if none waits."""
        own = self._waiting.get(self._has.get(slot, (None, None, None)))
        if not own:
            best = max(self._waiting, key=self._share, default=None)
            if best is None or not self._waiting[best]:
                return None
            self._has[slot] = best
            own = self._waiting[best]
        return own.popleft()

    def put_back(self, job: Job, *, last: bool = False) -> None:
        """A cell that has to be tried again: next of its model, or last."""
        waiting = self._waiting.setdefault(group(job), deque())
        waiting.append(job) if last else waiting.appendleft(job)

    def forget(self, slot: int) -> None:
        """The worker starts afresh, with no model."""
        self._has.pop(slot, None)

    def _share(self, group: Group) -> float:
        return len(self._waiting[group]) / (1 + sum(has == group for has in self._has.values()))
