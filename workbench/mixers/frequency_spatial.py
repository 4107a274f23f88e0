"""Attention modules of image networks that mix what frequencies, directions and places say. Channels never mix.

    FSAM   y = g_c g_s v      g_c: gate of each channel from one coefficient of its cosine transform
                              g_s: gate of each place from the maximum and deviation over channels
    ACFA   y = g_c g_s v      g_c from mean and maximum over places, g_s from mean and maximum over channels; then, by quarters of
           the channels: times a learned plane, times a learned column, times a learned row, and a depthwise convolution
    TFFA   y_i = a_i0 w v_i + a_i1 (F^-1(W . F v))_i + a_i2 (psi * v)_i      a_i: softmax over the three domains

All three are linear in v with the gates held fixed. The first two gate every number of v, so their maps are diagonal but for the
last quarter of ACFA, which is a band. TFFA is a diagonal, a circulant and a band, each with rows scaled by a_i.

What a paper does to its image as a whole comes from ``x``, which is v in the network. Features are ``[B, H, N, E]``; C = H*E
channels are numbered head by head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.channels import (
    channel_map,
    check_square,
    check_values,
    correlate,
    correlation_map,
    planes,
    token_gate,
    tokens,
)
from workbench.mixers.image import Grid, check_grid, grid_of, spread
from workbench.mixers.scored import check_tensor
from workbench.patterns.algebra import HeadsMap, SumMap
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.toeplitz import ToeplitzMap

FREQUENCIES = ((0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0))
"""The first (row, column) frequencies of FcaNet's ranking, of which FSATFusion takes 16."""


