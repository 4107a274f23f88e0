"""Gated autoencoders (Rajamanoharan et al. 2024, arXiv 2404.16014): which features are active, and how much, are told apart.

pi  = (x - b_dec) W_enc + b_gate                     gate
mag = (x - b_dec) (W_enc exp(r_mag)) + b_mag         magnitude
f   = 1[pi > 0] ReLU(mag)
loss = |y - x|^2 + sparsity sum_i ReLU(pi)_i + |decoder(ReLU(pi)) - x|^2, the decoder of the last term held fixed

``b_gate`` is ``b_enc``; ``pre`` is pi.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.coders.coder import Coder, Progress, Terms, squared


class Gated(Coder):
    kind = "gated"
    paper = "arXiv 2404.16014"
    defaults: ClassVar[dict[str, Any]] = {"sparsity": 5.0, "warm": 0.05}
    scaled = ("b_enc", "b_mag")

    def _begin(self) -> None:
        self.r_mag = nn.Parameter(torch.zeros(self.features))
        self.b_mag = nn.Parameter(torch.zeros(self.features))

    @property
    def b_gate(self) -> nn.Parameter:
        return self.b_enc

    def activate(self, pre: Tensor) -> Tensor:
        magnitude = (pre - self.b_enc) * self.r_mag.exp() + self.b_mag
        return torch.relu(magnitude) * (pre > 0)

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        gate = self.pre(x)
        f, open_by = self.activate(gate), torch.relu(gate)
        skipped = self.skipped(x)
        output = self.decode(f) + skipped
        error = squared(output, target)
        size = open_by.sum(
            -1
        ).mean()  # rows of the decoder have norm 1: a free norm would shrink, and the magnitude make up
        fixed = open_by @ self.W_dec.detach() + self.b_dec.detach() + skipped
        auxiliary = squared(fixed, target)
        loss = error + self.options["sparsity"] * now.ramp(self.options["warm"]) * size + auxiliary
        return Terms(loss, output, (f > 0).sum(0), {"error": error, "penalty": size, "auxiliary": auxiliary})
