"""Hard concrete masks (arXiv 1712.01312): shares in [0, 1] that are exactly 0 or 1 with positive probability and have a
gradient in between.

With u uniform in (0, 1): s = sigmoid((log u - log(1 - u) + a) / b), z = clamp(1.2 s - 0.1, 0, 1), b = 2/3, where a is the
logit that is learned. The constants are those of subnetwork probing and of Edge Pruning.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
_EDGE = 1e-6


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """The mask of every logit for draws ``uniform`` in [0, 1) of the same shape; differentiable in ``logits``."""
    u = uniform.clamp(_EDGE, 1 - _EDGE)
    s = torch.sigmoid((u.log() - (1 - u).log() + logits) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(logits: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(a - b log(0.1 / 1.1)), the expectation that the penalty on open masks takes."""
    return torch.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))