def frequency_spatial_attention(
    x: Tensor,
    v: Tensor,
    squeeze: Tensor,
    expand: Tensor,
    kernel: Tensor,
    *,
    grid: Grid,
    frequencies: Sequence[tuple[int, int]] = FREQUENCIES[:1],
) -> tuple[Tensor, AttentionMap]:
    """FSAM: x, v ``[B, H, N, E]``. Channel c is summed up by its coefficient at the frequency of its share of the channels.

    ``frequencies`` are (row, column) frequencies of the cosine transform, for equal shares of the channels; ``squeeze``
    ``[hidden, C]`` and ``expand`` ``[C, hidden]`` make the channel gate, ``kernel`` ``[2, s, s]`` of odd size the gate of places.
    Source: the code of FSATFusion, after FcaNet (arXiv:2012.11879) and CBAM.
    """
    _, h, n, e = check_values(v, x=x)
    sides = check_grid(grid, n)
    _check_gates(squeeze, expand, kernel, h * e)
    pairs = isinstance(frequencies, Sequence) and all(isinstance(p, Sequence) and len(p) == 2 for p in frequencies)
    if not pairs or not frequencies or (h * e) % len(frequencies):
        got = f"{len(frequencies)} frequencies" if pairs else repr(frequencies)
        raise WorkbenchError(f"frequencies are pairs that split the {h * e} channels evenly; got {got}")
    flat = planes(x)
    basis = torch.stack([_cosines(sides, pair, flat) for pair in frequencies])
    summed = (flat * basis.repeat_interleave(h * e // len(frequencies), 0)).sum(2)
    channel_gate = torch.sigmoid(torch.relu(summed @ squeeze.to(x.dtype).T) @ expand.to(x.dtype).T)
    scaled = flat * channel_gate[..., None]
    # Channels that are all alike have no deviation, and a root no gradient at 0.
    deviation = scaled.var(1, correction=0).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    place_gate = _place_gate(torch.stack([scaled.amax(1), deviation], 1), kernel, sides)
    return token_gate(v, tokens(channel_gate[..., None] * place_gate[:, None], h))


def adaptive_cross_fusion_attention(
    x: Tensor,
    v: Tensor,
    squeeze: Tensor,
    expand: Tensor,
    kernel: Tensor,
    plane: Tensor,
    column: Tensor,
    row: Tensor,
    convolution: Tensor,
    *,
    grid: Grid,
) -> tuple[Tensor, AttentionMap]:
    """ACFA: x, v ``[B, H, N, E]`` with C divisible by 4, so that every quarter of the channels has a direction of its own.

    ``squeeze`` ``[hidden, C]``, ``expand`` ``[C, hidden]`` and ``kernel`` ``[2, s, s]`` make the gates; ``plane`` ``[C/4, N]``,
    ``column`` ``[C/4, rows]`` and ``row`` ``[C/4, columns]`` guide three quarters, ``convolution`` ``[C/4, t, t]`` of odd size
    runs over the fourth. Source: Zhang, Gu, Wang, arXiv:2512.05494.
    """
    b, h, n, e = check_values(v, x=x)
    sides = check_grid(grid, n)
    _check_gates(squeeze, expand, kernel, h * e)
    if (h * e) % 4:
        raise WorkbenchError(f"the channels H*E are split into quarters; got {h} * {e}")
    quarter = h * e // 4
    check_tensor("plane", plane, (quarter, n))
    check_tensor("column", column, (quarter, sides[0]))
    check_tensor("row", row, (quarter, sides[1]))
    check_square("convolution", convolution, quarter)
    flat = planes(x)

    def excited(pooled: Tensor) -> Tensor:
        return torch.relu(pooled @ squeeze.to(x.dtype).T) @ expand.to(x.dtype).T

    channel_gate = torch.sigmoid(excited(flat.mean(2)) + excited(flat.amax(2)))
    scaled = flat * channel_gate[..., None]
    place_gate = _place_gate(torch.stack([scaled.mean(1), scaled.amax(1)], 1), kernel, sides)
    gate = channel_gate[..., None] * place_gate[:, None]
    guides = torch.cat([plane, column.repeat_interleave(sides[1], 1), row.repeat(1, sides[0])]).to(x.dtype)
    guided, last = gate[:, : 3 * quarter] * guides, gate[:, 3 * quarter :]
    values = planes(v)
    out = torch.cat(
        [guided * values[:, : 3 * quarter], correlate(last * values[:, 3 * quarter :], convolution, sides)], 1
    )
    inner = HeadsMap(
        DiagonalMap(guided, domain="token"), correlation_map(convolution, sides, right=last.detach(), batch=b)
    )
    return tokens(out, h).to(v.dtype), channel_map(inner, e)


def triple_feature_fusion_attention(
    v: Tensor,
    logits: Tensor,
    weight: Tensor,
    spectrum: Tensor,
    scales: Tensor,
    shifts: Tensor,
    *,
    grid: Grid,
    taps: int = 5,
) -> tuple[Tensor, AttentionMap]:
    """TFFA: v ``[B, H, N, E]`` in its spatial, Fourier and wavelet domain, mixed place by place.

    ``logits`` ``[B, 3, N]`` of the three domains, before their softmax; ``weight`` ``[C]`` of the spatial one; ``spectrum``
    ``[C, rows, columns // 2 + 1]`` scales the real Fourier transform; ``scales`` and ``shifts`` ``[C, 2]`` are a and b of the
    derivative-of-Gaussian and the Mexican-hat wavelet, whose sum over ``taps`` x ``taps`` places is the third domain's kernel.
    Source: Zhang, Gu, Wang, arXiv:2512.05494.
    """
    b, h, n, e = check_values(v)
    sides = check_grid(grid, n)
    check_tensor("logits", logits, (b, 3, n))
    check_tensor("weight", weight, (h * e,))
    check_tensor("spectrum", spectrum, (h * e, sides[0], sides[1] // 2 + 1))
    check_tensor("scales", scales, (h * e, 2))
    check_tensor("shifts", shifts, (h * e, 2))
    if not bool((scales > 0).all()):
        raise WorkbenchError(f"scales of wavelets are positive; got {float(scales.min()):.4g}")
    if taps < 1 or taps % 2 == 0:
        raise WorkbenchError(f"taps is odd; got {taps}")
    work = working_dtype(v.dtype)
    values, shares, scaling = planes(v).to(work), logits.to(work).softmax(1), spectrum.to(work)
    spectral = torch.fft.irfft2(torch.fft.rfft2(values.unflatten(2, sides)) * scaling, s=sides).flatten(2)
    kernel = _wavelets(scales.to(work), shifts.to(work), taps)
    parts = torch.stack([values * weight.to(work)[:, None], spectral, correlate(values, kernel, sides)], 1)
    out = (parts * shares[:, :, None]).sum(1)
    held = shares.detach()[:, :, None].expand(-1, -1, h * e, -1)
    circulant = ToeplitzMap(
        torch.fft.irfft2(scaling.detach(), s=sides)[None].expand(b, -1, -1, -1),
        queries=sides,
        keys=sides,
        circular=True,
        left=held[:, 1],
    )
    inner = SumMap(
        DiagonalMap(held[:, 0] * weight.detach()[:, None], domain="token"),
        circulant,
        correlation_map(kernel, sides, left=held[:, 2], batch=b),
    )
    return tokens(out, h).to(v.dtype), channel_map(inner, e)


def _check_gates(squeeze: Tensor, expand: Tensor, kernel: Tensor, channels: int) -> None:
    check_tensor("squeeze", squeeze, ("hidden", channels))
    check_tensor("expand", expand, (channels, squeeze.shape[0]))
    check_square("kernel", kernel, 2)


def _cosines(sides: Grid, pair: tuple[int, int], like: Tensor) -> Tensor:
    """The cosine transform's basis function of a pair of frequencies, ``[N]``."""
    waves = []
    for length, frequency in zip(sides, pair, strict=True):
        place = torch.arange(length, dtype=like.dtype, device=like.device) + 0.5
        wave = (math.pi * frequency * place / length).cos() * length**-0.5
        waves.append(wave * 2**0.5 if frequency else wave)
    return (waves[0][:, None] * waves[1]).flatten()


def _place_gate(summary: Tensor, kernel: Tensor, sides: Grid) -> Tensor:
    """Gate of every place ``[B, N]`` from two numbers each ``[B, 2, N]``."""
    picture = summary.unflatten(2, sides)
    return torch.sigmoid(
        functional.conv2d(picture, kernel.to(summary.dtype)[None], padding=kernel.shape[-1] // 2)
    ).flatten(1)


def _wavelets(scales: Tensor, shifts: Tensor, taps: int) -> Tensor:
    """The sum of both wavelets over places of rows times columns, ``[C, taps, taps]``."""
    place = torch.arange(taps, dtype=scales.dtype, device=scales.device) - taps // 2
    u = (place - shifts[..., None]) / scales[..., None]  # [C, 2, taps]
    bell = (-u.square() / 2).exp()
    gaussian = -(scales[:, 0, None] ** -0.5) * u[:, 0] * bell[:, 0]
    hat = 2 / ((3 * scales[:, 1, None]) ** 0.5 * math.pi**0.25) * (1 - u[:, 1].square()) * bell[:, 1]
    return gaussian[:, :, None] * gaussian[:, None, :] + hat[:, :, None] * hat[:, None, :]


def _example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(count)
    n = grid[0] * grid[1]
    shapes = {"x": (2, 2, n, 4), "squeeze": (3, 8), "expand": (8, 3), "kernel": (2, 7, 7)}
    found = example_tensors(seed, dtype, **shapes)
    return {**found, "v": found["x"].clone(), "grid": grid, "frequencies": FREQUENCIES[:4]}


def _directional_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    found = _example(seed, count, dtype)
    rows, columns = found["grid"]
    guides = {"plane": (2, rows * columns), "column": (2, rows), "row": (2, columns), "convolution": (2, 3, 3)}
    found = {name: value for name, value in found.items() if name != "frequencies"}
    return {**found, **example_tensors(seed + 1000, dtype, **guides)}


def _fused_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(count)
    n = grid[0] * grid[1]
    shapes = {"v": (2, 2, n, 4), "logits": (2, 3, n), "weight": (8,), "spectrum": (8, grid[0], grid[1] // 2 + 1)}
    found = example_tensors(seed, dtype, **shapes, scales=(8, 2), shifts=(8, 2))
    return {**found, "scales": 1 + functional.softplus(found["scales"]), "grid": grid}


def _unit(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.3


def _own(parts: dict[str, Any]) -> Tensor:
    return spread(parts["v"], parts["q"].shape[1])


def _gates(parts: dict[str, Any]) -> dict[str, Any]:
    own = _own(parts)
    return {
        "x": own,
        "v": own,
        "squeeze": parts["squeeze"].flatten(1),
        "expand": parts["expand"].flatten(0, 1),
        "kernel": parts["kernel"].unflatten(0, (2, 7, 7)),
        "grid": grid_of(parts),
    }


def _prepare(parts: dict[str, Any]) -> dict[str, Any]:
    given = _gates(parts)
    channels = given["squeeze"].shape[1]
    return {**given, "frequencies": FREQUENCIES[: math.gcd(channels, 4)]}


def _prepare_directional(parts: dict[str, Any]) -> dict[str, Any]:
    """Guides are tables of 7 x 7, 7 and 7 numbers, stretched over the image."""
    given = _gates(parts)
    rows, columns = given["grid"]
    quarter = given["squeeze"].shape[1] // 4

    def stretched(name: str, table: tuple[int, int], sides: tuple[int, int]) -> Tensor:
        tables = parts[name].flatten(0, 1)[:quarter].unflatten(1, table)
        return functional.interpolate(tables[None], sides, mode="bilinear")[0].flatten(1)

    return {
        **given,
        "plane": stretched("plane", (7, 7), (rows, columns)),
        "column": stretched("column", (7, 1), (rows, 1)),
        "row": stretched("row", (1, 7), (1, columns)),
        "convolution": parts["convolution"].flatten(0, 1)[:quarter].unflatten(1, (3, 3)),
    }


def _prepare_fused(parts: dict[str, Any]) -> dict[str, Any]:
    """The spectrum is a table of 7 x 7 numbers, stretched over the frequencies."""
    rows, columns = grid_of(parts)
    table = parts["spectrum"].flatten(0, 1).unflatten(1, (7, 7))
    return {
        "v": _own(parts),
        "logits": parts["domains"].mean(1).transpose(1, 2),
        "weight": parts["weight"].flatten(),
        "spectrum": functional.interpolate(table[None], (rows, columns // 2 + 1), mode="bilinear")[0],
        "scales": 1 + functional.softplus(parts["scales"].flatten(0, 1)),
        "shifts": parts["shifts"].flatten(0, 1),
        "grid": (rows, columns),
    }


_STRUCTURED = (
    "#67 Decoding with Structured Awareness: Integrating Directional, Frequency-Spatial, and Structural Attention for Medical "
    "Image Segmentation (2025)"
)
_GATES = {"squeeze": Parameter("4HE", _unit), "expand": Parameter("HE4", _unit), "kernel": Parameter("98", _unit)}

VARIANTS = (
    Variant(
        name="frequency-spatial-attention",
        paper="#86 FSATFusion: Frequency-Spatial Attention Transformer for Infrared and Visible Image Fusion (2025)",
        family="channel",
        priority="C",
        operator=frequency_spatial_attention,
        example=_example,
        reference="Lmmh058/FSATFusion Networks/network.py FAM_Attention",
        note="Frequencies count over the image as it is; the code resamples it to 224 x 224 and takes multiples of 32.",
        recipe=Recipe(parameters=_GATES, prepare=_prepare, ignores=("q", "k")),
    ),
    Variant(
        name="adaptive-cross-fusion-attention",
        paper=_STRUCTURED,
        family="channel",
        priority="C",
        operator=adaptive_cross_fusion_attention,
        example=_directional_example,
        reference="arXiv:2512.05494, abstract",
        note="From the abstract and a summary of the paper: guides enter as they are, without the paper's convolutions of them; "
        "normalisation and fusion of the quarters follow outside.",
        recipe=Recipe(
            parameters={
                **_GATES,
                "plane": Parameter("HE49", torch.ones),
                "column": Parameter("HE7", torch.ones),
                "row": Parameter("HE7", torch.ones),
                "convolution": Parameter("HE9", _unit),
            },
            prepare=_prepare_directional,
            ignores=("q", "k"),
        ),
    ),
    Variant(
        name="triple-feature-fusion-attention",
        paper=_STRUCTURED,
        family="convolution",
        priority="C",
        operator=triple_feature_fusion_attention,
        example=_fused_example,
        reference="arXiv:2512.05494, abstract",
        note="From the abstract and a summary of the paper: one weight per channel in the spatial domain, wavelets of rows times "
        "columns, and a softmax over the domains at every place are assumptions.",
        recipe=Recipe(
            learned={"domains": Learned("H3")},
            parameters={
                "weight": Parameter("HE", torch.ones),
                "spectrum": Parameter("HE49", torch.ones),
                "scales": Parameter("HE2"),
                "shifts": Parameter("HE2"),
            },
            prepare=_prepare_fused,
            ignores=("q", "k"),
        ),
    ),
)
