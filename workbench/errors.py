"""Errors a user can cause. The command line prints their message as one line and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable


class WorkbenchError(ValueError):
    """A request that cannot be answered: the message says what was asked, what was got and what to call instead."""


class UnknownName(WorkbenchError):
    """A name that does not exist; the message lists the names that do."""

    def __init__(self, what: str, name: object, known: Iterable[object]) -> None:
        listed = ", ".join(str(k) for k in known)
        super().__init__(f"no {what} {str(name)!r}; known: {listed or 'none'}")


class Refused(WorkbenchError):
    """A request that could be carried out only by being subtly wrong or by not fitting the machine."""
