"""``topk_encode`` in plain torch: tiles of rows by features, each merged into the running k best of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.scores import working_dtype

CHUNK = 2**20
"""Pre-activations of a tile. At 2**20 it is 4 MiB in float32 and stays in a last-level cache."""
ROWS = 256
"""Rows of a tile: a tile's weights are read once for so many rows."""


def encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, positive: bool) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(x.dtype)
    n, f = x.shape[0], weight.shape[1]
    # Places start with what cannot be selected. They come before equal pre-activations, which therefore never replace them.
    values = x.new_full((n, k), 0.0 if positive else float("-inf"), dtype=dtype)
    indices = torch.full((n, k), -1, device=x.device)
    rows = min(n, ROWS, CHUNK)
    for first in range(0, f, max(1, CHUNK // rows)):
        columns = slice(first, min(f, first + max(1, CHUNK // rows)))
        part = weight[:, columns].to(dtype)
        shift = None if bias is None else bias[columns].to(dtype)
        for lo in range(0, n, rows):
            at = slice(lo, min(n, lo + rows))
            some = x[at].to(dtype)
            pre = some @ part if shift is None else torch.addmm(shift, some, part)
            bar = values[at, -1]
            if bool((pre.amax(1) <= bar).all()):
                continue
            found, place = _largest(pre, k, bar)
            both, order = torch.cat([values[at], found], 1).sort(dim=1, descending=True, stable=True)
            values[at] = both[:, :k]
            indices[at] = torch.cat([indices[at], place + first], 1).gather(1, order[:, :k])
    return values.masked_fill_(indices < 0, 0.0), indices


def _largest(pre: Tensor, k: int, bar: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of each row, by ascending place; of equals the first. ``topk`` picks any of equals, so it is asked for
    one more: rows whose k-th and next value are equal, above ``bar``, are sorted in full."""
    values, place = pre.topk(min(k + 1, pre.shape[1]))
    if values.shape[1] > k:
        tied = (values[:, k - 1] == values[:, k]) & (values[:, k - 1] > bar)
        values, place = values[:, :k], place[:, :k]
        if bool(tied.any()):
            whole, order = pre[tied].sort(dim=1, descending=True, stable=True)
            values[tied], place[tied] = whole[:, :k], order[:, :k]
    place, order = place.sort(dim=1)
    return values.gather(1, order), place
