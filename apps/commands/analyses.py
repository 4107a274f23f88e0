"""``analyses``, ``analyse``: every analysis of the catalogue, and any of them on a model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps import inputs
from workbench.apps.inputs import (
    LARGEST_SEED,
    FileOption,
    JsonOption,
    LayerOption,
    ModelArgument,
    OutOption,
    TextOption,
    assignments,
)
from workbench.apps.terminal import answer, table, working
from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from workbench.probes.calling import Wording
    from workbench.probes.catalogue import Analysis


def analyses(
    name: Annotated[
        str | None, typer.Argument(metavar="[ANALYSIS]", help="Tell about this one and run its example.")
    ] = None,
    group: Annotated[str | None, typer.Option("--group", help="Only this group.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the example's table that are shown.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """The analyses: what each asks, what it is compared with, how its cause is tested.

    `workbench analyse ANALYSIS MODEL` runs one on a model.
    """
    with working("analyses"):
        import workbench as wb
        from workbench.probes.catalogue import GROUPS

        known = wb.analyses()
        listed = known.frame()
    if name is not None:
        _tell(known[name], rows, as_json)
        return
    if group is not None:
        if group not in GROUPS:
            raise UnknownName("group of analyses", group, GROUPS)
        listed = listed[listed["group"] == group]

    def show(console: Console) -> None:
        cells = listed[["name", "group", "question"]].to_numpy().tolist()
        console.print(table(f"{len(listed)} analyses", ["name", "group", "question"], cells))

    answer(as_json, {"command": "analyses", "rows": listed}, show)


def _tell(record: Analysis, shown: int, as_json: bool) -> None:
    from workbench.probes.calling import analysis_frame

    with working(record.name):
        frame = analysis_frame(record(**record.example()))
    told = {
        "question": record.question,
        "call": record.call + str(inspect.signature(record.function)),
        "reads": {"maps": "maps", "run": "maps and activations", "model": "a model", "tensors": "arrays"}[
            record.source
        ],
        "compared with": record.null,
        "cause": record.cause,
        "from": record.paper,
        "our own reading": record.definition,
    }

    def show(console: Console) -> None:
        lines = [[key, value] for key, value in told.items() if value]
        console.print(table(record.name, ["", ""], lines))
        console.print(inspect.cleandoc(record.function.__doc__ or ""))
        _print(console, "its example", frame, shown)

    answer(as_json, {"command": "analyses", "name": record.name, **told, "example": frame}, show)


def analyse(
    name: Annotated[str, typer.Argument(metavar="ANALYSIS", help="`workbench analyses` lists them.")],
    model: ModelArgument,
    text: TextOption = None,
    file: FileOption = None,
    task: Annotated[str | None, typer.Option("--task", help="Prompts of this task, in the place of a text.")] = None,
    examples: Annotated[int, typer.Option("-n", "--examples", min=1, help="Number of prompts of the task.")] = 16,
    task_options: Annotated[
        list[str] | None, typer.Option("--task-option", help="An option of the task, as name=value.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="An option of the analysis, as name=value.")
    ] = None,
    layer: LayerOption = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the table that are shown.")] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of the prompts.")] = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Any analysis on a model: its table, saved with --out.

    Give it a text, or the prompts of a task.
    """
    import workbench as wb
    from workbench.probes.calling import analysis_frame, prepare

    record = wb.analyses()[name]
    target = inputs.fresh(out)
    if task is not None and (text is not None or file is not None):
        raise WorkbenchError("give either --task or a text; got both")
    if task is None and task_options:
        raise WorkbenchError("--task-option belongs to --task, which is not given")
    given_text = text is not None or file is not None
    call = prepare(
        record,
        assignments(options, "--option"),
        text=given_text,
        pairs=task is not None,
        layers=inputs.layers(layer),
        wording=_wording(),
    )
    prompts: Any = inputs.prompt(text, file) if given_text else None
    with working(f"{model}: {name}"):
        built = inputs.load(model)
        if task is not None:
            chosen = wb.task(task, **assignments(task_options, "--task-option"))
            prompts = chosen.build(seed, built.tokenizer, examples)
        result = call(built, prompts)
        frame = analysis_frame(result)
        if target is not None:
            if not hasattr(result, "save"):
                raise WorkbenchError(f"{name} gives plain numbers, which --out cannot save; use --json")
            result.save(target)
    undefined = dict(getattr(result, "undefined", {}) or {})
    payload = {
        "command": "analyse",
        "analysis": name,
        "model": model,
        "rows": frame,
        "undefined": undefined,
        "compared with": record.null,
        "our own reading": record.definition,
        "saved": target,
        "provenance": getattr(result, "provenance", None),
    }

    def show(console: Console) -> None:
        console.print(record.question)
        _print(console, f"{model}: {name}", frame, rows)
        console.print(f"compared with: {record.null}")
        for what, why in undefined.items():
            console.print(f"{what} is undefined: {why}")
        if record.definition:
            console.print(f"our own reading: {record.definition}")
        if target is not None:
            console.print(f"saved in {target}")

    answer(as_json, payload, show)


def _wording() -> Wording:
    from workbench.probes.calling import Wording

    return Wording("--option {name}=...", "--text, --file or --task", "--task", "--layer", "the command line")


def _print(console: Console, title: str, frame: pd.DataFrame, shown: int) -> None:
    more = f", the first {shown} of {len(frame):,} rows" if len(frame) > shown else ""
    sides = {name: "right" if frame[name].dtype.kind in "fi" else "left" for name in frame.columns}
    console.print(table(f"{title}{more}", sides, frame.head(shown).to_numpy(dtype=object).tolist()))
