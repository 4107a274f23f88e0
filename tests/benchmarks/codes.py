"""Discrete autoencoders beside what needs none: AUROC of heads on models with known circuits.

    python tests/benchmarks/codes.py [--pairs 250] [--draws 3] [--models siit-ioi-1,siit-ioi-2] [--json]

Rows are forms of the method: as published, with one correction at a time, the default, and the default on prompts whose
labels were shuffled within pairs (chance); then the baselines: distance of the class means, a held-out logistic probe, and
the exact effect of ablating each head by its mean. Every form sees the same pairs, those of ``task.contrast()``, drawn
``--draws`` times; 250 is the published number. Columns are means over models and draws with the range of the models' means;
the trained models differ in their seed. The options of the default were chosen on ``siit-ioi``, which is not scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

TASKS = {
    "compiled-ioi": ("ioi", {}),
    "compiled-two-task": ("ioi", {}),
    "compiled-induction": ("induction", {"length": 12}),
}
PLAIN = {
    "pooling": "mean",
    "centre": False,
    "normalise": False,
    "silent": 0.0,
    "dimensions": 0,
    "statistic": "unique",
    "score": "raw",
}
SLOW = {"epochs": 500, "rate": 1e-3}
FORMS: dict[str, dict[str, Any]] = {
    "scaled inputs": {**PLAIN, **SLOW, "normalise": True},
    "scaled, named places": {**PLAIN, **SLOW, "normalise": True, "pooling": "spans", "dimensions": 64},
    "scaled, excess over the null": {**PLAIN, **SLOW, "normalise": True, "score": "excess"},
    "scaled, z": {**PLAIN, **SLOW, "normalise": True, "score": "z"},
    "scaled, mass": {**PLAIN, **SLOW, "normalise": True, "statistic": "mass"},
    "default": {},
    "default, z": {"score": "z"},
    "default, raw mass": {"score": "raw"},
}


def shuffled(pairs: Any, seed: int) -> Any:
    """Pairs in which clean and corrupted change sides at random."""
    import torch

    swap = torch.rand(len(pairs), generator=torch.Generator().manual_seed(1000 + seed)) < 0.5
    clean = torch.where(swap[:, None], pairs.corrupt, pairs.clean)
    return replace(pairs, clean=clean, corrupt=torch.where(swap[:, None], pairs.clean, pairs.corrupt))


def row(model: Any, pairs: Any, seed: int) -> dict[str, float]:
    """AUROC of every form on one model and one draw."""
    import workbench as wb

    truth = model.ground_truth

    def found(method: str, given: Any = pairs, **options: Any) -> Any:
        return wb.find_circuit(model, given, method, "node", seed=seed, **options)

    published = found("discrete-sae-published")
    areas = {
        "published": wb.auroc(published, truth, signed=True),
        "published, by pairs of heads": wb.auroc(published, truth, column="pairs"),
    }
    circuits = {name: found("discrete-sae", **options) for name, options in FORMS.items()}
    areas |= {name: wb.auroc(circuit, truth, signed=True) for name, circuit in circuits.items()}
    areas["default, shuffled labels"] = wb.auroc(found("discrete-sae", shuffled(pairs, seed)), truth, signed=True)
    for title, column in (("difference of the means", "mean_difference"), ("logistic probe", "probe")):
        areas[title] = wb.auroc(circuits["default"], truth, column=column)
    exact = wb.find_circuit(model, pairs, "patching", "node", "mean")
    heads = [name for name in exact.names if name.startswith("a")]
    scores = dict(zip(exact.names, exact.scores.tolist(), strict=True))
    effects = wb.Circuit.of("node", heads, heads).rescored([scores[name] for name in heads])
    areas["exact mean ablation"] = wb.auroc(effects, truth)
    return areas


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default="", help="siit models, folders or names; by default the bundled ones but siit-ioi"
    )
    parser.add_argument("--pairs", type=int, default=250)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only-models", action="store_true", help="leave the compiled models out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    import torch

    import workbench as wb

    torch.set_num_threads(args.threads)
    seeds = [name for name in wb.bundled() if name.startswith("siit-ioi-")]
    trained = [name for name in args.models.split(",") if name] or seeds
    groups = {"siit-ioi": [(name, "ioi", {}) for name in trained]}
    if not args.only_models:
        groups |= {name: [(name, task, options)] for name, (task, options) in TASKS.items()}
    rows = []
    for group, members in groups.items():
        for name, kind, options in members:
            model = wb.load(name)
            for draw in range(args.draws):
                pairs = wb.task(kind, **options).contrast().build(seed=draw, tokenizer=model.tokenizer, n=args.pairs)
                areas = row(model, pairs, draw)
                rows += [{"group": group, "model": name, "draw": draw, "form": f, "auroc": a} for f, a in areas.items()]
                print(f"{name}, draw {draw}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"pairs": args.pairs, "draws": args.draws, "rows": rows}, indent=1))
    else:
        show(rows)
    return 0


def show(rows: list[dict[str, Any]]) -> None:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    frame = pd.DataFrame(rows)
    groups = list(dict.fromkeys(frame["group"]))
    table = Table(title="AUROC of heads, mean [range]", title_justify="left")
    for column in ("form", *groups):
        table.add_column(column, justify="left" if column == "form" else "right")
    for form in dict.fromkeys(frame["form"]):
        cells = []
        for group in groups:
            own = frame[(frame["form"] == form) & (frame["group"] == group)]
            # Over trained models the range is that of their means; of a single model, that of its draws.
            spread = own.groupby("model")["auroc"].mean() if own["model"].nunique() > 1 else own["auroc"]
            cells.append(f"{own['auroc'].mean():.2f} [{spread.min():.2f}, {spread.max():.2f}]")
        table.add_row(form, *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    sys.exit(main())
