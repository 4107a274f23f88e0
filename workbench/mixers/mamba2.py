"""State space duality (Mamba-2): one decay per head and token, so that a scan is linear attention with a decay.

    h_t = exp(dt_t a) h_{t-1} + dt_t B_t x_t^T,   y_t = C_t^T h_t + D x_t
    M = (Gamma * C B^T) diag(dt) + D I             Gamma_ij = exp(a (dt_{j+1} + .. + dt_i)) for j <= i

LinGen's MA-branch runs it in both directions over a video whose tokens are put in another major order from layer to layer, after
a shortened copy of the video (review tokens, averages over boxes of tokens). x is what enters the scan, after the short
convolution and SiLU.

Dao and Gu, Transformers are SSMs (arXiv 2405.21060), sections 5 and 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import UnknownName, WorkbenchError
from workbench.kernels.linear_attention import linear_attention
from workbench.kernels.scores import working_dtype
from workbench.mixers.image import spread
from workbench.mixers.scored import check_tensor
from workbench.patterns.algebra import ProductMap, SumMap
from workbench.patterns.arranged import LastRowsMap, PermutedMap
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.linear import LinearMap
from workbench.patterns.sparse import SparseMap

VALUES = "post-conv V"
Grid3 = tuple[int, int, int]
ORDERS = {
    "spatial-row": (0, 1, 2),
    "spatial-column": (0, 2, 1),
    "temporal-row": (1, 2, 0),
    "temporal-column": (2, 1, 0),
}
"""Rotary Major Scan: axes (time, row, column) from the slowest to the fastest. Layers take the orders in turn."""


def state_space_dual(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None
) -> tuple[Tensor, AttentionMap]:
    """Mamba-2 of x ``[B, H, N, E]``, output of the same shape.

    ``dt`` ``[B, H, N]`` (after bias, softplus and limits), ``a`` ``[H]`` (negative), ``b`` and ``c`` ``[B, G, N, S]`` with G
    groups dividing the heads, ``d`` ``[H]`` (the skip) or None. Linear time; gradients flow to all arguments.
    """
    check_dual(x, dt, a, b, c, d)
    work = torch.promote_types(working_dtype(dt.dtype), x.dtype)
    h = x.shape[1]
    values, step = x.to(work), dt.to(work)
    read, write = spread(c.to(work), h), spread(b.to(work), h) * step[..., None]
    log_decay = step * a.to(work)[:, None]
    out = linear_attention(read, write, values, log_decay).output
    found: AttentionMap = LinearMap(read, write, log_decay, causal=True, value_space=VALUES)
    if d is not None:
        skip = d.to(work)[:, None].expand(x.shape[0], h, x.shape[2])
        out = out + skip[..., None] * values
        found = SumMap(found, DiagonalMap(skip, domain="token"), value_space=VALUES)
    return out.to(x.dtype), found


def rotary_major_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    grid: Grid3,
    order: str,
    review: Grid3,
) -> tuple[Tensor, AttentionMap]:
    """LinGen's MA-branch: Mamba-2 forwards and backwards over a video in one of four major ``ORDERS``, with review tokens.

    x ``[B, H, N, E]`` numbers tokens by time, row and column of ``grid``. R review tokens are means of x over boxes of
    ``review`` tokens (time, rows, columns; boxes at the edges hold what is there); they come first in the forward sequence and
    last in the backward one. The other arguments have an axis for the two directions and hold review tokens before tokens:
    dt ``[B, 2, H, R + N]``, a ``[2, H]``, b and c ``[B, 2, G, R + N, S]``, d ``[2, H]``, in the numbering of ``grid``, not of
    ``order``. The map is over tokens: review tokens are written as the tokens that they average.
    """
    check_tensor("x", x, ("B", "H", "N", "E"))
    grid = _check_grid(grid, x.shape[2])
    if order not in ORDERS:
        raise UnknownName("scan order", order, ORDERS)
    boxes, places = _boxes(grid, review, x.device)
    n, reviews = x.shape[2], len(places)
    check_tensor("b", b, (x.shape[0], 2, "G", reviews + n, "S"))
    for name, part, shape in (
        ("dt", dt, (x.shape[0], 2, x.shape[1], reviews + n)),
        ("a", a, (2, x.shape[1])),
        ("c", c, tuple(b.shape)),
        ("d", d, (2, x.shape[1])),
    ):
        check_tensor(name, part, shape)
    work = torch.promote_types(working_dtype(dt.dtype), x.dtype)
    weights = (places >= 0).to(work)
    weights = weights / weights.sum(-1, keepdim=True)
    pooled = (x.to(work)[:, :, places.clamp(min=0)] * weights[..., None]).sum(3)
    values = torch.cat([pooled, x.to(work)], 2)
    forwards = torch.cat([_major(boxes, order, x.device), _major(grid, order, x.device) + reviews])
    outs, maps = [], []
    for i, path in enumerate((forwards, forwards.flip(0))):
        parts = (values[:, :, path], dt[:, i][..., path], a[i], b[:, i][:, :, path], c[:, i][:, :, path], d[i])
        out, found = state_space_dual(*parts)
        back = path.argsort()
        outs.append(out[:, :, back[reviews:]])
        maps.append(PermutedMap(found, back, back))
    own = torch.arange(n, device=x.device)[:, None]
    indices = torch.cat([places, pad(own, (0, places.shape[1] - 1), value=-1)])
    weights = torch.cat([weights, pad(torch.ones_like(own, dtype=work), (0, places.shape[1] - 1))])
    tokens = SparseMap(indices[None, None], weights.expand(*x.shape[:2], -1, -1), n, value_space=VALUES)
    amap = ProductMap(LastRowsMap(SumMap(*maps), reviews), tokens)
    amap.offset = 0  # query 0 is token 0, whatever stood before it in the sequence
    return (outs[0] + outs[1]).to(x.dtype), amap


def check_dual(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> None:
    """Raise ``WorkbenchError`` naming the argument of Mamba-2 that does not fit."""
    check_tensor("x", x, ("B", "H", "N", "E"))
    batch, h, n, _ = x.shape
    check_tensor("dt", dt, (batch, h, n))
    check_tensor("a", a, (h,))
    check_tensor("b", b, (batch, "G", n, "S"))
    check_tensor("c", c, tuple(b.shape))
    if h % b.shape[1]:
        raise WorkbenchError(f"b has groups that divide the {h} heads; got {b.shape[1]}")
    if d is not None:
        check_tensor("d", d, (h,))


def _check_grid(grid: Any, tokens: int) -> Grid3:
    fits = isinstance(grid, tuple | list) and len(grid) == 3 and all(isinstance(n, int) and n > 0 for n in grid)
    if not fits or grid[0] * grid[1] * grid[2] != tokens:
        raise WorkbenchError(f"grid is (times, rows, columns) with product {tokens}; got {grid!r}")
    return grid[0], grid[1], grid[2]


def _major(grid: Grid3, order: str, device: torch.device) -> Tensor:
    """Tokens of ``grid`` in a major order."""
    table = torch.arange(grid[0] * grid[1] * grid[2], device=device).view(grid)
    return table.permute(ORDERS[order]).flatten()


def _boxes(grid: Grid3, review: Any, device: torch.device) -> tuple[Grid3, Tensor]:
    """The grid of boxes, and the tokens of each box ``[R, tokens of a box]``, -1 beyond the edge."""
    fits = isinstance(review, tuple | list) and len(review) == 3 and all(isinstance(n, int) and n > 0 for n in review)
    if not fits:
        raise WorkbenchError(f"review is a box of (times, rows, columns), each at least 1; got {review!r}")
    t, r, c = (-(-side // box) for side, box in zip(grid, review, strict=True))
    table = torch.arange(grid[0] * grid[1] * grid[2], device=device).view(grid)
    short = [n * box - side for n, box, side in zip((t, r, c), review, grid, strict=True)]
    table = pad(table, (0, short[2], 0, short[1], 0, short[0]), value=-1)
    table = table.view(t, review[0], r, review[1], c, review[2]).permute(0, 2, 4, 1, 3, 5)
    return (t, r, c), table.reshape(t * r * c, -1)


# ------------------------------------------------------------------------ records


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    groups = (2, 2, tokens, 3)
    given = example_tensors(seed, dtype, x=(2, 4, tokens, 5), dt=(2, 4, tokens), a=(4,), b=groups, c=groups, d=(4,))
    return {**given, "dt": softplus(given["dt"]), "a": -given["a"].exp()}


def _lingen_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid, review = nearest_grid(tokens, 3), (1, 2, 2)
    n, reviews = grid[0] * grid[1] * grid[2], grid[0] * -(-grid[1] // 2) * -(-grid[2] // 2)
    groups = (2, 2, 1, reviews + n, 3)
    given = example_tensors(
        seed, dtype, x=(2, 2, n, 4), dt=(2, 2, 2, reviews + n), a=(2, 2), b=groups, c=groups, d=(2, 2)
    )
    options = {"grid": grid, "order": "temporal-column", "review": review}
    return {**given, "dt": softplus(given["dt"]), "a": -given["a"].exp(), **options}


def _spread_rates(shape: tuple[int, ...]) -> Tensor:
    """log(-a) between log 1 and log 16, as Mamba-2 starts."""
    return torch.linspace(1, 16, shape[-1]).log().expand(shape).clone()


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    """C and B are what queries and keys are; the groups are heads."""
    h = given["q"].shape[1]
    return {
        "x": spread(given["v"], h),
        "dt": given["dt"],
        "a": -given["log_a"].exp(),
        "b": spread(given["k"], h),
        "c": given["q"],
        "d": given["d"],
    }


VARIANTS = (
    Variant(
        name="mamba-2",
        paper="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality (2024)",
        family="linear",
        priority="A",
        operator=state_space_dual,
        example=_example,
        value_input="x",
        causal=True,
        reference="HF Mamba2Mixer.torch_forward",
        recipe=Recipe(
            learned={"dt": Learned("H", softplus, bias=-2.0)},
            parameters={"log_a": Parameter("H", _spread_rates), "d": Parameter("H", torch.ones)},
            prepare=_prepare,
        ),
    ),
    Variant(
        name="lingen-rotary-major-scan",
        paper="#124 LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear Computational "
        "Complexity (2024)",
        family="linear",
        priority="B",
        operator=rotary_major_scan,
        example=_lingen_example,
        value_input="x",
        reference="abstract of the paper",
        note="which four orders, and that review tokens are box means before the sequence, is from secondary descriptions; "
        "needs a video, so no native model runs it",
    ),
)
