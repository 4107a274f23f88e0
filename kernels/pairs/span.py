"""A chunk of attention: a run of query rows of some heads against a run of keys.

The heads that share a key head are folded into the rows of one product, so that keys are never repeated. ``Picked``
(``kernels/pairs/picked.py``) has the same moves for block masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.mask import Mask
from workbench.kernels.scores import HIDDEN, Scores

LOG2E = math.log2(math.e)


@dataclass(frozen=True, eq=False)
class Span:
    """Query rows ``rows`` against keys ``columns`` of some examples and key heads."""

    scores: Scores
    mask: Mask
    batch: slice
    groups: slice
    rows: slice
    columns: slice

    @property
    def heads(self) -> slice:
        fold = self.scores.shape[1] // self.scores.k.shape[1]
        return slice(self.groups.start * fold, self.groups.stop * fold)

    @property
    def full(self) -> tuple[int, int, int, int]:
        """Shape of the scores with examples, heads and rows apart."""
        lengths = [part.stop - part.start for part in (self.batch, self.heads, self.rows, self.columns)]
        return lengths[0], lengths[1], lengths[2], lengths[3]

    @property
    def flat(self) -> tuple[int, int, int]:
        """Shape of the scores as ``C`` products."""
        b, h, n, m = self.full
        groups = self.groups.stop - self.groups.start
        return b * groups, h // groups * n, m

    def take_rows(self, tensor: Tensor) -> Tensor:
        """``[B, H, Q, ...]`` to ``[C, R, ...]``."""
        return tensor[self.batch, self.heads, self.rows].reshape(*self.flat[:2], *tensor.shape[3:])

    def put_rows(self, tensor: Tensor, value: Tensor) -> None:
        tensor[self.batch, self.heads, self.rows] = value.view(*self.full[:3], *tensor.shape[3:]).to(tensor.dtype)

    def add_rows(self, tensor: Tensor, value: Tensor) -> None:
        part = tensor[self.batch, self.heads, self.rows]
        part += value.view(part.shape)

    def take_keys(self, tensor: Tensor) -> Tensor:
        """``[B, G, K, E]`` to ``[C, M, E]``."""
        return tensor[self.batch, self.groups, self.columns].flatten(0, 1)

    def add_keys(self, tensor: Tensor, value: Tensor) -> None:
        part = tensor[self.batch, self.groups, self.columns]
        part += value.view(part.shape)

    def along_keys(self, tensor: Tensor) -> Tensor:
        """``[B, H, K]`` broadcastable to ``full``."""
        return tensor[self.batch, self.heads, None, self.columns]

    def sink(self) -> Tensor | None:
        """``[C, R]``, base 2."""
        logits = self.scores.sink_logits()
        if logits is None:
            return None
        return (logits[:, self.heads] * LOG2E).expand(self.full[:3]).reshape(self.flat[:2])

    def bias(self) -> Tensor:
        return self.scores.bias_tile(self.rows, self.columns, self.batch, self.heads)

    def hide(self, x: Tensor) -> None:
        """Push hidden scores to ``HIDDEN``. A minimum with a float tile is many times faster than masked_fill on CPUs."""
        rows, columns = self.rows, self.columns
        start, stop = self.mask.open(rows.start, rows.stop, columns.start, columns.stop)
        for part in (slice(columns.start, start), slice(stop, columns.stop)):
            if part.start < part.stop:
                allowed = self.mask.tile(rows, part, x.device)
                if allowed is not None:
                    view = x.view(self.full)[..., part.start - columns.start : part.stop - columns.start]
                    torch.minimum(view, ceiling(allowed, x), out=view)

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Example, head, absolute query position and key position of every pair, broadcastable to ``full``."""
        device, offset = self.scores.q.device, self.scores.mask.offset
        b, h, i, j = (
            torch.arange(p.start, p.stop, device=device) for p in (self.batch, self.heads, self.rows, self.columns)
        )
        return b[:, None, None, None], h[:, None, None], i[:, None] + offset, j

    def key_at(self, index: Tensor) -> Tensor:
        """Key positions of places in the last axis of the scores."""
        return index + self.columns.start

    def key_table(self, table: Tensor) -> Tensor:
        """``[B, K, S]`` at the chunk's keys, ``[B, 1, M, S]``."""
        return table[self.batch, None, self.columns]

    def add_sums(
        self, e: Tensor, weight: Tensor, mass: Tensor | None, block: int | None, received: Tensor | None
    ) -> None:
        """Add the sums of ``weight`` ``[C, R]`` times ``e`` over blocks ``[B, H, I, J]`` and over rows ``[B, H, K]``."""
        grid = self._grid(e, block)
        by_key = (weight.view(*grid.shape[:3], 1, grid.shape[3]) @ grid).squeeze(3)
        if received is not None:
            received[self.batch, self.heads, self.columns] += by_key.sum(2)
        if mass is not None and block is not None:
            self._blocks(mass, grid, block).add_(_pool(by_key, block).sum(-1))

    def tops(self, x: Tensor, block: int) -> Tensor:
        """Largest score of every row in every block of keys, ``[C, R, blocks]``."""
        whole = x.shape[-1] // block * block
        parts = [x[..., :whole].unflatten(-1, (-1, block)).amax(-1)] if whole else []
        parts += [x[..., whole:].amax(-1, keepdim=True)] if whole < x.shape[-1] else []
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def raise_peak(self, blocks: Tensor, tops: Tensor, block: int) -> None:
        """Raise block maxima ``[B, H, I, J]`` to those of the rows, ``[C, R, blocks]``."""
        b, h, n, _ = self.full
        size = block if n > block else n
        rows = tops.view(b, h, n // size, size, tops.shape[-1]).amax(3)
        i, j = self.rows.start // block, self.columns.start // block
        part = blocks[self.batch, self.heads, i : i + rows.shape[2], j : j + rows.shape[3]]
        torch.maximum(part, rows, out=part)

    def spread(self, blocks: Tensor, block: int) -> Tensor:
        """A block map ``[B, H, I, J]`` at every pair, ``full``."""
        i = torch.arange(self.rows.start, self.rows.stop, device=blocks.device) // block
        j = torch.arange(self.columns.start, self.columns.stop, device=blocks.device) // block
        return blocks[self.batch, self.heads][..., j][:, :, i]

    def _grid(self, e: Tensor, block: int | None) -> Tensor:
        """``[B, H, row blocks, rows in one, M]``: a chunk is whole blocks of rows or lies inside one."""
        b, h, n, m = self.full
        size = block if block is not None and n > block else n
        return e.view(b, h, n // size, size, m)

    def _blocks(self, blocks: Tensor, grid: Tensor, block: int) -> Tensor:
        i, j = self.rows.start // block, self.columns.start // block
        return blocks[self.batch, self.heads, i : i + grid.shape[2], j : j - (-grid.shape[4] // block)]


def ceiling(allowed: Tensor, like: Tensor) -> Tensor:
    """Infinity where allowed, ``HIDDEN`` elsewhere: a minimum with it hides the rest."""
    return allowed.to(like.dtype).sub_(0.5).mul_(float("inf")).clamp_(min=HIDDEN)


def _pool(values: Tensor, block: int) -> Tensor:
    """``[..., M]`` to ``[..., key blocks, block]``; the last block is filled up with zeros (weights are not negative)."""
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % block)).unflatten(-1, (-1, block))
