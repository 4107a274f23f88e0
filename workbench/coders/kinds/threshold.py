"""JumpReLU coders whose thresholds are given as they are, as other tools write them: f = ReLU(pre) 1[pre > theta].

``kinds/jumprelu.py`` keeps log(theta), from which theta comes back only to rounding; here a threshold stays what the file says,
also 0 or below (where every positive pre-activation passes). They can be trained on with the loss of JumpReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.coders.kinds.jumprelu import JumpReLU


class Threshold(JumpReLU):
    kind = "threshold"
    scaled = ("b_enc", "theta")

    def _begin(self) -> None:
        self.theta = nn.Parameter(torch.full((self.features,), float(self.options["threshold"])))

    @property
    def threshold(self) -> Tensor:
        """What a pre-activation must exceed, ``[F]``, at least 0."""
        return self.theta.clamp(min=0)

    @torch.no_grad()
    def fold(self, scale_in: Tensor, scale_out: Tensor) -> None:
        super(JumpReLU, self).fold(scale_in, scale_out)
