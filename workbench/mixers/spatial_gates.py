"""Spatial gates of images: every token is scaled by a number, alone or with a number per channel.

    y_ic = g_ic v_ic,   g_ic = a_i or a_row(i)c a_column(i)c

Features are ``[B, H, N, E]`` over a grid of N tokens; ``x`` is what the gate is made of and ``v`` what it scales, in a
network the same tensor; channel c = h*E + e of C = H*E. Maps are diagonal over tokens, but for ``waveblock_non_local``,
whose weights join all pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.mixers.channels import check_sides, check_values, check_whole, planes, token_gate, tokens
from workbench.mixers.gating import (
    SOURCE,
    UNUSED,
    gate_parts,
    gate_record,
    gated_example,
    head_values,
    plain_example,
    small,
)
from workbench.mixers.image import Grid, grid_of
from workbench.mixers.linear import linear_product
from workbench.mixers.scored import check_tensor
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.linear import LinearMap


def efficient_local_attention(
    x: Tensor, v: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, *, grid: Grid, groups: int = 16
) -> tuple[Tensor, AttentionMap]:
    """y = v * a_row * a_column: means over rows and over columns, each through one convolution, group norm and sigmoid
    (Xu and Wan, arXiv:2403.01123).

    x, v ``[B, H, N, E]``; ``kernel`` ``[C, C / convolution groups, taps]`` of odd length, the same for both directions;
    ``weight`` and ``bias`` ``[C]`` and ``groups`` are the group norm's. ELA-B has 7 taps, a kernel per channel and 16
    groups; -T 5 taps and 32 groups; -S and -L 5 and 7 taps with C/8 convolution groups.
    """
    _, h, n, e = check_values(v, x=x)
    channels = h * e
    rows, columns = check_sides(grid, n, 2)
    check_tensor("kernel", kernel, (channels, "channels / groups", "taps"))
    if kernel.shape[2] % 2 == 0 or channels % kernel.shape[1]:
        raise WorkbenchError(
            f"kernel is [C, C / convolution groups, taps] with C = {channels} and an odd number of taps; "
            f"got {list(kernel.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_tensor(name, tensor, (channels,))
    if channels % check_whole("groups", groups):
        raise WorkbenchError(f"groups divides the {channels} channels; got {groups}")
    image = planes(x).unflatten(2, (rows, columns))

    def along(strip: Tensor) -> Tensor:
        taps = kernel.to(strip.dtype)
        mixed = functional.conv1d(strip, taps, padding=taps.shape[2] // 2, groups=channels // taps.shape[1])
        return torch.sigmoid(functional.group_norm(mixed, groups, weight.to(strip.dtype), bias.to(strip.dtype)))

    gate = along(image.mean(3))[..., None] * along(image.mean(2))[:, :, None]
    return token_gate(v, tokens(gate.flatten(2), h))


def subspace_attention(
    x: Tensor, v: Tensor, scale: Tensor, shift: Tensor, point: Tensor, point_shift: Tensor, *, grid: Grid
) -> tuple[Tensor, DiagonalMap]:
    """y = v + softmax over tokens(relu(point . maxpool3(relu(scale x + shift)))) v in every group of channels (Saini et
    al., WACV 2020).

    x, v ``[B, H, N, E]``, a subspace per head; ``scale``, ``shift``, ``point`` ``[H, E]`` and ``point_shift`` ``[H]``
    are the 1x1 convolutions with their batch norms folded in.
    """
    _, h, n, e = check_values(v, x=x)
    sides = check_sides(grid, n, 2)
    for name, tensor, shape in (
        ("scale", scale, (h, e)), ("shift", shift, (h, e)), ("point", point, (h, e)), ("point_shift", point_shift, (h,)),
    ):  # fmt: skip
        check_tensor(name, tensor, shape)
    work = x.dtype
    seen = torch.relu(x * scale.to(work)[:, None] + shift.to(work)[:, None])
    pooled = functional.max_pool2d(planes(seen).unflatten(2, sides), 3, stride=1, padding=1).flatten(2)
    scores = (tokens(pooled, h) * point.to(work)[:, None]).sum(3) + point_shift.to(work)[:, None]
    gate = 1 + torch.relu(scores).softmax(2)
    return gate[..., None].to(v.dtype) * v, DiagonalMap(gate, domain="token")


def multi_scale_body_attention(
    x: Tensor, v: Tensor, body: Tensor, encoder: Tensor, decoder: Tensor, head: Tensor, *, grid: Grid
) -> tuple[Tensor, DiagonalMap]:
    """y_i = sigmoid(head . [x_i, A_i, 1]) v_i, where A is the attention of one encoder-decoder for all scales of a
    network.

    A = decoder 3x3(upsample(relu(encoder 3x3(average 2x2(body))))), resized to the grid of this scale. x, v
    ``[B, H, N, E]``; ``body`` ``[B, S, rows, columns]`` the features that the body reads; ``encoder``
    ``[hidden, S, 3, 3]``, ``decoder`` ``[1, hidden, 3, 3]``, ``head`` ``[C + 2]`` this scale's own weights of x, A and
    a constant.
    """
    b, h, n, e = check_values(v, x=x)
    sides = check_sides(grid, n, 2)
    check_tensor("body", body, (b, "S", "rows", "columns"))
    check_tensor("encoder", encoder, ("hidden", body.shape[1], 3, 3))
    check_tensor("decoder", decoder, (1, encoder.shape[0], 3, 3))
    check_tensor("head", head, (h * e + 2,))
    work = x.dtype
    small = functional.avg_pool2d(body.to(work), 2, ceil_mode=True)
    hidden = torch.relu(functional.conv2d(small, encoder.to(work), padding=1))
    large = functional.interpolate(hidden, body.shape[2:], mode="nearest")
    shared = functional.interpolate(functional.conv2d(large, decoder.to(work), padding=1), sides, mode="bilinear")
    own = torch.einsum("bcn,c->bn", planes(x), head[:-2].to(work))
    gate = torch.sigmoid(own + head[-2].to(work) * shared.flatten(1) + head[-1].to(work))
    return gate[:, None, :, None].to(v.dtype) * v, DiagonalMap(gate[:, None].expand(b, h, n), domain="token")


def little_attention(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, DiagonalMap]:
    """y_i = sigmoid(w . x_i + b) v_i: one 1x1 convolution, the cheapest gate over places.

    x, v ``[B, H, N, E]``; ``weight`` ``[C]``, ``bias`` ``[1]``. One gate for all channels.
    """
    b, h, n, e = check_values(v, x=x)
    check_tensor("weight", weight, (h * e,))
    check_tensor("bias", bias, (1,))
    gate = torch.sigmoid(torch.einsum("bcn,c->bn", planes(x), weight.to(x.dtype)) + bias.to(x.dtype))
    return gate[:, None, :, None].to(v.dtype) * v, DiagonalMap(gate[:, None].expand(b, h, n), domain="token")


def waveblock_non_local(
    q: Tensor, k: Tensor, v: Tensor, *, grid: Grid, start: int, rate: float = 0.3, wave: float = 2.0
) -> tuple[Tensor, LinearMap]:
    """Dot-product non-local attention over a feature map with a wave: M_ij = w_i (q_i . k_j) w_j^2 / N (Wang et al.,
    arXiv:2006.06525).

    q, k, v ``[B, H, N, E]`` are projections without bias of the features before the wave; w is 1 on
    ``round(rate * rows)`` rows of the grid from ``start`` on and ``wave`` elsewhere: two networks that start at other
    rows see different things. The wave enters by queries, keys and values, and is off outside of training (``wave=1``).
    The residual is not part of it.
    """
    _, _, n, _ = check_values(v)
    check_tensor("q", q, (*v.shape[:3], "R"))
    check_tensor("k", k, tuple(q.shape))
    rows, columns = check_sides(grid, n, 2)
    kept = round(rate * rows)
    check_whole("start", start, 0)
    if not 0 <= start <= rows - kept:
        raise WorkbenchError(f"the calm rows start at 0 .. {rows - kept}; got start={start}")
    calm = (torch.arange(rows, device=v.device) >= start) & (torch.arange(rows, device=v.device) < start + kept)
    waves = torch.where(calm, 1.0, wave).to(q.dtype).repeat_interleave(columns)[:, None]
    left, right = waves * q, waves.square() * k.to(q.dtype)
    out = linear_product(left, right, v, causal=False, scale=1 / n)
    return out, LinearMap(left, right, causal=False, scale=1 / n)


def _local_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"kernel": (6, 1, 7), "weight": (6,), "bias": (6,)}
    return {**gated_example(6, 1, **shapes)(seed, count, dtype), "groups": 2}


def _body_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"encoder": (4, 3, 3, 3), "decoder": (1, 4, 3, 3), "head": (8,), "body": (2, 3, 6, 7)}
    return gated_example(2, 3, **shapes)(seed, count, dtype)


def _wave_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(count)
    n = grid[0] * grid[1]
    start = (grid[0] - round(0.3 * grid[0])) // 2
    return {
        **example_tensors(seed, dtype, q=(2, 2, n, 4), k=(2, 2, n, 4), v=(2, 2, n, 3)),
        "grid": grid,
        "start": start,
    }


def _local_parts(parts: dict[str, Any]) -> dict[str, Any]:
    found = gate_parts("weight", "bias")(parts)
    return {
        **found,
        "kernel": parts["kernel"].flatten(0, 1)[:, None],
        "grid": grid_of(parts),
        "groups": parts["v"].shape[1],
    }


def _subspace_parts(parts: dict[str, Any]) -> dict[str, Any]:
    names = ("scale", "shift", "point", "point_shift")
    return {"x": parts["source"], "v": head_values(parts), **{n: parts[n] for n in names}, "grid": grid_of(parts)}


def _wave_parts(parts: dict[str, Any]) -> dict[str, Any]:
    heads = parts["q"].shape[1]
    k = parts["k"].repeat_interleave(heads // parts["k"].shape[1], 1)
    return {"q": parts["q"], "k": k, "v": head_values(parts), "grid": grid_of(parts), "start": 0}


_ELA = "#44 ELA: Efficient Local Attention for Deep Convolutional Neural Networks (2024)"
_ULSAM = "#28 ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks (2020)"
_MEDUSA = (
    "#147 MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image "
    "Analysis (2021)"
)
_LITTLE = "#98 A Little Bit Attention Is All You Need for Person Re-Identification (2023)"
_AWB = (
    "#157 Attentive WaveBlock: Complementarity-enhanced Mutual Networks for Unsupervised Domain Adaptation in Person "
    "Re-identification and Beyond (2020)"
)


VARIANTS = (
    gate_record(
        "efficient-local-attention", _ELA, efficient_local_attention, _local_example,
        note="ELA-B with 2 groups in the norm, as the example has 6 channels.",
        recipe=Recipe(
            learned=SOURCE,
            parameters={"kernel": Parameter("HE7", small), "weight": Parameter("HE", torch.ones), "bias": Parameter("HE")},
            prepare=_local_parts, ignores=UNUSED,
        ),
    ),
    gate_record(
        "ultra-lightweight-subspace-attention", _ULSAM, subspace_attention,
        gated_example(2, 3, scale=(2, 3), shift=(2, 3), point=(2, 3), point_shift=(2,)),
        reference="Nandan91/ULSAM ulsam.py",
        note="Batch norms folded into the 1x1 convolutions.",
        recipe=Recipe(
            learned=SOURCE,
            parameters={
                "scale": Parameter("HE", torch.ones), "shift": Parameter("HE"), "point": Parameter("HE", small),
                "point_shift": Parameter("H"),
            },
            prepare=_subspace_parts, ignores=UNUSED,
        ),
    ),
    gate_record(
        "medusa", _MEDUSA, multi_scale_body_attention, _body_example,
        note="Known from the abstract: one body, a head per scale. Depth of the body, resizing and the head's form are assumed.",
    ),
    gate_record(
        "little-bit-attention", _LITTLE, little_attention, plain_example(2, 3, weight=(6,), bias=(1,)),
        note="The paper was read as an abstract only: one 1x1 convolution over places stands for its cheap block.",
        recipe=Recipe(
            learned=SOURCE, parameters={"weight": Parameter("HE", small), "bias": Parameter("1")},
            prepare=lambda parts: {**gate_parts("weight")(parts), "bias": parts["bias"]}, ignores=UNUSED,
        ),
    ),
    gate_record(
        "attentive-waveblock", _AWB, waveblock_non_local, _wave_example,
        reference="WangWenhao0716/Attentive-WaveBlock mmt/models_post_a_s2",
        note="Attention after the wave. The released block projects with biases.",
        recipe=Recipe(prepare=_wave_parts),
    ),
)  # fmt: skip
