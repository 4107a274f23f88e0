"""Groups of a grid's tokens, and softmax inside of them: what window attention of images and volumes is made of.

A rule gives every token of the grid (row-major) a group. A group is a row of a table of tokens, -1 where it is not full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.flash import flash_attention
from workbench.mixers.local import grouped_softmax
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


def window_groups(
    grid: Sequence[int], window: Sequence[int], *, shift: Sequence[int] | None = None, wrap: bool = False
) -> Tensor:
    """Tokens of every window, int64 ``[windows, tokens]``, -1 where a window is not full."""
    check_sizes("window", window, grid)
    moved = (0,) * len(grid) if shift is None else shift
    fits = whole_numbers(moved, 0) and len(moved) == len(grid)
    if not fits or any(s >= w for s, w in zip(moved, window, strict=True)):
        raise WorkbenchError(f"shift is from 0 to below the window {list(window)} on each axis; got {moved!r}")
    numbers = []
    for place, length, size, s in zip(places(grid), grid, window, moved, strict=True):
        at = (place - s) % length if wrap else place - s + size
        numbers.append(at // size)
    return group_table(numbers)


def axis_logits(q: Tensor, table: Tensor, queries: Tensor, place: Tensor) -> Tensor:
    """q_i . table[place] ``[B, H, groups, L, S]`` for grouped queries ``[groups, L]`` and ``place`` ``[groups, L, S]``."""
    products = (q @ table.to(q.dtype).T)[:, :, queries.clamp(min=0)]
    return products.gather(-1, place.expand(*products.shape[:2], -1, -1, -1))


def attention_in_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    sizes: Sequence[int],
    groups: Tensor,
    table: Tensor | None,
    scale: float | None,
    strides: Sequence[int] | None = None,
) -> tuple[Tensor, SparseMap]:
    """Softmax in groups with a bias by relative position in units of ``strides``."""
    groups = groups.to(q.device)
    bias = None
    if table is not None:
        cells = math.prod(2 * size - 1 for size in sizes)
        if table.ndim != 2 or table.shape[0] not in (1, q.shape[1]) or table.shape[1] != cells:
            raise WorkbenchError(f"table is [{q.shape[1]} or 1, {cells}] for {list(sizes)}; got {list(table.shape)}")
        at = torch.zeros(*groups.shape, groups.shape[1], dtype=torch.int64, device=q.device)
        for place, size, step in zip(places(grid), sizes, strides or (1,) * len(grid), strict=True):
            inside = place.to(q.device)[groups.clamp(min=0)] // step
            away = (inside[:, :, None] - inside[:, None, :] + size - 1).clamp(0, 2 * size - 2)
            at = at * (2 * size - 1) + away
        bias = table[:, at]
    return grouped_softmax(q, k, v, groups[None, None], groups[None, None], scale=scale, bias=bias)


def attention_on_grid(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], table: Tensor | None, scale: float | None
) -> tuple[Tensor, SoftmaxMap]:
    """Softmax over the whole grid with a bias by relative position, ``table`` ``[H or 1, prod(2 length - 1)]``. The output is
    made of all N x N weights where there is a table; the map holds the table."""
    if table is None:
        return flash_attention(q, k, v, mask=Mask(), scale=scale)
    cells = math.prod(2 * length - 1 for length in grid)
    if table.ndim != 2 or table.shape[0] not in (1, q.shape[1]) or table.shape[1] != cells:
        raise WorkbenchError(f"table is [{q.shape[1]} or 1, {cells}] for {list(grid)}; got {list(table.shape)}")
    held, at = table.detach(), [place.to(q.device) for place in places(grid)]

    def rows(numbers: Tensor, lo: int, hi: int) -> Tensor:
        found = torch.zeros(hi - lo, q.shape[2], dtype=torch.int64, device=q.device)
        for place, length in zip(at, grid, strict=True):
            found = found * (2 * length - 1) + place[lo:hi, None] - place + length - 1
        return numbers[:, found]

    out, found = softmax_attention(q, k, v, mask=Mask(), scale=scale, bias=rows(table, 0, q.shape[2]))
    return out, SoftmaxMap(q, k, found.lse, mask=Mask(), scale=scale, bias=lambda lo, hi: rows(held, lo, hi))


def places(grid: Sequence[int]) -> list[Tensor]:
    """Place of every token along each axis, ``[N]`` each."""
    return [part.flatten() for part in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")]


def group_table(numbers: Sequence[Tensor]) -> Tensor:
    """Tokens by group, ``[groups, most]``, from one number per token and axis; -1 fills."""
    _, group, counts = torch.stack(list(numbers), 1).unique(dim=0, return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    found = torch.full((len(counts), int(counts.max())), -1, dtype=torch.int64)
    found[group[order], torch.arange(len(order)) - starts[group[order]]] = order
    return found


def check_sizes(name: str, sizes: Sequence[int], grid: Sequence[int]) -> None:
    """Raise ``WorkbenchError`` unless ``sizes`` is a positive whole number for each axis of the grid."""
    if not whole_numbers(sizes) or len(sizes) != len(grid):
        raise WorkbenchError(f"{name} has a whole number of at least 1 for each axis of {list(grid)}; got {sizes!r}")


def whole_numbers(sizes: object, least: int = 1) -> bool:
    """Whether this is a sequence of whole numbers of at least ``least``."""
    return isinstance(sizes, Sequence) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= least for size in sizes
    )
