"""``reuse``: do two tasks share their circuits, and do the heads of one repair the other?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps import inputs
from workbench.apps.inputs import LARGEST_SEED, JsonOption, ModelArgument, OutOption
from workbench.apps.terminal import answer, table, working
from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.circuits import Circuit
    from workbench.models.protocol import Model
    from workbench.probes.circuits.reuse.overlap import Reuse
    from workbench.probes.circuits.reuse.repair import Repair

_HEAD = re.compile(r"^(?:a?)(\d+)\.(?:h?)(\d+)$")
_REPAIR = {"condition": "left", "accuracy": "right", "low": "right", "high": "right", "difference": "right",
           "fixed": "right", "broken": "right", "on_answer": "right", "on_forced": "right"}  # fmt: skip


def reuse(
    model: ModelArgument,
    source: Annotated[str, typer.Option("--from", metavar="TASK", help="The task whose circuit is A.")] = "ioi",
    target: Annotated[
        str, typer.Option("--to", metavar="TASK", help="The task that may use it too.")
    ] = "colored-objects",
    method: Annotated[
        str, typer.Option("--method", help="How to find circuits; `workbench methods` lists them.")
    ] = "path-patching",
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="Keep only the N strongest parts of each circuit.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Take the circuits and roles from the papers instead of finding them.")
    ] = False,
    onto: Annotated[
        str | None,
        typer.Option(
            "--onto", help="Named words of the second task that heads are forced to attend to, separated by commas."
        ),
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            "--heads",
            help="Heads to force, as 12.3,13.4; may be given several times, each a group.",
            show_default="inhibition and negative heads that the second task leaves idle",
        ),
    ] = None,
    controls: Annotated[
        int, typer.Option("--controls", min=0, help="Sets of random heads forced in the same way.")
    ] = 8,
    examples: Annotated[int, typer.Option("-n", "--examples", min=1, help="Number of pairs of prompts per task.")] = 64,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pairs that go through the model together.")] = 16,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of the examples.")] = 0,
    method_options: Annotated[
        list[str] | None, typer.Option("--option", help="An option of the method, as name=value.")
    ] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Circuits of two tasks compared.

    What they share, what their heads do, and whether heads of the first repair the second when --onto says where to look.
    """
    folder = inputs.fresh(out)
    words = [part.strip() for part in onto.split(",")] if onto else []
    if source == target:
        raise WorkbenchError(f"--from and --to name two different tasks; got {source!r} twice")
    if heads and not words:
        raise WorkbenchError("--heads says which heads to force; --onto, which words of the second task they attend to")
    options = inputs.assignments(method_options, "--option")
    if published and (options or top is not None):
        raise WorkbenchError("--published takes circuits from the papers; --option and --top belong to finding them")
    forced: dict[str, Repair] = {}
    note = ""
    with working(f"{model}: {source} and {target}"):
        import workbench as wb
        from workbench.probes.circuits.reuse.overlap import circuit_reuse, repairs

        tasks = {name: wb.task(name) for name in (source, target)}
        loaded = inputs.load(model)
        pairs = {name: task.build(seed=seed, tokenizer=loaded.tokenizer, n=examples) for name, task in tasks.items()}
        for word in words:
            if word not in pairs[target].spans:
                raise UnknownName(f"named word of {target}", word, pairs[target].spans)
        named = [_heads(loaded, text) for text in heads or ()]
        given = {name: _published(loaded, name) for name in pairs} if published else None
        found = circuit_reuse(
            loaded, pairs, circuits=given, method=method, top=top, roles=given is None, batch=batch, **options
        )
    if words:
        with working(f"{model}: forcing attention on {target}"):
            groups, movers = _groups(found, named, given)
            if groups:
                forced = repairs(
                    loaded, pairs[target], groups, words, movers=movers, controls=controls, batch=batch, seed=seed
                )
            else:
                note = f"no head of {source} inhibits or is negative and idle in {target}; name heads with --heads"
    if folder is not None:
        _save(folder, found, forced)
    compared = found.comparison.frame().iloc[-1]
    payload = {
        "command": "reuse",
        "model": model,
        "tasks": list(found.tasks),
        "shared": list(found.shared),
        "overlap": compared.to_dict(),
        "spearman": found.comparison.spearman,
        "rows": found.frame(),
        "repairs": {name: each.frame() for name, each in forced.items()},
        "note": note,
        "saved": folder,
        "provenance": found.provenance,
    }

    def show(console: Console) -> None:
        frame = found.frame()
        columns = {str(name): "right" if frame[name].dtype.kind == "f" else "left" for name in frame}
        rows = [[("yes" if v else "") if isinstance(v, bool) else v for v in row] for row in frame.values.tolist()]
        console.print(table(f"{model}: circuits of {source} and {target}", columns, rows))
        console.print(
            f"{compared.common:.0f} of the {compared.a:.0f} nodes of {source} are among the {compared.b:.0f} of {target}: "
            f"{100 * compared.overlap:.0f}% (IoU {compared.iou:.2f}; by chance {compared.expected:.2f} nodes, "
            f"IoU {compared.expected_iou:.2f}; p {compared.p:.2g})"
        )
        for name, each in forced.items():
            part = each.frame()[list(_REPAIR)]
            console.print(
                table(f"{name} ({', '.join(each.heads[1])}) onto {', '.join(words)}", _REPAIR, part.values.tolist())
            )
        for line in (note, f"saved in {folder}" if folder is not None else ""):
            if line:
                console.print(line)

    answer(as_json, payload, show)


