"""Axes of the residual stream of a hand-compiled model: blocks, codes of tokens and of positions, rotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.datasets.tokenizer import base_vocabulary
from workbench.errors import UnknownName, WorkbenchError

POSITION = 64


class Layout:
    """Names for the axes of the residual stream: a direct sum of blocks of the given widths."""

    def __init__(self, **blocks: int) -> None:
        self.width = sum(blocks.values())
        self._at: dict[str, slice] = {}
        start = 0
        for name, size in blocks.items():
            self._at[name] = slice(start, start + size)
            start += size

    def pick(self, block: str, first: int = 0, count: int | None = None) -> Tensor:
        """The map ``[D, count]`` that reads ``count`` coordinates of a block."""
        if block not in self._at:
            raise UnknownName("block", block, self._at)
        span = range(self.width)[self._at[block]][first : None if count is None else first + count]
        return torch.eye(self.width)[:, span.start : span.stop]

    def total(self, block: str, first: int = 0, count: int | None = None) -> Tensor:
        """The map ``[D, 1]`` that reads the sum of ``count`` coordinates of a block."""
        return self.pick(block, first, count).sum(1, keepdim=True)


def one_hot(known: Sequence[str], vocabulary: Sequence[str] | None = None) -> Tensor:
    """``[V, len(known)]``: row of each token of the vocabulary, zero for tokens that are not ``known``."""
    tokens = {token: i for i, token in enumerate(base_vocabulary() if vocabulary is None else vocabulary)}
    table = torch.zeros(len(tokens), len(known))
    table[[tokens[word] for word in known], range(len(known))] = 1
    return table


def flag(known: Sequence[str], vocabulary: Sequence[str] | None = None) -> Tensor:
    """``[V, 1]``: 1 for the ``known`` tokens."""
    return one_hot(known, vocabulary).sum(1, keepdim=True)


@dataclass(frozen=True)
class Shift:
    """``Shift(rates)(d)`` is the rotation ``[P, P]`` that takes the code of position p to the code of p - d."""

    rates: Tensor

    def __call__(self, steps: int) -> Tensor:
        cos, sin = (self.rates * steps).cos().diag(), (self.rates * steps).sin().diag()
        return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]).float()


def positions(context: int, width: int = POSITION, seed: int = 0) -> tuple[Tensor, Shift, float]:
    """Position codes ``[context, 64]`` of norm 1, the map that moves them back, and their gap.

    A code is 32 pairs (cos w p, sin w p) with random frequencies; the inner product of codes is 1 for equal
    positions and at most 1 - gap otherwise. ``code(p) @ shift(d) == code(p - d)``.
    """
    rates = torch.rand(width // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * torch.pi
    table = _codes(context, rates)
    gap = 1 - float((table[1:] @ table[0]).max()) if context > 1 else 1.0
    if gap < 0.1:
        raise WorkbenchError(f"{context} positions are too many for codes of width {width}")
    return table.float(), Shift(rates), gap


def apart(context: int, width: int) -> tuple[Tensor, Shift]:
    """Position codes ``[context, width]`` of norm 1, orthogonal unless a multiple of ``width`` apart, and their shift.

    The frequencies are odd multiples of pi / width, so that the inner product is 0 at distances 1 to width - 1, -1 at
    ``width`` and 1 again at twice that.
    """
    rates = torch.pi * (2 * torch.arange(width // 2, dtype=torch.float64) + 1) / width
    return _codes(context, rates).float(), Shift(rates)


def _codes(context: int, rates: Tensor) -> Tensor:
    angles = torch.arange(context, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1) / len(rates) ** 0.5


def rotation(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix ``[D, D]``, uniform over the group."""
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return (q * r.diagonal().sign()).float()
