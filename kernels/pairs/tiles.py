"""Which tiles of (query, key) pairs a Triton kernel of the softmax family visits, and which of them need no mask.

Where causality and window decide alone, the key tiles of a row tile are a range, the middle of which is open. With documents, key
padding or block masks they are a list, made once per call from the ends of the tiles without waiting for the device: hidden tiles
are not visited, and no tile is tested in the loop.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.pairs.chunks import blank, unseen
from workbench.kernels.scores import Scores
from workbench.kernels.tiles import Cells, mask_arguments, score_arguments


@triton.jit
def open_keys(
    low, high, first, last, n_keys, OFFSET, WINDOW, PREFIX,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, T: tl.constexpr, SIMPLE: tl.constexpr,
):  # fmt: skip
    """Key tiles of ``[first, last)`` in which query rows ``low .. high`` see every key, so that no mask is needed."""
    start = first
    stop = first
    if SIMPLE:
        stop = n_keys // T
        if HAS_WINDOW:
            start = (tl.maximum(high + OFFSET - WINDOW + 1, 0) + T - 1) // T
            if CAUSAL:
                stop = tl.minimum(stop, (low + OFFSET + 1) // T)
            else:
                stop = tl.minimum(stop, (low + OFFSET + WINDOW) // T)
        elif CAUSAL:
            stop = tl.minimum(stop, tl.maximum(low + OFFSET + 1, PREFIX) // T)
        start = tl.minimum(tl.maximum(start, first), last)
        stop = tl.minimum(tl.maximum(stop, start), last)
    return start, stop


def cleaned(scores: Scores, v: Tensor | None) -> tuple[Scores, Tensor | None]:
    """The same scores and values with zeros at positions that data-dependent masks hide from everyone; they may hold NaN."""
    mask = scores.mask
    if all(part is None for part in (mask.keys, mask.queries, mask.dense, mask.blocks)):
        return scores, v
    keys, rows = unseen(scores)
    return replace(scores, q=blank(scores.q, rows), k=blank(scores.k, keys)), None if v is None else blank(v, keys)


def pair_arguments(scores: Scores, rows: Cells, columns: Cells, by_key: bool = False) -> dict[str, Any]:
    """Which pairs a kernel visits: mask and score arguments, the keys that anybody can see by position, and the lists of key
    tiles of every row tile (``by_key``: of row tiles of every key tile)."""
    mask, (_, _, q, k) = scores.mask, scores.shape
    first_seen, n_keys = replace(mask, documents=None, keys=None, blocks=None, side=None).span(0, q, k)
    arguments = mask_arguments(scores) | score_arguments(scores)
    even = all(cells.pad == cells.step and cells.block % cells.step == 0 for cells in (rows, columns))
    if mask.side is not None and even and mask.side % rows.tile == 0 and mask.side % columns.tile == 0:
        arguments["SIDE"] = 0  # a tile lies in one block: the list has decided
    listed = any(part is not None for part in (mask.documents, mask.keys, mask.blocks))
    tiles = counts = scores.q
    lists = {"t_b": 0, "t_h": 0, "t_q": 0, "c_b": 0, "c_h": 0}
    if listed:
        seen = visible_tiles(scores, rows, columns)
        seen = seen.transpose(-1, -2).contiguous() if by_key else seen
        counts = seen.sum(-1, dtype=torch.int32)
        tiles = seen.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
        lists = {
            f"t_{axis}": 0 if n == 1 else step for axis, n, step in zip("bh", seen.shape, tiles.stride(), strict=False)
        }
        lists |= {
            f"c_{axis}": 0 if n == 1 else step for axis, n, step in zip("bh", seen.shape, counts.stride(), strict=False)
        }
        lists |= {"t_q": tiles.stride(2)}
    plain = mask.queries is None and mask.dense is None and scores.bias is None
    return arguments | lists | {
        "TILES": tiles, "COUNTS": counts, "LISTED": listed, "SIMPLE": not listed and plain and even,
        "n_queries": q, "n_keys": n_keys, "first_seen": first_seen,
    }  # fmt: skip


def visible_tiles(scores: Scores, rows: Cells, columns: Cells) -> Tensor:
    """Tiles ``[B or 1, H or 1, row tiles, key tiles]`` in which some query may see some key; True when in doubt."""
    mask, device = scores.mask, scores.q.device
    row, row_in = _positions(rows, device)
    column, column_in = _positions(columns, device)
    row_first, row_last = _ends(row, row_in)
    first, last = _ends(column, column_in)
    nearest, farthest = (
        row_first[:, None] + mask.offset - last,
        row_last[:, None] + mask.offset - first,
    )  # query minus key
    seen = torch.ones_like(nearest, dtype=torch.bool)
    if mask.causal:
        seen = farthest >= 0
    if mask.window is not None:
        seen = seen & (nearest < mask.window)
        if not mask.causal:
            seen = seen & (-farthest < mask.window)
    seen = seen | (first < mask.prefix)
    seen = (seen & row_in.any(1)[:, None] & column_in.any(1))[None, None]
    if mask.documents is not None:
        numbers = mask.documents.to(device, torch.int64)
        least, most = _ends(numbers[:, (row + mask.offset).clamp(max=numbers.shape[1] - 1)], row_in)
        fewest, greatest = _ends(numbers[:, column.clamp(max=numbers.shape[1] - 1)], column_in)
        seen = seen & ((least[:, :, None] <= greatest[:, None]) & (fewest[:, None] <= most[:, :, None]))[:, None]
    if mask.keys is not None:
        at = mask.keys.to(device)[:, column.clamp(max=columns.length - 1)] & column_in
        seen = seen & at.any(-1)[:, None, None]
    if mask.queries is not None:
        at = mask.queries.to(device)[:, row.clamp(max=rows.length - 1)] & row_in
        seen = seen & at.any(-1)[:, None, :, None]
    if mask.blocks is not None and mask.side is not None:
        i, j = (torch.arange(n, device=device) for n in mask.blocks.shape[2:])
        by_row = (row_first[:, None] // mask.side <= i) & (i <= row_last[:, None] // mask.side)
        by_column = (first[:, None] // mask.side <= j) & (j <= last[:, None] // mask.side)
        seen = seen & (by_row.float() @ mask.blocks.to(device, torch.float32) @ by_column.T.float() > 0)
    return seen


def _positions(cells: Cells, device: torch.device) -> tuple[Tensor, Tensor]:
    """``places`` for all tiles, ``[tiles, tile]``."""
    at = torch.arange(cells.tiles * cells.tile, device=device)
    cell, within = at // cells.pad, at % cells.pad
    inside = cell % cells.per * cells.step + within
    position = cell // cells.per * cells.block + inside
    ok = (within < cells.step) & (inside < cells.block) & (position < cells.length)
    return position.view(-1, cells.tile), ok.view(-1, cells.tile)


def _ends(values: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest value of each tile; anything for a tile that holds nothing."""
    info = torch.iinfo(torch.int32)
    return values.masked_fill(~inside, info.max).amin(-1), values.masked_fill(~inside, info.min).amax(-1)
