"""Uniform gradient sampling (arXiv 2409.09951): probabilities of being open, learned through masks that are mostly 0 or 1.

Part i has p = sigmoid(logit). With u uniform in (0, 1) and w = window * p (1 - p), its share is
z = clamp(1/2 - (u - p) / w, 0, 1): uniform in (0, 1) with probability w, otherwise 0 or 1, and p on average. The gradient
takes w as a constant, so d z / d logit = 1 / window where 0 < z < 1, and the expected slope of the loss, for any state of
the other parts, is p (1 - p) (loss open - loss closed): the slope under Bernoulli masks. Every prompt draws masks of its own.
Loss: KL + sparsity * mean p.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import WorkbenchError
from workbench.probes.circuits import learning
from workbench.probes.circuits.components import Acts, Setting
from workbench.probes.circuits.masked import Prepared, masked
from workbench.probes.circuits.method import Method
from workbench.probes.circuits.optimal import mean_and_size
from workbench.probes.circuits.places import Places


def shares(logits: Tensor, uniform: Tensor, window: float = 1.0) -> Tensor:
    """Masks ``[N, B]`` of parts with ``logits`` ``[N]`` for draws ``uniform`` ``[N, B]``."""
    p = logits.sigmoid()[:, None]
    return (0.5 - (uniform - p) / (window * p * (1 - p)).detach()).clamp(0, 1)


def ugs(
    setting: Setting,
    level: str,
    *,
    steps: int = 200,
    rate: float = 0.1,
    sparsity: float = 2.0,
    window: float = 1.0,
    objective: str = "kl",
    start: float = 0.75,
    constants_rate: float = 0.01,
    prompts: int = 4,
    seed: int = 0,
) -> Circuit:
    """Scores are the probabilities of being open, their logits the column ``logit``.

    ``window`` is above 0 and at most 2. With ablation ``"optimal"`` the constants begin at ``optimal_constants`` and are
    learned along with the masks, in steps of ``constants_rate`` in units of each output's root mean square (0 keeps
    them); other ablations have no constants to learn. Sampling, penalty and masks per prompt follow the authors' code;
    Adam's rate and steps are ours, for models of some hundred edges. Their penalty is a sum over parts, so that our
    ``sparsity`` is theirs times the number of parts. They also close, in each draw, edges that lead nowhere; we do not.
    """
    learning.check_counts(steps=steps, prompts=prompts)
    if not 0 < window <= 2:
        raise WorkbenchError(f"window is above 0 and at most 2, or shares are not p on average; got {window}")
    model = masked(setting, level)
    rounds = learning.batches(model, prompts)
    size = max(len(batch.pairs) for batch in rounds)
    places = len(setting.places)
    # A mask for every prompt is a mask for every place where each prompt has places of its own. What replaces the parts
    # comes with the prepared batches, so this model needs no replacements.
    own = Places("each", tuple(f"{place}.{k}" for place in range(places) for k in range(size)))
    apart = masked(replace(setting, ablation="zero", places=own), level)
    rounds = [
        replace(batch, place=batch.place * size + torch.arange(len(batch.pairs))[:, None].to(batch.place))
        for batch in rounds
    ]
    loss = learning.objective(setting, objective, len(rounds))
    logits = learning.start_logits(len(model.names), start)
    groups: list[dict[str, Any]] = [{"params": [logits], "lr": rate}]
    constants: Acts = {}
    if setting.ablation == "optimal" and constants_rate > 0:
        constants = {site: value[:1, :1].clone().requires_grad_() for site, value in rounds[0].instead.items()}
        for site, rms in mean_and_size(setting, list(constants))[1].items():
            groups.append({"params": [constants[site]], "lr": constants_rate * float(rms.mean())})
    generator = torch.Generator().manual_seed(seed)

    def value(step: int, batch: Prepared) -> Tensor:
        keep = shares(logits, torch.rand(len(logits), size, generator=generator, dtype=torch.float64), window)
        if constants:
            shapes = batch.instead
            batch = replace(batch, instead={site: c.expand_as(shapes[site]) for site, c in constants.items()})
        return loss(batch, apart.logits(batch, keep.flatten())) + sparsity * logits.sigmoid().mean()

    learning.descend(torch.optim.Adam(groups), steps, rounds, value)
    return learning.openness(level, model.names, logits.sigmoid(), logits)


METHODS = (
    Method(
        "ugs",
        "probabilities of being open, from masks drawn uniform between 0 and 1 near them",
        ugs,
        "Li and Janson 2024 (arXiv 2409.09951)",
        positions=True,
        training=True,
        unit="probability of being kept",
    ),
)
