"""Outlook attention: every place writes the weights of its whole window, without looking at keys, and windows overlap.

    A_c = softmax over t of scale (x_c W)_{s t}          s, t: places of the k x k window around c, s the row
    o_i = sum over windows c that hold i, at s = i - c, of sum_t A_{c s t} v_{c + t}

So M_ij = sum_c A_{c, i-c, j-c} is a band of (2k - 1) x (2k - 1) tokens. Every window gives a row that sums to 1; weights on
places outside of the image meet zeros. Row i therefore sums to the number of windows that hold i, less what fell outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.catalogue import Learned, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.image import Grid, as_planes, as_tokens, cells, check_grid, grid_of, spread
from workbench.mixers.scored import check_tensor
from workbench.patterns.sparse import SparseMap


def outlook_attention(
    logits: Tensor, v: Tensor, *, grid: Grid, size: int = 3, stride: int = 1, scale: float | None = None
) -> tuple[Tensor, SparseMap]:
    """Overlapping windows with generated weights: v ``[B, H, N, E]`` to ``[B, H, N, E]``.

    ``logits`` ``[B, H, L, size^4]`` for the L = ceil(rows / stride) * ceil(columns / stride) windows, which are centred on every
    ``stride``-th token: a linear function of the (average pooled) tokens. The first ``size^2`` are those of the window's first
    place. ``scale=None`` is ``E ** -0.5``. Source: Yuan et al., VOLO, arXiv:2106.13112.
    """
    check_tensor("v", v, ("B", "H", "N", "E"))
    b, h, n, e = v.shape
    grid = check_grid(grid, n)
    if size < 1 or size % 2 == 0 or stride < 1:
        raise WorkbenchError(f"windows have an odd side and a positive stride; got size={size}, stride={stride}")
    down, across = -(-grid[0] // stride), -(-grid[1] // stride)
    area = size * size
    check_tensor("logits", logits, (b, h, down * across, area * area))
    work = working_dtype(logits.dtype)
    weights = (logits.to(work) * (e**-0.5 if scale is None else scale)).unflatten(-1, (area, area)).softmax(-1)
    planes, edge = as_planes(v, grid).to(work), size // 2
    seen = functional.unfold(planes, size, padding=edge, stride=stride)
    seen = seen.view(b, h, e, area, down * across).permute(0, 1, 4, 3, 2)
    given = (weights @ seen).permute(0, 1, 4, 3, 2).reshape(b, h * e * area, down * across)
    out = as_tokens(functional.fold(given, grid, size, padding=edge, stride=stride), h)
    return out.to(v.dtype), _band(weights.detach(), grid, size, stride)


def _band(weights: Tensor, grid: Grid, size: int, stride: int) -> SparseMap:
    """``weights`` ``[B, H, L, size^2, size^2]`` as size^4 weights per token: those of every window it may stand in."""
    device = weights.device
    row, column = cells(grid, device)
    step = torch.arange(size, device=device) - size // 2
    steps = torch.stack(torch.meshgrid(step, step, indexing="ij"), -1).view(-1, 2)
    # The window in which a token has place s is centred at token - s; [N, S].
    top, left = row[:, None] - steps[:, 0], column[:, None] - steps[:, 1]
    exists = (top >= 0) & (top < grid[0]) & (left >= 0) & (left < grid[1]) & (top % stride == 0) & (left % stride == 0)
    window = (top // stride) * -(-grid[1] // stride) + left // stride
    rows, columns = top[..., None] + steps[:, 0], left[..., None] + steps[:, 1]
    inside = (rows >= 0) & (rows < grid[0]) & (columns >= 0) & (columns < grid[1])
    at = torch.where(exists[..., None] & inside, rows * grid[1] + columns, -1).flatten(1)
    place = torch.arange(size * size, device=device)
    picked = weights[:, :, window.masked_fill(~exists, 0), place]
    return SparseMap(at[None, None], picked.flatten(3), grid[0] * grid[1], sign="nonnegative", row_sum="free")


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    return {**example_tensors(seed, dtype, logits=(2, 3, n, 81), v=(2, 3, n, 4)), "grid": grid}


def _prepare(parts: dict[str, Any]) -> dict[str, Any]:
    logits = parts["logits"]
    return {"logits": logits, "v": spread(parts["v"], logits.shape[1]), "grid": grid_of(parts)}


VARIANTS = (
    Variant(
        name="outlook-attention",
        paper="#11 VOLO: Vision Outlooker for Visual Recognition (2021)",
        family="convolution",
        priority="C",
        operator=outlook_attention,
        example=_example,
        reference="timm volo.py OutlookAttention",
        recipe=Recipe(learned={"logits": Learned("H81")}, prepare=_prepare, ignores=("q", "k")),
    ),
)
