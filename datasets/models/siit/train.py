"""Strict interchange-intervention training of a small softmax transformer onto the program of ``program.py``.

Each variable of the program has one component of the network. On pairs of prompts (base, source) a step lowers

- behaviour: cross-entropy of the network with the program's answer;
- intervention (IIT, Geiger et al., arXiv 2112.00826): a variable's component carries what it wrote on the source, and the
  target is the program's answer with that variable from the source; the variable is drawn for every row;
- strict (SIIT, Gupta et al., arXiv 2407.14494): any other component, MLPs included, carries what it wrote on the source, and the
  target is the program's answer to the base;
- leak (ours): KL divergence of that run from the run without a swap. The strict loss certifies the largest logit alone; the
  logits may still move with parts that the program does not have.

Targets spread a share ``SMOOTHING`` over all names (ours), so that logits stay finite and the leak term keeps its grip.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.datasets.models.siit.measure import measure, shares
from workbench.datasets.models.siit.program import (
    Prompts,
    Sources,
    answers,
    draw,
    name_ids,
    targets,
    vocabulary,
)
from workbench.datasets.models.siit.swap import COMPONENTS, components, mapped, plain, swapped
from workbench.datasets.models.train import _checkpoint, _resume
from workbench.errors import Refused
from workbench.models.native_config import NativeConfig
from workbench.models.native_net import NativeNet

WEIGHTS = {"behaviour": 1.0, "intervention": 1.0, "strict": 0.4, "leak": 1.0}
LATE_LEAK = 3.0
"""Weight of the leak term while the rate falls: earlier it would keep the network from learning the program at all."""
SMOOTHING = 0.05
POOL, WARM_UP, CLIP = 50_000, 50, 1.0
"""Prompts to draw from; steps of rising rate; largest norm of the gradient."""
READY, COOLING = 0.99, 700
"""Once every accuracy on fresh prompts exceeds ``READY`` the rate falls for ``COOLING`` steps, and training ends."""


@dataclass(frozen=True)
class Recipe:
    """What may differ between runs. ``steps``: at most so many before the rate falls."""

    seed: int = 0
    steps: int = 2000
    batch: int = 96
    rate: float = 4e-3
    threads: int = 1


def config(vocab: int) -> NativeConfig:
    """3 layers of 4 heads and an MLP, width 64."""
    return NativeConfig(
        layers=3,
        heads=4,
        width=64,
        head_width=32,
        vocab=vocab,
        mlp_width=128,
        positions="learned",
        context=32,
        trained=15,
    )


def start(seed: int) -> NativeNet:
    """The untrained network. Positions start as large as tokens, and the duplicate's head with equal queries and keys, so that
    a token's first match is itself; both shorten training and fix nothing."""
    torch.manual_seed(seed)
    net = NativeNet(config(len(vocabulary())))
    layer, head = _place(COMPONENTS["duplicate"])
    with torch.no_grad():
        assert net.W_pos is not None
        net.W_pos.normal_(std=net.config.width**-0.5)
        attn: Any = net.blocks[layer].attn
        attn.W_K[head] = attn.W_Q[head]
    return net


def losses(net: NativeNet, base: Prompts, source: Prompts, generator: torch.Generator) -> dict[str, Tensor]:
    """The four terms of the module's docstring on one batch; variables and other components are drawn with ``generator``."""
    own, others = mapped(components(net.config))
    n, known = len(base), name_ids(vocabulary())
    variable = torch.randint(len(own), (n,), generator=generator)
    other = others[torch.randint(len(others), (n,), generator=generator)]
    logits, wrote = plain(net, torch.cat([base.ids, source.ids]), torch.cat([base.end, source.end]))
    moved = swapped(
        net, base.ids.repeat(2, 1), base.end.repeat(2), wrote[n:].twice(), torch.cat([own[variable], other])
    ).log_softmax(-1)
    before = logits.log_softmax(-1)

    def entropy(logp: Tensor, names: Tensor) -> Tensor:
        return -(targets(names, logp.shape[1], known, SMOOTHING) * logp).sum(-1).mean()

    said = answers(base)
    return {
        "behaviour": entropy(before, torch.cat([said, answers(source)])),
        "intervention": entropy(moved[:n], answers(base, source, variable)),
        "strict": entropy(moved[n:], said),
        "leak": nn.functional.kl_div(moved[n:], before[:n].detach(), log_target=True, reduction="batchmean"),
    }


def rate(step: int, cooling: int | None) -> float:
    """Share of the peak rate: linear warm-up, constant, and from step ``cooling`` on linear to a fiftieth."""
    left = 1.0 if cooling is None else 1 - (step - cooling) / COOLING
    return min((step + 1) / WARM_UP, 1.0, max(left, 0.02))


def weights(step: int, cooling: int | None) -> dict[str, float]:
    """``WEIGHTS``, with ``LATE_LEAK`` once the rate falls."""
    return WEIGHTS if cooling is None or step < cooling else {**WEIGHTS, "leak": LATE_LEAK}


def train(recipe: Recipe, work: Path, every: int = 50, stop: int | None = None) -> tuple[NativeNet, int, float]:
    """The trained network, the steps and the seconds it took. Every ``every`` steps it is measured and one JSON line goes to
    stderr, and a checkpoint to ``work``, from which an interrupted run goes on to the same bits. ``stop`` ends early, as an
    interruption would. Raises ``Refused`` if the network is not ready after ``recipe.steps``."""
    torch.set_num_threads(recipe.threads)
    net = start(recipe.seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=recipe.rate, betas=(0.9, 0.95))
    work.mkdir(parents=True, exist_ok=True)
    step, spent = _resume(work, net, optimiser)
    ready = work / "cooling.json"
    cooling = json.loads(ready.read_text()) if ready.exists() else None
    pool = draw(vocabulary(), seed=recipe.seed, n=POOL)
    sources = Sources(pool)
    began = time.monotonic() - spent
    while step != stop and (cooling is None or step < cooling + COOLING):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        rows = torch.randint(len(pool), (recipe.batch,), generator=generator)
        parts = losses(net, pool[rows], pool[sources(rows, generator)], generator)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * rate(step, cooling)
        scale = weights(step, cooling)
        optimiser.zero_grad()
        torch.stack([scale[name] * part for name, part in parts.items()]).sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimiser.step()
        step += 1
        if step % every:
            continue
        least = min(shares(measure(net, n=400, split="train")).values())
        if cooling is None and least > READY:
            cooling = step
            ready.write_text(json.dumps(cooling))
        seconds = time.monotonic() - began
        shown = {name: round(part.item(), 4) for name, part in parts.items()}
        said = {"step": step, "seconds": round(seconds, 1), **shown, "least": round(least, 4), "cooling": cooling}
        print(json.dumps(said), file=sys.stderr, flush=True)
        _checkpoint(work, net, optimiser, step, seconds)
        if cooling is None and step >= recipe.steps:
            raise Refused(
                f"seed {recipe.seed} has not learned the program in {step} steps: its lowest accuracy is {least:.3f}, and "
                f"{READY} is needed before the rate falls. Train with more --steps or another --seed"
            )
    return net.eval(), step, time.monotonic() - began


def _place(component: str) -> tuple[int, int]:
    layer, head = component[1:].split(".h")
    return int(layer), int(head)
