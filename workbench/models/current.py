"""Which run the code is inside of: hooks of a run act on its own forward pass and on no other.

Module hooks and shared configs are seen by every forward pass of a model: by a second run in another thread, and by one that
an edit starts. Threads begin outside of any run, and an edit is called outside of its run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_RUN: ContextVar[object | None] = ContextVar("workbench_run", default=None)


def current() -> object | None:
    """The run whose forward pass is going on here, None outside of any."""
    return _RUN.get()


@contextmanager
def inside(run: object | None) -> Iterator[None]:
    """Code in this block belongs to ``run``."""
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)
