"""IBCircuit: an information bottleneck on every part; how much of its output must pass for the answer to stay?

A part gives lambda * own + (1 - lambda) * (mu + sigma * noise), noise standard normal, where mu and sigma are mean and
standard deviation of its output at each position over the clean prompts. For Gaussian outputs the information that
passes is I = KL(N(lambda h + (1 - lambda) mu, (1 - lambda)^2 sigma^2) || N(mu, sigma^2)), mean over prompts: per number of
the output lambda^2 - lambda - log(1 - lambda) nats. Loss: KL + beta * sum of I over the parts.

No corrupted prompts: the noise is the ablation, with the mean as its centre, so ``ablation="mean"`` is the only one. The
circuit that is found is the whole mechanism, not the parts in which clean and corrupted prompts differ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import WorkbenchError
from workbench.probes.circuits import learning
from workbench.probes.circuits.components import Acts, Setting, gather
from workbench.probes.circuits.masked import Prepared, masked
from workbench.probes.circuits.method import Method


def information(logits: Tensor, varying: Tensor | float = 1.0) -> Tensor:
    """I in nats per number of the output, for lambda = sigmoid(logits). ``varying`` is the share of the numbers that differ
    between prompts; the others only lose their noise."""
    share = logits.sigmoid()
    return 0.5 * ((1 - share).square() + varying * share.square() - 1) + F.softplus(logits)


def ibcircuit(
    setting: Setting,
    level: str,
    *,
    steps: int = 200,
    rate: float = 0.1,
    beta: float = 0.01,
    objective: str = "kl",
    start: float = 0.9,
    prompts: int = 4,
    seed: int = 0,
) -> Circuit:
    """Scores are lambda, its logits the column ``logit``, its I in nats per number the column ``information``.

    Adam with ``rate``; published: 1000 to 1300 full-batch steps, rate .05, beta .001 (1 in the released
    configuration, there with the mean over parts), logits starting at 5 (``start`` .993). The released code learns a
    lambda for every prompt and averages them, and takes mu and sigma from the noisy run itself; here a part has one
    lambda, and mu and sigma come from the whole model, which gives I its closed form. Edges: every edge mixes its
    source's output in the same way, with the noise drawn once for each source; this is our reading.
    """
    learning.check_counts(steps=steps, prompts=prompts)
    if len(setting.pairs) < 2:
        raise WorkbenchError("a spread over prompts takes at least 2 pairs; got 1")
    model = masked(setting, level)
    rounds = learning.batches(model, prompts)
    loss = learning.objective(setting, objective, len(rounds))
    sigma = _spread(setting, rounds[0].instead)
    logits = learning.start_logits(len(model.names), start)
    generator = torch.Generator().manual_seed(seed)

    def value(step: int, batch: Prepared) -> Tensor:
        noisy = {
            site: mean + sigma[site] * torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
            for site, mean in batch.instead.items()
        }
        out = model.logits(replace(batch, instead=noisy), logits.sigmoid())
        return loss(batch, out) + beta * information(logits).sum()

    learning.descend(torch.optim.Adam([logits], lr=rate), steps, rounds, value)
    return learning.openness(level, model.names, logits.sigmoid(), logits, information=information(logits))


def _spread(setting: Setting, mean: Acts) -> Acts:
    """Standard deviation over the clean prompts of every number at every position, ``[1, T, ...]``."""
    found: Acts = {}
    for pairs in setting.chunks():
        for site, value in gather(setting.model, pairs.clean, list(mean))[0].items():
            square = (value - mean[site][:1]).square().sum(0, keepdim=True) / len(setting.pairs)
            found[site] = found[site] + square if site in found else square
    return {site: value.sqrt() for site, value in found.items()}


METHODS = (
    Method(
        "ibcircuit",
        "how much of every output must pass a noisy bottleneck",
        ibcircuit,
        "IBCircuit (information bottleneck circuits), by its released code",
        ablations=("mean",),
        positions=True,
        training=True,
        unit="share of its own output that a part keeps",
    ),
)
