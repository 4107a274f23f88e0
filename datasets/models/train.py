"""Train a bundled model: ``python -m workbench.datasets.models.train --model tiny-softmax``.

``tiny-softmax`` and ``tiny-gated`` differ in the mixer alone: same sizes, seed, data order, steps and optimiser. Writes
``config.json``, ``model.safetensors`` (float16), ``tokenizer.json`` and ``card.md`` into ``datasets/models/<model>/``; a
checkpoint in ``--work`` lets an interrupted run go on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from workbench.datasets.models.evaluate import card, evaluate
from workbench.datasets.models.mixture import KINDS, batches
from workbench.datasets.tokenizer import base_vocabulary, build, word_tokenizer
from workbench.errors import UnknownName
from workbench.models.hookpoints import attached
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

MODELS = {"tiny-softmax": "softmax", "tiny-gated": "gated-softmax"}
CONFIG = NativeConfig(layers=4, heads=8, width=128, head_width=16, vocab=0, mlp_width=512, tied=True, bias=True)


@dataclass(frozen=True)
class Stage:
    """What holds from step ``start`` on: tokens of the longest row, weight of the text loss, and the price of writing.

    Once the tasks are learned text weighs more and heads pay for what they write (``written``): a head with nothing to say
    learns to say nothing, by attending to a first token of small value or, in the gated twin, by closing its gate. Gates stay
    open until there is a price.
    """

    start: int
    longest: int
    text: float
    price: float


STAGES = (Stage(0, 72, 0.3, 0.0), Stage(1400, 128, 0.3, 0.0), Stage(2000, 192, 1.0, 1.0))
LOOK_BACK = (1, 1, 3, 4, 6)
DECAY = 0.1
WEIGHTS = {"induction": 1.5, "needle": 2.0, "greater-than": 0.7}


def stage(step: int) -> Stage:
    """The stage of a step."""
    return [each for each in STAGES if step >= each.start][-1]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, constant, then linear over the last quarter to a fiftieth of the peak.

    Nothing before the last quarter depends on ``steps``, so a run may be made longer from its checkpoint.
    """
    left = (steps - step) / (0.25 * steps)
    return peak * min((step + 1) / 100, 1.0, max(left, 0.02))


def loss_of(
    net: NativeNet, rows: list[Any], generator: torch.Generator, text_weight: float, price: float
) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy per kind of answer, averaged with ``WEIGHTS``; plus ``text_weight`` times that of the text, a quarter
    of whose positions is drawn with ``generator``; plus ``price`` times what heads write."""
    logits, targets, kinds = [], [], []
    spent: list[Tensor] = []
    for row in rows:
        with written(net, row.kind >= 0, spent) if price else nullcontext():
            hidden, _ = net(row.ids, hidden=True)
        text = (row.kind == len(KINDS)) & (torch.rand(row.kind.shape, generator=generator) < 0.25)
        b, t = ((row.kind >= 0) & (row.kind < len(KINDS)) | text).nonzero(as_tuple=True)
        logits.append(hidden[b, t] @ net.unembed)
        targets.append(row.ids[b, t + 1])
        kinds.append(row.kind[b, t])
    kind = torch.cat(kinds)
    each = nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets), reduction="none")
    means = {i: each[kind == i].mean() for i in kind.unique().tolist()}
    names = (*KINDS, "text")
    answers = [value * WEIGHTS.get(names[i], 1.0) for i, value in means.items() if i < len(KINDS)]
    total = torch.stack(answers).mean() + text_weight * means[len(KINDS)]
    parts = {names[i]: round(value.item(), 3) for i, value in means.items()}
    if spent:
        parts["written"] = round(torch.stack(spent).mean().item(), 4)
        total = total + price * torch.stack(spent).mean()
    return total, parts


@contextmanager
def written(net: NativeNet, real: Tensor, found: list[Tensor]) -> Iterator[None]:
    """Append for each layer ``mean |z_h W_O,h| / |x|`` over heads and ``real`` queries ``[B, T]`` after the first.

    ``x`` is the residual stream that the layer gets. Norms, not squares: writing much on few tokens is cheap, a little on all
    of them is not.
    """
    stream: list[Tensor] = []
    hooks: list[tuple[HookPoint, Callable[..., None]]] = []
    for layer in range(net.config.layers):
        attn: Any = net.blocks[layer].attn

        def before(x: Tensor, hook: HookPoint) -> None:
            stream[:] = [x.detach().pow(2).sum(-1, keepdim=True)]

        def after(z: Tensor, hook: HookPoint, weight: Tensor = attn.W_O) -> None:
            square = torch.einsum("bthe,hef,bthf->bth", z, weight @ weight.transpose(1, 2), z)
            found.append((square / stream[0] + 1e-8).sqrt()[:, 1:][real[:, 1:]].mean())

        hooks += [(net.hook_dict[f"blocks.{layer}.hook_resid_pre"], before), (attn.hook_z, after)]
    with attached(hooks):
        yield


@torch.no_grad()
def look_back(net: NativeNet, offsets: tuple[int, ...] = LOOK_BACK) -> None:
    """Let the first heads of layer 0 start out attending a fixed number of tokens back.

    With key bias k_f = r and query bias q_f = r exp(-i w_f s) on the fastest rotary pairs f, the score of distance d is a sum
    of r^2 cos(w_f (d - s)), largest at d = s. Content weights of these heads start at a tenth. Training goes on from there;
    without this the tasks that need such heads take several times as many steps.
    """
    attn: Any = net.blocks[0].attn
    config, fast, strength = net.config, 4, 5.0
    half = config.head_width // 2
    rates = config.theta ** (-torch.arange(half)[:fast] / half)
    for head, offset in enumerate(offsets):
        attn.W_Q[head] *= 0.1
        attn.W_K[head] *= 0.1
        attn.b_K[head, :fast] = strength
        attn.b_Q[head, :fast] = strength * torch.cos(rates * offset)
        attn.b_Q[head, half : half + fast] = -strength * torch.sin(rates * offset)


@torch.no_grad()
def open_gates(net: NativeNet) -> None:
    """Let gates start at sigmoid(2) = 0.88, so that the gated twin starts out close to the softmax model."""
    for name, p in net.named_parameters():
        if name.endswith("b_gate"):
            p.fill_(2.0)


def optimiser(net: NativeNet) -> torch.optim.AdamW:
    """AdamW; decay on matrices alone, and half the rate on gates."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "gates": []}
    for name, p in net.named_parameters():
        groups["gates" if name.endswith("gate") else "matrices" if _decays(name) else "vectors"].append(p)
    options = {"matrices": (DECAY, 1.0), "vectors": (0.0, 1.0), "gates": (0.0, 0.5)}
    return torch.optim.AdamW(
        [
            {"params": ps, "weight_decay": options[kind][0], "rate": options[kind][1], "gates": kind == "gates"}
            for kind, ps in groups.items()
            if ps
        ],
        lr=0.0,
        betas=(0.9, 0.98),
    )


