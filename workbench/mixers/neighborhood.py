"""Neighborhood attention in one to three dimensions: every token sees the K nearest per axis, K_1 x K_2 x K_3 in all.

Per axis, with kernel K, dilation d and stride s, a token at position p stands at x = floor(p / d) of the L tokens of its residue
class p mod d, and sees of that class

    not causal   K tokens about c = clamp(min(floor(x / s) s + floor(s / 2), L - 1), floor(K / 2), L - ceil(K / 2)):
                 c - floor(K / 2) ... c - floor(K / 2) + K - 1, so that windows move inwards at the borders, without padding
    causal       y <= x with y > e - K, where e = min(floor(x / s) s + s - 1, L - 1) is the last token of x's stride group

The axes' conditions hold together. s = 1 is a sliding window, s = K blocked attention; a kernel as long as its class sees all
of it. Sources: Hassani et al., Neighborhood Attention (2022) and Faster Neighborhood Attention (2024); Generalized Neighborhood
Attention (2025); the rule is that of NATTEN's FlexAttention back end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.mixers.grid_groups import check_sizes, whole_numbers
from workbench.mixers.local import check_qkv, chosen, local_softmax
from workbench.patterns.sparse import SparseMap


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    causal: Sequence[bool] | None = None,
    table: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """Softmax over the neighborhood of every token of a grid of one to three axes.

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]`` with N the product of ``grid``, row-major. ``kernel``,
    ``dilation``, ``stride`` (default 1) and ``causal`` (default False) have one entry per axis. ``table``
    ``[H or 1, prod(2 K - 1)]`` is added to the logits by relative position within the residue class, as in the networks of
    2022. Output ``[B, H, N, V]``.
    """
    check_grid(q, k, v, grid)
    indices = neighborhood_indices(grid, kernel, dilation=dilation, stride=stride, causal=causal).to(q.device)
    bias = None
    if table is not None:
        cells = math.prod(2 * size - 1 for size in kernel)
        if table.ndim != 2 or table.shape[0] not in (1, q.shape[1]) or table.shape[1] != cells:
            raise WorkbenchError(f"table is [{q.shape[1]} or 1, {cells}] for the kernel; got {list(table.shape)}")
        bias = table[:, _relative(indices, grid, kernel, dilation)]
    return local_softmax(q, k, v, indices[None, None], scale=scale, bias=bias)


def neighborhood_indices(
    grid: Sequence[int],
    kernel: Sequence[int],
    *,
    dilation: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    causal: Sequence[bool] | None = None,
) -> Tensor:
    """Keys of every token by the rule above, int64 ``[N, prod(kernel)]``, -1 where a causal or short axis has fewer."""
    if not whole_numbers(grid) or not 1 <= len(grid) <= 3:
        raise WorkbenchError(f"grid has one to three axes; got {grid!r}")
    ones = (1,) * len(grid)
    steps = {
        "kernel": kernel,
        "dilation": ones if dilation is None else dilation,
        "stride": ones if stride is None else stride,
    }
    for name, sizes in steps.items():
        check_sizes(name, sizes, grid)
    past = (False,) * len(grid) if causal is None else causal
    if not isinstance(past, Sequence) or len(past) != len(grid):
        raise WorkbenchError(f"causal has one flag for each axis of {list(grid)}; got {past!r}")
    if any(s > size for s, size in zip(steps["stride"], kernel, strict=True)):
        raise WorkbenchError(f"stride is at most the kernel {list(kernel)}; got {list(steps['stride'])}")
    found = torch.zeros(1, 1, dtype=torch.int64)
    for length, size, gap, step, flag in zip(grid, kernel, steps["dilation"], steps["stride"], past, strict=True):
        near = _axis(length, size, gap, step, flag)
        joined = found[:, None, :, None] * length + near[None, :, None, :]
        hidden = (found < 0)[:, None, :, None] | (near < 0)[None, :, None, :]
        found = joined.masked_fill(hidden, -1).flatten(2).flatten(0, 1)
    return found


def _axis(length: int, kernel: int, dilation: int, stride: int, causal: bool) -> Tensor:
    """Neighbours along one axis, ``[length, kernel]``, -1 for none."""
    position = torch.arange(length)
    x, group = position // dilation, position % dilation
    last = (length - 1 - group) // dilation  # of the residue class
    if causal:
        leader = torch.minimum(x // stride * stride + stride - 1, last)
        near = leader[:, None] - kernel + 1 + torch.arange(kernel)
        fits = (near >= 0) & (near <= x[:, None])
    else:
        leader = torch.minimum(x // stride * stride + stride // 2, last)
        first = torch.minimum(leader - kernel // 2, last + 1 - kernel).clamp(min=0)
        near = first[:, None] + torch.arange(kernel)
        fits = near <= last[:, None]
    return (near * dilation + group[:, None]).masked_fill(~fits, -1)


def _relative(indices: Tensor, grid: Sequence[int], kernel: Sequence[int], dilation: Sequence[int] | None) -> Tensor:
    """Place of every (token, neighbour) in a table of prod(2 K - 1) relative positions."""
    gaps = dilation or (1,) * len(grid)
    token = torch.arange(indices.shape[0], device=indices.device)[:, None]
    key = indices.clamp(min=0)
    place = torch.zeros_like(indices)
    inner = math.prod(grid)
    for length, size, gap in zip(grid, kernel, gaps, strict=True):
        inner //= length
        away = key // inner % length // gap - token // inner % length // gap
        place = place * (2 * size - 1) + (away + size - 1).clamp(0, 2 * size - 2)
    return place


def check_grid(q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int]) -> None:
    """Raise ``WorkbenchError`` unless q, k and v fit together and hold the tokens of the grid."""
    check_qkv(q, k, v)
    if not whole_numbers(grid) or not len(grid):
        raise WorkbenchError(f"grid is the number of tokens along each axis; got {grid!r}")
    tokens = math.prod(grid)
    for name, part in (("q", q), ("k", k)):
        if part.shape[2] != tokens:
            raise WorkbenchError(f"{name} holds the {tokens} tokens of the grid {list(grid)}; got {part.shape[2]}")


def _example(axes: int, **options: Any) -> Any:
    def example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        grid = nearest_grid(tokens, axes)
        n = math.prod(grid)
        drawn = example_tensors(seed, dtype, q=(2, 4, n, 8), k=(2, 2, n, 8), v=(2, 2, n, 8))
        return {**drawn, "grid": grid, **options}

    return example


def _biased_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_example(2, kernel=(3, 3))(seed, tokens, dtype), **example_tensors(seed + 1, dtype, table=(4, 25))}


def _video_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Two frames of one row, long enough for a stride to move windows."""
    frames = 2 if tokens > 3 else 1
    grid = (frames, 1, max(1, tokens // frames))
    n = math.prod(grid)
    drawn = example_tensors(seed, dtype, q=(2, 4, n, 8), k=(2, 2, n, 8), v=(2, 2, n, 8))
    return {**drawn, "grid": grid, "kernel": (2, 1, 3), "stride": (1, 1, 2)}


def dilated_neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """Dilated neighborhood attention (DiNA): the K nearest tokens ``dilation`` apart. Arguments as in
    ``neighborhood_attention``. Source: Hassani and Shi, arXiv:2209.15001."""
    return neighborhood_attention(q, k, v, grid=grid, kernel=kernel, dilation=dilation, scale=scale)


def generalized_neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] | None = None,
    causal: Sequence[bool] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SparseMap]:
    """Generalized neighborhood attention: groups of ``stride`` tokens per axis share the neighborhood of their middle one,
    from a sliding window (stride 1) to blocked attention (stride = kernel). Arguments as in ``neighborhood_attention``.
    Source: Hassani et al., arXiv:2504.16922."""
    return neighborhood_attention(
        q, k, v, grid=grid, kernel=kernel, dilation=dilation, stride=stride, causal=causal, scale=scale
    )


