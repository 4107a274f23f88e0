"""Images as rows of tokens: kernel taps, windows and pooling on a grid whose cells are numbered row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.errors import WorkbenchError
from workbench.mixers import channels

Grid = tuple[int, int]


def check_grid(grid: Any, tokens: int, name: str = "grid") -> Grid:
    """The grid as ``(rows, columns)``; raises unless it has ``tokens`` cells."""
    fits = isinstance(grid, tuple | list) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
    if not fits or grid[0] * grid[1] != tokens:
        raise WorkbenchError(f"{name} is (rows, columns) with rows * columns = {tokens}; got {grid!r}")
    return grid[0], grid[1]


def grid_of(parts: dict[str, Any]) -> Grid:
    """The grid of what a native model gives, one row of tokens where it has none."""
    grid = parts["grid"]
    return (1, parts["v"].shape[2]) if grid is None else (grid[0], grid[1])


def spread(x: Tensor, heads: int) -> Tensor:
    """``[B, G, ...]`` to ``[B, heads, ...]``: every value head as often as query heads share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def cells(grid: Grid, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Row and column of every token, both ``[N]``."""
    places = torch.arange(grid[0] * grid[1], device=device)
    return places // grid[1], places % grid[1]


def taps(grid: Grid, size: int, dilation: int = 1, device: torch.device | None = None) -> Tensor:
    """Tokens under a square kernel centred on each token, ``[N, size * size]`` row by row, -1 outside of the image."""
    if size < 1 or size % 2 == 0 or dilation < 1:
        raise WorkbenchError(
            f"a centred kernel has an odd side and a positive dilation; got size={size}, dilation={dilation}"
        )
    steps = (torch.arange(size, device=device) - size // 2) * dilation
    row, column = cells(grid, device)
    rows = (row[:, None, None] + steps[:, None]).expand(-1, size, size)
    columns = (column[:, None, None] + steps[None, :]).expand(-1, size, size)
    inside = (rows >= 0) & (rows < grid[0]) & (columns >= 0) & (columns < grid[1])
    return torch.where(inside, rows * grid[1] + columns, -1).flatten(1)


def windows(grid: Grid, side: int, device: torch.device | None = None) -> Tensor:
    """Tokens of each ``side`` x ``side`` window, ``[W, side * side]`` row by row, -1 beyond the edge of the image."""
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        raise WorkbenchError(f"a window has at least one token a side; got {side}")
    down, across = -(-grid[0] // side), -(-grid[1] // side)
    table = torch.arange(grid[0] * grid[1], device=device).view(grid)
    table = functional.pad(table, (0, across * side - grid[1], 0, down * side - grid[0]), value=-1)
    return table.view(down, side, across, side).transpose(1, 2).reshape(down * across, side * side)


def gathered(x: Tensor, at: Tensor) -> Tensor:
    """Tokens of x ``[B, H, N, E]`` at ``at`` ``[Q, S]``: ``[B, H, Q, S, E]``, zeros for -1."""
    return x[:, :, at.clamp(min=0)].masked_fill((at < 0)[..., None], 0.0)


def as_planes(x: Tensor, grid: Grid) -> Tensor:
    """Tokens ``[B, H, N, E]`` as one picture per channel of every head, ``[B, H*E, rows, columns]``."""
    return channels.planes(x).unflatten(2, grid)


def as_tokens(pictures: Tensor, heads: int) -> Tensor:
    """Pictures ``[B, H*E, rows, columns]`` as tokens ``[B, H, N, E]``."""
    return channels.tokens(pictures.flatten(2), heads)


def depthwise(x: Tensor, kernel: Tensor, grid: Grid) -> Tensor:
    """Convolution of every channel with a kernel of its own, zeros around the image.

    x ``[B, H, N, E]``, ``kernel`` ``[H, E, size, size]`` of odd size; correlates like ``torch.nn.Conv2d``.
    """
    size = kernel.shape[-1]
    if kernel.shape != (x.shape[1], x.shape[3], size, size) or size % 2 == 0:
        raise WorkbenchError(
            f"kernel is [H, E, size, size] = {[x.shape[1], x.shape[3], 'size', 'size']} with an odd size; "
            f"got {list(kernel.shape)}"
        )
    return channels.tokens(channels.correlate(channels.planes(x), kernel.flatten(0, 1), grid), x.shape[1])


def pooled(x: Tensor, grid: Grid, out: Grid) -> Tensor:
    """Adaptive averages of tokens ``[B, H, N, E]`` on an ``out`` grid: ``[B, H, out cells, E]``."""
    return as_tokens(functional.adaptive_avg_pool2d(as_planes(x, grid), out), x.shape[1])
