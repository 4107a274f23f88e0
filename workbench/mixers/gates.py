"""Channel gates: every channel is scaled by a number that the whole image, text or neighbourhood decides.

    y_c = g_c v_c,   g = sigmoid(f(pooled channels))        rows and columns of the map are channels, M = diag(g)

Features are ``[B, G, C, N]``: G groups of C channels each, numbered through, over N tokens; ``x`` is what the gate is
made of and ``v`` what it scales, in a network the same tensor. In a convolutional GLU the gate is one per channel and
token, and the map is diagonal over tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import UnknownName
from workbench.mixers.channels import check_odd, check_sides, check_values, correlate, planes, token_gate, tokens
from workbench.mixers.gating import SOURCE, UNUSED, channels_last, head_values, small
from workbench.mixers.image import Grid, grid_of
from workbench.mixers.scored import check_tensor
from workbench.patterns.diagonal import DiagonalMap

GROUPS, WIDTH = 2, 4
"""Groups of channels and channels in each, in the examples."""


def eca_kernel_size(channels: int, gamma: float = 2.0, offset: float = 1.0) -> int:
    """Taps of ECA's convolution over channels: the odd number next above |log2(C) / gamma + offset / gamma| cut to an
    integer, at least 3."""
    size = int(abs((math.log2(channels) + offset) / gamma))
    return max(size if size % 2 else size + 1, 3)


def efficient_channel_attention(x: Tensor, v: Tensor, kernel: Tensor) -> tuple[Tensor, DiagonalMap]:
    """g = sigmoid(conv1d(mean over tokens)), the convolution running over channels without bias (Wang et al.,
    arXiv:1910.03151).

    x, v ``[B, G, C, N]``; ``kernel`` ``[taps]``, odd (see ``eca_kernel_size``), zeros beyond the first and last
    channel.
    """
    _features(x, v)
    check_odd("kernel", kernel[None] if isinstance(kernel, Tensor) else kernel, 1, 1)
    pooled = x.flatten(1, 2).mean(2)
    mixed = functional.conv1d(pooled[:, None], kernel.to(x.dtype)[None, None], padding=kernel.shape[0] // 2)
    return _channel_gate(v, torch.sigmoid(mixed[:, 0]))


def resolution_aware_channel_attention(
    x: Tensor, v: Tensor, squeeze: Tensor, expand: Tensor, *, resolution: int = 0
) -> tuple[Tensor, DiagonalMap]:
    """g = sigmoid(W2_r relu(W1_r mean over tokens)): squeeze and excitation with weights for each spatial resolution r.

    x, v ``[B, G, C, N]``; ``squeeze`` ``[R, hidden, G*C]``, ``expand`` ``[R, G*C, hidden]``; ``resolution`` chooses the
    sensor's pair of matrices.
    """
    _features(x, v)
    channels = x.shape[1] * x.shape[2]
    check_tensor("squeeze", squeeze, ("R", "hidden", channels))
    check_tensor("expand", expand, (squeeze.shape[0], channels, squeeze.shape[1]))
    if not isinstance(resolution, int) or not 0 <= resolution < len(squeeze):
        raise UnknownName("resolution", resolution, range(len(squeeze)))
    return _channel_gate(v, _excited(x.flatten(1, 2).mean(2), squeeze[resolution], expand[resolution]))


def contrast_aware_channel_attention(
    x: Tensor, v: Tensor, squeeze: Tensor, expand: Tensor, squeeze_bias: Tensor, expand_bias: Tensor
) -> tuple[Tensor, DiagonalMap]:
    """g = sigmoid(W2 relu(W1 (std + mean over tokens) + b1) + b2): contrast in the place of the average (Hui et al.,
    arXiv:1909.11856).

    x, v ``[B, G, C, N]``; ``squeeze`` ``[hidden, G*C]``, ``expand`` ``[G*C, hidden]``, biases ``[hidden]`` and
    ``[G*C]``. The deviation divides by N.
    """
    _features(x, v)
    channels = x.shape[1] * x.shape[2]
    check_tensor("squeeze", squeeze, ("hidden", channels))
    check_tensor("expand", expand, (channels, squeeze.shape[0]))
    check_tensor("squeeze_bias", squeeze_bias, (squeeze.shape[0],))
    check_tensor("expand_bias", expand_bias, (channels,))
    flat = x.flatten(1, 2)
    # A constant channel has no deviation, and a root no gradient at 0.
    spread = flat.var(2, correction=0).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    hidden = torch.relu((spread + flat.mean(2)) @ squeeze.to(x.dtype).T + squeeze_bias.to(x.dtype))
    return _channel_gate(v, torch.sigmoid(hidden @ expand.to(x.dtype).T + expand_bias.to(x.dtype)))


def sentence_attention(
    x: Tensor, v: Tensor, sentence: Tensor, squeeze: Tensor, expand: Tensor
) -> tuple[Tensor, DiagonalMap]:
    """g = sigmoid(W2 relu(W1 [mean over tokens, sentence])): channels of an image chosen by a question about it.

    x, v ``[B, G, C, N]``; ``sentence`` ``[B, S]`` an embedding of the text; ``squeeze`` ``[hidden, G*C + S]``,
    ``expand`` ``[G*C, hidden]``.
    """
    _features(x, v)
    channels = x.shape[1] * x.shape[2]
    check_tensor("sentence", sentence, (x.shape[0], "S"))
    check_tensor("squeeze", squeeze, ("hidden", channels + sentence.shape[1]))
    check_tensor("expand", expand, (channels, squeeze.shape[0]))
    pooled = torch.cat([x.flatten(1, 2).mean(2), sentence.to(x.dtype)], 1)
    return _channel_gate(v, _excited(pooled, squeeze, expand))


def class_semantics_attention(
    v: Tensor, semantics: Tensor, squeeze: Tensor, expand: Tensor
) -> tuple[Tensor, DiagonalMap]:
    """g = sigmoid(W2 relu(W1 mean over time of class scores)): channels of a video chosen by the classes that occur in
    it.

    v ``[B, G, C, N]`` over N moments; ``semantics`` ``[B, K, T]`` scores of K classes over time; ``squeeze``
    ``[hidden, K]``, ``expand`` ``[G*C, hidden]``.
    """
    check_tensor("v", v, ("B", "G", "C", "N"))
    check_tensor("semantics", semantics, (v.shape[0], "K", "T"))
    check_tensor("squeeze", squeeze, ("hidden", semantics.shape[1]))
    check_tensor("expand", expand, (v.shape[1] * v.shape[2], squeeze.shape[0]))
    return _channel_gate(v, _excited(semantics.to(v.dtype).mean(2), squeeze, expand))


def convolutional_glu(x: Tensor, v: Tensor, kernel: Tensor, bias: Tensor, *, grid: Grid) -> tuple[Tensor, AttentionMap]:
    """y = GELU(depthwise 3x3(x) + b) * v: a GLU whose gate sees the nearest neighbours (Shi, arXiv:2311.17132).

    x, v ``[B, H, N, E]`` are the two halves of one projection; ``kernel`` ``[H*E, 3, 3]``, ``bias`` ``[H*E]``. The map
    is diagonal over tokens, one per channel. The neighbours enter through the gate alone.
    """
    _, h, n, e = check_values(v, x=x)
    sides = check_sides(grid, n, 2)
    check_odd("kernel", kernel, h * e, 2)
    check_tensor("bias", bias, (h * e,))
    local = correlate(planes(x), kernel, sides) + bias.to(x.dtype)[:, None]
    return token_gate(v, tokens(functional.gelu(local), h))


def _features(x: Tensor, v: Tensor) -> None:
    check_tensor("v", v, ("B", "G", "C", "N"))
    check_tensor("x", x, (*v.shape[:3], "N"))


def _excited(pooled: Tensor, squeeze: Tensor, expand: Tensor) -> Tensor:
    return torch.sigmoid(torch.relu(pooled @ squeeze.to(pooled.dtype).T) @ expand.to(pooled.dtype).T)


def _channel_gate(v: Tensor, gate: Tensor) -> tuple[Tensor, DiagonalMap]:
    """v scaled by ``[B, G*C]``."""
    apart = gate.unflatten(1, v.shape[1:3])
    return apart[..., None].to(v.dtype) * v, DiagonalMap(apart, domain="channel")


def _examples(**shapes: tuple[int, ...]) -> Any:
    """An example with features x and v and these parameters."""

    def example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
        features = dict.fromkeys(("x", "v"), (2, GROUPS, WIDTH, count))
        return example_tensors(seed, dtype, **features, **shapes)

    return example


def _semantics_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"v": (2, GROUPS, WIDTH, count), "semantics": (2, 5, count), "squeeze": (3, 5), "expand": (8, 3)}
    return example_tensors(seed, dtype, **shapes)


def _glu_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(count)
    n = grid[0] * grid[1]
    shapes = {"x": (2, 3, n, 1), "v": (2, 3, n, 1), "kernel": (3, 3, 3), "bias": (3,)}
    return {**example_tensors(seed, dtype, **shapes), "grid": grid}


def _resolution_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_examples(squeeze=(2, 3, 8), expand=(2, 8, 3))(seed, count, dtype), "resolution": 1}


def _glu_parts(parts: dict[str, Any]) -> dict[str, Any]:
    kernel, bias = parts["kernel"].flatten(0, 1).unflatten(-1, (3, 3)), parts["bias"].flatten()
    return {"x": parts["source"], "v": head_values(parts), "kernel": kernel, "bias": bias, "grid": grid_of(parts)}


def _channels_first(parts: dict[str, Any]) -> dict[str, Tensor]:
    """Values with channels as rows, which gate themselves."""
    v = head_values(parts).transpose(2, 3)
    return {"x": v, "v": v}


def _eca_parts(parts: dict[str, Any]) -> dict[str, Any]:
    return {**_channels_first(parts), "kernel": parts["kernel"]}


def _resolution_parts(parts: dict[str, Any]) -> dict[str, Any]:
    squeeze, expand = parts["squeeze"].flatten(0, 1).T[None], parts["expand"].flatten(0, 1)[None]
    return {**_channels_first(parts), "squeeze": squeeze, "expand": expand}


def _contrast_parts(parts: dict[str, Any]) -> dict[str, Any]:
    squeeze, expand = parts["squeeze"].flatten(0, 1).T, parts["expand"].flatten(0, 1)
    biases = {"squeeze_bias": parts["squeeze_bias"], "expand_bias": parts["expand_bias"].flatten()}
    return {**_channels_first(parts), "squeeze": squeeze, "expand": expand, **biases}


VARIANTS = (
    Variant(
        name="efficient-channel-attention",
        paper="#6 ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks (2019)",
        family="channel",
        priority="C",
        operator=efficient_channel_attention,
        example=_examples(kernel=(eca_kernel_size(GROUPS * WIDTH),)),
        reference="timm layers/eca.py",
        recipe=Recipe(
            parameters={"kernel": Parameter("3", small)}, prepare=_eca_parts, finish=channels_last, ignores=UNUSED
        ),
    ),
    Variant(
        name="resolution-aware-channel-attention",
        paper="#1 DFYP: A Dynamic Fusion Framework with Spectral Channel Attention and Adaptive Operator learning for Crop Yield "
        "Prediction (2025)",
        family="channel",
        priority="C",
        operator=resolution_aware_channel_attention,
        example=_resolution_example,
        note="Known from the abstract: squeeze and excitation, with a pair of matrices for each resolution as the reading of "
        "'resolution-specific'.",
        recipe=Recipe(
            parameters={"squeeze": Parameter("HE4", small), "expand": Parameter("HE4", small)},
            prepare=_resolution_parts,
            finish=channels_last,
            ignores=UNUSED,
        ),
    ),
    Variant(
        name="contrast-aware-channel-attention",
        paper="#90 Lightweight Image Super-Resolution with Information Multi-distillation Network (2019)",
        family="channel",
        priority="C",
        operator=contrast_aware_channel_attention,
        example=_examples(squeeze=(2, 8), expand=(8, 2), squeeze_bias=(2,), expand_bias=(8,)),
        note="The reduction of 16 channels to 1 is 8 to 2 in the example.",
        recipe=Recipe(
            parameters={
                "squeeze": Parameter("HE4", small), "expand": Parameter("HE4", small), "squeeze_bias": Parameter("4"),
                "expand_bias": Parameter("HE"),
            },
            prepare=_contrast_parts,
            finish=channels_last,
            ignores=UNUSED,
        ),
    ),
    Variant(
        name="sentence-attention",
        paper="#54 Sentence Attention Blocks for Answer Grounding (2023)",
        family="channel",
        priority="C",
        operator=sentence_attention,
        example=_examples(sentence=(2, 5), squeeze=(3, 13), expand=(8, 3)),
        note="Known from the abstract: how image and sentence meet (here side by side before the first matrix) is assumed.",
    ),
    Variant(
        name="class-semantics-attention",
        paper="#35 Class Semantics-based Attention for Action Detection (2021)",
        family="channel",
        priority="C",
        operator=class_semantics_attention,
        example=_semantics_example,
        note="Known from the abstract: squeeze and excitation of the mean class scores is assumed; channels only.",
    ),
    Variant(
        name="convolutional-glu",
        paper="#62 TransNeXt: Robust Foveal Visual Perception for Vision Transformers (2023)",
        family="channel",
        priority="C",
        operator=convolutional_glu,
        example=_glu_example,
        reference="DaiShiResearch/TransNeXt",
        note="The projection after the product is not part of the operator.",
        recipe=Recipe(
            learned=SOURCE,
            parameters={"kernel": Parameter("HE9", small), "bias": Parameter("HE")},
            prepare=_glu_parts,
            ignores=UNUSED,
        ),
    ),
)  # fmt: skip
