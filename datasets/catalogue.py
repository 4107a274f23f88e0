"""The tasks by name, from the tables ``TASKS`` of the modules in ``datasets/tasks/``."""

from __future__ import annotations

import importlib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from workbench.errors import UnknownName, WorkbenchError, check_types
from workbench.pairs import Task


@cache
def _known() -> dict[str, tuple[type, str]]:
    found: dict[str, tuple[type, str]] = {}
    for path in sorted((Path(__file__).resolve().parent / "tasks").glob("*.py")):
        module = importlib.import_module(f"workbench.datasets.tasks.{path.stem}")
        for name, record in getattr(module, "TASKS", {}).items():
            if name in found:
                raise WorkbenchError(f"two tasks are called {name!r}")
            found[name] = record
    return found


def tasks() -> dict[str, str]:
    """Every task's name and what it asks, in one line."""
    return {name: line for name, (_, line) in _known().items()}


def task_type(name: str) -> type:
    """The class of a task, whose docstring says what its options are and whose module draws an example."""
    if name not in _known():
        raise UnknownName("task", name, _known())
    return _known()[name][0]


def task(name: str, **options: Any) -> Task:
    """A task with its options set, e.g. ``task("ioi", corruption="abc", split="test")``.

    Raises ``UnknownName`` for an unknown task and ``WorkbenchError`` for an option that the task does not have or whose value
    has another type.
    """
    kind = task_type(name)
    known = [field.name for field in fields(kind) if field.init]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise WorkbenchError(f"task {name!r} has no option {', '.join(map(repr, unknown))}; it has: {', '.join(known)}")
    check_types(f"task {name!r}", get_type_hints(kind), options)
    built: Task = kind(**options)
    return built
