"""``module:function``: any importable function as a probe. Some parameters are filled in by name, the rest are arguments."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.kinds.checks import check_needs, whole
from workbench.jobs.probes import REQUIRED, Cell, Outcome, Probe

_MODEL, _TASK = ("model", "tokenizer", "pairs"), ("task", "pairs")
FILLED = ("model", "task", "pairs", "seed", "tokenizer", "cell")
_EXAMPLES = 64
_GIVES = "a DataFrame, a result, a circuit, a mapping (one row), a list of mappings, or an Outcome"
Parameters = Mapping[str, inspect.Parameter]


def function_probe(name: str) -> Probe:
    """The probe of ``module:function``. An analysis of ``wb.analyses()`` is called as one, whatever its parameters."""
    function = _imported(name)
    analysis = _analysis(function)
    if analysis is not None:
        from workbench.jobs.kinds.analyses import analysis_probe

        return replace(analysis_probe(analysis), name=name)
    parameters = _parameters(name, function)
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = {
        p.name: REQUIRED if p.default is p.empty else p.default
        for p in parameters.values()
        if p.name not in FILLED and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    if "pairs" in parameters:
        own = {"examples": _EXAMPLES, **own}
    needs = {what: _need(parameters, names) for what, names in (("model", _MODEL), ("task", _TASK))}

    def check(job: Job) -> None:
        check_needs(job, needs["model"], needs["task"])
        for key in job.args:
            if key in FILLED:
                raise WorkbenchError(f"{key} of {name} is filled in from the job; it is no argument")
            if key not in own and not free:
                raise UnknownName(f"argument of {name}", key, own)
        missing = [key for key, default in own.items() if default is REQUIRED and key not in job.args]
        if missing:
            raise WorkbenchError(f"{name} needs {', '.join(missing)}, which the job does not give")
        if "pairs" in parameters and "examples" in job.args:
            whole(job, "examples", _EXAMPLES)

    def call(cell: Cell) -> Outcome:
        taken = {key for key in cell.job.args if key in parameters or (free and key not in own)}
        given = {key: value for key, value in cell.job.args.items() if key in taken}
        for key in FILLED:
            if key in parameters and _there(cell.job, key):
                given[key] = _fill(cell, key, own)
        return outcome(name, function(**given))

    said = (inspect.getdoc(function) or "").partition("\n")[0]
    return Probe(name, said or name, needs["model"], needs["task"], None if free else own, call, check)


def outcome(name: str, found: Any) -> Outcome:
    """What a function returned as an outcome; anything without an obvious table is refused with its type."""
    if isinstance(found, Outcome):
        return found
    if isinstance(found, Mapping):
        return Outcome(_frame(name, [found]))
    if isinstance(found, list | tuple) and all(isinstance(row, Mapping) for row in found):
        return Outcome(_frame(name, found))
    frame = found
    if callable(getattr(found, "frame", None)):
        frame = found.frame()
    if type(frame).__module__.partition(".")[0] == "pyarrow" and hasattr(frame, "schema"):
        return Outcome(frame)
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        kind = type(found)
        raise WorkbenchError(f"{name} returned something of type {kind.__qualname__}; a probe returns {_GIVES}")
    saved = found if frame is not found and callable(getattr(found, "save", None)) else None
    return Outcome(frame if isinstance(frame.index, pd.RangeIndex) else frame.reset_index(), saved)


def _imported(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise WorkbenchError(
            f"a function of your own is written module:function, as in mypackage.scores:score; got {name!r}"
        )
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # the console script does not look where it was called
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise WorkbenchError(
            f"cannot import {module} for the probe {name}: {type(error).__name__}: {' '.join(str(error).split())}; run where it "
            "can be imported, or install it"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise UnknownName(f"function in {module}", attribute, known)
        found = getattr(found, part)
    if not callable(found):
        raise WorkbenchError(f"{name} is no function but of type {type(found).__name__}")
    return found


def _analysis(function: Callable[..., Any]) -> str | None:
    """The name of the analysis that ``function`` answers."""
    if not getattr(function, "__module__", "").startswith("workbench.probes."):
        return None
    import workbench as wb

    return next((record.name for record in wb.analyses().values() if record.function is function), None)


def _parameters(name: str, function: Callable[..., Any]) -> Parameters:
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise WorkbenchError(f"{name} does not tell its parameters; wrap it in a function of your own") from None
    for parameter in found.values():
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise WorkbenchError(f"{name} takes {parameter.name} by position alone, and a job gives arguments by name")
    return found


def _need(parameters: Parameters, names: Sequence[str]) -> str:
    """Whether the function needs what fills the parameters ``names``."""
    reading = [parameters[name] for name in names if name in parameters]
    if any(parameter.default is parameter.empty for parameter in reading):
        return "required"
    return "optional" if reading or "cell" in parameters else "no"


def _there(job: Job, name: str) -> bool:
    return (name not in _MODEL or job.model is not None) and (name not in _TASK or job.task is not None)


def _fill(cell: Cell, name: str, own: Mapping[str, Any]) -> Any:
    if name == "cell":
        return cell
    if name == "seed":
        return cell.job.seed
    if name == "pairs":
        default = own["examples"]
        return cell.pairs(whole(cell.job, "examples", default if isinstance(default, int) else _EXAMPLES))
    return cell.model.tokenizer if name == "tokenizer" else getattr(cell, name)


def _frame(name: str, rows: Sequence[Mapping[Any, Any]]) -> Any:
    import pandas as pd

    return pd.DataFrame([{str(key): _plain(name, key, value) for key, value in row.items()} for row in rows])


def _plain(name: str, key: Any, value: Any) -> Any:
    """A number or text of a cell of the table; tensors and arrays of one number are that number."""
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise WorkbenchError(
        f"{name} returned something of type {type(value).__name__} as {key!r}; a row holds numbers and texts"
    )
