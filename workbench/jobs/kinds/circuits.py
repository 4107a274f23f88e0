"""``find_circuit`` and ``circuit_score``: a task's circuit in a model, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.kinds.above import above
from workbench.jobs.kinds.checks import check_needs, check_value, whole
from workbench.jobs.probes import Cell, Outcome, Probe

if TYPE_CHECKING:
    from workbench.circuits import Circuit
    from workbench.models.protocol import Model
    from workbench.pairs import Pairs

_METHOD = "eap-ig"
_FIND: Mapping[str, Any] = {
    "method": _METHOD,
    "level": None,
    "ablation": "counterfactual",
    "positions": "all",
    "examples": 64,
    "top": None,
    "batch": 16,
    "options": {},
}
"""Arguments beside the method's own options; ``options`` holds those of the method that would have one of these names."""
_SCORE: Mapping[str, Any] = {**_FIND, "controls": 5}


def find_circuit(cell: Cell) -> Outcome:
    """The table of the task's circuit, scored on ``examples`` pairs of the job's seed; the circuit is saved.

    ``top`` keeps so many parts. Every other argument is an option of the method; its ``seed``, if it has one, is the job's.
    """
    found = _found(cell)
    return Outcome(found.frame(), found)


def circuit_score(cell: Cell) -> Outcome:
    """One row that says how good a circuit is, found as in ``find_circuit``, judged on pairs of the next seed.

    ``parts`` scored and ``kept``; ``faithfulness`` of the kept; the areas ``cpr`` and ``cmd`` beside those of ``controls`` random
    rankings, their means; ``auroc`` and ``average_precision`` (``prevalence`` by chance) where the model knows its circuit, else
    null; ``metric`` and ``accuracy`` of the whole model, ``metric_of_nothing`` with every part replaced.
    """
    import pandas as pd

    import workbench as wb

    found, task = _found(cell), cell.task
    assert task is not None
    args = {**_SCORE, **cell.job.args}
    held = cell.pairs(args["examples"], cell.job.seed + 1)
    judged = wb.faithfulness(
        cell.model,
        found,
        held,
        ablation=args["ablation"],
        metric=task.metric,
        batch=args["batch"],
        controls=args["controls"],
        seed=cell.job.seed,
    )
    row = {
        "level": found.level,
        "parts": len(found.names),
        "kept": len(found),
        "faithfulness": judged.own,
        "cpr": judged.cpr,
        "cmd": judged.cmd,
        "random_cpr": float(judged.random_cpr.mean()) if args["controls"] else math.nan,
        "random_cmd": float(judged.random_cmd.mean()) if args["controls"] else math.nan,
        **_recovered(found, cell.model, task.name),
        "metric": judged.full,
        "metric_of_nothing": judged.empty,
        "accuracy": _accuracy(cell.model, held, args["batch"]),
    }
    return Outcome(pd.DataFrame([row]), found, judged.note)


def _found(cell: Cell) -> Circuit:
    import workbench as wb

    task = cell.task
    if task is None:
        raise WorkbenchError(
            f"{cell.job.probe} finds the circuit of a task, and the job names none; add task: to the spec"
        )
    args = {**_SCORE, **cell.job.args}
    pairs = above("probes.circuits.find").pairs_for(args["method"], task, cell.model, args["examples"], cell.job.seed)
    request = {name: args[name] for name in ("method", "level", "ablation", "positions", "batch")}
    circuit = wb.find_circuit(cell.model, pairs, metric=task.metric, **request, **_options(cell.job))
    return circuit if args["top"] is None else circuit.top(args["top"])


def _options(job: Job) -> dict[str, Any]:
    """The method's own options; where it draws anything, it draws by the job's seed."""
    import workbench as wb

    given = {name: value for name, value in job.args.items() if name not in _SCORE} | job.args.get("options", {})
    method = wb.methods()[job.args.get("method", _METHOD)]
    return ({"seed": job.seed} if "seed" in method.options else {}) | given


def check(job: Job) -> None:
    """Refuse what ``find_circuit`` would refuse without looking at a model."""
    import workbench as wb

    own = _SCORE if job.probe == "circuit_score" else _FIND
    check_needs(job, "required", "required")
    given = job.args.get("options", {})
    check_value(f"argument options of {job.probe}", Mapping[str, Any], given)
    args = {**own, **job.args}
    for name in ("method", "ablation", "positions"):
        check_value(f"argument {name} of {job.probe}", str, args[name])
    check_value(f"argument level of {job.probe}", str | None, args["level"])
    for name, least in (("examples", 1), ("batch", 1), *((("top", 1),) if args["top"] is not None else ())):
        whole(job, name, own[name], least)
    if job.probe == "circuit_score":
        whole(job, "controls", _SCORE["controls"], 0)
    methods = wb.methods()
    if args["method"] not in methods:
        raise UnknownName("circuit method", args["method"], methods)
    known = methods[args["method"]].options
    for name in job.args:
        if name not in own and name not in known:
            raise UnknownName(f"argument of {job.probe} with method {args['method']}", name, [*own, *known])
        if name in given and name not in own:
            raise WorkbenchError(f"argument {name} of {job.probe} is given twice, by itself and in options")
    options = {name: value for name, value in job.args.items() if name not in own} | given
    above("probes.circuits.find").check_request(
        args["method"], args["level"], args["ablation"], args["positions"], options
    )


def _recovered(found: Circuit, model: Model, task: str) -> dict[str, float]:
    """How well the scores find the circuit that the model is known to have for this task; NaN where none is known, or none of
    this level."""
    import workbench as wb

    names = ("auroc", "average_precision", "prevalence")
    truth, bare = getattr(model, "ground_truth", None), found.over_positions()
    if truth is None or truth.provenance.get("task", task) != task:
        return dict.fromkeys(names, math.nan)
    if bare.level == "edge" and set(truth.names) != set(bare.names):
        return dict.fromkeys(names, math.nan)
    recovery = wb.circuit_recovery(bare, truth, draws=20)
    return dict(zip(names, (recovery.auroc, recovery.auprc, recovery.prevalence), strict=True))


def _accuracy(model: Model, pairs: Pairs, batch: int) -> float:
    """Share of the pairs whose clean prompt the whole model answers right."""
    import torch

    import workbench as wb

    right = []
    with torch.no_grad():
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            logits = model.run(part.clean).logits
            if logits is None:
                raise WorkbenchError(f"{model.name} gives no logits, so that its accuracy is not defined")
            right.append(wb.accuracy(logits, part).cpu())
    return float(torch.cat(right).double().mean())


PROBES = (
    Probe(
        "find_circuit",
        "the nodes or edges of a task's circuit, scored by a method of `workbench methods`",
        "required",
        "required",
        _FIND,
        find_circuit,
        check,
    ),
    Probe(
        "circuit_score",
        "one row per circuit: areas of faithfulness on held-out pairs, random controls, recovery of the known circuit",
        "required",
        "required",
        _SCORE,
        circuit_score,
        check,
    ),
)
