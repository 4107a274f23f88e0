"""Edge Pruning (arXiv 2406.16778): the masks that keep the output closest while the share of closed parts is driven to a
target.

Every edge (or node) has a hard concrete mask z. Loss = KL + l1 (s - t) + l2 (s - t)^2, where s = 1 - mean z is the
sparsity of this draw and t the target, which rises from 0 in a straight line. The masks descend on the loss, the
multipliers l1 and l2 climb on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import WorkbenchError
from workbench.graph import edge_parts
from workbench.probes.circuits import learning
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.hard_concrete import open_probability, sample
from workbench.probes.circuits.masked import Prepared, masked
from workbench.probes.circuits.method import Method

_RAMP, _WARM = 2500 / 3000, 200 / 3000
"""Shares of the steps in which the target and the rates rise, as published."""


def edge_pruning(
    setting: Setting,
    level: str,
    *,
    steps: int = 200,
    rate: float = 0.2,
    target: float = 0.9,
    node_target: float = 0.0,
    objective: str = "kl",
    start: float = 0.9,
    prompts: int = 4,
    seed: int = 0,
) -> Circuit:
    """Scores are the probabilities of being open, their logits the column ``logit``.

    ``target`` is the final share of closed parts, at least 0; above 1 it presses harder, as in the published sweep (.94
    to 1.1). With ``node_target`` above 0 at level ``"edge"``, every source has a mask of its own as well, an edge is
    open as far as both are, and the nodes are driven to that sparsity (published: .72, in some runs); the column
    ``source_open`` is the probability of the source. As in the authors' code: AdamW (decay .01) on masks and
    multipliers with ``rate``, warmed up in the first fifteenth and then falling in a straight line to 0, and the target
    reached after 5/6 of the steps. Published: 3000 steps of 32 prompts at rate .8, logits starting at 10 (``start``
    .99995) with a spread of .01. Ours start alike at log(start / (1 - start)); with few steps a high start or rate
    closes masks at random, and a mask at exactly 0 or 1 has no gradient: what has settled open can outlast a target of
    1.
    """
    learning.check_counts(steps=steps, prompts=prompts)
    if target < 0 or node_target < 0:
        raise WorkbenchError(f"targets are shares of closed parts, at least 0; got {target} and {node_target}")
    if node_target and level == "node":
        raise WorkbenchError("node_target adds masks of sources to those of edges; at level='node' use target")
    model = masked(setting, level)
    rounds = learning.batches(model, prompts)
    loss = learning.objective(setting, objective, len(rounds))
    sources, source = _sources(model.names) if node_target else ([], torch.zeros(0, dtype=torch.int64))
    targets = [target, node_target] if node_target else [target]
    counts = [len(model.names), len(sources)][: len(targets)]
    masks = [learning.start_logits(count, start) for count in counts]
    multipliers = torch.zeros(len(targets), 2, dtype=torch.float64, requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": masks}, {"params": [multipliers], "maximize": True}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)
    warm = max(1, round(_WARM * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    generator = torch.Generator().manual_seed(seed)

    def value(step: int, batch: Prepared) -> Tensor:
        drawn = [sample(mask, torch.rand(len(mask), generator=generator, dtype=torch.float64)) for mask in masks]
        keep = drawn[0] * drawn[1][source] if node_target else drawn[0]
        total = loss(batch, model.logits(batch, keep))
        ramp = min(1.0, step / (_RAMP * steps))
        for z, goal, pair in zip(drawn, targets, multipliers, strict=True):
            gap = 1 - z.mean() - ramp * goal
            total = total + pair[0] * gap + pair[1] * gap.square()
        return total

    learning.descend(optimizer, steps, rounds, value, schedule)
    found = open_probability(masks[0]).detach()
    if not node_target:
        return learning.openness(level, model.names, found, masks[0])
    of_source = open_probability(masks[1]).detach()[source]
    return learning.openness(level, model.names, found * of_source, masks[0], source_open=of_source)


def _sources(names: tuple[str, ...]) -> tuple[list[str], Tensor]:
    """The sources of edges, each place apart, and the source of every edge."""
    of = [edge_parts(name)[0] + name.partition("@")[2] for name in names]
    index = {name: number for number, name in enumerate(dict.fromkeys(of))}
    return list(index), torch.tensor([index[name] for name in of])


METHODS = (
    Method(
        "edge-pruning",
        "hard concrete masks driven to a target sparsity by Lagrangian multipliers",
        edge_pruning,
        "Bhaskar et al. 2024 (arXiv 2406.16778)",
        positions=True,
        training=True,
        unit="probability of being kept",
    ),
)
