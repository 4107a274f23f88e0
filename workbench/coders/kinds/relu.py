"""ReLU autoencoders with an L1 penalty (Bricken et al. 2023; Conerly et al. 2024): f = ReLU(pre),

loss = |y - x|^2 + sparsity sum_i f_i |d_i|

with d_i row i of the decoder, whose norm is free. The penalty ramps up over the first ``warm`` of the training.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.coders.coder import Coder, Progress, Terms, squared


class ReLU(Coder):
    kind = "relu"
    paper = "Bricken et al. 2023"
    defaults: ClassVar[dict[str, Any]] = {"sparsity": 5.0, "warm": 0.05}
    unit_decoder = False

    def activate(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        f = self.activate(self.pre(x))
        output = self.decode(f) + self.skipped(x)
        error, size = squared(output, target), self.penalty(f, now)
        loss = error + self.options["sparsity"] * now.ramp(self.options["warm"]) * size
        return Terms(loss, output, (f > 0).sum(0), {"error": error, "penalty": size})

    def penalty(self, f: Tensor, now: Progress) -> Tensor:
        return (f * self.decoder_norms()).sum(-1).mean()
