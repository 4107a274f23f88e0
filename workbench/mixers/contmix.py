"""Dynamic kernels: every place generates the weights of its own neighbourhood.

    ContMix   a_i = scale q_i C^T                       likeness to the M pooled tokens C of a context
              K_i = softmax(a_i W + b)                  one kernel per place and head, two kernel sizes
              o_i = sum_t K_it v_{n(i, t)}              n(i, .): the window of k x k tokens around i, moved inside the image
    MHDLSA    K_i = (DW(x R))_i X,   o_i = sum_t K_it v_{i + t}    zeros around the image, no normalisation

ContMix weights count places of the window, so that at the edge of the image the first weight still belongs to the first token of
the moved window; the bias b holds a table of relative positions beside the bias of the projection. An image smaller than the
kernel gives fewer tokens: the weights of the others are left out of the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.image import Grid, cells, check_grid, depthwise, gathered, grid_of, pooled, spread, taps
from workbench.mixers.local import masked_softmax
from workbench.mixers.neighborhood import neighborhood_indices
from workbench.mixers.scored import check_tensor
from workbench.patterns.algebra import HeadsMap
from workbench.patterns.sparse import SparseMap


def context_mixing(
    q: Tensor,
    context: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    grid: Grid,
    small: int = 5,
    large: int = 7,
    projection_bias: Tensor | None = None,
    small_bias: Tensor | None = None,
    large_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, HeadsMap]:
    """ContMix of OverLoCK: q ``[B, H, N, E]`` and ``context`` ``[B, H, M, E]`` make kernels for v ``[B, 2H, N, V]``.

    The first H value heads take kernels of ``small^2`` weights, the others of ``large^2``; ``projection`` ``[M, small^2 +
    large^2]`` and ``projection_bias`` are shared by all heads. ``small_bias`` ``[H, 2 small - 1, 2 small - 1]`` and
    ``large_bias`` are added by relative position. ``scale=None`` is ``(2 E) ** -0.5``: in the network a head's queries are half
    as wide as its two values together. Source: Lou and Yu, OverLoCK, arXiv:2502.20087.
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    b, h, n, e = q.shape
    grid = check_grid(grid, n)
    check_tensor("context", context, (b, h, "M", e))
    check_tensor("v", v, (b, 2 * h, n, "V"))
    for name, size in (("small", small), ("large", large)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise WorkbenchError(f"{name} is the side of a kernel, a whole number of at least 1; got {size!r}")
    check_tensor("projection", projection, (context.shape[2], small * small + large * large))
    if projection_bias is not None:
        check_tensor("projection_bias", projection_bias, (projection.shape[1],))
    work = working_dtype(q.dtype)
    likeness = (q.to(work) * ((2 * e) ** -0.5 if scale is None else scale)) @ context.to(work).transpose(-1, -2)
    logits = likeness @ projection.to(work)
    if projection_bias is not None:
        logits = logits + projection_bias.to(work)
    outputs, maps = [], []
    for size, table, part, values in (
        (small, small_bias, logits[..., : small * small], v[:, :h]),
        (large, large_bias, logits[..., small * small :], v[:, h:]),
    ):
        at, relative = moved_windows(grid, size, q.device)
        if table is not None:
            check_tensor("small_bias" if size == small else "large_bias", table, (h, 2 * size - 1, 2 * size - 1))
            part = part + table.to(work).flatten(1)[:, relative]
        weights = masked_softmax(part, at < 0)
        outputs.append((weights[..., None, :] @ gathered(values.to(work), at)).squeeze(-2))
        maps.append(SparseMap(at[None, None], weights, n, sign="nonnegative", row_sum="1"))
    return torch.cat(outputs, 1).to(v.dtype), HeadsMap(*maps)


def moved_windows(grid: Grid, size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Tokens of the window around each token, moved inside the image, and their relative positions, both ``[N, size^2]``.

    -1 stands for what an image smaller than the window does not have. Relative positions number a square of
    ``2 size - 1`` displacements row by row; those of missing tokens are 0.
    """
    if size < 1 or size % 2 == 0:
        raise WorkbenchError(f"a window around a token has an odd side; got {size}")
    at = neighborhood_indices(grid, (size, size)).to(device)
    displacement = torch.zeros_like(at)
    for place in cells(grid, device):
        displacement = displacement * (2 * size - 1) + place[at] - place[:, None] + size - 1
    return at, displacement.masked_fill(at < 0, 0)


def dynamic_local_attention(
    x: Tensor, v: Tensor, reduction: Tensor, kernel: Tensor, expansion: Tensor, *, grid: Grid
) -> tuple[Tensor, SparseMap]:
    """MHDLSA of DLGSANet: a small network on x ``[B, N, D]`` writes a depthwise kernel for every place and head of v.

    v ``[B, H, N, V]``; ``reduction`` ``[D, R]`` narrows, ``kernel`` ``[R, s, s]`` mixes neighbours channel by channel,
    ``expansion`` ``[R, H s^2]`` writes the weights, signed and not normalised. In the network v and x are the same tokens.
    Source: Li et al., DLGSANet, arXiv:2301.02031.
    """
    check_tensor("v", v, ("B", "H", "N", "V"))
    b, h, n, _ = v.shape
    grid = check_grid(grid, n)
    check_tensor("x", x, (b, n, "D"))
    check_tensor("kernel", kernel, ("R", "s", "s"))
    size = kernel.shape[-1]
    check_tensor("reduction", reduction, (x.shape[2], kernel.shape[0]))
    check_tensor("expansion", expansion, (kernel.shape[0], h * size * size))
    work = working_dtype(x.dtype)
    mixed = depthwise((x.to(work) @ reduction.to(work))[:, None], kernel.to(work)[None], grid)[:, 0]
    weights = (mixed @ expansion.to(work)).unflatten(2, (h, size * size)).transpose(1, 2)
    at = taps(grid, size, device=v.device)
    out = (weights.to(v.dtype)[..., None, :] @ gathered(v, at)).squeeze(-2)
    return out, SparseMap(at[None, None], weights, n, row_sum="free")


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    found = example_tensors(
        seed,
        dtype,
        q=(2, 2, n, 4),
        context=(2, 2, 6, 4),
        v=(2, 4, n, 3),
        projection=(6, 34),
        projection_bias=(34,),
        small_bias=(2, 5, 5),
        large_bias=(2, 9, 9),
    )
    return {**found, "grid": grid, "small": 3, "large": 5}


def _local_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    shapes = {"x": (2, n, 5), "v": (2, 3, n, 4), "reduction": (5, 2), "kernel": (2, 3, 3), "expansion": (2, 27)}
    return {**example_tensors(seed, dtype, **shapes), "grid": grid}


def _prepare(parts: dict[str, Any]) -> dict[str, Any]:
    """Keys of a 7 x 7 average of the image; half of the heads have queries, all have values."""
    heads, grid = parts["q"].shape[1], grid_of(parts)
    if heads % 2:
        raise WorkbenchError(f"ContMix has two value heads for each head of queries; got {heads} heads")
    return {
        "q": parts["q"][:, : heads // 2],
        "context": pooled(spread(parts["k"], heads), grid, (7, 7))[:, : heads // 2],
        "v": spread(parts["v"], heads),
        "projection": parts["projection"].unflatten(0, (49, 74)),
        "projection_bias": parts["projection_bias"],
        "small_bias": parts["small_bias"].unflatten(1, (9, 9))[: heads // 2],
        "large_bias": parts["large_bias"].unflatten(1, (13, 13))[: heads // 2],
        "grid": grid,
    }


def _prepare_local(parts: dict[str, Any]) -> dict[str, Any]:
    """Four channels per head are reduced; kernels of 7 x 7."""
    narrow = parts["narrow"].transpose(1, 2).flatten(2)
    return {
        "x": narrow,
        "v": spread(parts["v"], parts["narrow"].shape[1]),
        "reduction": torch.eye(narrow.shape[2], dtype=narrow.dtype, device=narrow.device),
        "kernel": parts["kernel"].unflatten(1, (4, 7, 7)).flatten(0, 1),
        "expansion": parts["expansion"].flatten(0, 1).flatten(1),
        "grid": grid_of(parts),
    }


def _small(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.1


VARIANTS = (
    Variant(
        name="context-mixing-dynamic-convolution",
        paper="#22 OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels (2025)",
        family="convolution",
        priority="C",
        operator=context_mixing,
        example=_example,
        reference="LMMMEng/OverLoCK detection/models/overlock.py",
        note="The network enlarges images that are smaller than the kernel; here the kernel is cut.",
        recipe=Recipe(
            parameters={
                "projection": Parameter("3626", _small),
                "projection_bias": Parameter("74"),
                "small_bias": Parameter("H81"),
                "large_bias": Parameter("H169"),
            },
            prepare=_prepare,
        ),
    ),
    Variant(
        name="dynamic-local-self-attention",
        paper="#127 DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution (2023)",
        family="convolution",
        priority="C",
        operator=dynamic_local_attention,
        example=_local_example,
        reference="NeonLeexiang/DLGSANet basicsr/archs/dlgsanet_idynamicdwconv_util.py",
        note="Biases of the network that writes the kernels are left out.",
        recipe=Recipe(
            learned={"narrow": Learned("H4")},
            parameters={"kernel": Parameter("H196", _small), "expansion": Parameter("H4H49", _small)},
            prepare=_prepare_local,
            ignores=("q", "k"),
        ),
    ),
)
