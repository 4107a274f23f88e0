"""One cell of a grid: what is to be computed, and the name of its result."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from workbench.errors import UnknownName, WorkbenchError

FIELDS = ("model", "revision", "task", "probe", "args", "seed", "dtype")
KEY_LENGTH = 32
LARGEST_SEED = 2**32 - 1
"""What every random generator of the dependencies takes."""
_FORMAT = 1
_KEY = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}").fullmatch


@dataclass(frozen=True, eq=False)
class Job:
    """What one cell computes. Equal jobs have equal keys, and a result stands under its job's key.

    ``probe`` names the computation: ``find_circuit``, an analysis, or ``module:function`` (``workbench.jobs.probes``).
    ``model`` is what ``wb.load`` takes as a text, ``revision`` its commit or digest. ``task`` is a task's name, or a mapping
    with ``name`` and the task's options. ``args`` are the probe's own arguments. All of it is plain JSON: other values are
    refused, and so is a number that is not finite.
    """

    probe: str
    model: str | None = None
    revision: str | None = None
    task: str | Mapping[str, Any] | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("probe", "model", "revision", "dtype"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and (value is not None or name == "probe"):
                raise WorkbenchError(f"{name} of a job is a text; got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= LARGEST_SEED:
            raise WorkbenchError(f"seed of a job is a whole number from 0 to {LARGEST_SEED}; got {self.seed!r}")
        if not isinstance(self.args, Mapping):
            raise WorkbenchError(f"args of a job map names to values; got {self.args!r}")
        task = self.task
        if isinstance(task, Mapping):
            if not isinstance(task.get("name"), str):
                raise WorkbenchError(
                    f"a task with options has a name, as in {{name: ioi, split: test}}; got {dict(task)!r}"
                )
            options = {name: value for name, value in task.items() if name != "name"}
            task = MappingProxyType({"name": task["name"], **plain(options, "task")}) if options else task["name"]
        elif task is not None and not isinstance(task, str):
            raise WorkbenchError(f"task of a job is a name, or a mapping with a name; got {task!r}")
        object.__setattr__(self, "task", task)
        object.__setattr__(self, "args", MappingProxyType(plain(self.args, "args")))

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Job:
        """The job of a record such as ``dict()`` gives; names that no job has are refused."""
        for name in record:
            if name not in FIELDS:
                raise UnknownName("field of a job", name, FIELDS)
        if "probe" not in record:
            raise WorkbenchError(f"a job names its probe; got only {', '.join(map(str, record)) or 'nothing'}")
        return cls(**{name: value for name, value in record.items() if value is not None or name == "probe"})

    @cached_property
    def key(self) -> str:
        """Content hash: 32 hexadecimal digits of the SHA-256 of the job in canonical JSON."""
        text = json.dumps({"format": _FORMAT, **self.dict()}, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]

    def dict(self) -> dict[str, Any]:
        """The fields as plain JSON, in the order of ``FIELDS``."""
        found = {name: getattr(self, name) for name in FIELDS}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}

    @property
    def task_name(self) -> str | None:
        return self.task["name"] if isinstance(self.task, Mapping) else self.task

    @property
    def title(self) -> str:
        """One short line for people: probe, model, task, arguments and seed."""
        said = [self.probe, *(part for part in (self.model, self.task_name) if part)]
        options = dict(self.task) if isinstance(self.task, Mapping) else {}
        options.pop("name", None)
        said += [f"{name}={value}" for name, value in {**options, **self.args}.items()]
        return " ".join([*said, f"seed={self.seed}"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def plain(value: Any, where: str) -> Any:
    """``value`` as plain JSON (tuples become lists); raises and says where for anything else."""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise WorkbenchError(f"{where}: names are texts; got {name!r}")
        return {name: plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}.{i}") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise WorkbenchError(f"{where}: numbers of a job are finite; got {value}")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise WorkbenchError(f"{where}: a job holds texts, numbers, lists and mappings; got a {type(value).__name__}")


def is_key(name: str) -> bool:
    """Whether ``name`` has the form of a job's key."""
    return _KEY(name) is not None
