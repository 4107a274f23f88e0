"""Local softmax whose windows reach over the border of the image, where there are zeros instead of tokens.

HaloNet: the image is cut into blocks of b x b queries; a block's keys are its own tokens and a halo of h around it,

    s_ij = scale q_i . k_j + q_i . (R_row + C_column),     (b + 2 h)^2 keys for all b^2 queries of the block

MSA-Conv (TiC): every token has the K x K keys of a convolution, dilated or not, about itself; the image may be rolled first.

Released code of both pads keys and values with zeros and lets the zeros take part: a key outside of the image has logit 0 (plus
its bias) and gives nothing, so rows at the border sum to less than 1 over the tokens that exist. ``zero_padding=False`` leaves
those keys out. Sources: Vaswani et al., arXiv:2103.12731; TiC: Exploring Vision Transformer in Convolution (2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.mixers.grid_groups import axis_logits, check_sizes, places, whole_numbers
from workbench.mixers.local import chosen, grouped_softmax, local_softmax
from workbench.mixers.neighborhood import check_grid
from workbench.mixers.windows import at_least_one
from workbench.patterns.sparse import SparseMap


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    block: int,
    halo: int,
    row_table: Tensor | None = None,
    column_table: Tensor | None = None,
    zero_padding: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """Blocked local attention of HaloNet: q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``, ``grid`` (rows, columns).

    ``row_table`` and ``column_table`` ``[2 (block + 2 halo) - 1, E]`` hold relative positions, by place of the key in the
    window minus place of the query in the block; their product with q is not scaled. Output ``[B, H, N, V]``.
    """
    check_grid(q, k, v, grid)
    at_least_one("block", block)
    if isinstance(halo, bool) or not isinstance(halo, int) or halo < 0:
        raise WorkbenchError(f"halo is a number of tokens, 0 or more; got {halo!r}")
    if len(grid) != 2:
        raise WorkbenchError(f"grid is (rows, columns) here; got {list(grid)}")
    window = block + 2 * halo
    corners = [torch.arange(0, length, block, device=q.device) for length in grid]
    queries = _squares(corners, 0, block, grid)
    keys = _squares(corners, -halo, window, grid)
    bias = None
    for axis, (name, part) in enumerate((("row_table", row_table), ("column_table", column_table))):
        if part is None:
            continue
        if tuple(part.shape) != (2 * window - 1, q.shape[3]):
            raise WorkbenchError(f"{name} is [{2 * window - 1}, {q.shape[3]}] for the window; got {list(part.shape)}")
        inner, outer = places((block, block))[axis].to(q.device), places((window, window))[axis].to(q.device)
        away = (outer - inner[:, None] + window - 1).expand(queries.shape[0], -1, -1)
        logits = axis_logits(q, part, queries, away)
        bias = logits if bias is None else bias + logits
    return grouped_softmax(
        q, k, v, queries[None, None], keys[None, None], scale=scale, bias=bias, zero_padding=zero_padding
    )


def msa_convolution(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    shift: Sequence[int] = (0, 0),
    zero_padding: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """MSA-Conv of TiC: softmax over the ``kernel`` tokens of a convolution about every token, ``dilation`` apart.

    Shapes as in ``halo_attention``. ``shift`` rolls the image before and back after (the multi-directional cyclic shift), which
    moves the border through the image and joins opposite borders. The released layer has one head.
    """
    check_grid(q, k, v, grid)
    for name, sizes in (("kernel", kernel), ("dilation", dilation)):
        check_sizes(name, sizes, grid)
    if not whole_numbers(shift, -(2**62)) or len(shift) != len(grid):
        raise WorkbenchError(f"shift has a number of tokens for each axis of {list(grid)}; got {shift!r}")
    indices = torch.zeros(q.shape[2], 1, dtype=torch.int64)
    options = zip(places(grid), grid, kernel, dilation, shift, strict=True)
    for place, length, size, gap, moved in options:
        near = ((place - moved) % length)[:, None] + (torch.arange(size) - size // 2) * gap
        inside = (near >= 0) & (near < length)
        joined = (indices * length)[..., None] + ((near + moved) % length)[:, None]
        indices = joined.masked_fill((indices < 0)[..., None] | ~inside[:, None], -1).flatten(1)
    return local_softmax(q, k, v, indices[None, None].to(q.device), scale=scale, zero_padding=zero_padding)


def _squares(corners: Sequence[Tensor], first: int, side: int, grid: Sequence[int]) -> Tensor:
    """Tokens of the square of ``side`` at every corner plus ``first``, ``[blocks, side^2]``, -1 outside of the image."""
    rows, columns = (corner[:, None] + first + torch.arange(side, device=corner.device) for corner in corners)
    tokens = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]
    inside = ((rows >= 0) & (rows < grid[0]))[:, None, :, None] & ((columns >= 0) & (columns < grid[1]))[
        None, :, None, :
    ]
    return tokens.masked_fill(~inside, -1).flatten(2).flatten(0, 1)


def _drawn(seed: int, tokens: int, dtype: torch.dtype, heads: int = 4, groups: int = 2) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = math.prod(grid)
    drawn = example_tensors(seed, dtype, q=(2, heads, n, 8), k=(2, groups, n, 8), v=(2, groups, n, 8))
    return {**drawn, "grid": grid}


def _halo_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    tables = example_tensors(seed + 1, dtype, row_table=(7, 8), column_table=(7, 8))
    return {**_drawn(seed, tokens, dtype), **tables, "block": 2, "halo": 1}


def _convolution_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_drawn(seed, tokens, dtype, 1, 1), "kernel": (3, 3), "shift": (1, 0)}


def _small(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.02


QKVG = ("q", "k", "v", "grid")
VARIANTS = (
    Variant(
        name="halonet-attention",
        paper="#3 Scaling Local Self-Attention for Parameter Efficient Visual Backbones (2021)",
        family="softmax",
        priority="C",
        operator=halo_attention,
        example=_halo_example,
        reference="timm layers/halo_attn.py",
        note="With the unmasked zero padding of timm; zero_padding=False is the version that masks. Without its stride.",
        recipe=Recipe(
            parameters={name: Parameter("15E", _small) for name in ("row_table", "column_table")},
            prepare=chosen(*QKVG, "row_table", "column_table", block=4, halo=2),
        ),
    ),
    Variant(
        name="tic-msa-convolution",
        paper="#46 TiC: Exploring Vision Transformer in Convolution (2023)",
        family="softmax",
        priority="C",
        operator=msa_convolution,
        example=_convolution_example,
        reference="StriveZs/MSA-Conv core/op/Transformer_in_Convolution.py",
        note="The released code has no cyclic shift; rolling by it is taken from the paper's summary.",
        recipe=Recipe(prepare=chosen(*QKVG, kernel=(3, 3), shift=(1, 1))),
    ),
)
