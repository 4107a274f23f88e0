"""Every analysis of ``wb.analyses()`` as a probe, by its name; ``retrieval_heads`` is ``retrieval-heads`` too."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.kinds.above import above
from workbench.jobs.kinds.checks import check_needs, check_value, whole
from workbench.jobs.probes import REQUIRED, Cell, Outcome, Probe

_EXAMPLES = 16


def analysis_names() -> tuple[str, ...]:
    """Names of all analyses."""
    import workbench as wb

    return tuple(wb.analyses())


@cache
def analysis_probe(name: str) -> Probe:
    """The probe of an analysis. Its arguments are the analysis' options and, where it looks at prompts, ``text``, or
    ``examples`` of the job's task, and ``layers``; its ``seed``, if it has one, is the job's."""
    import workbench as wb

    calling = above("probes.calling")
    record = wb.analyses()[name]
    defaults = calling.option_defaults(record)
    prompts, paired = calling.takes_prompts(record), calling.takes_pairs(record)
    task = "no" if prompts == "no" else "required" if paired else "optional"
    own = {} if prompts == "no" else {"text": None, "examples": _EXAMPLES}
    own = {key: value for key, value in own.items() if key == "examples" or not paired}
    arguments = {
        **own,
        **({"layers": None} if prompts != "no" else {}),
        **{key: _default(value) for key, value in defaults.items() if key != "seed"},
    }

    def prepared(job: Job) -> Any:
        options = {key: value for key, value in job.args.items() if key not in (*own, "layers")}
        if "seed" in defaults:
            options["seed"] = job.seed
        return calling.prepare(
            record,
            options,
            text="text" in job.args,
            pairs=job.task is not None,
            layers=job.args.get("layers"),
            wording=_wording(),
        )

    def check(job: Job) -> None:
        check_needs(job, "required", task)
        for key in job.args:
            if key not in arguments:
                raise UnknownName(f"argument of {record.name}", key, arguments)
        if "text" in job.args:
            _check_text(record.name, job.args["text"])
        if "examples" in job.args:
            if job.task is None:
                raise WorkbenchError(f"examples of {record.name} counts prompts of a task, and the job names none")
            whole(job, "examples", _EXAMPLES)
        if job.args.get("layers") is not None:
            check_value(f"argument layers of {record.name}", int | str | list[int | str], job.args["layers"])
        prepared(job)

    def call(cell: Cell) -> Outcome:
        """The table of the analysis; its result is saved where it can be."""
        planned = prepared(cell.job)
        prompts = cell.job.args.get("text")
        if cell.job.task is not None:
            prompts = cell.pairs(whole(cell.job, "examples", _EXAMPLES))
        result = planned(cell.model, prompts)
        undefined = dict(getattr(result, "undefined", {}) or {})
        return Outcome(
            calling.analysis_frame(result),
            result if hasattr(result, "save") else None,
            "; ".join(f"{what} is undefined: {why}" for what, why in undefined.items()),
        )

    return Probe(record.name, record.question, "required", task, arguments, call, check)


def _check_text(analysis: str, text: Any) -> None:
    check_value(f"argument text of {analysis}", str | list[str], text)
    if not text or not all(each.strip() for each in ([text] if isinstance(text, str) else text)):
        raise WorkbenchError(f"argument text of {analysis} holds no words; got {text!r}")


def _default(value: Any) -> Any:
    return REQUIRED if value is inspect.Parameter.empty else value


@cache
def _wording() -> Any:
    return above("probes.calling").Wording("{name}: ...", "text: or task:", "task:", "layers:", "a job")
