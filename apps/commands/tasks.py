"""``tasks``: what the tasks ask, and their examples token by token."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps import inputs
from workbench.apps.inputs import LARGEST_SEED, JsonOption
from workbench.apps.terminal import answer, table, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.pairs import Pairs, Task

TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help="A task; `workbench tasks` lists them.")]
ExamplesOption = Annotated[int, typer.Option("-n", "--examples", help="Number of pairs of prompts.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of the examples.")]
TaskOptions = Annotated[list[str] | None, typer.Option("--task-option", help="An option of the task, as name=value.")]

tasks = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    help="The tasks.\n\n`tasks show NAME` says what a task is and draws an example token by token.",
)


@tasks.callback()
def list_tasks(context: typer.Context, as_json: JsonOption = False) -> None:
    """The tasks.

    `tasks show NAME` says what a task is and draws an example token by token.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise WorkbenchError("--json belongs to the sub-command: workbench tasks show NAME --json")
        return
    import workbench as wb

    known = wb.tasks()
    payload = {"command": "tasks", "rows": [{"name": name, "description": line} for name, line in known.items()]}
    answer(
        as_json,
        payload,
        lambda c: c.print(table("tasks", ["name", "what it asks"], [list(row) for row in known.items()])),
    )


@tasks.command("show")
def show_task(
    name: TaskArgument,
    examples: ExamplesOption = 1,
    seed: SeedOption = 0,
    options: TaskOptions = None,
    contrast: Annotated[
        bool, typer.Option("--contrast", help="Corrupted prompts that do not call for the behaviour: the negatives.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="Use this model's tokenizer, not the bundled one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a task is, and draw examples: clean and corrupted tokens, answers, named spans."""
    with working(f"{name}: examples"):
        built = chosen(name, options)
        built = built.contrast() if contrast else built
        if model is None:
            from workbench.datasets.tokenizer import word_tokenizer

            tokenizer = word_tokenizer()
        else:
            tokenizer = inputs.load(model).tokenizer
        pairs = built.build(seed=seed, tokenizer=tokenizer, n=examples)
        drawn = [example(pairs, i, tokenizer) for i in range(len(pairs))]
    payload = {
        "command": "tasks show",
        "task": name,
        "about": about(built),
        "options": values(built),
        "defaults": values(type(built)()),
        "corruption": built.corruption,
        "corruptions": list(built.corruptions),
        "contrast": built.contrast().corruption,
        "seed": seed,
        "dropped": pairs.dropped,
        "examples": drawn,
    }

    def show(console: Console) -> None:
        console.print(about(built), soft_wrap=True)
        here = values(built)
        rows = [[o, *("drawn" if v is None else v for v in (d, here[o]))] for o, d in values(type(built)()).items()]
        console.print(table("options", ["name", "default", "here"], rows))
        console.print(
            f"corruptions: {', '.join(built.corruptions)}; --contrast, for negatives: {built.contrast().corruption}"
        )
        for item in drawn:
            rows = [
                [v.replace("\n", "\\n") if isinstance(v, str) else v for v in row.values()] for row in item["tokens"]
            ]
            console.print(table(item["text"], ["position", "clean", "corrupt", "span"], rows))
            console.print(f"answer: {' '.join(item['answer'])}   wrong: {' '.join(item['wrong'])}")
        console.print(f"other examples drawn and dropped for this tokenizer: {pairs.dropped}")

    answer(as_json, payload, show)


def chosen(name: str, options: list[str] | None) -> Task:
    """The task of that name with the options as typed."""
    import workbench as wb

    return wb.task(name, **inputs.assignments(options, "--task-option"))


def about(task: Task) -> str:
    """What the task's module says: what it asks, with the token rows of the clean prompt and of every corruption."""
    said = inspect.cleandoc(sys.modules[type(task).__module__].__doc__ or "")
    return said.replace("``", "").replace("\n::\n", "")


def values(task: Task) -> dict[str, Any]:
    """The options of a task and their values."""
    from dataclasses import fields

    frozen: Any = task  # the protocol cannot say that a task is a dataclass
    return {field.name: getattr(task, field.name) for field in fields(frozen) if field.init}


def example(pairs: Pairs, index: int, tokenizer: Any) -> dict[str, Any]:
    """One pair as rows of tokens, with what the task calls them."""

    def names(ids: Any) -> list[str]:
        return [str(t) for t in tokenizer.convert_ids_to_tokens([i for i in ids.tolist() if i >= 0])]

    spans: dict[int, list[str]] = {}
    for name, span in pairs.spans.items():
        for position in range(*span[index].tolist()):
            spans.setdefault(position, []).append(name)
    clean, corrupt = names(pairs.clean[index]), names(pairs.corrupt[index])
    rows = [
        {"position": i, "clean": a, "corrupt": b if a != b else "", "span": ", ".join(spans.get(i, []))}
        for i, (a, b) in enumerate(zip(clean, corrupt, strict=True))
    ]
    text = pairs.texts[index] if pairs.texts else ""
    return {"text": text, "tokens": rows, "answer": names(pairs.answer[index]), "wrong": names(pairs.wrong[index])}
