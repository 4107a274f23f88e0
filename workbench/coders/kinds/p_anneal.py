"""ReLU autoencoders whose penalty bends from L1 to Lp (Karvonen et al. 2024, arXiv 2408.00113, section 4):

loss = |y - x|^2 + sparsity c_p sum_i (f_i |d_i|)^p,     p from 1 to ``p_end`` over the training after ``p_start``

c_p keeps the penalty of the running batch at what it was with the p before, so that only its shape changes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.coders.coder import Progress
from workbench.coders.kinds.relu import ReLU


class PAnneal(ReLU):
    kind = "p-anneal"
    paper = "arXiv 2408.00113"
    defaults: ClassVar[dict[str, Any]] = {**ReLU.defaults, "p_start": 0.2, "p_end": 0.2}
    last_p: Tensor
    factor: Tensor

    def _begin(self) -> None:
        self.register_buffer("last_p", torch.tensor(1.0))
        self.register_buffer("factor", torch.tensor(1.0))

    def power(self, now: Progress) -> float:
        """p at this step, in 20 stages."""
        done = (now.step / max(1, now.steps) - self.options["p_start"]) / (1 - self.options["p_start"])
        return 1.0 - (1.0 - self.options["p_end"]) * round(20 * min(max(done, 0.0), 1.0)) / 20

    def penalty(self, f: Tensor, now: Progress) -> Tensor:
        size, p = f * self.decoder_norms(), self.power(now)
        if p != float(self.last_p):
            with torch.no_grad():
                ratio = _power_sum(size, float(self.last_p)) / _power_sum(size, p).clamp(min=1e-12)
                self.factor.mul_(ratio)
                self.last_p.fill_(p)
        return self.factor * _power_sum(size, p)


def _power_sum(size: Tensor, p: float) -> Tensor:
    """Mean over rows of sum_i size_i^p. The root has no slope at 0, where nothing is to be pushed down."""
    held = size > 0
    return torch.where(held, size.masked_fill(~held, 1.0).pow(p), size).sum(-1).mean()
