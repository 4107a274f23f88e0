"""``judge``: is a circuit faithful, complete, minimal, better than chance, and right where that is known?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps.commands.circuits import (
    METHOD,
    AblationOption,
    LevelOption,
    MethodOptions,
    SavedOption,
    ScoringOption,
    ask,
    loaded,
)
from workbench.apps.commands.tasks import ExamplesOption, SeedOption, TaskArgument, TaskOptions
from workbench.apps.inputs import JsonOption, ModelArgument
from workbench.apps.terminal import answer, table, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 15
_SAYS = {
    "performance": "kl: from the whole model, in nats per prompt; correct: share of prompts; agrees: share of prompts with the "
    "whole model's answer; metric: the task's, mean over prompts",
    "completeness": "circuit, model: metric of each without the removed parts; gap: between the two, 0 is complete; low, "
    "high: 95% interval of circuit - model; share: of the metric between the whole model and nothing",
    "minimality": "effect: what the part changes in the metric with others removed; share: of the metric of the whole model",
}


def judge(
    model: ModelArgument,
    task: TaskArgument,
    saved: SavedOption = None,
    method: ScoringOption = None,
    keep: Annotated[
        int | None, typer.Option("--top", help="Judge the N parts with the largest absolute scores.")
    ] = None,
    level: LevelOption = None,
    ablation: AblationOption = "counterfactual",
    examples: ExamplesOption = 64,
    seed: SeedOption = 0,
    task_options: TaskOptions = None,
    method_options: MethodOptions = None,
    as_json: JsonOption = False,
) -> None:
    """Judge the kept parts of a circuit by every criterion.

    Performance with its tail beside random circuits, completeness, minimality, the areas of faithfulness, and the
    truth if the model knows its circuit. A circuit is found and judged on other pairs.
    """
    if saved is None and keep is None:
        raise WorkbenchError("a method scores parts without choosing any: --top N says how many to judge")
    with working(f"{model}: judging a circuit of {task}"):
        import workbench as wb

        given = loaded(saved, method, level, method_options)
        asked = ask(model, task, examples, seed, task_options)
        found = asked.find(method or METHOD, level, ablation, method_options) if given is None else given
        if keep is not None:
            found = found.top(keep)
        held = asked.model, found, ask(model, task, examples, seed + 1, task_options).pairs
        options: dict[str, Any] = {"ablation": ablation, "metric": asked.task.metric}
        performance = wb.kept_performance(*held, **options)
        complete = wb.completeness(*held, **options, random=5, restarts=1)
        minimal = wb.minimality(*held, **options, steps=2)
        faithful = wb.faithfulness(*held, **options, controls=0)
        truth = getattr(asked.model, "ground_truth", None)
        right = None
        if truth is not None and (found.level == "node" or set(truth.names) == set(found.names)):
            right = wb.circuit_recovery(found, truth)
    payload = {
        "command": "judge",
        "model": model,
        "task": task,
        "kept": len(found),
        "of": len(found.names),
        "level": found.level,
        "performance": performance.frame(),
        "completeness": complete.frame(),
        "minimality": minimal.frame(),
        "cpr": faithful.cpr,
        "cmd": faithful.cmd,
        "truth": None if right is None else right.frame(),
    }

    def show(console: Console) -> None:
        title = f"{model}, {task}: {len(found):,} of {len(found.names):,} {found.level}s kept"
        whole = performance.frame()[["set", "kl", "kl_max", "correct", "agrees", "metric"]]
        gaps = complete.frame()
        worst = complete.removed[int(complete.gap.argmax())]
        for name, frame in (
            ("performance", whole),
            ("completeness", gaps.drop(columns="parts")),
            ("minimality", minimal.frame().drop(columns="removed").head(_SHOWN)),
        ):
            console.print(table(f"{title}, {name}", _columns(frame), frame.values.tolist()))
            console.print(_SAYS[name])
            if name == "completeness" and worst:
                console.print(f"the largest gap is without {', '.join(worst)}")
        console.print(f"CPR {faithful.cpr:.3f} (higher is better), CMD {faithful.cmd:.3f} (lower is better)")
        if right is not None:
            frame = right.frame()
            console.print(table("against the known circuit", _columns(frame), frame.values.tolist()))

    answer(as_json, payload, show)


def _columns(frame: Any) -> dict[str, Any]:
    return {name: "left" if frame[name].dtype.kind in "OUb" else "right" for name in frame.columns}