def _decays(name: str) -> bool:
    return name.rsplit(".", 1)[-1].startswith("W_")


def train(args: argparse.Namespace) -> NativeNet:
    """The trained network; logs one JSON line per ``args.every`` steps to stderr."""
    if args.model not in MODELS:
        raise UnknownName("bundled model with a recipe", args.model, MODELS)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    raw, tokenizer = build(base_vocabulary()), word_tokenizer(base_vocabulary())
    net = NativeNet(
        replace(CONFIG, vocab=len(tokenizer), mixer=MODELS[args.model], trained=max(each.longest for each in STAGES))
    )
    look_back(net)
    open_gates(net)
    opt = optimiser(net)
    folder = Path(args.work) / args.model
    folder.mkdir(parents=True, exist_ok=True)
    first, spent = _resume(folder, net, opt)
    began = time.monotonic() - spent
    for step in range(first, args.steps):
        now = stage(step)
        rows = batches(random.Random(f"mixture/{args.seed}/{step}"), raw, now.longest)
        for group in opt.param_groups:
            still = group["gates"] and not now.price
            group["lr"] = 0.0 if still else learning_rate(step, args.steps, args.rate) * group["rate"]
        loss, parts = loss_of(net, rows, torch.Generator().manual_seed(step), now.text, now.price)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        if step % 100 == 99:
            _log(step=step + 1, minutes=round((time.monotonic() - began) / 60, 2), loss=round(loss.item(), 3), **parts)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            _log(step=step + 1, **evaluate(net, tokenizer, n=64, longest=now.longest))
            _checkpoint(folder, net, opt, step + 1, time.monotonic() - began)
    args.minutes = (time.monotonic() - began) / 60
    return net


def write(net: NativeNet, args: argparse.Namespace) -> None:
    """Store the network in half precision, evaluate what was stored, and write the card."""
    out = Path(args.out) / args.model
    NativeModel(net, word_tokenizer(base_vocabulary()), name=args.model).save(out, dtype=torch.float16)
    stored = NativeModel.load(out)
    found = evaluate(stored.net, stored.tokenizer, n=args.examples, longest=STAGES[-1].longest, lengths=True)
    (out / "card.md").write_text(card(args, stored.net, found, STAGES[-1].longest))
    _log(**found)


def _log(**fields: Any) -> None:
    print(json.dumps(fields), file=sys.stderr, flush=True)


def _checkpoint(folder: Path, net: NativeNet, opt: torch.optim.Optimizer, step: int, seconds: float) -> None:
    tensors = {f"net.{name}": p.detach() for name, p in net.named_parameters()}
    for i, p in enumerate(p for group in opt.param_groups for p in group["params"]):
        tensors |= {f"opt.{i}.{name}": value for name, value in opt.state[p].items()}
    part = folder / "checkpoint.part"
    save_file(tensors, part, metadata={"step": str(step), "seconds": str(seconds)})
    part.rename(folder / "checkpoint.safetensors")


def _resume(folder: Path, net: NativeNet, opt: torch.optim.Optimizer) -> tuple[int, float]:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = file.metadata()
    tensors = load_file(path)
    net.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("net.")})
    for i, p in enumerate(p for group in opt.param_groups for p in group["params"]):
        start = f"opt.{i}."
        opt.state[p] = {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
    return int(said["step"]), float(said["seconds"])


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m workbench.datasets.models.train", description=__doc__)
    parser.add_argument("--model", required=True, help=", ".join(MODELS))
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations and checkpoints")
    parser.add_argument("--examples", type=int, default=400, help="test examples per task for the card")
    parser.add_argument("--work", default="results/training", help="folder of checkpoints")
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent), help="folder that holds the models")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    write(train(args), args)


if __name__ == "__main__":
    main()
