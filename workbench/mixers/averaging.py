"""Token-aware average pooling in front of attention, and how alike the rows of a pattern are.

    T_ij = sum_s c_i(s) A^(s)_ij,   A^(0) = I,   A^(s) = 3x3 average with dilation s (zeros around the image count)
    M    = softmax(scale (T q)(T k)^T) T

Every token chooses by its weights c_i over the dilations how far around it is averaged; queries, keys and values are made of the
averaged tokens. As projections act on channels, averaging the tokens or their projections is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.image import Grid, check_grid, gathered, grid_of, spread, taps
from workbench.mixers.scored import check_tensor, checked, masked_softmax, plain_scores, visible, weighted
from workbench.patterns.algebra import ProductMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


def token_aware_pooling_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix: Tensor,
    *,
    grid: Grid,
    mask: Mask = Mask(),
    scale: float | None = None,
) -> tuple[Tensor, ProductMap]:
    """Attention over tokens that were averaged with their neighbourhood, each as wide as it wants.

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]`` of the tokens before averaging; ``mix`` ``[B, N, S]`` the weights
    c_i(s) of no averaging (s = 0) and of 3x3 averages with dilations 1 to S - 1, a softmax in the paper. The map is the product
    of the attention among averaged tokens and the averaging. ``mask`` is about averaged tokens: one that it hides still enters
    the averages of its neighbours. Source: Guo, Stutz, Schiele, arXiv:2303.11126.
    """
    b, h, n, _ = checked(q, k, v, mask)
    grid = check_grid(grid, n)
    check_tensor("mix", mix, (b, n, "S"))
    tables = [taps(grid, 3, dilation, q.device) for dilation in range(1, mix.shape[2])]
    q_in, k_in, v_in = (_averaged(x, mix, tables) for x in (q, k, v))
    weights, lse = masked_softmax(plain_scores(q_in, k_in, scale), visible(mask, n, n, q.device))
    left = SoftmaxMap(q_in, spread(k_in, h), lse, mask=mask, scale=scale)
    return weighted(weights, v_in), ProductMap(left, _averaging(mix, tables, h, k.shape[1]))


def _averaged(x: Tensor, mix: Tensor, tables: list[Tensor]) -> Tensor:
    shares = mix.to(x.dtype)[:, None, :, :, None]
    out = x * shares[:, :, :, 0]
    for dilation, at in enumerate(tables, 1):
        out = out + gathered(x, at).mean(3) * shares[:, :, :, dilation]
    return out


def _averaging(mix: Tensor, tables: list[Tensor], heads: int, kv_heads: int) -> SparseMap:
    """The averaging as a map; the same for all heads."""
    b, n, _ = mix.shape
    own = torch.arange(n, device=mix.device)[:, None]
    at = torch.cat([own, *tables], 1)
    shares = torch.cat([mix[..., :1], (mix[..., 1:] / 9).repeat_interleave(9, 2)], 2)
    return SparseMap(at[None, None], shares[:, None].expand(b, heads, n, -1), n, kv_heads=kv_heads)


def attention_diversification(pattern: AttentionMap, threshold: float = 2.0) -> Tensor:
    """How alike the rows of a pattern are: mean cosine between each row and the mean row, ``[B]``, 1 if all are equal.

    Rows are the mean over heads; of rows and mean row only weights above ``threshold / K`` count, the threshold times what a
    uniform row gives. Training with this as a loss makes tokens look at different places (Guo et al., arXiv:2303.11126).
    """
    if threshold < 0:
        raise WorkbenchError(f"threshold is not negative; got {threshold}")
    _, _, queries, keys = pattern.shape
    bound = threshold / keys
    middle = pattern.received().mean(1) / queries
    middle = middle * (middle > bound)
    total = torch.zeros_like(middle[:, 0])
    for _, _, rows in pattern._chunks():
        row = rows.mean(1)
        total += torch.cosine_similarity(row * (row > bound), middle[:, None], dim=-1).sum(1)
    return total / queries


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    found = example_tensors(seed, dtype, q=(2, 4, n, 6), k=(2, 2, n, 6), v=(2, 2, n, 5), mix=(2, n, 4))
    return {**found, "mix": found["mix"].softmax(-1), "grid": grid}


def _prepare(parts: dict[str, Any]) -> dict[str, Any]:
    mix = parts["dilations"].mean(1).softmax(-1)
    return {**{name: parts[name] for name in ("q", "k", "v", "mask")}, "mix": mix, "grid": grid_of(parts)}


VARIANTS = (
    Variant(
        name="token-aware-average-pooling",
        paper="#14 Robustifying Token Attention for Vision Transformers (2023)",
        family="weighted softmax",
        priority="C",
        operator=token_aware_pooling_attention,
        example=_example,
        reference="guoyongcs/TAPADL TAPADL_FAN/models/tap_fan.py, TAPADL_RVT/engine.py",
        note="A layer normalisation between averaging and projections is not part of the operator.",
        recipe=Recipe(learned={"dilations": Learned("H4")}, prepare=_prepare),
    ),
)
