"""Refusals of jobs that their probe could not begin; no model is loaded for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.probes import REQUIRED

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def check_needs(job: Job, model: str, task: str) -> None:
    """Refuse a job without the model or task that its probe needs, or with one that it would not look at."""
    for what, need, given in (("model", model, job.model), ("task", task, job.task_name)):
        if need == "required" and given is None:
            raise WorkbenchError(f"{job.probe} needs a {what}; add {what}: to the spec")
        if need == "no" and given is not None:
            raise WorkbenchError(f"{job.probe} looks at no {what}; got {what} {given!r}")


def check_arguments(job: Job, arguments: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Refuse arguments that are not in ``arguments``, that are missing, or that are not of the type in ``kinds``."""
    for name in job.args:
        if name not in arguments:
            raise UnknownName(f"argument of {job.probe}", name, arguments)
    missing = [name for name, default in arguments.items() if default is REQUIRED and name not in job.args]
    if missing:
        raise WorkbenchError(f"{job.probe} needs {', '.join(missing)}, which the job does not give")
    for name, value in job.args.items():
        if name in kinds:
            check_value(f"argument {name} of {job.probe}", kinds[name], value)


def check_value(what: str, kind: Any, value: Any) -> None:
    """Refuse a value of another type; whole numbers pass as fractions, lists as sequences and tuples."""
    if type(value) is kind:
        return
    from pydantic import ValidationError

    try:
        _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise WorkbenchError(f"{what}: {error.errors()[0]['msg']}; got {value!r}") from None


def whole(job: Job, name: str, default: int, least: int = 1) -> int:
    """The argument ``name`` as a whole number from ``least``."""
    value = job.args.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise WorkbenchError(f"argument {name} of {job.probe} is a whole number from {least}; got {value!r}")
    return value


@lru_cache(maxsize=512)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
