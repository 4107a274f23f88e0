"""Every circuit method on every model whose circuit is known: one leaderboard.

    python tests/benchmarks/circuits.py [--models compiled-ioi,siit-ioi] [--methods eap,eap-ig] [--pairs 16] [--level edge]
                                        [--export-mib DIR] [--json]

A circuit is found on pairs of the task's training split and judged on pairs of its test split. AUROC and AUPRC compare the
scores with the model's ground truth: edges (or heads and MLPs) whose exact exchange has an effect under the same corruption.
CMD and CPR are the areas of the MIB benchmark, with what the method replaced parts by. Forward and backward passes are
counted in prompts, as multiples of the number of pairs. ``random`` ranks by random numbers. Compiled models come with hard
and with soft attention (``:soft``).

``--export-mib DIR`` writes every edge circuit of one method per folder as a submission of MIB's circuit track.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODELS = {
    "compiled-induction": ("induction", {"length": 12}),
    "compiled-induction:soft": ("induction", {"length": 12}),
    "compiled-needle": ("needle", {"length": 48}),
    "compiled-ioi": ("ioi", {}),
    "compiled-ioi:soft": ("ioi", {}),
    "compiled-greater-than": ("greater-than", {}),
    "compiled-two-task": ("ioi", {}),
    "siit-ioi": ("ioi", {}),
}
"""Model -> task and its options; ``--models`` chooses from these."""
VARIATIONS = {
    "eap (zero)": ("eap", "zero", {}),
    "eap (mean)": ("eap", "mean", {}),
}
"""Rows beside the methods with their own defaults: method, ablation, options."""


def load(name: str) -> Any:
    import workbench as wb
    from workbench.datasets.models.compile import compiled

    if name.endswith(":soft"):
        return compiled(name.removesuffix(":soft"), "soft")
    return wb.load(name)


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """Prompts that go forward and backward through ``model`` while the block runs."""
    passes = {"forward": 0, "backward": 0}
    run = model.run

    def counting(*args: Any, **kwargs: Any) -> Any:
        found = run(*args, **kwargs)
        rows = len(found.tokens.ids)
        passes["forward"] += rows
        if found.logits is not None and found.logits.requires_grad:

            def back(gradient: Any) -> None:
                passes["backward"] += rows

            found.logits.register_hook(back)
        return found

    model.run = counting
    try:
        yield passes
    finally:
        del model.run


def ways(level: str, chosen: list[str]) -> dict[str, tuple[str, str, str, dict[str, Any]]]:
    """Rows of the table: name -> method, level, ablation, options."""
    import workbench as wb

    found: dict[str, tuple[str, str, str, dict[str, Any]]] = {}
    for name, method in wb.methods().items():
        ablation = "counterfactual" if "counterfactual" in method.ablations else method.ablations[0]
        if level == "edge" and method.levels[-1] == "node":
            found[f"{name} (nodes)"] = (name, "node", ablation, {})
        elif level in method.levels:
            found[name] = (name, level, ablation, {})
    for name, (method, ablation, options) in VARIATIONS.items():
        if level in wb.methods()[method].levels:
            found[name] = (method, level, ablation, options)
    found["random"] = ("", level, "counterfactual", {})
    unknown = [name for name in chosen if name not in found]
    if unknown:
        raise SystemExit(f"no row {unknown[0]!r}; known: {', '.join(found)}")
    return {name: way for name, way in found.items() if not chosen or name in chosen}


def measure(
    model: Any, task: Any, pairs: Any, held: Any, way: tuple[str, str, str, dict[str, Any]]
) -> tuple[dict[str, Any], Any]:
    """One row, and the circuit."""
    import torch

    import workbench as wb
    from workbench.probes.circuits.judgement.labels import auprc

    method, level, ablation, options = way
    start = time.perf_counter()
    with counted(model) as passes:
        if method:
            circuit = wb.find_circuit(
                model, pairs, method, level, ablation, metric=task.metric, batch=len(pairs), **options
            )
        else:
            names = wb.find_circuit(model, pairs, "eap", level, metric=task.metric).names
            scores = torch.rand(len(names), generator=torch.Generator().manual_seed(0))
            circuit = wb.Circuit(level, names, scores, torch.ones(len(names), dtype=torch.bool))
    seconds = time.perf_counter() - start
    row = {
        "level": level,
        "ablation": ablation,
        "auroc": math.nan,
        "auprc": math.nan,
        "cmd": math.nan,
        "cpr": math.nan,
        "seconds": seconds,
        "forward": passes["forward"] / len(pairs),
        "backward": passes["backward"] / len(pairs),
    }
    truth = model.ground_truth
    whole = level == "node" or len(circuit.names) == len(truth.names)
    if whole:
        row["auroc"], row["auprc"] = wb.auroc(circuit, truth), auprc(circuit, truth)
        judged = wb.faithfulness(
            model, circuit, held, ablation=ablation, metric=task.metric, controls=0, batch=len(held)
        )
        row["cmd"], row["cpr"] = judged.cmd, judged.cpr
    return row, circuit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default="", help="rows of the table, all if empty")
    parser.add_argument("--level", choices=("edge", "node"), default="edge")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export-mib", type=Path, help="a new folder for the circuits as MIB submissions")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    import torch

    import workbench as wb

    torch.set_num_threads(args.threads)
    names = [name for name in args.models.split(",") if name]
    for name in names:
        if name not in MODELS:
            raise SystemExit(f"no model {name!r} with a known circuit here; known: {', '.join(MODELS)}")
    known = wb.methods()
    chosen = ways(args.level, [name for name in args.methods.split(",") if name])
    rows, circuits = [], {}
    for name in names:
        model = load(name)
        kind, options = MODELS[name]
        task = wb.task(kind, **options)
        apart = task.contrast()
        pairs = task.build(seed=args.seed, tokenizer=model.tokenizer, n=args.pairs)
        unlike = apart.build(seed=args.seed, tokenizer=model.tokenizer, n=max(args.pairs, 32))
        held = wb.task(kind, **options, split="test").build(seed=args.seed, tokenizer=model.tokenizer, n=args.pairs)
        for title, way in chosen.items():
            if not args.json:
                print(f"{name}: {title}", file=sys.stderr, flush=True)
            try:
                row, circuit = measure(model, task, unlike if way[0] and known[way[0]].contrast else pairs, held, way)
            except wb.WorkbenchError as error:
                row, circuit = {"level": way[1], "ablation": way[2], "refused": str(error)}, None
            rows.append({"model": name, "method": title, **row})
            if circuit is not None and circuit.level == "edge" and len(circuit.names) == len(model.ground_truth.names):
                circuits[title, kind, name.replace(":", "-")] = circuit
    if args.export_mib:
        for title in dict.fromkeys(title for title, _, _ in circuits):
            found = {(task, model): c for (way, task, model), c in circuits.items() if way == title}
            width = {key: load(key[1].replace("-soft", ":soft")).shape.width for key in found}
            sized = {key: replace_width(circuit, width[key]) for key, circuit in found.items()}
            wb.write_mib(sized, args.export_mib / title.replace(" ", "-").replace("(", "").replace(")", ""))
    if args.json:
        print(json.dumps({"pairs": args.pairs, "seed": args.seed, "rows": rows}, indent=1))
    else:
        show(rows)
    return 0


def replace_width(circuit: Any, width: int) -> Any:
    """The circuit with its model's width in the provenance, as the export wants it."""
    from dataclasses import replace

    return replace(circuit, provenance={**circuit.provenance, "width": width})


