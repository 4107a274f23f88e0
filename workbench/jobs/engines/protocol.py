"""What the driver needs of whoever runs the cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Order = Mapping[str, Any]
"""What a worker is told to do, as plain JSON; ``workbench.jobs.worker.work`` carries it out and answers with a ``dict``."""


@dataclass(frozen=True)
class Reply:
    """The end of an order. ``answer`` is what the worker said; None if its process died first, and ``died`` says how."""

    slot: int
    answer: Mapping[str, Any] | None
    died: str = ""


class Engine(Protocol):
    """``slots`` workers, each doing one order at a time and keeping its process, and what it loaded, between orders.

    A worker starts with its first order, and starts again with the next order after it died.
    """

    name: str
    slots: int

    def submit(self, slot: int, order: Order) -> None:
        """Give a free slot an order; returns at once."""
        ...

    def wait(self, timeout: float) -> list[Reply]:
        """The orders that have ended since the last call; waits at most ``timeout`` seconds for the first. A worker that
        died ends its order, alone."""
        ...

    def kill(self, slot: int) -> None:
        """End the worker of this slot now; the reply of its order comes with ``died``."""
        ...

    def close(self) -> None:
        """End all workers now, whatever they do."""
        ...
