"""HyperZ.Z.W: kernels that a network over coordinates makes and the input modulates, element by element.

    W = network(coordinates)                    a hyper-kernel as large as the image, per channel
    y = (W * z) conv v                          convolution with the context-dependent kernel
    Y = (W * Z) V                               product of planes, as the released code has it: rows of a column mix

z and v are the same features in the network; each map is that of v with z held fixed. Features are ``[B, H, N, E]``
over a grid with channel c = h*E + e of C = H*E. Source: Zhang, arXiv:2401.17948.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.channels import channel_map, check_sides, check_values, planes, tokens
from workbench.mixers.gating import UNUSED, head_values, small
from workbench.mixers.image import Grid, grid_of
from workbench.mixers.scored import check_tensor
from workbench.patterns.sparse import SparseMap
from workbench.patterns.toeplitz import ToeplitzMap


def hyper_kernel(enter: Tensor, hidden: Tensor, leave: Tensor, grid: Grid) -> Tensor:
    """W ``[C, rows, columns]`` = leave sin(hidden sin(enter [y, x, 1])) with coordinates from -1 to 1.

    ``enter`` ``[width, 3]``, ``hidden`` ``[width, width]``, ``leave`` ``[C, width]``.
    """
    check_tensor("enter", enter, ("width", 3))
    check_tensor("hidden", hidden, (enter.shape[0], enter.shape[0]))
    check_tensor("leave", leave, ("C", enter.shape[0]))
    y, x = (torch.linspace(-1, 1, side, device=enter.device, dtype=enter.dtype) for side in grid)
    places = torch.stack([*torch.meshgrid(y, x, indexing="ij"), torch.ones(*grid, device=y.device, dtype=y.dtype)])
    return (leave @ torch.sin(hidden @ torch.sin(enter @ places.flatten(1)))).unflatten(1, grid)


def hyper_zzw_convolution(
    z: Tensor, v: Tensor, enter: Tensor, hidden: Tensor, leave: Tensor, *, grid: Grid
) -> tuple[Tensor, AttentionMap]:
    """y_i = sum_j (W * z)(i - j + middle) v_j, zeros around the image: a kernel as large as the image, centred.

    z, v ``[B, H, N, E]``; the network's weights as in ``hyper_kernel`` for C = H*E channels. The middle of an even side
    is the cell after it.
    """
    _, h, n, e = check_values(v, z=z)
    sides = check_sides(grid, n, 2)
    kernel = _context(z, enter, hidden, leave, sides)
    sizes = [2 * side - 1 for side in sides]
    work = torch.promote_types(working_dtype(v.dtype), kernel.dtype)
    image = planes(v).to(work).unflatten(2, sides)
    whole = torch.fft.irfft2(torch.fft.rfft2(image, s=sizes) * torch.fft.rfft2(kernel.to(work), s=sizes), s=sizes)
    top, left = (side // 2 for side in sides)
    out = whole[..., top : top + sides[0], left : left + sides[1]].flatten(2).to(v.dtype)
    inner = ToeplitzMap(kernel, queries=sides, keys=sides, first=(-top, -left))
    return tokens(out, h), channel_map(inner, e)


def hyper_zzw_product(
    z: Tensor, v: Tensor, enter: Tensor, hidden: Tensor, leave: Tensor, *, grid: Grid
) -> tuple[Tensor, AttentionMap]:
    """y(a, x) = sum_b (W * z)(a, b) v(b, x): the plane of every channel times the plane of its values, for square
    images.

    z, v ``[B, H, N, E]`` over a grid with as many rows as columns; weights as in ``hyper_kernel``. A token takes from
    the tokens of its own column, by the context in its row.
    """
    _, h, n, e = check_values(v, z=z)
    side, columns = check_sides(grid, n, 2)
    if side != columns:
        raise WorkbenchError(f"planes multiply as square matrices; got grid={grid!r}")
    context = _context(z, enter, hidden, leave, (side, side))
    out = (context.to(v.dtype) @ planes(v).unflatten(2, (side, side))).flatten(2)
    places = torch.arange(n, device=v.device)
    at = torch.arange(side, device=v.device) * side + (places % side)[:, None]
    weights = context.repeat_interleave(side, 2)
    return tokens(out, h), channel_map(SparseMap(at[None, None], weights, n), e)


def _context(z: Tensor, enter: Tensor, hidden: Tensor, leave: Tensor, sides: tuple[int, ...]) -> Tensor:
    """W * z, ``[B, C, rows, columns]``."""
    for name, part, shape in (("enter", enter, ("width", 3)), ("hidden", hidden, ("width", "width"))):
        check_tensor(name, part, shape)
    check_tensor("leave", leave, (z.shape[1] * z.shape[3], "width"))
    grid = (sides[0], sides[1])
    work = working_dtype(z.dtype)
    return hyper_kernel(enter.to(work), hidden.to(work), leave.to(work), grid) * planes(z).unflatten(2, grid)


def _example(square: bool) -> Any:
    def example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
        side = max(1, round(count**0.5))
        grid = (side, side) if square else nearest_grid(count)
        n = grid[0] * grid[1]
        shapes = {"z": (2, 3, n, 1), "v": (2, 3, n, 1), "enter": (5, 3), "hidden": (5, 5), "leave": (3, 5)}
        return {**example_tensors(seed, dtype, **shapes), "grid": grid}

    return example


def _parts(parts: dict[str, Any]) -> dict[str, Any]:
    network = {"enter": parts["enter"].unflatten(0, (16, 3)), "hidden": parts["hidden"].unflatten(0, (16, 16))}
    leave = parts["leave"].flatten(0, 1)
    return {"z": parts["source"], "v": head_values(parts), **network, "leave": leave, "grid": grid_of(parts)}


def _spread(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 2


_PAPER = "#158 HyperZcdotZcdotW Operator Connects Slow-Fast Networks for Full Context Interaction (2024)"

VARIANTS = (
    Variant(
        name="hyper-zzw",
        paper=_PAPER,
        family="convolution",
        priority="C",
        operator=hyper_zzw_convolution,
        example=_example(square=False),
        note="Follows the abstract, which convolves; the form of the coordinate network is assumed.",
        recipe=Recipe(
            learned={"source": Learned("HE", bias=1.0)},
            parameters={
                "enter": Parameter("48", _spread),
                "hidden": Parameter("256", small),
                "leave": Parameter("HE16", small),
            },
            prepare=_parts,
            ignores=UNUSED,
        ),
    ),
    Variant(
        name="hyper-zzw-product",
        paper=_PAPER,
        family="convolution",
        priority="C",
        operator=hyper_zzw_product,
        example=_example(square=True),
        reference="Terminator models/modules/hyperzzw.py",
        note="The global branch of the released code multiplies planes where the abstract convolves; square images only.",
    ),
)
