"""What methods that learn a mask share: batches prepared once, the loss of a masked model, and the descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.pairs import divergence
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.masked import Masked, Prepared

OBJECTIVES = ("kl", "metric")


def batches(model: Masked, prompts: int) -> list[Prepared]:
    """The pairs in batches of ``prompts`` (at most the setting's own batch), prepared once."""
    pairs, size = model.setting.pairs, min(prompts, model.setting.batch)
    return [model.prepare(pairs[start : start + size]) for start in range(0, len(pairs), size)]


def objective(setting: Setting, name: str, count: int) -> Callable[[Prepared, Tensor], Tensor]:
    """The loss of a batch's masked logits: ``kl`` is KL(whole model || masked model) at the answer position in nats,
    ``metric`` minus the setting's metric.

    Weighted so that its mean over all ``count`` batches is the mean over all examples.
    """
    if name not in OBJECTIVES:
        raise UnknownName("objective", name, OBJECTIVES)
    weight = count / len(setting.pairs)

    def loss(batch: Prepared, logits: Tensor) -> Tensor:
        if name == "kl":
            return weight * divergence(batch.logits, logits, batch.pairs).sum()
        return -weight * setting.measure(logits, batch.pairs).sum()

    return loss


def descend(
    optimizer: Optimizer,
    steps: int,
    rounds: Sequence[Prepared],
    loss: Callable[[int, Prepared], Tensor],
    schedule: LRScheduler | None = None,
) -> None:
    """``steps`` steps on ``loss(step, batch)``, batches in turn. Gradients go to the optimizer's parameters alone."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.enable_grad():
        for step in range(steps):
            value = loss(step, rounds[step % len(rounds)])
            if not torch.isfinite(value):
                raise WorkbenchError(f"the loss is {float(value)} at step {step} of {steps}; lower rate=")
            for parameter, slope in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                parameter.grad = slope
            optimizer.step()
            if schedule is not None:
                schedule.step()


def start_logits(count: int, start: float) -> Tensor:
    """``count`` logits of the probability ``start``, to be learned."""
    if not 0 < start < 1:
        raise WorkbenchError(f"start is a probability between 0 and 1, both excluded; got {start}")
    return torch.full((count,), math.log(start / (1 - start)), dtype=torch.float64, requires_grad=True)


def check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise WorkbenchError(f"{name} is a whole number, at least 1; got {value}")


def openness(level: str, names: Sequence[str], share: Tensor, logits: Tensor, **columns: Tensor) -> Circuit:
    """The circuit whose scores are how open each part ended, in (0, 1), with the logits as a column beside others."""
    kept = torch.ones(len(names), dtype=torch.bool)
    unit = {"unit": "probability of being open"}
    return Circuit(level, tuple(names), share, kept, unit, {"logit": logits, **columns})