def _heads(model: Model, text: str) -> tuple[str, ...]:
    """Heads as typed, ``12.3,13.4`` or ``a12.h3,a13.h4``."""
    names = []
    for part in text.split(","):
        match = _HEAD.match(part.strip())
        if match is None:
            raise WorkbenchError(f"--heads wants heads as layer.head, such as 12.3,13.4; got {part.strip()!r}")
        layer, head = int(match[1]), int(match[2])
        if layer >= model.shape.layers or head >= model.shape.heads:
            raise WorkbenchError(
                f"{model.name} has layers 0 to {model.shape.layers - 1} with heads 0 to {model.shape.heads - 1}; "
                f"got head {layer}.{head}"
            )
        names.append(f"a{layer}.h{head}")
    return tuple(dict.fromkeys(names))


def _published(model: Model, task: str) -> Circuit:
    """The published circuit of a task for a model of this shape, the one of the reuse paper where there are several."""
    from workbench.datasets.published.circuits import published_circuit, published_circuits

    fitting = []
    for name in published_circuits():
        circuit = published_circuit(name)
        heads = sum(".h" in node for node in circuit.names)
        last = f"a{model.shape.layers - 1}.h{model.shape.heads - 1}"
        if (
            circuit.provenance["task"] == task
            and heads == model.shape.layers * model.shape.heads
            and last in circuit.names
        ):
            fitting.append((not name.startswith("merullo"), name, circuit))
    if not fitting:
        raise WorkbenchError(
            f"no circuit of {task} is published for a model of {model.shape.layers} layers with {model.shape.heads} heads; "
            "leave --published away to find it"
        )
    return min(fitting, key=lambda found: found[:2])[2]


def _groups(
    found: Reuse, named: list[tuple[str, ...]], given: dict[str, Circuit] | None
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Heads to force by name of their group, and the movers of the second task whose attention is watched."""
    from workbench.probes.circuits.reuse.overlap import FORCED_ROLES, idle_heads

    source, target = found.tasks
    groups: dict[str, tuple[str, ...]]
    if given is None:
        groups, movers = idle_heads(found), found.roles[target].of("mover")
    else:
        busy = set(given[target].nodes)
        told = {role: tuple(given[source].provenance["roles"].get(role, ())) for role in FORCED_ROLES}
        groups = {role: idle for role, all_ in told.items() if (idle := tuple(n for n in all_ if n not in busy))}
        movers = tuple(given[target].provenance["roles"].get("mover", ()))
    if named:
        groups = {", ".join(heads): heads for heads in named}
    taken = {name for heads in groups.values() for name in heads}
    return groups, tuple(name for name in movers if name not in taken)


def _save(folder: Path, found: Reuse, forced: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    found.save(folder / "overlap")
    for task in found.tasks:
        found.circuits[task].save(folder / f"circuit-{task}")
    for task, roles in found.roles.items():
        roles.save(folder / f"roles-{task}")
    for number, each in enumerate(forced.values()):
        each.save(folder / f"repair-{number}")
