"""``methods``, ``circuit``, ``faithfulness``: which parts of a model carry a behaviour, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.apps import inputs
from workbench.apps.commands.tasks import ExamplesOption, SeedOption, TaskArgument, TaskOptions, chosen
from workbench.apps.inputs import JsonOption, ModelArgument, OutOption
from workbench.apps.terminal import answer, table, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.circuits import Circuit
    from workbench.models.protocol import Model
    from workbench.pairs import Pairs, Task

_SHOWN = 15
METHOD = "eap-ig"
MethodOption = Annotated[str, typer.Option("--method", help="How to score; `workbench methods` lists them.")]
LevelOption = Annotated[str | None, typer.Option("--level", help="node or edge; what the method is for by default.")]
AblationOption = Annotated[
    str, typer.Option("--ablation", help="What replaces an output: counterfactual, zero, mean or optimal.")
]
PositionsOption = Annotated[
    str, typer.Option("--positions", help="Parts over all positions, at each one, or at the spans that the task names.")
]
SavedOption = Annotated[Path | None, typer.Option("--circuit", help="A circuit saved with `circuit --out`.")]
ScoringOption = Annotated[
    str | None, typer.Option("--method", help="How to score without --circuit.", show_default=METHOD)
]
MethodOptions = Annotated[list[str] | None, typer.Option("--option", help="An option of the method, as name=value.")]


def methods(as_json: JsonOption = False) -> None:
    """Circuit discovery methods and their options."""
    with working("methods"):
        import workbench as wb

        rows = [
            {
                "name": m.name,
                "description": m.description,
                "levels": m.levels,
                "ablations": m.ablations,
                "positions": m.positions,
                "contrast": m.contrast,
                "paper": m.paper,
                "options": m.options,
            }
            for m in wb.methods().values()
        ]

    def show(console: Console) -> None:
        cells = [
            [
                r["name"],
                r["description"],
                ", ".join(r["levels"]),
                ", ".join(f"{k}={v}" for k, v in r["options"].items()),
            ]
            for r in rows
        ]
        console.print(table("methods", ["name", "score", "levels", "options"], cells))

    answer(as_json, {"command": "methods", "rows": rows}, show)


def circuit(
    model: ModelArgument,
    task: TaskArgument,
    method: MethodOption = METHOD,
    level: LevelOption = None,
    ablation: AblationOption = "counterfactual",
    examples: ExamplesOption = 64,
    seed: SeedOption = 0,
    keep: Annotated[
        int | None, typer.Option("--top", help="Keep only the N parts with the largest absolute scores.")
    ] = None,
    positions: PositionsOption = "all",
    task_options: TaskOptions = None,
    method_options: MethodOptions = None,
    eap_json: Annotated[Path | None, typer.Option("--eap-json", help="Also write the graph of EAP-IG and MIB.")] = None,
    graph_json: Annotated[
        Path | None, typer.Option("--graph-json", help="Also write the kept edges as an attribution graph.")
    ] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the nodes or edges of a task's circuit.

    Methods that compare activations get the task's negatives as corrupted prompts.
    """
    target = inputs.fresh(out)
    with working(f"{model}: {method} on {task}"):
        import workbench as wb

        asked = ask(model, task, examples, seed, task_options)
        found = asked.find(method, level, ablation, method_options, positions)
        if keep is not None:
            found = found.top(keep)
        if eap_json is not None:
            wb.write_eap_json(found, eap_json)
        if graph_json is not None:
            wb.write_graph_json(found, graph_json, slug=f"{asked.model.name}-{task}".replace("/", "-"))
        if target is not None:  # last: it cannot be written twice, so a refusal of the others must not leave it behind
            found.save(target)
    frame = found.frame()
    payload = {
        "command": "circuit",
        "model": model,
        "task": task,
        "method": method,
        "level": found.level,
        "kept": len(found),
        "rows": frame,
        "saved": target,
        "provenance": dict(found.provenance),
    }

    def show(console: Console) -> None:
        _show_circuit(console, f"{model}, {task}, {method}", found)
        if target is not None:
            console.print(f"saved in {target}")

    answer(as_json, payload, show)


