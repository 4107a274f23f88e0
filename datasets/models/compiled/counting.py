"""Thresholds and tables that several compiled models share: a share of attention becomes a count, two counts a third."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workbench.datasets.models.compiled.parts import Mlp


def steps(read: Tensor, levels: Sequence[float], write: Tensor) -> Mlp:
    """One-hot of the level nearest to a number.

    ``read`` ``[D, 1]`` is the number, ``levels`` fall, ``write`` ``[len(levels), D]`` gets 1 in the row of its level. Between
    neighbours a ramp of two units goes from 0 at the lower to 1 at the upper level (arXiv 2301.05062, numerical MLPs).
    """
    upper, lower = torch.tensor(levels[:-1]), torch.tensor(levels[1:])
    slope = 1 / (upper - lower)
    change = write[:-1] - write[1:]  # passing from a level to the one above it
    bias = -slope * lower
    return Mlp(
        torch.cat([read @ slope[None], read @ slope[None], torch.zeros_like(read)], 1),
        torch.cat([bias, bias - 1, torch.ones(1)]),
        torch.cat([change, -change, write[-1:]]),
    )


def pairs_table(a: Tensor, b: Tensor, write: Mapping[tuple[int, int], Tensor]) -> Mlp:
    """One unit per pair of categories, relu(a_i + b_j - 1): ``a`` ``[D, N]``, ``b`` ``[D, M]`` read one-hot blocks, and the
    unit of (i, j) writes ``write[i, j]`` ``[D]`` (arXiv 2301.05062, categorical MLPs)."""
    chosen = list(write)
    read = torch.stack([a[:, i] + b[:, j] for i, j in chosen], 1)
    return Mlp(read, -torch.ones(len(chosen)), torch.stack([write[pair] for pair in chosen]))
