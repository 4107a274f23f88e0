"""How far would a mean move if other sequences had been drawn?"""

from __future__ import annotations

import torch
from torch import Tensor


def interval(values: Tensor, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap interval of the mean over the first axis of ``values`` ``[N, ...]`` (float64).

    Rows are resampled with replacement ``draws`` times; NaN entries are left out. Returns ``low, high`` of shape
    ``[...]``; NaN where fewer than two rows are defined, because one sequence says nothing about the next.
    """
    means = resampled_means(values, draws=draws, seed=seed)
    tail = (1 - level) / 2
    low, high = (torch.nanquantile(means, q, dim=0) for q in (tail, 1 - tail))
    lonely = values.isfinite().sum(0) < 2
    return low.masked_fill(lonely, float("nan")), high.masked_fill(lonely, float("nan"))


def resampled_means(values: Tensor, *, draws: int = 1000, seed: int = 0) -> Tensor:
    """Means of ``draws`` resamples of the rows of ``values`` ``[N, ...]``: ``[draws, ...]`` in float64."""
    rows = len(values)
    if not rows:
        return values.new_full((draws, *values.shape[1:]), float("nan"), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(rows, (draws, rows), generator=generator)
    weights = torch.zeros(draws, rows, dtype=torch.float64)
    weights.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    flat = values.detach().cpu().double().reshape(rows, -1)
    known = flat.isfinite()
    total = weights @ flat.masked_fill(~known, 0.0)
    return (total / (weights @ known.double())).reshape(draws, *values.shape[1:])


def standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean over the first axis, NaN entries left out; NaN where fewer than two are defined."""
    known = values.isfinite()
    count = known.sum(0)
    mean = values.nanmean(0)
    square = ((values - mean) ** 2).masked_fill(~known, 0.0).sum(0)
    return (square / (count - 1).clamp(min=1) / count.clamp(min=1)).sqrt().masked_fill(count < 2, float("nan"))
