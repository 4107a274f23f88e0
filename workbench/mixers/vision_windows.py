"""Softmax in windows of an image: Swin, MaxViT, MOAT, LaMamba, HiDiffusion.

A token at p sees the tokens of its group, with a bias by relative position where the network has one:

    window      floor(p / w) per axis                                              MaxViT's block attention, MOAT
    shifted     floor((p - s) / w): what a shift cuts off at the borders is a window of its own     Swin, LaMamba
    on a torus  floor(((p - s) mod L) / w): opposite borders share windows                            HiDiffusion
    grid        p mod ceil(L / G): G tokens per axis, spread over the whole axis          MaxViT's grid attention

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
from workbench.mixers.grid_groups import (
    attention_in_groups,
    attention_on_grid,
    check_sizes,
    group_table,
    places,
    window_groups,
)
from workbench.mixers.local import chosen
from workbench.mixers.neighborhood import check_grid
from workbench.mixers.windows import at_least_one
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


def swin_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    table: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """Shifted windows (Swin): windows moved by ``shift`` (half a window in every second layer, else 0), no wrapping.

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``, N the product of ``grid``, row-major; ``table``
    ``[H or 1, prod(2 w - 1)]`` by relative position (query minus key). Rolling and masking, as released, gives the same
    groups. Source: Liu et al., arXiv:2103.14030.
    """
    check_grid(q, k, v, grid)
    return attention_in_groups(q, k, v, grid, window, window_groups(grid, window, shift=shift), table, scale)


def maxvit_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    window: Sequence[int],
    table: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """Block attention of MaxViT: windows of P x P tokens (7 in the paper). Arguments as in ``swin_attention``. Source: Tu et
    al., arXiv:2204.01697, section 3.2."""
    check_grid(q, k, v, grid)
    return attention_in_groups(q, k, v, grid, window, window_groups(grid, window), table, scale)


def maxvit_grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    cells: Sequence[int],
    table: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """Grid attention of MaxViT: each token sees a grid of ``cells`` (7 x 7) tokens spread over the image; ``table``
    ``[H or 1, prod(2 cells - 1)]`` by relative position on that grid. Source: Tu et al., arXiv:2204.01697, section 3.2."""
    check_grid(q, k, v, grid)
    check_sizes("cells", cells, grid)
    strides = [-(-length // size) for length, size in zip(grid, cells, strict=True)]
    groups = group_table([p % s for p, s in zip(places(grid), strides, strict=True)])
    return attention_in_groups(q, k, v, grid, cells, groups, table, scale, strides)


def moat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    window: Sequence[int] | None = None,
    table: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap | SoftmaxMap]:
    """Attention of MOAT: over the whole image, or for large inputs in windows, never shifted, as the block's convolution
    carries information across. ``table`` is that of the window, or of the image. Arguments as in ``swin_attention``. The map of
    the whole image makes its weights when asked. Source: Yang et al., arXiv:2210.01820."""
    check_grid(q, k, v, grid)
    if window is None:
        return attention_on_grid(q, k, v, grid, table, scale)
    return attention_in_groups(q, k, v, grid, window, window_groups(grid, window), table, scale)


def lamamba_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    window: int,
    shifted: bool,
    table: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """Local branch of a LaMamba block: square windows, moved by half a window in every second block.

    An image no larger than the window is one window and is not shifted. ``table`` ``[H or 1, (2 w - 1)^2]``, other arguments as
    in ``swin_attention``. Source: Fu et al., arXiv:2408.02615.
    """
    check_grid(q, k, v, grid)
    at_least_one("window", window)
    sizes = (window,) * len(grid)
    move = window // 2 if shifted and max(grid) > window else 0
    return attention_in_groups(
        q, k, v, grid, sizes, window_groups(grid, sizes, shift=(move,) * len(grid)), table, scale
    )


def hidiffusion_attention(
    q: Tensor, k: Tensor, v: Tensor, *, grid: Sequence[int], quarters: int, scale: float | None = None
) -> tuple[Tensor, SparseMap]:
    """MSW-MSA of HiDiffusion: four windows of half the image's sides, moved on the torus by 0 to 3 quarters of a window.

    The step draws ``quarters``; windows that wrap mix opposite borders, as nothing masks them, and there is no position bias.
    Shapes as in ``swin_attention``. Source: Zhang et al., arXiv:2311.17528.
    """
    check_grid(q, k, v, grid)
    if quarters not in (0, 1, 2, 3) or isinstance(quarters, bool):
        raise WorkbenchError(f"quarters of a window to shift by are 0, 1, 2 or 3; got {quarters!r}")
    window = [-(-length // 2) for length in grid]
    shift = [size // 4 * quarters for size in window]
    return attention_in_groups(q, k, v, grid, window, window_groups(grid, window, shift=shift, wrap=True), None, scale)


def _example(bias: int = 0, **options: Any) -> Any:
    """``bias``: length of the table of relative positions, where there is one."""

    def example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        grid = nearest_grid(tokens)
        n = math.prod(grid)
        drawn = example_tensors(seed, dtype, q=(2, 4, n, 8), k=(2, 2, n, 8), v=(2, 2, n, 8))
        if bias:
            drawn |= example_tensors(seed + 1, dtype, table=(4, bias))
        return {**drawn, "grid": grid, **options}

    return example


def _moat_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    given = _example()(seed, tokens, dtype)
    rows, columns = given["grid"]
    return {**given, **example_tensors(seed + 1, dtype, table=(4, (2 * rows - 1) * (2 * columns - 1)))}


QKVG = ("q", "k", "v", "grid")
BIASED = (*QKVG, "table")
H49 = {"table": Parameter("H49")}
MAXVIT = "#17 MaxViT: Multi-Axis Vision Transformer (2022)"
VARIANTS = (
    Variant(
        name="swin-attention",
        paper="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (2021)",
        family="softmax",
        priority="B",
        operator=swin_attention,
        example=_example(bias=15, window=(3, 2), shift=(1, 1)),
        reference="timm swin_transformer.py",
        note="The released mask adds -100 to hidden logits; here they are hidden.",
        recipe=Recipe(parameters=H49, prepare=chosen(*BIASED, window=(4, 4), shift=(2, 2))),
    ),
    Variant(
        name="maxvit-block-attention",
        paper=MAXVIT,
        family="softmax",
        priority="C",
        operator=maxvit_block_attention,
        example=_example(bias=15, window=(2, 3)),
        reference="timm maxxvit.py",
        recipe=Recipe(parameters=H49, prepare=chosen(*BIASED, window=(4, 4))),
    ),
    Variant(
        name="maxvit-grid-attention",
        paper=MAXVIT,
        family="softmax",
        priority="C",
        operator=maxvit_grid_attention,
        example=_example(bias=15, cells=(2, 3)),
        reference="timm maxxvit.py",
        recipe=Recipe(parameters=H49, prepare=chosen(*BIASED, cells=(4, 4))),
    ),
    Variant(
        name="moat-attention",
        paper="#58 MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision Models (2022)",
        family="softmax",
        priority="C",
        operator=moat_attention,
        example=_moat_example,
        reference="definition",
        note="In windows the same as MaxViT's block attention; the two differ in the network around it.",
        recipe=Recipe(parameters=H49, prepare=chosen(*BIASED, window=(4, 4))),
    ),
    Variant(
        name="lamamba-local-attention",
        paper="#108 LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba (2024)",
        family="softmax",
        priority="C",
        operator=lamamba_local_attention,
        example=_example(bias=9, window=2, shifted=True),
        reference="yunxiangfu2001/LaMamba-Diff model/lamamba.py",
        note="The local branch alone; its windows have 8 tokens a side.",
        recipe=Recipe(parameters={"table": Parameter("H9")}, prepare=chosen(*BIASED, window=2, shifted=True)),
    ),
    Variant(
        name="hidiffusion-msw-msa",
        paper="#132 HiDiffusion: Unlocking High-Resolution Creativity and Efficiency in Low-Resolution Trained Diffusion "
        "Models (2023)",
        family="softmax",
        priority="C",
        operator=hidiffusion_attention,
        example=_example(quarters=1),
        reference="megvii-research/HiDiffusion hidiffusion.py",
        note="An odd side is interpolated to an even one by the released code; here its second window is smaller.",
        recipe=Recipe(prepare=chosen(*QKVG, quarters=1)),
    ),
)
