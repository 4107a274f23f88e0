"""A chunk of attention under a block mask: block rows that see equally many key blocks, each against its own, gathered.

What the block mask hides is never multiplied. The moves are those of ``Span``, in ``C`` products of ``R`` rows by ``M`` keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.mask import in_window
from workbench.kernels.pairs.span import LOG2E, ceiling
from workbench.kernels.scores import Scores


@dataclass(frozen=True, eq=False)
class Picked:
    """``C`` block rows, each of one example and head (``b``, ``h`` ``[C]``), against its own key blocks ``j`` ``[C, blocks]``."""

    scores: Scores
    b: Tensor
    h: Tensor
    j: Tensor
    positions: Tensor
    """Query rows, ``[C, R]``."""

    @property
    def side(self) -> int:
        assert self.scores.mask.side is not None
        return self.scores.mask.side

    @property
    def full(self) -> tuple[int, int, int, int]:
        c, n = self.positions.shape
        return c, 1, n, self.j.shape[1] * self.side

    @property
    def flat(self) -> tuple[int, int, int]:
        c, _, n, m = self.full
        return c, n, m

    @property
    def columns(self) -> Tensor:
        """Key positions ``[C, M]``; those of the last block may lie past the end."""
        return (self.j[..., None] * self.side + torch.arange(self.side, device=self.j.device)).flatten(1)

    def take_rows(self, tensor: Tensor) -> Tensor:
        return tensor[self.b[:, None], self.h[:, None], self.positions]

    def put_rows(self, tensor: Tensor, value: Tensor) -> None:
        tensor[self.b[:, None], self.h[:, None], self.positions] = value.to(tensor.dtype)

    def add_rows(self, tensor: Tensor, value: Tensor) -> None:
        tensor[self.b[:, None], self.h[:, None], self.positions] += value

    def take_keys(self, tensor: Tensor) -> Tensor:
        c, _, _, m = self.full
        return self._by_block(tensor)[self._at(tensor)].view(c, m, tensor.shape[3])

    def add_keys(self, tensor: Tensor, value: Tensor) -> None:
        self._by_block(tensor).index_add_(0, self._at(tensor).flatten(), value.reshape(self.j.numel(), -1))

    def along_keys(self, tensor: Tensor) -> Tensor:
        columns = self.columns.clamp(max=tensor.shape[2] - 1)
        return tensor[self.b[:, None], self.h[:, None], columns][:, None, None]

    def sink(self) -> Tensor | None:
        logits = self.scores.sink_logits()
        return None if logits is None else (logits[0, self.h] * LOG2E).expand(self.positions.shape)

    def bias(self) -> Tensor:
        k = self.scores.shape[3]
        rows = []
        for b, h, lo, columns in zip(
            self.b.tolist(), self.h.tolist(), self.positions[:, 0].tolist(), self.columns, strict=True
        ):
            part = self.scores.bias_tile(
                slice(lo, lo + self.positions.shape[1]), slice(0, k), slice(b, b + 1), slice(h, h + 1)
            )
            rows.append(part.expand(1, 1, self.positions.shape[1], k)[0, ..., columns.clamp(max=k - 1)])
        return torch.stack(rows)

    def hide(self, x: Tensor) -> None:
        mask, k = self.scores.mask, self.scores.shape[3]
        rows, columns = self.positions[:, :, None], self.columns[:, None, :]
        allowed = (columns < k).expand(self.flat)
        places, columns = rows + mask.offset, columns.clamp(max=k - 1)
        near: Tensor | None = None
        if mask.window is not None:
            near = in_window(places, columns, mask.window)
            near = near if mask.causal else near | in_window(columns, places, mask.window)
        elif mask.causal:
            near = columns <= places
        if near is not None:
            allowed = allowed & (near | (columns < mask.prefix))
        b, h = self.b[:, None, None], self.h[:, None, None]
        if mask.documents is not None:
            numbers = mask.documents.to(x.device).expand(self.scores.shape[0], -1)
            allowed = allowed & (numbers[b, places] == numbers[b, columns])
        if mask.keys is not None:
            allowed = allowed & mask.keys.to(x.device).expand(self.scores.shape[0], -1)[b, columns]
        if mask.queries is not None:
            allowed = allowed & mask.queries.to(x.device).expand(self.scores.shape[0], -1)[b, rows]
        if mask.dense is not None:
            allowed = allowed & mask.dense.to(x.device).expand(self.scores.shape)[b, h, rows, columns]
        torch.minimum(x, ceiling(allowed, x), out=x)

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        columns = self.columns.clamp(max=self.scores.shape[3] - 1)
        places = self.positions + self.scores.mask.offset
        return (
            self.b[:, None, None, None],
            self.h[:, None, None, None],
            places[:, None, :, None],
            columns[:, None, None],
        )

    def key_at(self, index: Tensor) -> Tensor:
        return self.columns.gather(1, index.flatten(1)).view(index.shape)

    def key_table(self, table: Tensor) -> Tensor:
        return table[self.b[:, None], self.columns.clamp(max=table.shape[1] - 1)][:, None]

    def add_sums(
        self, e: Tensor, weight: Tensor, mass: Tensor | None, block: int | None, received: Tensor | None
    ) -> None:
        if received is not None:
            _, heads, keys = received.shape
            at = (self.b * heads + self.h)[:, None] * keys + self.columns.clamp(max=keys - 1)
            received.view(-1).index_add_(0, at.flatten(), (weight[:, None] @ e).flatten())
        if mass is not None and block is not None:
            cells = e.unflatten(2, (-1, math.gcd(self.side, block))).sum(-1) * weight[..., None]
            mass.view(-1).index_add_(0, self._cells(mass, block).flatten(), cells.flatten())

    def tops(self, x: Tensor, block: int) -> Tensor:
        """Largest score of every row in every cell of keys."""
        return x.unflatten(2, (-1, math.gcd(self.side, block))).amax(-1)

    def raise_peak(self, blocks: Tensor, tops: Tensor, block: int) -> None:
        blocks.view(-1).scatter_reduce_(0, self._cells(blocks, block).flatten(), tops.flatten(), "amax")

    def spread(self, blocks: Tensor, block: int) -> Tensor:
        i = self.positions[:, :, None] // block
        j = (self.columns // block).clamp(max=blocks.shape[3] - 1)[:, None, :]
        return blocks[self.b[:, None, None], self.h[:, None, None], i, j][:, None]

    def _cells(self, blocks: Tensor, block: int) -> Tensor:
        """Where the cells ``[C, R, M / cell]`` lie in a block map. A cell, the common measure of both sides, lies in one."""
        _, heads, rows, columns = blocks.shape
        j = (self.columns[:, :: math.gcd(self.side, block)] // block).clamp(max=columns - 1)
        at = (self.b * heads + self.h)[:, None] * rows + self.positions // block
        return at[:, :, None] * columns + j[:, None, :]

    def _by_block(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1, self.side * tensor.shape[3])

    def _at(self, tensor: Tensor) -> Tensor:
        group = self.h // (self.scores.shape[1] // tensor.shape[1])
        return ((self.b * tensor.shape[1] + group) * (tensor.shape[2] // self.side))[:, None] + self.j
