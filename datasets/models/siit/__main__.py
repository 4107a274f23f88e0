"""Train and write a bundled model: ``python -m workbench.datasets.models.siit --seed 0``.

Seed 0 is ``siit-ioi``, seed n ``siit-ioi-n``. A checkpoint in ``--work`` lets an interrupted run go on. Weights are stored as
float16 and judged as stored: a network that misses a requirement is not written.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from workbench.circuits import Circuit
from workbench.datasets.models.siit.audit import SHARE, audit, held_out, truth
from workbench.datasets.models.siit.measure import REQUIRED, measure, shortfalls
from workbench.datasets.models.siit.program import vocabulary
from workbench.datasets.models.siit.swap import COMPONENTS
from workbench.datasets.models.siit.train import COOLING, LATE_LEAK, SMOOTHING, WEIGHTS, Recipe, train
from workbench.errors import Refused
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeNet

MODELS = Path(__file__).resolve().parents[1]


def name_of(seed: int) -> str:
    """The bundled name of a seed."""
    return "siit-ioi" if seed == 0 else f"siit-ioi-{seed}"


def write(net: NativeNet, folder: Path, recipe: Recipe, steps: int, seconds: float) -> dict[str, Any]:
    """Write weights (float16), tokenizer, ground truth, audit and card; the audit is of the stored weights. Raises ``Refused``,
    leaving no folder, if they miss a requirement."""
    NativeModel(net, vocabulary(), name=folder.name).save(folder, dtype=torch.float16)
    model = NativeModel.load(folder)
    found = measure(model.net)
    missed = shortfalls(found)
    if missed:
        shutil.rmtree(folder)
        raise Refused(
            f"{folder.name} is not written: every accuracy has to exceed {REQUIRED}; it has {', '.join(missed)}. "
            "Train with more --steps or another --seed"
        )
    pairs = held_out(model)
    circuit = truth(model, pairs)
    found = {
        **audit(model, pairs, circuit),
        **found,
        "recipe": asdict(recipe),
        "steps": steps,
        "seconds": round(seconds, 1),
    }
    shutil.rmtree(folder / "ground_truth", ignore_errors=True)
    circuit.save(folder / "ground_truth")
    (folder / "audit.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "card.md").write_text(card(model, circuit, found))
    return found


def card(model: NativeModel, circuit: Circuit, found: dict[str, Any]) -> str:
    """The model's page."""
    needed = circuit.columns["needed"].tolist()
    rows = "\n".join(
        f"| `{name}` | {'yes' if used else 'no'} | {'yes' if kept else 'no'} | {effect:.2f} | {cut:.2f} |"
        for name, used, kept, effect, cut in zip(
            circuit.names,
            needed,
            circuit.kept.tolist(),
            *(circuit.columns[key].tolist() for key in ("effect", "cut")),
            strict=True,
        )
        if used or kept
    )
    parts = "\n".join(
        f"| {variable} | `{component}` | {found['iia'][variable]:.2%} | {found['effects'][component]:.2f} |"
        for variable, component in COMPONENTS.items()
    )
    others = "\n".join(
        f"| `{name}` | {found['strict'][name]:.2%} | {found['kl'][name]:.4f} | {found['leak'][name]:.2%} |"
        for name in found["strict"]
    )
    recipe, c, span = found["recipe"], model.net.config, found["gap"]
    shape = f"{c.layers} layers, {c.heads} heads of {c.head_width}, width {c.width}, MLP {c.mlp_width}"
    weights = ", ".join(f"{name} {value}" for name, value in WEIGHTS.items())
    steps = f"Adam, peak rate {recipe['rate']}, {found['steps']} steps of {recipe['batch']} pairs"
    command = f"python -m workbench.datasets.models.siit --seed {recipe['seed']} --batch {recipe['batch']}"
    return f"""# {model.name}

A small softmax transformer trained onto a known causal model of indirect object identification (`task("ioi")`) by strict
interchange-intervention training (arXiv 2407.14494). The program has three variables: which of the first two names the third
one repeats (`duplicate`), the same at the last token (`inhibition`), and the names that are left (`mover`). Each has one head.
With three different names the program answers either of the first two.

| | |
|-|-|
| architecture | {shape}, learned positions up to {c.context} tokens, rms norm |
| vocabulary | {c.vocab} words: those of the task (`tokenizer.json`; `<bos>` first) |
| parameters | {sum(p.numel() for p in model.net.parameters()):,}, stored as float16 |
| recipe | {steps} of prompts, rate falling over the last {COOLING}, seed {recipe["seed"]} (`siit/train.py`) |
| loss | {weights}, and leak {LATE_LEAK} while the rate falls; targets smoothed by {SMOOTHING} over the names |
| start | random, except that the head of `duplicate` starts with equal queries and keys |
| training time | {found["seconds"]:.0f} s on {recipe["threads"]} CPU thread(s) of a busy machine |
| accuracy | {found["accuracy"]:.2%} of held-out prompts; with nobody named twice {found["accuracy_nobody"]:.2%} |

All numbers are of the stored weights on pairs of names that training never saw. Effects are in units of the logit difference,
of which clean and corrupted prompts (`{found["corruption"]}`) are {span:.2f} apart.

| variable | component | interchange accuracy | exact effect of the node |
|-|-|-|-|
{parts}

Interchange accuracy is taken over the interventions that change the program's answer.

## Parts that the program does not have

Strict accuracy and mean KL divergence (nats) with the part's output from another prompt; leak is the mean size of the part's
exact effect as a share of {span:.2f}.

| part | strict accuracy | KL | leak |
|-|-|-|-|
{others}

## Circuit

`load("{model.name}").ground_truth` has all {found["edges"]} edges with two exact effects on {found["examples"]} held-out
prompts: of the corrupted value on the edge (`effect`), and of nothing on it (`cut`). It keeps the {len(circuit)} edges whose
effect is at least {SHARE:.0%} of the {span:.2f}. The column `needed` marks {sum(needed)} edges, those between the program's
heads whose cut has that size; one that is needed and not kept carries what clean and corrupted prompts share. Training fixes
which parts compute a variable, not by which channels they hand it on: those are measured. Kept and not needed:
{", ".join(f"`{name}`" for name in found["kept_not_needed"]) or "none"}.

| edge | needed | kept | effect | cut |
|-|-|-|-|-|
{rows}

Again: `{command}`. Everything here as JSON: `audit.json`.
"""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    default = Recipe()
    parser = argparse.ArgumentParser(prog="python -m workbench.datasets.models.siit", description=__doc__)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--steps", type=int, default=default.steps, help="at most so many before the rate falls")
    parser.add_argument("--batch", type=int, default=default.batch, help="pairs of prompts per step")
    parser.add_argument("--rate", type=float, default=default.rate, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument("--work", default="results/training", help="folder of checkpoints")
    parser.add_argument("--out", default=str(MODELS), help="folder that holds the models")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    recipe = Recipe(args.seed, args.steps, args.batch, args.rate, args.threads)
    name = name_of(recipe.seed)
    net, steps, seconds = train(recipe, Path(args.work) / name)
    found = write(net, Path(args.out) / name, recipe, steps, seconds)
    print(json.dumps({key: found[key] for key in ("accuracy", "iia", "strict", "leak", "kept", "edges", "seconds")}))


if __name__ == "__main__":
    main()
