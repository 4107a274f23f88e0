"""Class-unique codes: how many of a head's discrete codes do positive prompts use that no negative prompt uses?

The count grows with a head's output diversity and with the number of prompts, labels or no labels, so it is read
against its distribution under permuted labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

_ROUNDING = 1e-9
"""Scores are means of counts or of shares: what differs by less is one number, summed in another order."""


class Null(NamedTuple):
    """Scores under permuted labels, per head ``[H]``: mean, standard deviation, z-score of the true labels (NaN
    where the null is constant) and p-value (1 + #{null >= score}) / (1 + permutations)."""

    mean: Tensor
    sd: Tensor
    z: Tensor
    p: Tensor


def unique_codes(codes: Tensor, positive: Tensor, relative: bool = False) -> Tensor:
    """|codes in positives minus codes in negatives| per head.

    ``codes`` ``[N, H]`` integers, ``positive`` bool ``[N]`` or, for several labellings at once, ``[P, N]``. Returns
    ``[H]`` or ``[P, H]``; ``relative`` divides by the number of codes in use (the union).
    """
    if codes.ndim != 2 or codes.is_floating_point():
        raise WorkbenchError(f"codes are integers [prompts, heads]; got {codes.dtype} {list(codes.shape)}")
    labels = positive if positive.ndim == 2 else positive[None]
    if labels.dtype != torch.bool or labels.shape[1] != len(codes):
        raise WorkbenchError(f"labels are bool [{len(codes)}]; got {positive.dtype} {list(positive.shape)}")
    heads, size = codes.shape[1], int(codes.max()) + 1
    used = torch.zeros(len(codes), heads, size).scatter_(2, codes[..., None], 1.0).flatten(1)  # [N, H*F]
    total = used.sum(0)
    inside = labels.to(used.dtype) @ used  # [P, H*F]: in how many positives a code occurs
    score = ((inside > 0) & (inside == total)).view(len(labels), heads, size).sum(-1).double()
    if relative:
        score = score / (total > 0).view(heads, size).sum(-1)
    return score if positive.ndim == 2 else score[0]


def permuted(positive: Tensor, permutations: int, seed: int) -> Tensor:
    """Random relabellings ``[P, N]`` with as many positives."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([positive[torch.randperm(len(positive), generator=generator)] for _ in range(permutations)])


def against(scores: Tensor, null: Tensor) -> Null:
    """``scores`` ``[H]`` against ``null`` ``[P, H]``."""
    mean, sd = null.mean(0), null.std(0)
    varies = null.amax(0) - null.amin(0) > _ROUNDING  # the sd of equal numbers is not exactly 0
    z = torch.where(varies, (scores - mean) / sd, torch.nan)
    p = (1 + (null >= scores - _ROUNDING).sum(0)).double() / (1 + len(null))
    return Null(mean, sd, z, p)
