"""HiLo attention: some heads look at small windows, the others at averages of all windows.

    high   M = softmax(scale q k^T) inside of each s x s window
    low    M = softmax(scale q (A k)^T) A,   A the average of each window

Keys and values are linear in the tokens, so averaging them is the same as making them of averaged tokens, and a pooled key's
weight spreads evenly over its window: divided by s^2, the map of N x N / s^2 pooled keys is exactly one of tokens. Windows at the
edge of an image that s does not divide hold fewer tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.image import Grid, check_grid, gathered, grid_of, spread, windows
from workbench.mixers.local import grouped_softmax
from workbench.mixers.scored import check_tensor, masked_softmax, plain_scores, weighted
from workbench.patterns.algebra import HeadsMap, ProductMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


def hilo_attention(
    q: Tensor, k: Tensor, v: Tensor, *, grid: Grid, window: int = 2, alpha: float = 0.5, scale: float | None = None
) -> tuple[Tensor, HeadsMap]:
    """High- and low-frequency heads: q, k ``[B, H, N, E]``, v ``[B, H, N, V]``, the high-frequency heads first.

    ``int(H * alpha)`` heads are low-frequency; with ``window=1`` all are, and attention is plain. The map's parts are the heads
    of either kind, as far as there are any; those of the second are products of the pooled map and the averages.
    Source: Pan, Cai, Zhuang, Fast Vision Transformers with HiLo Attention, arXiv:2205.13213.
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    b, h, n, e = q.shape
    grid = check_grid(grid, n)
    check_tensor("k", k, (b, h, n, e))
    check_tensor("v", v, (b, h, n, "V"))
    if window < 1 or not 0 <= alpha <= 1:
        raise WorkbenchError(f"window is at least 1 and alpha a share of the heads; got window={window}, alpha={alpha}")
    high = 0 if window == 1 else h - int(h * alpha)
    table = windows(grid, window, q.device)
    outputs: list[Tensor] = []
    maps: list[AttentionMap] = []
    if high:
        group = table[None, None]
        out, local = grouped_softmax(q[:, :high], k[:, :high], v[:, :high], group, group, scale=scale)
        outputs.append(out)
        maps.append(local)
    if high < h:
        out, coarse = _low(q[:, high:], k[:, high:], v[:, high:], table, scale)
        outputs.append(out)
        maps.append(coarse)
    return torch.cat(outputs, 1), HeadsMap(*maps)


def _low(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float | None) -> tuple[Tensor, ProductMap]:
    """Attention to the averages of the windows of ``table`` ``[W, s^2]``."""
    b, h, n, _ = q.shape
    count = (table >= 0).sum(-1, keepdim=True)
    keys, values = (gathered(x, table).sum(3) / count.to(x.dtype) for x in (k, v))
    weights, lse = masked_softmax(plain_scores(q, keys, scale))
    left = SoftmaxMap(q, keys, lse, mask=Mask(), scale=scale)
    even = (1 / count.to(q.dtype)).expand_as(table).expand(b, h, -1, -1)
    return weighted(weights, values), ProductMap(left, SparseMap(table[None, None], even, n))


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    return {**example_tensors(seed, dtype, q=(2, 4, n, 6), k=(2, 4, n, 6), v=(2, 4, n, 5)), "grid": grid}


def _prepare(parts: dict[str, Any]) -> dict[str, Any]:
    q = parts["q"]
    return {"q": q, **{name: spread(parts[name], q.shape[1]) for name in ("k", "v")}, "grid": grid_of(parts)}


VARIANTS = (
    Variant(
        name="hilo-attention",
        paper="#84 Fast Vision Transformers with HiLo Attention (2022)",
        family="two-stage",
        priority="C",
        operator=hilo_attention,
        example=_example,
        reference="ziplab/LITv2 hilo.py",
        recipe=Recipe(prepare=_prepare),
    ),
)
