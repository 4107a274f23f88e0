"""Cascaded group attention: each head works on a split of the channels, to which the output of the head before is added.

    f_h = split_h + o_{h-1},   q_h = DW_h(f_h Wq_h),   k_h = f_h Wk_h,   v_h = f_h Wv_h
    P_h = softmax(scale q_h k_h^T + b_h(|row offset|, |column offset|)),   o_h = P_h v_h

On the values of its own head each head is plain softmax attention, and that is the map. From head to head there is a path: with
the patterns held fixed, o_h depends on the values of an earlier head g through the tokens by P_h P_{h-1} ... P_g and through the
channels by Wv_{g+1} ... Wv_h, which ``CascadedMap.path`` and ``CascadedMap.channels`` return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.image import Grid, cells, check_grid, depthwise, grid_of, spread
from workbench.mixers.scored import check_tensor, masked_softmax, plain_scores, weighted
from workbench.patterns.algebra import ProductMap
from workbench.patterns.softmax import SoftmaxMap


class CascadedMap(SoftmaxMap):
    """Softmax attention of every head on its own values, with the path from head to head.

    ``value_weights`` ``[H, E, E]`` project what a head gets to its values, ``values`` ``[B, H, N, E]`` are these values.
    """

    value_space = "each head's own V"
    value_weights: Tensor
    values: Tensor

    def heads(self, indices: Sequence[int]) -> SoftmaxMap:
        found = super().heads(indices)
        found.value_space = self.value_space
        return found

    def path(self, source: int, target: int) -> AttentionMap:
        """How tokens of head ``source``'s values reach tokens of head ``target``'s output, ``[B, 1, N, N]``."""
        self._check_path(source, target)
        found: AttentionMap = self.heads([source])
        for head in range(source + 1, target + 1):
            found = ProductMap(self.heads([head]), found)
        return found

    def channels(self, source: int, target: int) -> Tensor:
        """How channels of head ``source``'s output become channels of head ``target``'s values, ``[E, E]``: the identity from
        a head to itself, the product of the projections in between otherwise."""
        self._check_path(source, target)
        found = torch.eye(self.value_weights.shape[1], dtype=self.value_weights.dtype, device=self.value_weights.device)
        for head in range(source + 1, target + 1):
            found = found @ self.value_weights[head]
        return found

    def _check_path(self, source: int, target: int) -> None:
        if not 0 <= source <= target < self.shape[1]:
            raise WorkbenchError(
                f"a path leads from a head to itself or a later one of {self.shape[1]}; got {source} to {target}"
            )


def cascaded_group_attention(
    splits: Tensor,
    query_weights: Tensor,
    key_weights: Tensor,
    value_weights: Tensor,
    v: Tensor | None = None,
    *,
    grid: Grid,
    query_kernel: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, CascadedMap]:
    """Attention of heads that feed each other: ``splits`` ``[B, H, N, E]`` of the input's channels to ``[B, H, N, E]``.

    ``query_weights`` and ``key_weights`` ``[H, E, D]``, ``value_weights`` ``[H, E, E]``; ``query_kernel`` ``[H, D, s, s]`` a
    depthwise convolution of the queries (none if None); ``bias`` ``[H, rows, columns]`` by absolute offsets in the grid;
    ``scale=None`` is ``D ** -0.5``. ``v`` ``[B, H, N, V]`` are the values that the patterns are applied to; without it the
    cascade's own, as in the network. Patterns always come from the cascade. Source: Liu et al., arXiv:2305.07027.
    """
    check_tensor("splits", splits, ("B", "H", "N", "E"))
    b, h, n, e = splits.shape
    grid = check_grid(grid, n)
    check_tensor("query_weights", query_weights, (h, e, "D"))
    check_tensor("key_weights", key_weights, tuple(query_weights.shape))
    check_tensor("value_weights", value_weights, (h, e, e))
    offsets, by_rows = None, None
    if bias is not None:
        check_tensor("bias", bias, (h, *grid))
        offsets, held = _by_offset(bias, grid, 0, n), bias.detach()

        def by_rows(lo: int, hi: int) -> Tensor:
            return _by_offset(held, grid, lo, hi)

    scale = query_weights.shape[2] ** -0.5 if scale is None else scale
    parts: dict[str, list[Tensor]] = {name: [] for name in ("q", "k", "v", "lse", "weights")}
    out = torch.zeros_like(splits[:, :1])
    for head in range(h):  # one after the other: each needs the output of the one before
        own = slice(head, head + 1)
        given = splits[:, own] + out
        q, k, values = (given @ w[head].to(given.dtype) for w in (query_weights, key_weights, value_weights))
        if query_kernel is not None:
            q = depthwise(q, query_kernel[own].to(q.dtype), grid)
        scores = plain_scores(q, k, scale)
        weights, lse = masked_softmax(scores if offsets is None else scores + offsets[own].to(scores.dtype))
        out = weighted(weights, values)
        for name, part in zip(parts, (q, k, values, lse, weights), strict=True):
            parts[name].append(part)
    found = {name: torch.cat(held, 1) for name, held in parts.items()}
    amap = CascadedMap(found["q"], found["k"], found["lse"], mask=Mask(), scale=scale, bias=by_rows)
    amap.value_weights, amap.values = value_weights.detach(), found["v"].detach()
    values = found["v"] if v is None else v
    check_tensor("v", values, (b, h, n, "V"))
    return weighted(found["weights"], values), amap


def _by_offset(table: Tensor, grid: Grid, lo: int, hi: int) -> Tensor:
    """``table`` ``[H, rows, columns]`` at the absolute offsets of tokens lo .. hi from all, ``[H, hi - lo, N]``."""
    row, column = cells(grid, table.device)
    return table[:, (row[lo:hi, None] - row).abs(), (column[lo:hi, None] - column).abs()]


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    weights = {"query_weights": (3, 4, 5), "key_weights": (3, 4, 5), "value_weights": (3, 4, 4)}
    found = example_tensors(
        seed, dtype, splits=(2, 3, n, 4), **weights, v=(2, 3, n, 4), query_kernel=(3, 5, 3, 3), bias=(3, *grid)
    )
    return {**found, "grid": grid}


def _unit(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * shape[-2] ** -0.5


def _prepare(parts: dict[str, Any]) -> dict[str, Any]:
    names = ("query_weights", "key_weights", "value_weights")
    given = {name: parts[name] for name in names}
    kernel = parts["query_kernel"].unflatten(-1, (3, 3))
    return {
        **given,
        "splits": spread(parts["v"], parts["q"].shape[1]),
        "query_kernel": kernel,
        "grid": grid_of(parts),
    }


def _delta_taps(shape: tuple[int, ...]) -> Tensor:
    """3x3 kernels, flattened, that leave what they convolve as it is."""
    kernels = torch.zeros(shape)
    kernels[..., 4] = 1
    return kernels


VARIANTS = (
    Variant(
        name="cascaded-group-attention",
        paper="#92 EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention (2023)",
        family="weighted softmax",
        priority="C",
        operator=cascaded_group_attention,
        example=_example,
        reference="timm efficientvit_msra.py",
        note="The map is that of each head on its own values; CascadedMap.path leads from head to head.",
        recipe=Recipe(
            parameters={
                "query_weights": Parameter("HEE", _unit),
                "key_weights": Parameter("HEE", _unit),
                "value_weights": Parameter("HEE", _unit),
                "query_kernel": Parameter("HE9", _delta_taps),
            },
            prepare=_prepare,
            ignores=("q", "k"),
        ),
    ),
)