def faithfulness(
    model: ModelArgument,
    task: TaskArgument,
    saved: SavedOption = None,
    method: ScoringOption = None,
    level: LevelOption = None,
    ablation: AblationOption = "counterfactual",
    examples: ExamplesOption = 64,
    seed: SeedOption = 0,
    task_options: TaskOptions = None,
    method_options: MethodOptions = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a circuit against random ones.

    How much of the behaviour its best parts carry by themselves.
    """
    target = inputs.fresh(out)
    with working(f"{model}: faithfulness on {task}"):
        import workbench as wb

        given = loaded(saved, method, level, method_options)
        asked = ask(model, task, examples, seed, task_options)
        found = asked.find(method or METHOD, level, ablation, method_options) if given is None else given
        result = wb.faithfulness(asked.model, found, asked.pairs, ablation=ablation, metric=asked.task.metric)
        if target is not None:
            result.save(target)
    frame = result.frame()
    payload = {
        "command": "faithfulness",
        "model": model,
        "task": task,
        "circuit": str(saved) if saved else method or METHOD,
        "cpr": result.cpr,
        "cmd": result.cmd,
        "note": result.note,
        "rows": frame,
        "saved": target,
        "provenance": result.provenance,
    }

    def show(console: Console) -> None:
        rows = [list(row) for row in frame.itertuples(index=False)]
        console.print(table(f"{model}, {task}: faithfulness", dict.fromkeys(frame.columns, "right"), rows))
        console.print(
            "faithfulness: the largest absolute scores kept, 1 is the whole model, 0 nothing; low, high: its 95% interval; "
            "signed: the largest signed scores; reversed: the smallest; random: as many random parts, lowest to highest"
        )
        console.print(
            f"CPR {result.cpr:.3f} (area under the curve, higher is better), CMD {result.cmd:.3f} (lower is better)"
        )
        if result.note:
            console.print(result.note)
        if target is not None:
            console.print(f"saved in {target}")

    answer(as_json, payload, show)


@dataclass(frozen=True)
class Asked:
    """What a command is about: a model, a task and its pairs."""

    model: Model
    task: Task
    pairs: Pairs
    seed: int

    def find(
        self,
        method: str,
        level: str | None,
        ablation: str,
        options: list[str] | None,
        positions: str = "all",
    ) -> Circuit:
        import workbench as wb
        from workbench.probes.circuits.find import pairs_for

        return wb.find_circuit(
            self.model,
            pairs_for(method, self.task, self.model, len(self.pairs), self.seed),
            method=method,
            level=level,
            ablation=ablation,
            metric=self.task.metric,
            positions=positions,
            **inputs.assignments(options, "--option"),
        )


def ask(model: str, task: str, examples: int, seed: int, options: list[str] | None) -> Asked:
    """Load the model and build the pairs."""
    built = chosen(task, options)
    wrapped = inputs.load(model)
    return Asked(wrapped, built, built.build(seed=seed, tokenizer=wrapped.tokenizer, n=examples), seed)


def loaded(saved: Path | None, method: str | None, level: str | None, options: list[str] | None) -> Circuit | None:
    """The saved circuit, None if one is to be found; refuses to be told how to find one beside a saved one."""
    from workbench.circuits import Circuit

    if saved is not None and (method or level or options):
        raise WorkbenchError("--method, --level and --option say how to find a circuit; --circuit gives one")
    return None if saved is None else Circuit.load(saved)


def _show_circuit(console: Console, title: str, found: Circuit) -> None:
    frame = found.frame()
    order = frame["score"].abs().sort_values(ascending=False, kind="stable").index
    best = frame.loc[order].head(_SHOWN)
    columns = {n: "right" if frame[n].dtype.kind == "f" else "left" for n in frame.columns}
    more = f"; the {_SHOWN} strongest" if len(frame) > _SHOWN else ""
    rows = [[_score(v) if isinstance(v, float) else v for v in row] for row in best.values.tolist()]
    console.print(table(f"{title}: {len(found):,} of {len(found.names):,} {found.level}s kept{more}", columns, rows))
    if "unit" in found.provenance:
        console.print(f"score: {found.provenance['unit']}")
    some = best[best["score"] != 0]
    heads = [name for name in some["node" if found.level == "node" else "source"] if name.startswith("a")]
    if heads:
        console.print(
            f"strongest heads: {', '.join(dict.fromkeys(n.removeprefix('a').replace('.h', '.') for n in heads))}"
        )


def _score(value: float) -> float | str:
    """A score that three decimals would show as nothing in powers of ten: the order of parts depends on it."""
    return f"{value:.0e}" if 0 < abs(value) < 0.0005 else value
