"""Train the bundled model of images: ``python -m workbench.datasets.models.vision``.

``tiny-vit`` names the shape in images of ``datasets/patches.py``, whose place is known to the patch. It has no class token: its
logits are those of the mean patch. Writes ``config.json``, ``model.safetensors`` (float16) and ``card.md`` into
``datasets/models/tiny-vit/``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.captures import capture
from workbench.datasets.patches import SHAPES, planted_images
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.sites import Site

NAME = "tiny-vit"
CONFIG = NativeConfig(
    layers=2,
    heads=4,
    width=64,
    head_width=16,
    vocab=len(SHAPES),
    mlp_width=256,
    positions="learned",
    causal=False,
    grid=(8, 8),
    patch=4,
    channels=1,
    bias=True,
)


def train(args: argparse.Namespace) -> NativeNet:
    """The trained network; logs one JSON line per 100 steps to stderr."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    net = NativeNet(CONFIG)
    opt = torch.optim.AdamW(net.parameters(), lr=args.rate, weight_decay=0.05, betas=(0.9, 0.98))
    began = time.monotonic()
    for step in range(args.steps):
        for group in opt.param_groups:
            group["lr"] = args.rate * min((step + 1) / 100, 1.0, max((args.steps - step) / (0.3 * args.steps), 0.02))
        batch = planted_images(args.batch, seed=args.seed * 1_000_000 + step, split="train")
        loss = nn.functional.cross_entropy(net(batch.images), batch.label)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        if step % 100 == 99:
            line = {
                "step": step + 1,
                "minutes": round((time.monotonic() - began) / 60, 2),
                "loss": round(loss.item(), 3),
            }
            print(json.dumps(line), file=sys.stderr, flush=True)
    args.minutes = (time.monotonic() - began) / 60
    return net.eval()


@torch.no_grad()
def evaluate(model: NativeModel, n: int) -> dict[str, Any]:
    """Accuracy on test images, without decoys, and with attention switched off; and how much attention the planted patches
    receive, ``[L, H]`` as a share of all."""
    test = planted_images(n)
    plain = planted_images(n, decoy=False)
    off: dict[Site | str, Any] = {Site("attn_out", layer): torch.zeros_like for layer in range(model.shape.layers)}
    run = model.run(test.images, maps=capture(stats=("received",)))
    planted = test.planted.flatten(1)[:, None]
    shares = [
        (run.maps[layer].received() * planted).sum(-1).mean(0) / planted.shape[-1]
        for layer in range(model.shape.layers)
    ]
    return {
        "accuracy": _right(run.logits, test.label),
        "accuracy without decoys": _right(model.run(plain.images).logits, plain.label),
        "accuracy without attention": _right(model.run(test.images, edit=off).logits, test.label),
        "planted share": torch.stack(shares),
        "even share": 4 / planted.shape[-1],
    }


def _right(logits: Tensor | None, label: Tensor) -> float:
    assert logits is not None
    return round((logits.argmax(1) == label).float().mean().item(), 4)


def write(net: NativeNet, args: argparse.Namespace) -> dict[str, Any]:
    """Store the network in half precision, evaluate what was stored, and write the card."""
    out = Path(args.out) / NAME
    NativeModel(net, name=NAME).save(out, dtype=torch.float16)
    stored = NativeModel.load(out)
    found = evaluate(stored, args.examples)
    (out / "card.md").write_text(card(args, stored.net, found))
    return found


def card(args: argparse.Namespace, net: NativeNet, found: dict[str, Any]) -> str:
    """What the model is, how it was made, what it can do."""
    c = net.config
    assert c.grid is not None
    parameters = sum(p.numel() for p in net.parameters())
    rows = [
        f"| {layer} | {' | '.join(f'{share:.3f}' for share in row)} |"
        for layer, row in enumerate(found["planted share"].tolist())
    ]
    heads = " | ".join(f"head {h}" for h in range(c.heads))
    return f"""# {NAME}

A {c.layers}-layer vision transformer that names the shape planted in a small noisy image. {c.heads} heads per layer,
width {c.width}, {parameters:,} parameters; {c.grid[0]} x {c.grid[1]} patches of {c.patch} x {c.patch} pixels, one channel;
learned positions; no class token, its logits are those of the mean patch.

Images: `workbench.datasets.patches` (`wb.planted_images`): one of {len(SHAPES)} shapes of two by two patches, and the scattered
quarters of another. A model that only counts quarters, and does not compare neighbours, has to guess between the two.

## Recipe

`python -m workbench.datasets.models.vision --steps {args.steps} --seed {args.seed}`: AdamW {args.rate:g}, weight decay .05,
batch {args.batch}, {args.steps:,} steps; {args.minutes:.1f} minutes on {args.threads} thread(s). Weights are stored as float16.

## What it can do

{args.examples} test images, chance {1 / len(SHAPES):.3f}:

| images | accuracy |
|---|---|
| as trained | {found["accuracy"]:.3f} |
| without decoys | {found["accuracy without decoys"]:.3f} |
| as trained, attention outputs set to zero | {found["accuracy without attention"]:.3f} |

Share of all attention that the four planted patches receive ({found["even share"]:.3f} if it were even):

| layer | {heads} |
|---|{"---|" * c.heads}
{chr(10).join(rows)}
"""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m workbench.datasets.models.vision", description=__doc__)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, default=1000, help="test images for the card")
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent), help="folder that holds the models")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    print(write(train(args), args))


if __name__ == "__main__":
    main()
