"""Softmax in windows of a volume: the cubes of DiT-3D, the temporal windows of LinGen.

    DiT-3D  s_ij = scale q_i . k_j + q_i . (X_dx + Y_dy + Z_dz)   in cubes of w voxels a side, d the place of i minus that of j
    LinGen  s_ij = scale q_i . k_j   in windows of few pixels and many frames, which move along time in every second layer

Windows that the border cuts hold the tokens that are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.mixers.grid_groups import attention_in_groups, axis_logits, check_sizes, places, window_groups
from workbench.mixers.local import grouped_softmax
from workbench.mixers.neighborhood import check_grid
from workbench.patterns.sparse import SparseMap


def dit3d_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    window: int,
    x_table: Tensor | None = None,
    y_table: Tensor | None = None,
    z_table: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """3-D window attention of DiT-3D: cubes of ``window`` voxels a side, with decomposed relative positions.

    s_ij = scale q_i . k_j + q_i . (X_dx + Y_dy + Z_dz), the second product unscaled; tables ``[2 window - 1, E]`` by query
    minus key. q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``, N the product of ``grid``, row-major. Source: Mo et
    al., arXiv:2307.01831, and its released code.
    """
    check_grid(q, k, v, grid)
    groups = window_groups(grid, (window,) * len(grid)).to(q.device)
    bias = None
    for axis, (name, part) in enumerate((("x_table", x_table), ("y_table", y_table), ("z_table", z_table))):
        if part is None:
            continue
        if tuple(part.shape) != (2 * window - 1, q.shape[3]):
            raise WorkbenchError(f"{name} is [{2 * window - 1}, {q.shape[3]}] for the window; got {list(part.shape)}")
        place = places(grid)[axis].to(q.device)[groups.clamp(min=0)]
        away = (place[:, :, None] - place[:, None, :] + window - 1).clamp(0, 2 * window - 2)
        logits = axis_logits(q, part, groups, away)
        bias = logits if bias is None else bias + logits
    return grouped_softmax(q, k, v, groups[None, None], groups[None, None], scale=scale, bias=bias)


def tesa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    window: Sequence[int],
    shifted: bool,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """Temporal Swin attention of LinGen: windows of few pixels and many frames, moved along time by half a window in every
    second layer. ``grid`` and ``window`` are (frames, rows, columns); shapes as in ``dit3d_attention``. Source: Wang et
    al., arXiv:2412.09856."""
    check_grid(q, k, v, grid)
    check_sizes("window", window, grid)
    shift = (window[0] // 2 if shifted else 0, *[0] * (len(grid) - 1))
    return attention_in_groups(q, k, v, grid, window, window_groups(grid, window, shift=shift), None, scale)


def _drawn(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens, 3)
    n = math.prod(grid)
    return {**example_tensors(seed, dtype, q=(2, 4, n, 8), k=(2, 2, n, 8), v=(2, 2, n, 8)), "grid": grid}


def _cube_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    tables = example_tensors(seed + 1, dtype, x_table=(3, 8), y_table=(3, 8), z_table=(3, 8))
    return {**_drawn(seed, tokens, dtype), **tables, "window": 2}


def _temporal_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_drawn(seed, tokens, dtype), "window": (2, 1, 2), "shifted": True}


def _as_volume(given: dict[str, Any], names: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """The rows of an image as layers (or frames) of one row each."""
    rows, columns = given["grid"]
    return {name: given[name] for name in ("q", "k", "v", *names)} | {"grid": (rows, 1, columns), **options}


def _cube(given: dict[str, Any]) -> dict[str, Any]:
    return _as_volume(given, ("x_table", "y_table", "z_table"), window=4)


def _temporal(given: dict[str, Any]) -> dict[str, Any]:
    return _as_volume(given, window=(4, 1, 2), shifted=True)


def _small(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.02


VARIANTS = (
    Variant(
        name="dit-3d-window-attention",
        paper="#125 DiT-3D: Exploring Plain Diffusion Transformers for 3D Shape Generation (2023)",
        family="softmax",
        priority="C",
        operator=dit3d_attention,
        example=_cube_example,
        reference="DiT-3D/DiT-3D models/dit3d_window_attn.py",
        recipe=Recipe(
            parameters={name: Parameter("7E", _small) for name in ("x_table", "y_table", "z_table")}, prepare=_cube
        ),
    ),
    Variant(
        name="lingen-tesa",
        paper="#124 LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear Computational "
        "Complexity (2024)",
        family="softmax",
        priority="C",
        operator=tesa_attention,
        example=_temporal_example,
        reference="definition",
        note="No code was found: the shape of the windows and a shift along time alone are taken from the paper's summary.",
        recipe=Recipe(prepare=_temporal),
    ),
)
