"""A pattern of softmax attention with some keys hidden, as the layer would give it without them."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import Refused


def without_keys(pattern: Tensor, stay: Tensor) -> Tensor:
    """``pattern`` ``[B, H, Q, K]`` without the keys at which ``stay`` (broadcasts to it) is False: softmax over those that stay.

    A row divides by what is left of its denominator. Where a row sums to less than 1, the rest belongs to a learned sink, which
    stays. A row with nothing left is zero. Refuses weights that are negative or sum to more than 1: they are no softmax, and what
    they would be without a key is not known.
    """
    before = pattern.sum(-1, keepdim=True)
    slack = 1e-5 if pattern.dtype in (torch.float32, torch.float64) else 2 * torch.finfo(pattern.dtype).eps
    if bool((pattern < 0).any()) or bool((before > 1 + slack).any()):
        raise Refused(
            f"the weights of this layer are no softmax (rows sum to {float(before.max()):.3g} at most, the least weight is "
            f"{float(pattern.min()):.3g}), so hiding keys has no meaning; name other layers"
        )
    left = pattern * stay.to(pattern.device)
    sink = torch.where(before < 1 - slack, 1 - before, 0.0)
    return left / (left.sum(-1, keepdim=True) + sink).clamp(min=torch.finfo(left.dtype).tiny)
