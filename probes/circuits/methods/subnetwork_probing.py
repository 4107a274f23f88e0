"""Subnetwork probing (arXiv 2104.03514, for circuits as in the ACDC paper, arXiv 2304.14997): which parts stay open when
every open part costs something?

Every part has a hard concrete mask z in [0, 1]; its output is z * own + (1 - z) * replacement. The logits of all masks
minimise loss + sparsity * (mean probability of being open), with one draw of all masks per step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.probes.circuits import learning
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.hard_concrete import open_probability, sample
from workbench.probes.circuits.masked import Prepared, masked
from workbench.probes.circuits.method import Method


def subnetwork_probing(
    setting: Setting,
    level: str,
    *,
    steps: int = 200,
    rate: float = 0.1,
    sparsity: float = 2.0,
    objective: str = "kl",
    start: float = 0.9,
    prompts: int = 4,
    seed: int = 0,
) -> Circuit:
    """Scores are the probabilities of being open, their logits the column ``logit``.

    Adam with ``rate``, ``prompts`` examples per step; the masks begin with logit log(start / (1 - start)). ``objective``
    is ``"kl"`` to the whole model or ``"metric"`` (minus the metric). Published: 3000 full-batch steps, rate .001,
    sparsity 50, start .9; the defaults here are for models of some hundred edges. That the penalty is the mean over
    parts, not the sum, is our reading of the published code.
    """
    learning.check_counts(steps=steps, prompts=prompts)
    model = masked(setting, level)
    rounds = learning.batches(model, prompts)
    loss = learning.objective(setting, objective, len(rounds))
    generator = torch.Generator().manual_seed(seed)
    logits = learning.start_logits(len(model.names), start)

    def value(step: int, batch: Prepared) -> Tensor:
        keep = sample(logits, torch.rand(len(logits), generator=generator, dtype=torch.float64))
        return loss(batch, model.logits(batch, keep)) + sparsity * open_probability(logits).mean()

    learning.descend(torch.optim.Adam([logits], lr=rate), steps, rounds, value)
    return learning.openness(level, model.names, open_probability(logits), logits)


METHODS = (
    Method(
        "subnetwork-probing",
        "hard concrete masks under a penalty on every open part",
        subnetwork_probing,
        "Cao et al. 2021 (arXiv 2104.03514), as in Conmy et al. 2023 (arXiv 2304.14997)",
        positions=True,
        training=True,
        unit="probability of being kept",
    ),
)