def causal_neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, *, grid: Sequence[int], kernel: Sequence[int], scale: float | None = None
) -> tuple[Tensor, SparseMap]:
    """Neighborhood attention that is causal along every axis, so that a window at a border holds fewer tokens. Arguments as in
    ``neighborhood_attention``; causal axes came with the fused kernels (arXiv:2403.04690)."""
    check_grid(q, k, v, grid)
    return neighborhood_attention(q, k, v, grid=grid, kernel=kernel, causal=(True,) * len(grid), scale=scale)


QKVG = ("q", "k", "v", "grid")
FASTER = "#8 Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level (2024)"
NATTEN = "NATTEN backends/flex.py"


def _line(given: dict[str, Any]) -> dict[str, Any]:
    """The tokens of a sequence model as a grid of one axis."""
    return {name: given[name] for name in ("q", "k", "v")} | {"grid": (given["q"].shape[2],), "kernel": (7,)}


def _video(given: dict[str, Any]) -> dict[str, Any]:
    """The rows of an image as frames of one row each."""
    rows, columns = given["grid"]
    options = {"grid": (rows, 1, columns), "kernel": (2, 2, 2), "stride": (2, 1, 2)}
    return {name: given[name] for name in ("q", "k", "v")} | options


VARIANTS = (
    Variant(
        name="neighborhood-attention",
        paper=FASTER,
        family="softmax",
        priority="B",
        operator=neighborhood_attention,
        example=_biased_example,
        reference=NATTEN,
        note="With the relative position bias of the first networks (2022), which the fused kernels dropped.",
        recipe=Recipe(parameters={"table": Parameter("H25")}, prepare=chosen(*QKVG, "table", kernel=(3, 3))),
    ),
    Variant(
        name="dilated-neighborhood-attention",
        paper="Dilated Neighborhood Attention Transformer (2022)",
        family="softmax",
        priority="B",
        operator=dilated_neighborhood_attention,
        example=_example(2, kernel=(2, 2), dilation=(1, 2)),
        reference=NATTEN,
        recipe=Recipe(prepare=chosen(*QKVG, kernel=(2, 2), dilation=(2, 2))),
    ),
    Variant(
        name="generalized-neighborhood-attention",
        paper="#43 Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light (2025)",
        family="softmax",
        priority="A",
        operator=generalized_neighborhood_attention,
        example=_video_example,
        reference=NATTEN,
        note="In three dimensions, as in video diffusion.",
        recipe=Recipe(prepare=_video),
    ),
    Variant(
        name="causal-neighborhood-attention",
        paper=FASTER,
        family="softmax",
        priority="B",
        operator=causal_neighborhood_attention,
        example=_example(2, kernel=(2, 3)),
        causal=True,
        reference=NATTEN,
        note="Along one axis, as in native models, it is a sliding window.",
        recipe=Recipe(prepare=_line),
    ),
)
