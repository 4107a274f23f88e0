"""The tasks by name."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any, get_type_hints

from workbench.errors import UnknownName, WorkbenchError, check_types
from workbench.pairs import Task

_TASKS: dict[str, tuple[str, str]] = {
    "ioi": ("ioi:IOI", "indirect object identification: who received the gift"),
    "greater-than": ("greater_than:GreaterThan", "a span of years ends later than it starts"),
    "colored-objects": ("colored_objects:ColoredObjects", "the color of one of three objects"),
    "docstring": ("docstring:Docstring", "the next argument to document"),
    "induction": ("induction:Induction", "random words repeated after a random period"),
    "needle": ("needle:Needle", "the value of a key hidden in filler text"),
}


def tasks() -> dict[str, str]:
    """Every task's name and what it asks, in one line."""
    return {name: line for name, (_, line) in _TASKS.items()}


def task(name: str, **options: Any) -> Task:
    """A task with its options set, e.g. ``task("ioi", corruption="abc", split="test")``.

    Raises ``UnknownName`` for an unknown task and ``WorkbenchError`` for an option that the task does not have or whose value
    has another type.
    """
    if name not in _TASKS:
        raise UnknownName("task", name, _TASKS)
    module, attribute = _TASKS[name][0].split(":")
    kind = getattr(importlib.import_module(f"workbench.datasets.{module}"), attribute)
    known = [field.name for field in fields(kind) if field.init]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise WorkbenchError(f"task {name!r} has no option {', '.join(map(repr, unknown))}; it has: {', '.join(known)}")
    check_types(f"task {name!r}", get_type_hints(kind), options)
    return kind(**options)
