"""``analyses``, ``analyse``: every analysis of the catalogue, and any of them on a model."""

from __future__ import annotations

import contextlib
import inspect
import sys
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
from workbench.errors import UnknownName, WorkbenchError, check_types

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from rich.console import Console

    from workbench.models.protocol import Model
    from workbench.probes.catalogue import Analysis

_RUNS, _MAP, _MODELS, _PAIRS, _EITHER = ("source", "run"), ("amap",), ("model",), ("pairs",), ("inputs",)
_WRITTEN = (
    "int",
    "float",
    "bool",
    "str",
    "tuple[",
    "Sequence[int",
    "Sequence[float",
    "Sequence[str",
    "Sequence[tuple[",
)
"""How types of options begin that can be written as name=value."""


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
    with working(record.name):
        result = record(**record.example())
        frame = _frame(result)
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

    record = wb.analyses()[name]
    target = inputs.fresh(out)
    if task is not None and (text is not None or file is not None):
        raise WorkbenchError("give either --task or a text; got both")
    if task is None and task_options:
        raise WorkbenchError("--task-option belongs to --task, which is not given")
    chosen = {key: _tuples(value) for key, value in assignments(options, "--option").items()}
    needed = _needed(record, chosen)
    _check(record, chosen)
    words = inputs.prompt(text, file) if text is not None or file is not None else None
    given_none = words is None and task is None
    if given_none and needed != ["model"] and not _runs_itself(record, needed):
        raise WorkbenchError(f"{name} looks at prompts: give --text, --file or --task")
    with working(f"{model}: {name}"):
        built = inputs.load(model)
        pairs = None
        if task is not None:
            pairs = wb.task(task, **assignments(task_options, "--task-option")).build(seed, built.tokenizer, examples)
        given: dict[str, Any] = {}
        for argument in needed:
            if argument in _MODELS or (given_none and _runs_itself(record, needed)):
                given[argument] = built
            elif argument in (*_RUNS, *_MAP):
                run = _run(record, built, words if pairs is None else pairs.clean, layer)
                given[argument] = run if argument in _RUNS else _one_map(name, run)
            elif argument in _PAIRS and pairs is None:
                raise WorkbenchError(f"{name} compares clean and corrupted prompts: give --task")
            else:
                given[argument] = words if pairs is None else pairs
        result = record(**given, **chosen)
        frame = _frame(result)
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


def _needed(record: Analysis, chosen: Mapping[str, Any]) -> list[str]:
    """The arguments that the command fills in; what it cannot fill in is refused with the call to make."""
    parameters = inspect.signature(record.function).parameters
    for option in chosen:
        if option not in parameters:
            raise UnknownName(f"option of {record.name}", option, parameters)
    wanted = [p for p in parameters.values() if p.name not in chosen]
    found = [p.name for p in wanted if p.name in (*_RUNS, *_MAP, *_MODELS)]
    found += [p.name for p in wanted if p.name in (*_PAIRS, *_EITHER) and p.default is p.empty]
    missing = [p.name for p in wanted if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in found]
    if record.source == "tensors" or missing or not found:
        written = [name for name in missing if str(parameters[name].annotation).startswith(_WRITTEN)]
        other = [name for name in missing if name not in written]
        if written and not other and record.source != "tensors":
            options = " ".join(f"--option {name}=..." for name in written)
            raise WorkbenchError(f"{record.name} needs {', '.join(written)}: give {options}")
        what = ", ".join(other or written) or "arrays"
        raise WorkbenchError(
            f"{record.name} needs {what}, which the command line cannot make; call {record.call} from Python "
            f"(`workbench analyses {record.name}` shows how)"
        )
    return found


def _runs_itself(record: Analysis, needed: list[str]) -> bool:
    """Whether the function takes a model in the place of a run, and makes prompts of its own."""
    return record.source == "model" and needed == ["source"]


def _one_map(name: str, run: Any) -> Any:
    layers = list(run.maps)
    if len(layers) != 1:
        raise WorkbenchError(f"{name} looks at one map: choose it with --layer, one of {', '.join(map(str, layers))}")
    return run.maps[layers[0]]


def _check(record: Analysis, chosen: Mapping[str, Any]) -> None:
    """Refuse options of a type that the function does not take; types that only exist for checkers are let through."""
    import typing

    function = record.function
    kinds: dict[str, Any] = {}
    for key in chosen:
        with contextlib.suppress(NameError, TypeError):
            kinds[key] = eval(str(function.__annotations__[key]), vars(sys.modules[function.__module__]), vars(typing))
    check_types(record.name, kinds, {key: chosen[key] for key in kinds})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _run(record: Analysis, model: Model, prompts: Any, layer: list[str] | None) -> Any:
    import torch

    import workbench as wb

    reads = [
        site.replace("{l}", str(number))
        for site in record.reads
        for number in (range(model.shape.layers) if "{l}" in site else (0,))
    ]
    with torch.no_grad():
        return model.run(prompts, read=reads, maps=wb.capture(layers=inputs.layers(layer)), logits=None)


def _frame(result: Any) -> pd.DataFrame:
    if hasattr(result, "frame"):
        return result.frame()
    import pandas as pd

    values = result.detach().cpu().double()
    index = pd.MultiIndex.from_product([range(size) for size in values.shape])
    index.names = [f"axis {i}" for i in range(values.ndim)]
    return pd.DataFrame({"value": values.flatten().numpy()}, index=index).reset_index()


def _print(console: Console, title: str, frame: pd.DataFrame, shown: int) -> None:
    more = f", the first {shown} of {len(frame):,} rows" if len(frame) > shown else ""
    sides = {name: "right" if frame[name].dtype.kind in "fi" else "left" for name in frame.columns}
    console.print(table(f"{title}{more}", sides, frame.head(shown).to_numpy(dtype=object).tolist()))
