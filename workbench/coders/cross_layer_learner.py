"""One training step of a cross-layer transcoder after another: optimiser, schedule, scale of the data, dead features."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.coders.coder import Progress
from workbench.coders.cross_layer import CrossLayer
from workbench.errors import WorkbenchError

_CLIP = 1.0
_WARM, _COOL = 0.05, 0.2


class CrossLayerLearner:
    """Trains ``coder`` for ``steps`` steps: ``start`` with some rows, ``step`` with every batch, ``finish``.

    Adam at ``rate``, warmed up over the first twentieth and brought to zero over the last fifth of the steps. ``start`` scales
    the data per layer: x to mean square 1, y to variance 1. ``finish`` folds that into the weights. ``losses``: squared error of
    each step over the variance of y. ``silent`` ``[L, F]``: rows since a feature was active; it is dead after ``dead_after``.
    """

    def __init__(self, coder: CrossLayer, *, steps: int, rate: float, dead_after: int) -> None:
        self.coder, self.steps, self.rate, self.dead_after = coder, steps, rate, dead_after
        self.optimiser = torch.optim.Adam(coder.parameters(), lr=rate)
        self.silent = torch.zeros(coder.layers, coder.features, device=coder.W_enc.device)
        self.losses: list[float] = []

    @torch.no_grad()
    def start(self, x: Tensor, y: Tensor) -> None:
        """Scales and output biases from rows X ``[N, L, D]`` and Y ``[N, L, D']``; refuses a layer whose output does not vary."""
        spread = (y - y.mean(0)).square().mean((0, 2))
        if not bool((spread > 0).all()):
            flat = (~(spread > 0)).nonzero()[:, 0].tolist()
            raise WorkbenchError(f"Y does not vary in layers {flat}: there is nothing to learn; leave them out")
        self.x_scale = x.square().mean((0, 2)).clamp(min=1e-30).rsqrt()
        self.y_scale = spread.rsqrt()
        self.coder.b_dec.copy_(y.mean(0) * self.y_scale[:, None])

    @torch.enable_grad()
    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on rows X and Y."""
        at = len(self.losses)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * _share(at, self.steps)
        now = Progress(step=at, steps=self.steps, silent=self.silent, dead_after=self.dead_after)
        terms = self.coder.objective(x * self.x_scale[:, None], y * self.y_scale[:, None], now)
        if not bool(torch.isfinite(terms.loss)):
            raise WorkbenchError(f"the loss of step {at} is {float(terms.loss.detach())}: lower rate={self.rate}")
        self.optimiser.zero_grad()
        terms.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.coder.parameters(), _CLIP)
        self.optimiser.step()
        self.silent = torch.where(terms.active > 0, 0.0, self.silent + len(x))
        self.losses.append(float(terms.parts["error"]) / (self.coder.layers * self.coder.width_out))

    @torch.no_grad()
    def finish(self, x: Tensor) -> CrossLayer:
        """The coder of raw activations, fixed; what inference needs to know comes from rows X."""
        self.coder.settle(x * self.x_scale[:, None])
        self.coder.rescaled(self.x_scale, self.y_scale)
        return self.coder.requires_grad_(False)


def _share(step: int, steps: int) -> float:
    """Share of the peak rate."""
    return min(1.0, (step + 1) / max(1.0, _WARM * steps), (steps - step) / max(1.0, _COOL * steps))
