"""Discrete codes (O'Neill and Bui 2024, arXiv 2405.12522): a ReLU autoencoder of which only the strongest feature is looked at.

loss = mean((y - x)^2) + sparsity mean(|f|), means over rows and width and over rows and features

``codes`` gives each row one symbol, with which the discrete circuit method compares heads.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.coders.coder import Coder, Progress, Terms


class Discrete(Coder):
    kind = "discrete"
    paper = "arXiv 2405.12522"
    defaults: ClassVar[dict[str, Any]] = {"sparsity": 0.02}

    def activate(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)

    def codes(self, x: Tensor) -> Tensor:
        """The strongest feature of every row, ``[...]``; feature 0 where none is active, as published."""
        return self.encode(x).argmax(-1)

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        f = self.encode(x)
        output = self.decode(f) + self.skipped(x)
        error, size = (output - target).pow(2).mean(), f.mean()
        return Terms(error + self.options["sparsity"] * size, output, (f > 0).sum(0), {"error": error, "penalty": size})
