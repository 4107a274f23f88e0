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

from workbench.datasets.models.siit.program import (
    VARIABLES,
    Prompts,
    Sources,
    answers,
    draw,
    name_ids,
    targets,
    vocabulary,
)
from workbench.datasets.models.siit.swap import components, plain, swapped
from workbench.datasets.models.train import _checkpoint, _resume
from workbench.models.native_config import NativeConfig
from workbench.models.native_net import NativeNet

COMPONENTS = {"duplicate": "a0.h1", "inhibition": "a1.h3", "mover": "a2.h2"}
"""The component of each variable."""
WEIGHTS = {"behaviour": 1.0, "intervention": 1.0, "strict": 0.4, "leak": 1.0}
LATE_LEAK = 6.0
"""Weight of the leak term while the rate falls: earlier it would keep the network from learning the program at all."""
SMOOTHING = 0.05
POOL, WARM_UP, COOLING, CLIP = 20_000, 50, 0.4, 1.0
"""Prompts to draw from; steps of rising rate; share of steps with a falling one; largest norm of the gradient."""


@dataclass(frozen=True)
class Recipe:
    """What may differ between runs."""

    seed: int = 0
    steps: int = 1000
    batch: int = 96
    rate: float = 4e-3
    threads: int = 1


def config(vocab: int) -> NativeConfig:
    """3 layers of 4 heads and an MLP, width 64."""
    return NativeConfig(
        layers=3,
        heads=4,
        width=64,
        head_width=16,
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


def mapped(names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Indices into ``names`` of the variables' components, and of all others."""
    own = [names.index(COMPONENTS[variable]) for variable in VARIABLES]
    return torch.tensor(own), torch.tensor([i for i in range(len(names)) if i not in own])


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


def rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then linear over the last ``COOLING`` of the steps to a fiftieth of the peak."""
    return recipe.rate * min((step + 1) / WARM_UP, 1.0, max(_left(step, recipe), 0.02))


def weights(step: int, recipe: Recipe) -> dict[str, float]:
    """``WEIGHTS``, with ``LATE_LEAK`` once the rate falls."""
    return WEIGHTS if _left(step, recipe) > 1 else {**WEIGHTS, "leak": LATE_LEAK}


def _left(step: int, recipe: Recipe) -> float:
    """Remaining steps in units of those with a falling rate."""
    return (recipe.steps - step) / (COOLING * recipe.steps)


def train(recipe: Recipe, work: Path, every: int = 100, stop: int | None = None) -> tuple[NativeNet, float]:
    """The trained network and the seconds it took; one JSON line per ``every`` steps on stderr, and a checkpoint in ``work``
    from which an interrupted run goes on to the same bits. ``stop`` ends before ``recipe.steps``, as an interruption would."""
    torch.set_num_threads(recipe.threads)
    net = start(recipe.seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=recipe.rate, betas=(0.9, 0.95))
    work.mkdir(parents=True, exist_ok=True)
    first, spent = _resume(work, net, optimiser)
    pool = draw(vocabulary(), seed=recipe.seed, n=POOL)
    sources = Sources(pool)
    began = time.monotonic() - spent
    last = recipe.steps if stop is None else min(stop, recipe.steps)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        rows = torch.randint(len(pool), (recipe.batch,), generator=generator)
        parts = losses(net, pool[rows], pool[sources(rows, generator)], generator)
        for group in optimiser.param_groups:
            group["lr"] = rate(step, recipe)
        optimiser.zero_grad()
        scale = weights(step, recipe)
        torch.stack([scale[name] * part for name, part in parts.items()]).sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimiser.step()
        if (step + 1) % every == 0 or step + 1 == last:
            seconds = time.monotonic() - began
            shown = {name: round(part.item(), 4) for name, part in parts.items()}
            print(json.dumps({"step": step + 1, "seconds": round(seconds, 1), **shown}), file=sys.stderr, flush=True)
            _checkpoint(work, net, optimiser, step + 1, seconds)
    return net.eval(), time.monotonic() - began


def _place(component: str) -> tuple[int, int]:
    layer, head = component[1:].split(".h")
    return int(layer), int(head)
