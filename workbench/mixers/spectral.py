"""Mixing in the frequency domain: fixed and learned spectra, and convolutions as large as the image.

    y = F^-1 (m * F v)        a circular convolution with the kernel F^-1 m, per channel

Values are ``[B, H, N, E]`` over a grid with channel c = h*E + e of C = H*E. Circulant maps keep their kernel alone.
Fourier mixing takes the Fourier transform itself as the map, the DCT maps tokens to frequencies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.channels import channel_map, check_sides, check_values, planes, tokens
from workbench.mixers.gating import SOURCE, UNUSED, head_values, small
from workbench.mixers.image import Grid, grid_of
from workbench.mixers.scored import check_tensor
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.fourier import FourierMap
from workbench.patterns.lazy import LazyMap
from workbench.patterns.toeplitz import ToeplitzMap


def global_filter(v: Tensor, spectrum: Tensor, *, grid: Grid) -> tuple[Tensor, AttentionMap]:
    """y = F^-1(m * F v) over an image with a learned m per channel (Rao et al., arXiv:2107.00645).

    v ``[B, H, N, E]``; ``spectrum`` m ``[C, rows, columns // 2 + 1, 2]``, real and imaginary parts of the half spectrum
    of a real kernel. The same for every input.
    """
    _, h, n, e = check_values(v)
    rows, columns = check_sides(grid, n, 2)
    check_tensor("spectrum", spectrum, (h * e, rows, columns // 2 + 1, 2))
    mask = torch.view_as_complex(spectrum.to(working_dtype(v.dtype)).contiguous())
    return tokens(_filtered(v, mask[None], (rows, columns)), h), _circulant(mask[None], (rows, columns), v)


def spectral_or_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spectrum: Tensor,
    *,
    grid: Grid,
    layer: int,
    spectral_layers: int = 4,
    scale: float | None = None,
) -> tuple[Tensor, AttentionMap]:
    """SpectFormer's mixer: a global filter in the first ``spectral_layers`` layers, softmax attention in those after
    (Patro et al., arXiv:2304.06446).

    q, k ``[B, H, N, E]``, v ``[B, H, N, V]``, ``spectrum`` as in ``global_filter``. Layer ``layer`` (from 0) uses what
    it needs.
    """
    if not all(isinstance(number, int) and number >= 0 for number in (layer, spectral_layers)):
        raise WorkbenchError(f"layers count from 0; got layer={layer!r}, spectral_layers={spectral_layers!r}")
    if layer < spectral_layers:
        return global_filter(v, spectrum, grid=grid)
    return softmax_attention(q, k, v, mask=Mask(), scale=scale)


def adaptive_frequency_filter(
    x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *, grid: Grid, threshold: float = 0.01
) -> tuple[Tensor, AttentionMap]:
    """y = F^-1(m(F x) * F v), the spectrum made of the input: m = shrink(W2 relu(W1 F x + b1) + b2) (Huang et al.,
    arXiv:2307.14008).

    x, v ``[B, H, N, E]``, in a network the same features; ``weight`` ``[2, 2, K, S, S]`` and ``bias`` ``[2, 2, K, S]``:
    two complex layers, real and imaginary parts, block-diagonal over K blocks of S channels, K S = C. relu and soft
    shrinkage act on real and imaginary parts apart. The residual is not part of it.
    """
    _, h, n, e = check_values(v, x=x)
    sides = check_sides(grid, n, 2)
    check_tensor("weight", weight, (2, 2, "K", "S", "S"))
    blocks, size = weight.shape[2:4]
    check_tensor("weight", weight, (2, 2, blocks, size, size))
    check_tensor("bias", bias, (2, 2, blocks, size))
    if blocks * size != h * e:
        raise WorkbenchError(f"blocks of channels have {h * e} in all; got {blocks} of {size}")
    work = working_dtype(x.dtype)
    spectrum = torch.fft.rfft2(planes(x).to(work).unflatten(2, sides), norm="ortho").unflatten(1, (blocks, size))
    parts = torch.view_as_real(spectrum).unbind(-1)
    for (real, imaginary), shifts, last in zip(weight.to(work), bias.to(work), (False, True), strict=True):
        left = _blockwise(real, parts[0]) - _blockwise(imaginary, parts[1])
        right = _blockwise(real, parts[1]) + _blockwise(imaginary, parts[0])
        shifted = [side + shift[..., None, None] for side, shift in zip((left, right), shifts, strict=True)]
        parts = tuple(functional.softshrink(s, threshold) if last else torch.relu(s) for s in shifted)
    mask = torch.complex(*parts).flatten(1, 2)
    return tokens(_filtered(v, mask, sides), h), _circulant(mask, sides, v)


def fourier_values(x: Tensor, heads: int = 1) -> Tensor:
    """What Fourier mixing adds up: x ``[B, N, D]`` transformed along its channels, real parts of all tokens and then
    imaginary ones, ``[B, heads, 2N, D / heads]``."""
    check_tensor("x", x, ("B", "N", "D"))
    spectrum = torch.fft.fft(x.to(working_dtype(x.dtype)), dim=2)
    return torch.cat([spectrum.real, spectrum.imag], 1).unflatten(2, (heads, -1)).transpose(1, 2)


def fourier_mixing(v: Tensor) -> tuple[Tensor, FourierMap]:
    """y = Re F_tokens F_channels x (Lee-Thorp et al., arXiv:2105.03824), from v = ``fourier_values(x)``.

    v ``[B, H, 2N, E]`` to ``[B, H, N, E]``. The transform along channels mixes channels and no tokens: it belongs to
    the values, and what is left is one map for all channels, cosines for real and sines for imaginary parts.
    """
    check_tensor("v", v, ("B", "H", "2N", "E"))
    if v.shape[2] % 2:
        raise WorkbenchError(f"v holds real and imaginary parts of every token, an even number; got {v.shape[2]}")
    b, h, double, _ = v.shape
    real, imaginary = v.to(working_dtype(v.dtype)).chunk(2, 2)
    out = torch.fft.fft(torch.complex(real, imaginary), dim=2).real.to(v.dtype)
    return out, FourierMap(b, h, double // 2, dtype=v.dtype, device=v.device)


def transform_once(v: Tensor, gain: Tensor) -> tuple[Tensor, AttentionMap]:
    """y_k = g_k c_k sum_j cos(pi (j + 1/2) k / N) v_j for the first modes of an orthonormal DCT-II (Poli et al.,
    arXiv:2211.14453).

    v ``[B, H, N, E]`` to ``[B, H, modes, E]``; ``gain`` ``[C, modes]``. The network goes on in the frequency domain,
    there is no inverse transform: rows of the map are frequencies, its columns tokens.
    """
    b, h, n, e = check_values(v)
    check_tensor("gain", gain, (h * e, "modes"))
    modes = gain.shape[1]
    if modes > n:
        raise WorkbenchError(f"{n} tokens have as many modes; got gains of {modes}")
    work = working_dtype(v.dtype)
    held = gain.detach().to(work)

    def basis(lo: int, hi: int) -> Tensor:
        mode = torch.arange(lo, hi, device=v.device, dtype=work)
        place = torch.arange(n, device=v.device, dtype=work) + 0.5
        return (math.pi / n * mode[:, None] * place).cos() * torch.where(mode == 0, 1.0, 2.0).div(n).sqrt()[:, None]

    def rows(lo: int, hi: int) -> Tensor:
        return (held[:, lo:hi, None] * basis(lo, hi)).expand(b, -1, -1, -1)

    out = gain.to(v.dtype) * (planes(v) @ basis(0, modes).to(v.dtype).T)
    sign = "signed" if bool((held < 0).any()) or bool(held[:, 1:].any()) else "nonnegative"
    inner = LazyMap((b, h * e, modes, n), rows, domain="frequency", sign=sign, row_sum="free")
    return tokens(out, h), channel_map(inner, e)


def _filtered(v: Tensor, mask: Tensor, sides: tuple[int, ...]) -> Tensor:
    """``[B, C, N]``: the half spectrum of every channel times ``mask``."""
    image = planes(v).to(mask.real.dtype).unflatten(2, sides)
    return torch.fft.irfft2(torch.fft.rfft2(image) * mask, s=sides).flatten(2).to(v.dtype)


def _circulant(mask: Tensor, sides: tuple[int, ...], v: Tensor) -> AttentionMap:
    kernel = torch.fft.irfft2(mask.detach(), s=sides)
    inner = ToeplitzMap(kernel.expand(v.shape[0], -1, -1, -1), queries=sides, keys=sides, circular=True)
    return channel_map(inner, v.shape[3])


def _blockwise(weight: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("kso,bksyx->bkoyx", weight, x)


def _gridded(count: int) -> tuple[tuple[int, ...], int, int]:
    grid = nearest_grid(count)
    return grid, grid[0] * grid[1], grid[1] // 2 + 1


def _filter_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid, n, half = _gridded(count)
    return {**example_tensors(seed, dtype, v=(2, 3, n, 1), spectrum=(3, grid[0], half, 2)), "grid": grid}


def _spectformer_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid, n, half = _gridded(count)
    shapes = {"q": (2, 3, n, 4), "k": (2, 3, n, 4), "v": (2, 3, n, 1), "spectrum": (3, grid[0], half, 2)}
    return {**example_tensors(seed, dtype, **shapes), "grid": grid, "layer": 3}


def _adaptive_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid, n, _ = _gridded(count)
    shapes = {"x": (2, 4, n, 1), "v": (2, 4, n, 1), "weight": (2, 2, 2, 2, 2), "bias": (2, 2, 2, 2)}
    return {**example_tensors(seed, dtype, **shapes), "grid": grid}


def _fourier_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"v": fourier_values(example_tensors(seed, torch.float64, x=(2, count, 6))["x"], 2).to(dtype)}


def _once_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    return example_tensors(seed, dtype, v=(2, 3, count, 1), gain=(3, min(5, count)))


def _resized(weights: Tensor, grid: Grid) -> Tensor:
    """A spectrum ``[H, E, 8 * 5 * 2]``, learned for 8 x 8 tokens, at the frequencies of another grid."""
    known = weights.flatten(0, 1).unflatten(1, (8, 5, 2)).permute(0, 3, 1, 2)
    size = (grid[0], grid[1] // 2 + 1)
    return functional.interpolate(known, size, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


def _filter_parts(parts: dict[str, Any]) -> dict[str, Any]:
    grid = grid_of(parts)
    return {"v": head_values(parts), "spectrum": _resized(parts["spectrum"], grid), "grid": grid}


def _spectformer_parts(parts: dict[str, Any]) -> dict[str, Any]:
    features = {name: parts[name] for name in ("q", "k")}
    return {**features, **_filter_parts(parts), "layer": 0}


def _fourier_parts(parts: dict[str, Any]) -> dict[str, Any]:
    v = head_values(parts)
    return {"v": fourier_values(v.transpose(1, 2).flatten(2), v.shape[1])}


def _adaptive_parts(parts: dict[str, Any]) -> dict[str, Any]:
    weight = torch.stack([parts["first"], parts["second"]])
    bias = torch.stack([parts["first_bias"], parts["second_bias"]])
    return {"x": parts["source"], "v": head_values(parts), "weight": weight, "bias": bias, "grid": grid_of(parts)}


_SPECTRUM = Parameter("HE80", small)
_SPECTFORMER = "#81 SpectFormer: Frequency and Attention is what you need in a Vision Transformer (2023)"

VARIANTS = (
    Variant(
        name="global-filter",
        paper="Global Filter Networks for Image Classification (2021)",
        family="convolution",
        priority="C",
        operator=global_filter,
        example=_filter_example,
        reference="raoyongming/GFNet GlobalFilter",
        recipe=Recipe(parameters={"spectrum": _SPECTRUM}, prepare=_filter_parts, ignores=UNUSED),
    ),
    Variant(
        name="spectformer",
        paper=_SPECTFORMER,
        family="convolution",
        priority="C",
        operator=spectral_or_attention,
        example=_spectformer_example,
        reference="badripatro/SpectFormers SpectralGatingNetwork",
        note="Its spectral layers are global filters; what is its own are the attention layers after them. The example is the "
        "last of four spectral layers; a native model runs spectral layers.",
        recipe=Recipe(parameters={"spectrum": _SPECTRUM}, prepare=_spectformer_parts, ignores=UNUSED),
    ),
    Variant(
        name="adaptive-frequency-filter",
        paper="#76 Adaptive Frequency Filters As Efficient Global Token Mixers (2023)",
        family="convolution",
        priority="C",
        operator=adaptive_frequency_filter,
        example=_adaptive_example,
        reference="microsoft/TokenMixers Adaptive Frequency Filters/affnet/modules/aff_block.py",
        recipe=Recipe(
            learned=SOURCE,
            parameters={
                "first": Parameter("2HEE", small), "second": Parameter("2HEE", small),
                "first_bias": Parameter("2HE"), "second_bias": Parameter("2HE"),
            },
            prepare=_adaptive_parts,
            ignores=UNUSED,
        ),
    ),
    Variant(
        name="fourier-mixing",
        paper="FNet: Mixing Tokens with Fourier Transforms (2021)",
        family="convolution",
        priority="B",
        operator=fourier_mixing,
        example=_fourier_example,
        reference="transformers FNetBasicFourierTransform",
        note="Values are real and imaginary parts after the transform along channels.",
        recipe=Recipe(prepare=_fourier_parts, ignores=UNUSED),
    ),
    Variant(
        name="transform-once",
        paper="#77 Transform Once: Efficient Operator Learning in Frequency Domain (2022)",
        family="convolution",
        priority="C",
        operator=transform_once,
        example=_once_example,
        reference="DiffEqML/kairos",
        note="One learned gain per mode and channel stands for the layers that follow in the frequency domain.",
    ),
)  # fmt: skip
