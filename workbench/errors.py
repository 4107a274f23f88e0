"""Errors a user can cause. The command line prints their message as one line and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class WorkbenchError(ValueError):
    """A request that cannot be answered: the message says what was asked, what was got and what to call instead."""


class UnknownName(WorkbenchError, KeyError):
    """A name that does not exist; the message lists the names that do, at its end the nearest one.

    Also a ``KeyError``, so that ``in`` and ``get`` of mappings that raise it say no instead of raising.
    """

    def __init__(self, what: str, name: object, known: Iterable[object]) -> None:
        import difflib

        names = [str(k) for k in known]
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.8)
        nearest = f"; nearest: {near[0]}" if near else ""
        super().__init__(f"no {what} {str(name)!r}; known: {', '.join(names) or 'none'}{nearest}")

    def __str__(self) -> str:
        return str(self.args[0])


class Refused(WorkbenchError):
    """A request that could be carried out only by being subtly wrong or by not fitting the machine."""


def check_types(what: str, kinds: Mapping[str, Any], options: Mapping[str, object]) -> None:
    """Refuse options of ``what`` whose value has not the type that ``kinds`` names; whole numbers pass as fractions."""
    from pydantic import TypeAdapter, ValidationError

    for name, value in options.items():
        try:
            TypeAdapter(kinds[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise WorkbenchError(f"{what}, option {name}: {error.errors()[0]['msg']}; got {value!r}") from None