def show(rows: list[dict[str, Any]]) -> None:
    """The leaderboard: AUROC per model, then means over the models; and what was refused."""
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    frame = pd.DataFrame([row for row in rows if "refused" not in row])
    models = list(dict.fromkeys(frame["model"]))
    table = Table(title="circuits: AUROC against the known circuit, and means over the models", title_justify="left")
    for column in ("method", *models, "CMD", "CPR", "seconds", "forward", "backward"):
        table.add_column(column, justify="left" if column == "method" else "right")
    means = frame.groupby("method", sort=False)[["auroc", "cmd", "cpr", "seconds", "forward", "backward"]].mean()
    for method, mean in means.sort_values("auroc", ascending=False, na_position="last").iterrows():
        own = frame[frame["method"] == method].set_index("model")["auroc"]
        cells = [_cell(own.get(model, math.nan)) for model in models]
        table.add_row(
            str(method),
            *cells,
            *(_cell(mean[key]) for key in ("cmd", "cpr")),
            f"{mean['seconds']:.2f}",
            *(f"{mean[key]:.0f}" for key in ("forward", "backward")),
        )
    console = Console(width=max(160, 60 + 12 * len(models)))
    console.print(table)
    for row in rows:
        if "refused" in row:
            console.print(f"{row['model']}, {row['method']}: {row['refused']}")


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
