"""What a cell can compute, by name: circuits, coders, every analysis, functions of the user's own.

``resolve(name)`` gives the probe of a name. A probe gets a ``Cell`` and answers with an ``Outcome``, which depends on the job
alone: the same job gives the same table, bit for bit, whatever ran before in the same process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.job import Job

if TYPE_CHECKING:
    from workbench.models.protocol import Model
    from workbench.pairs import Pairs, Task

NEEDS = ("no", "optional", "required")
_OWN = "module:function of your own"
_KINDS = {
    "sleep": "trivial",
    "fail": "trivial",
    "find_circuit": "circuits",
    "circuit_score": "circuits",
    "train_sae": "coders",
    "capture": "capture",
}
"""The module in ``kinds/`` whose ``PROBES`` holds the probe. Analyses and functions are made from their names."""


class _Required:
    """The type of ``REQUIRED``."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()
"""The default of an argument that has none."""


@dataclass(frozen=True)
class Outcome:
    """What a cell came to. ``table`` is a pandas DataFrame or a ``pyarrow.Table``. ``saved`` has ``save(folder)``, or is None.
    ``note`` is a remark for people; it is no part of the result."""

    table: Any
    saved: Any = None
    note: str = ""


class Cell:
    """One job under way: what a probe reads. ``load`` gives the job's model; it is called when the model is first asked for.
    ``scratch`` is where a probe may write what is too large for memory: a new folder on the disk of the store, gone after the
    cell. ``uploads`` holds the files that jobs of this store name by their content."""

    def __init__(
        self, job: Job, load: Callable[[], Model], scratch: Path | None = None, uploads: Path | None = None
    ) -> None:
        self.job = job
        self._load = load
        self._scratch = scratch
        self._uploads = uploads

    @property
    def uploads(self) -> Path:
        """The folder of uploaded files."""
        if self._uploads is None:
            raise WorkbenchError(
                f"{self.job.probe} reads an uploaded file, and this cell has no store; run it with run_jobs"
            )
        return self._uploads

    @cached_property
    def scratch(self) -> Path:
        """A folder to write to; what ``save`` moves out of it stays."""
        if self._scratch is None:
            raise WorkbenchError(f"{self.job.probe} writes to disk, and this cell has no folder; run it with run_jobs")
        self._scratch.mkdir(parents=True)
        return self._scratch

    @cached_property
    def model(self) -> Model:
        """The job's model; a job without one is refused."""
        if self.job.model is None:
            raise WorkbenchError(f"{self.job.probe} wants a model, and the job names none; add model: to the spec")
        return self._load()

    @cached_property
    def task(self) -> Task | None:
        """The job's task with its options set, None if it has none."""
        import workbench as wb

        given = self.job.task
        if given is None:
            return None
        options = {} if isinstance(given, str) else {name: value for name, value in given.items() if name != "name"}
        task: Task = wb.task(self.job.task_name, **options)
        return task

    def pairs(self, n: int, seed: int | None = None) -> Pairs:
        """``n`` examples of the task in the tokens of the model; ``seed`` is the job's if not given."""
        if self.task is None:
            raise WorkbenchError(f"{self.job.probe} wants examples, and the job names no task; add task: to the spec")
        return self.task.build(seed=self.job.seed if seed is None else seed, tokenizer=self.model.tokenizer, n=n)


@dataclass(frozen=True)
class Probe:
    """One computation that cells can name.

    ``needs_model`` and ``needs_task`` are one of ``NEEDS``. ``arguments`` maps the names of arguments to their defaults, to
    ``REQUIRED`` where there is none; None if any are taken. ``check(job)`` refuses a job that ``call`` could not begin: no
    model or task where one is needed, arguments that are unknown, missing or of another type. It loads no model.
    """

    name: str
    description: str
    needs_model: str
    needs_task: str
    arguments: Mapping[str, Any] | None
    call: Callable[[Cell], Outcome]
    check: Callable[[Job], None]


@cache
def resolve(name: str) -> Probe:
    """The probe called ``name``: of ``probes()``, or ``module:function`` of an importable module.

    Raises ``UnknownName`` for a name that is neither, and ``WorkbenchError`` for a module or function that is not there.
    """
    if name in _KINDS:
        kind = importlib.import_module(f"workbench.jobs.kinds.{_KINDS[name]}")
        found: Probe = next(probe for probe in kind.PROBES if probe.name == name)
        return found
    if ":" in name:
        from workbench.jobs.kinds.functions import function_probe

        return function_probe(name)
    from workbench.jobs.kinds.analyses import analysis_names, analysis_probe

    known = analysis_names()
    dashed = name.replace("_", "-")  # the function of an analysis is written so
    if dashed not in known:
        raise UnknownName("probe", name, [*_KINDS, *known, _OWN])
    return analysis_probe(dashed)


def probes() -> dict[str, Probe]:
    """Every probe that has a name of its own; beside them ``module:function`` is a probe."""
    from workbench.jobs.kinds.analyses import analysis_names

    return {name: resolve(name) for name in (*_KINDS, *analysis_names())}
