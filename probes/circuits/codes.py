"""Which heads use their codes differently on positive and on negative prompts?

``unique_codes`` is the published statistic: the number of codes that only positive prompts use. It grows with a head's
output diversity and with the number of prompts, labels or no labels. ``code_mass`` is the distance of the two
distributions of codes, which a code that one prompt uses hardly moves. Both are read against permuted labels.
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
    inside, total = _counts(codes, positive)
    score = ((inside > 0) & (inside == total)).sum(-1).double()
    if relative:
        score = score / (total > 0).sum(-1)
    return score if positive.ndim == 2 else score[0]


def code_mass(codes: Tensor, positive: Tensor) -> Tensor:
    """Total variation distance between the codes of positives and of negatives per head, 0 to 1; shapes as in
    ``unique_codes``."""
    inside, total = _counts(codes, positive)
    labels = positive if positive.ndim == 2 else positive[None]
    n = labels.sum(-1).double()[:, None, None]
    score = (inside / n - (total - inside) / (labels.shape[1] - n)).abs().sum(-1) / 2
    return score if positive.ndim == 2 else score[0]


def pair_codes(codes: Tensor, positive: Tensor) -> Tensor:
    """Pairs of codes that two heads show together on some positive and on no negative prompt, ``[H, H]`` for ``codes``
    ``[N, H]``: the published score of an edge, the same in both directions; the diagonal is ``unique_codes``."""
    found = []
    weight = positive.double()[:, None].expand(codes.shape)
    for head in range(codes.shape[1]):
        ranks = _ranks(codes[:, head, None] * (int(codes.max()) + 1) + codes)
        total = torch.zeros(codes.shape, dtype=torch.float64).scatter_add_(0, ranks, torch.ones_like(weight))
        inside = torch.zeros_like(total).scatter_add_(0, ranks, weight)
        found.append(((inside > 0) & (inside == total)).sum(0).double())
    return torch.stack(found)


def pair_counts(pairs: Tensor) -> Tensor:
    """How often a head occurs in the better half of all ordered pairs by score, ``[H]``: the published ranking of heads
    by their edges. Pairs with equal scores stay in the order of the heads, as there."""
    heads = len(pairs)
    order = pairs.flatten().argsort(descending=True, stable=True)
    listed = torch.stack([order // heads, order % heads], 1).flatten()[: heads * heads // 2]
    return torch.bincount(listed, minlength=heads).double()


def _counts(codes: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """How many positives ``[P, H, R]`` and how many prompts ``[H, R]`` show each of a head's R codes."""
    if codes.ndim != 2 or codes.is_floating_point():
        raise WorkbenchError(f"codes are integers [prompts, heads]; got {codes.dtype} {list(codes.shape)}")
    labels = positive if positive.ndim == 2 else positive[None]
    if labels.dtype != torch.bool or labels.shape[1] != len(codes):
        raise WorkbenchError(f"labels are bool [{len(codes)}]; got {positive.dtype} {list(positive.shape)}")
    inside = labels.sum(1)
    if not ((inside > 0) & (inside < len(codes))).all():
        raise WorkbenchError("positives and negatives are compared: both kinds of prompts are needed")
    ranks = _ranks(codes)
    used = torch.zeros(*codes.shape, int(ranks.max()) + 1).scatter_(2, ranks[..., None], 1.0)
    shape = used.shape[1:]
    return (labels.to(used.dtype) @ used.flatten(1)).view(-1, *shape).double(), used.sum(0).double()


def _ranks(codes: Tensor) -> Tensor:
    """Codes numbered 0, 1, 2 ... within each head, in the order of their values."""
    values, order = codes.sort(0)
    steps = torch.zeros_like(values)
    steps[1:] = (values[1:] != values[:-1]).to(values.dtype)
    return torch.empty_like(codes).scatter_(0, order, steps.cumsum(0))


def swapped(pairs: int, permutations: int, seed: int) -> Tensor:
    """Random labels ``[P, 2N]`` of N positives and their N negatives in which the two prompts of a pair change sides or
    do not, each with probability one half.

    Labels drawn without regard to pairs would be no null for a head that answers alike on both prompts of a pair: its
    codes would differ more between random halves of the prompts than they ever do between the classes.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(permutations, pairs, generator=generator) < 0.5
    return torch.cat([first, ~first], 1)


def against(scores: Tensor, null: Tensor) -> Null:
    """``scores`` ``[H]`` against ``null`` ``[P, H]``."""
    mean, sd = null.mean(0), null.std(0)
    varies = null.amax(0) - null.amin(0) > _ROUNDING  # the sd of equal numbers is not exactly 0
    z = torch.where(varies, (scores - mean) / sd, torch.nan)
    p = (1 + (null >= scores - _ROUNDING).sum(0)).double() / (1 + len(null))
    return Null(mean, sd, z, p)
