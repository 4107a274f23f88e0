"""Train the coders of a bundled model: ``python -m workbench.datasets.coders.train --model tiny-softmax``.

Of every layer a TopK autoencoder of the heads (``z-0`` ...) and a TopK transcoder of the MLP (``mlp-0`` ...), all in one pass
over the model's own training mixture, and one discrete code of head outputs (``discrete``) for the discrete circuit method.
Writes float16 folders and a card into ``datasets/coders/<model>/``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from workbench.coders.coder import Coder
from workbench.coders.estimators import SAE
from workbench.coders.folder import save_coder
from workbench.coders.sites import site_rows
from workbench.coders.specs import CoderSpec
from workbench.coders.train import train_coders
from workbench.datasets.models.mixture import KINDS, document
from workbench.models.load import load
from workbench.models.protocol import Model

FEATURES, K = 512, 16
CODES = 200
TOLD = "training mixture of the bundled models"
HELD_OUT = 100_000
"""Numbers of held-out documents start here."""


def texts(seed: int, first: int = 0, longest: int = 128) -> Iterator[str]:
    """Documents of all kinds, without end."""
    number = first
    while True:
        rng = random.Random(f"bundled-coders/{seed}/{number}")
        yield document(rng.choice(KINDS), rng, longest).text
        number += 1


def specs(layers: int) -> dict[str, CoderSpec]:
    """What is trained, by the name of its folder."""
    found = {}
    for layer in range(layers):
        z, block = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}"
        found[f"z-{layer}"] = CoderSpec((z,), (z,), "topk", FEATURES, options={"k": K})
        read, write = f"{block}.ln2.hook_normalized", f"{block}.hook_mlp_out"
        found[f"mlp-{layer}"] = CoderSpec((read,), (write,), "topk", FEATURES, options={"k": K})
    return found


@torch.no_grad()
def discrete(model: Model, seed: int, documents: int = 64) -> Coder:
    """A discrete code of head outputs, each averaged over a document."""
    rows = []
    for _, text in zip(range(documents), texts(seed), strict=False):
        names = [f"blocks.{layer}.attn.hook_result" for layer in range(model.shape.layers)]
        run = model.run(text, read=names, logits=None)
        rows.append(torch.cat([run.acts[name][0].mean(0) for name in names]))
    coder = SAE("discrete", features=CODES, steps=2000, batch=512, rate=1e-3, seed=seed).fit(torch.cat(rows)).coder_
    coder.about |= {"model": model.name, "reads": "attn.hook_result of every head, mean over the text", "data": TOLD}
    return coder


@torch.no_grad()
def measured(model: Model, coder: Coder, spec: CoderSpec, tokens: int = 16_384) -> dict[str, float]:
    """Variance left over, active features and dead share on held-out documents."""
    inputs, outputs, seen = [], [], 0
    for rows in site_rows(model, list(dict.fromkeys((*spec.reads, *spec.writes))), texts(0, HELD_OUT)):
        inputs.append(rows[spec.reads[0]])
        outputs.append(rows[spec.writes[0]])
        seen += len(inputs[-1])
        if seen >= tokens:
            break
    x, y = torch.cat(inputs), torch.cat(outputs)
    code: Tensor = coder.encode(x)
    left = float((coder(x) - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum())
    return {
        "fvu": left,
        "l0": float((code > 0).sum(1).double().mean()),
        "dead": 1 - float((code > 0).any(0).double().mean()),
    }


def card(model: str, rows: dict[str, dict[str, float]], args: argparse.Namespace, minutes: float) -> str:
    lines = [
        f"# Coders of {model}\n",
        f"TopK, {FEATURES} features, k = {K}: `z-l` are autoencoders of the heads of layer l (all heads side by side),",
        "`mlp-l` transcoders from what the MLP reads (`ln2.hook_normalized`) to what it writes (`hook_mlp_out`). `discrete` is a",
        f"discrete code of the heads' outputs with {CODES} features, for the option `coder={model}/discrete` of the circuit",
        "method `discrete-sae`. Stored as float16.\n",
        f"Trained on the {TOLD}: {args.steps} steps of {args.batch} tokens, seed {args.seed},",
        f"{minutes:.0f} minutes on {args.threads} CPU threads. Again:",
        f"`python -m workbench.datasets.coders.train --model {model} --steps {args.steps} --seed {args.seed}`\n",
        "Measured on 16,384 tokens of held-out documents: variance that is left unexplained, active features per token, features",
        "that are never active.\n",
        "| coder | left unexplained | active | dead |",
        "|-|-|-|-|",
        *(f"| {name} | {r['fvu']:.3f} | {r['l0']:.1f} | {r['dead']:.1%} |" for name, r in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-softmax")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.model)
    wanted, began = specs(model.shape.layers), time.monotonic()

    def tick(done: int, total: int) -> None:
        if done % 100 == 0:
            print(json.dumps({"step": done, "minutes": round((time.monotonic() - began) / 60, 1)}), file=sys.stderr)

    coders = train_coders(
        model, list(wanted.values()), texts(args.seed), steps=args.steps, batch=args.batch, seed=args.seed, data=TOLD, tick=tick
    )  # fmt: skip
    minutes = (time.monotonic() - began) / 60
    rows = {}
    for (name, spec), coder in zip(wanted.items(), coders, strict=True):
        coder.half().float()  # what is stored
        rows[name] = measured(model, coder, spec)
        save_coder(coder.half(), args.out / args.model / name)
    save_coder(discrete(model, args.seed).half(), args.out / args.model / "discrete")
    (args.out / args.model / "card.md").write_text(card(args.model, rows, args, minutes))


if __name__ == "__main__":
    main()
