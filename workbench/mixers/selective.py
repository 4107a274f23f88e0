"""Selective dense attention: feature maps of several layers are fused, each weighted by how much it matters.

    o_ic = sum over layers l of A_l v_lic,   sum over l of A_l = 1

    by channel   A_lc = softmax over l of (W_l relu(S mean over places of sum_l x_l))_c
    by place     A_li = softmax over l of (convolution of the mean and maximum over channels of sum_l x_l)_li

Every layer's features have been brought to one size. Keys are the places of all layers, layer after layer; the map of a channel
is one diagonal block per layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.mixers.channels import channel_map, check_square, planes
from workbench.mixers.image import Grid, check_grid
from workbench.mixers.scored import check_tensor
from workbench.patterns.algebra import KeysMap
from workbench.patterns.diagonal import DiagonalMap


def selective_channel_attention(
    x: Tensor, v: Tensor, squeeze: Tensor, expand: Tensor, *, layers: int
) -> tuple[Tensor, AttentionMap]:
    """Layers chosen channel by channel: x, v ``[B, H, L*N, E]`` to ``[B, H, N, E]``, in the network the same tensor.

    ``squeeze`` ``[hidden, C]`` and ``expand`` ``[L, C, hidden]`` for C = H*E channels, numbered head by head. Source: Wang et
    al., PIDray, arXiv:2108.07020, as its abstract tells; the choice follows Selective Kernel Networks, arXiv:1903.06586.
    """
    b, h, n, e = _check(x, v, layers)
    check_tensor("squeeze", squeeze, ("hidden", h * e))
    check_tensor("expand", expand, (layers, h * e, squeeze.shape[0]))
    fused = planes(x).unflatten(2, (layers, n)).sum(2)
    hidden = torch.relu(fused.mean(2) @ squeeze.to(x.dtype).T)
    shares = torch.einsum("bd,lcd->blc", hidden, expand.to(x.dtype)).softmax(1)
    return _fuse(v, shares.unflatten(2, (h, e))[:, :, :, None].expand(b, layers, h, n, e))


def selective_place_attention(
    x: Tensor, v: Tensor, kernel: Tensor, *, layers: int, grid: Grid
) -> tuple[Tensor, AttentionMap]:
    """Layers chosen place by place: x, v ``[B, H, L*N, E]`` to ``[B, H, N, E]``, in the network the same tensor.

    ``kernel`` ``[L, 2, s, s]`` of odd size sees the mean and the maximum over all channels. Source as of
    ``selective_channel_attention``.
    """
    b, h, n, e = _check(x, v, layers)
    sides = check_grid(grid, n)
    check_square("kernel", kernel, layers, 2)
    fused = planes(x).unflatten(2, (layers, n)).sum(2)
    summary = torch.stack([fused.mean(1), fused.amax(1)], 1).unflatten(2, sides)
    logits = functional.conv2d(summary, kernel.to(x.dtype), padding=kernel.shape[-1] // 2)
    shares = logits.flatten(2).softmax(1)
    return _fuse(v, shares[:, :, None, :, None].expand(b, layers, h, n, e))


def _check(x: Tensor, v: Tensor, layers: int) -> tuple[int, int, int, int]:
    check_tensor("v", v, ("B", "H", "L*N", "E"))
    check_tensor("x", x, tuple(v.shape))
    b, h, total, e = v.shape
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1 or total % layers:
        raise WorkbenchError(f"layers is how many feature maps the {total} places belong to; got {layers!r}")
    return b, h, total // layers, e


def _fuse(v: Tensor, shares: Tensor) -> tuple[Tensor, AttentionMap]:
    """Values of all layers weighted by ``shares`` ``[B, L, H, N, E]`` and added up."""
    layers, n = shares.shape[1], shares.shape[3]
    out = (v.unflatten(2, (layers, n)) * shares.transpose(1, 2).to(v.dtype)).sum(2)
    parts = (DiagonalMap(planes(layer), domain="token") for layer in shares.detach().unbind(1))
    return out, channel_map(KeysMap(*parts, row_sum="1", value_space="V of all layers"), v.shape[3])


def _channel_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    found = example_tensors(seed, dtype, x=(2, 2, 3 * count, 3), squeeze=(4, 6), expand=(3, 6, 4))
    return {**found, "v": found["x"].clone(), "layers": 3}


def _place_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(count)
    found = example_tensors(seed, dtype, x=(2, 2, 3 * grid[0] * grid[1], 3), kernel=(3, 2, 3, 3))
    return {**found, "v": found["x"].clone(), "layers": 3, "grid": grid}


_PAPER = "#21 Towards Real-World Prohibited Item Detection: A Large-Scale X-ray Benchmark (2021)"
_NOTE = "From the abstract, which names channel-wise and spatial dense attention over features of several scales."

VARIANTS = (
    Variant(
        name="selective-channel-attention",
        paper=_PAPER,
        family="channel",
        priority="C",
        operator=selective_channel_attention,
        example=_channel_example,
        reference="arXiv:2108.07020, abstract",
        note=_NOTE,
    ),
    Variant(
        name="selective-place-attention",
        paper=_PAPER,
        family="channel",
        priority="C",
        operator=selective_place_attention,
        example=_place_example,
        reference="arXiv:2108.07020, abstract",
        note=_NOTE,
    ),
)
