"""Gated positional self-attention (ConViT): content and place mixed by a gate per head.

    P_ij = (1 - g_h) softmax_j(scale q_i . k_j) + g_h softmax_j(u_h . r_ij),   g = sigmoid(lambda)

    r_ij = (x_j - x_i, y_j - y_i, (x_j - x_i)^2 + (y_j - y_i)^2) on the image's grid

The positional scores are quadratic in j and their terms without j cancel in the softmax, so they are a product of three numbers
per query with three per key: both parts are softmax maps in linear memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.maps import GatedMap
from workbench.mixers.image import check_grid
from workbench.mixers.scored import check_tensor, checked, masked_softmax, plain_scores, weighted
from workbench.patterns.algebra import SumMap
from workbench.patterns.softmax import SoftmaxMap


def grid_places(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Column x and row y ``[rows * columns]`` of every token of a grid flattened row by row, in float64."""
    rows, columns = (torch.arange(side, dtype=torch.float64, device=device) for side in grid)
    return columns.repeat(grid[0]), rows.repeat_interleave(grid[1])


def gated_positional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Tensor,
    gating: Tensor,
    *,
    grid: tuple[int, int],
    scale: float | None = None,
) -> tuple[Tensor, SumMap]:
    """GPSA of q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]`` with N = rows x columns of ``grid``.

    ``place`` ``[H, 3]`` is u, the weights of the column step, the row step and the squared distance; ``gating`` ``[H]`` is
    lambda, before its sigmoid (1 at the start). Both parts have rows that sum to 1, and so has their mixture. ``native()`` is
    the pair of parts, each a ``GatedMap`` with the part alone as ``raw``. Source: d'Ascoli et al., ConViT, arXiv:2103.10697,
    section 3.
    """
    _, h, n, m = checked(q, k, v, Mask())
    check_tensor("place", place, (h, 3))
    check_tensor("gating", gating, (h,))
    if n != m:
        raise WorkbenchError(f"grid has one cell for each query and each key; got {n} queries and {m} keys")
    grid = check_grid(grid, n)
    work = working_dtype(q.dtype)
    x, y = grid_places(grid, q.device)
    steps = torch.stack([x - x[:, None], y - y[:, None], (x - x[:, None]) ** 2 + (y - y[:, None]) ** 2])
    spatial, _ = masked_softmax(torch.einsum("hr,rij->hij", place.to(work), steps.to(work))[None])
    content, lse = masked_softmax(plain_scores(q, k, scale))
    gate = gating.to(work).sigmoid()[None, :, None]
    out = weighted((1 - gate[..., None]) * content + gate[..., None] * spatial, v)
    gates = gate.detach().expand(q.shape[0], h, n)
    parts = (
        GatedMap(SoftmaxMap(q, k, lse, mask=Mask(), scale=scale), 1 - gates),
        GatedMap(_places_map(place.detach().to(work), x, y, q.shape[0], k.shape[1]), gates),
    )
    return out, SumMap(*parts, row_sum="1")


def _places_map(place: Tensor, x: Tensor, y: Tensor, batch: int, groups: int) -> SoftmaxMap:
    """Softmax of u . r_ij, whose terms that depend on j are a (x_j^2 + y_j^2) + (u_1 - 2 a x_i) x_j + (u_2 - 2 a y_i) y_j with
    a = u_3. Coordinates count from the middle, so that the squares stay small."""
    x, y = (x - x.mean()).to(place.dtype), (y - y.mean()).to(place.dtype)
    near = place[:, 2:].expand(-1, len(x))
    queries = torch.stack([near, place[:, :1] - 2 * near * x, place[:, 1:2] - 2 * near * y], -1)
    keys = torch.stack([x**2 + y**2, x, y], -1)
    shape = (batch, groups, *keys.shape)
    return SoftmaxMap(queries.expand(batch, -1, -1, -1), keys.expand(shape), mask=Mask(), scale=1.0)


def local_places(shape: tuple[int, ...], strength: float = 1.0) -> Tensor:
    """Initial ``place`` ``[H, 3]``: each head looks at one cell of a square kernel of ``floor(sqrt(H))`` cells a side, by
    ``-strength |r - centre|^2`` up to a constant; further heads look nowhere in particular."""
    side = int(shape[0] ** 0.5)
    centre = (side - 1) / 2 if side % 2 == 0 else side // 2
    place = torch.zeros(shape)
    for row in range(side):
        for column in range(side):
            place[row + side * column] = torch.tensor([2 * (column - centre), 2 * (row - centre), -1.0])
    return place * strength


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    rows, columns = nearest_grid(tokens)
    n = rows * columns
    shapes = {"q": (2, 4, n, 8), "k": (2, 2, n, 8), "v": (2, 2, n, 6), "place": (4, 3), "gating": (4,)}
    return {**example_tensors(seed, dtype, **shapes), "grid": (rows, columns)}


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("q", "k", "v", "place", "gating", "grid")}


VARIANTS = (
    Variant(
        name="gated-positional-attention",
        paper="#15 ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases (2021)",
        family="weighted softmax",
        priority="C",
        operator=gated_positional_attention,
        example=_example,
        reference="timm convit.GPSA",
        recipe=Recipe(
            parameters={"place": Parameter("H3", local_places), "gating": Parameter("H", torch.ones)}, prepare=_prepare
        ),
    ),
)
