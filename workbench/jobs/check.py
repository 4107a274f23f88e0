"""Refuse a grid before anything of it runs, with the line of the mistake; then pin what its models are.

Whatever many cells share is looked at once: a model, a task with its options, the arguments of a probe.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.probes import Probe, resolve
from workbench.jobs.revisions import pinned_revision, revision_of
from workbench.jobs.spec import FIELDS, RESERVED, Grid, merged
from workbench.jobs.spec_files import mistake

DTYPES = ("float32", "float64", "bfloat16", "float16")
_MOST = 100
"""Mistakes, equal ones counted again, after which nobody looks for more."""


def check_grid(grid: Grid) -> None:
    """Raise ``WorkbenchError`` for the first mistake of the grid, with its line and the number of others.

    Mistakes are: a model that does not exist or is no model, with a revision that it has not; a task or an option of it that does
    not exist or has a wrong value; an unknown dtype or probe; arguments that the probe does not take, lacks, or takes in another
    type; a model or task that the probe needs, or would not look at. A grid whose cells have no model and no task is looked at
    without importing torch, as far as its probes come without it.
    """
    found: dict[tuple[str, str], WorkbenchError] = {}
    count = 0
    for at, error in itertools.islice(_mistakes(grid), _MOST):
        found.setdefault((at, str(error)), error)
        count += 1
    if found:
        (at, said), error = next(iter(found.items()))
        others = len(found) - 1
        number = f"at least {others}" if count == _MOST else f"{others}"
        more = f" (and {number} more mistake{'s' * (others > 1)})" if others else ""
        raise mistake(at, f"{said}{more}") from error


def pinned(grid: Grid) -> Grid:
    """The grid with the revision of every model filled in: the digest of its files, or its commit on the hub. Analyses take
    the name of their function (``retrieval_heads``), so that one cell has one key however it was written.

    Raises for models that do not exist and for revisions that they do not have. Imports no torch, unless the hub has to be asked.
    """
    known: dict[tuple[str, str | None], str] = {}
    jobs = []
    for job in grid.jobs:
        if "-" in job.probe and ":" not in job.probe:
            job = _with(job, probe=job.probe.replace("-", "_"))
        if job.model is None:
            jobs.append(job)
            continue
        asked = (job.model, job.revision)
        if asked not in known:
            try:
                known[asked] = pinned_revision(*asked)
            except WorkbenchError as error:
                raise mistake(grid.place(job, "model"), error) from error
        revision = known[asked]
        jobs.append(job if revision == job.revision else _with(job, revision=revision))
    return merged(grid, jobs)


def _mistakes(grid: Grid) -> Iterator[tuple[str, WorkbenchError]]:
    """Every mistake and where it stands; the same one may come several times."""
    probes: dict[str, Probe | None] = {}
    seen: set[Any] = set()
    for job in grid.jobs:
        if job.probe not in probes:
            try:
                probes[job.probe] = resolve(job.probe)
            except WorkbenchError as error:
                probes[job.probe] = None
                yield grid.place(job, "probe"), error
        task, probe = _coded(job.task), probes[job.probe]
        looks: list[tuple[Any, Callable[[], tuple[str, WorkbenchError] | None]]] = [
            (("model", job.model, job.revision, job.dtype), partial(_model, job)),
            (("task", task), partial(_task, job)),
        ]
        if probe is not None:
            of = (job.model is None, job.task_name, _coded(job.args))
            looks.append((("probe", job.probe, *of), partial(_arguments, job, probe)))
        for what, look in looks:
            if what not in seen:
                seen.add(what)
                if failed := look():
                    yield grid.place(job, failed[0]), failed[1]


def _model(job: Job) -> tuple[str, WorkbenchError] | None:
    """The field that is wrong about the job's model, and how."""
    if job.model is None:
        for name in ("revision", "dtype"):
            if value := getattr(job, name):
                return name, WorkbenchError(f"{name} {value} says how a model is loaded, and the job names no model")
        return None
    try:
        revision_of(job.model)
    except WorkbenchError as error:
        return "model", error
    try:
        pinned_revision(job.model, job.revision)
    except WorkbenchError as error:
        return "revision" if job.revision else "model", error
    if job.dtype is not None and job.dtype not in DTYPES:
        return "dtype", UnknownName("dtype", job.dtype, DTYPES)
    return None


def _task(job: Job) -> tuple[str, WorkbenchError] | None:
    """Build the job's task; gives ``task`` or ``task.option`` where that fails, and how."""
    if job.task is None:
        return None
    options = dict(job.task) if isinstance(job.task, Mapping) else {"name": job.task}
    name = options.pop("name")

    def failure(without: str | None) -> WorkbenchError | None:
        import workbench as wb

        try:
            wb.task(name, **{option: value for option, value in options.items() if option != without})
        except WorkbenchError as error:
            return error
        except Exception as error:
            said = " ".join(str(error).split())
            return WorkbenchError(f"task {name} cannot be made of {options}: {type(error).__name__}: {said}")
        return None

    error = failure(None)
    if error is None:
        return None
    culprit = _culprit(options, error, failure)
    return f"task.{culprit}" if culprit else "task", error


def _arguments(job: Job, probe: Probe) -> tuple[str, WorkbenchError] | None:
    """The field or argument that the job's probe refuses, and how; empty for one that is not there."""

    def failure(without: str | None) -> WorkbenchError | None:
        if without in ("model", "task"):
            tried = _with(job, **{without: None})
        else:
            tried = _with(job, args={name: value for name, value in job.args.items() if name != without})
        try:
            probe.check(tried)
        except WorkbenchError as error:
            return error
        return None

    error = failure(None)
    if error is None:
        return None
    given = [name for name in ("model", "task") if getattr(job, name) is not None]
    culprit = _culprit([*job.args, *given], error, failure)
    if culprit in job.args and culprit not in (probe.arguments or ()):
        near = difflib.get_close_matches(culprit, RESERVED, n=1, cutoff=0.8)
        if near:
            error = WorkbenchError(f"{error}; a key of every spec: {near[0]}")
    return culprit, error


def _culprit(names: Iterable[str], error: WorkbenchError, failure: Callable[[str], WorkbenchError | None]) -> str:
    """The name that the error is about: without it there is none, or another one and the message has the name. Empty if no name
    is like that, as where something is missing."""
    without = {name: failure(name) for name in names}
    told = [
        n for n, other in without.items() if str(other) != str(error) and re.search(rf"\b{re.escape(n)}\b", str(error))
    ]
    return next(iter(told), "") or next((name for name, other in without.items() if other is None), "")


def _with(job: Job, **changes: Any) -> Job:
    return Job(**{**{name: getattr(job, name) for name in (*FIELDS, "args")}, **changes})


def _coded(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(dict(value), sort_keys=True)
