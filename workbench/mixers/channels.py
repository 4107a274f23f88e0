"""Operators that treat every channel by itself: layouts, convolutions and their maps.

Values are ``[B, H, N, E]`` everywhere. An operator with coefficients per channel works on the planes ``[B, C, N]`` with C = H*E
and channel c = h*E + e. Its map is that of the channels where E is 1, so that every channel is a head, and otherwise a
``PerChannelMap`` with the channels' maps inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.scored import check_tensor
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.per_channel import PerChannelMap
from workbench.patterns.toeplitz import ToeplitzMap


def planes(x: Tensor) -> Tensor:
    """``[B, H, N, E]`` as ``[B, C, N]``."""
    return x.transpose(2, 3).flatten(1, 2)


def tokens(x: Tensor, heads: int) -> Tensor:
    """``[B, C, N]`` as ``[B, H, N, E]``."""
    return x.unflatten(1, (heads, -1)).transpose(2, 3)


def channel_map(inner: AttentionMap, width: int) -> AttentionMap:
    """The map of values ``width`` wide, from the maps of their channels."""
    return inner if width == 1 else PerChannelMap(inner, width)


def check_values(v: Tensor, **others: Tensor) -> tuple[int, int, int, int]:
    """``(B, H, N, E)`` of v; raises unless the others have v's shape."""
    check_tensor("v", v, ("B", "H", "N", "E"))
    b, h, n, e = v.shape
    for name, tensor in others.items():
        check_tensor(name, tensor, (b, h, n, e))
    return b, h, n, e


def check_sides(grid: Any, count: int, axes: int | None = None, name: str = "grid") -> tuple[int, ...]:
    """The sides of a grid of one to three axes with ``count`` cells."""
    fits = isinstance(grid, Sequence) and len(grid) in ((1, 2, 3) if axes is None else (axes,))
    fits = fits and all(isinstance(n, int) and n > 0 for n in grid)
    if not fits or prod(grid) != count:
        kinds = "one to three" if axes is None else str(axes)
        raise WorkbenchError(f"{name} is {kinds} positive sides with {count} cells; got {grid!r}")
    return tuple(grid)


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """The value; raises unless it is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise WorkbenchError(f"{name} is a whole number of at least {least}; got {value!r}")
    return value


def check_square(name: str, kernel: Tensor, *leading: int | str) -> None:
    """Raise unless ``kernel`` is ``[*leading, s, s]`` with an odd side s."""
    check_tensor(name, kernel, (*leading, "s", "s"))
    if kernel.shape[-1] != kernel.shape[-2] or kernel.shape[-1] % 2 == 0:
        wanted = ", ".join(str(axis) for axis in (*leading, "s", "s"))
        raise WorkbenchError(f"{name} is [{wanted}] with an odd size s; got {list(kernel.shape)}")


def check_odd(name: str, kernel: Tensor, channels: int, axes: int) -> None:
    """Raise unless ``kernel`` is ``[C, taps, ...]`` with an odd number of taps along each axis."""
    check_tensor(name, kernel, (channels, *("taps",) * axes))
    if any(length % 2 == 0 for length in kernel.shape[1:]):
        raise WorkbenchError(f"{name} has an odd number of taps along each axis; got {list(kernel.shape)}")


def correlate(x: Tensor, weight: Tensor, sides: tuple[int, ...], dilation: int = 1) -> Tensor:
    """Every channel of ``[B, C, N]`` under an odd kernel of its own ``[C, taps, ...]``, zeros around the grid, as in
    ``torch.nn.Conv2d``."""
    run = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[len(sides) - 1]
    padding = [length // 2 * dilation for length in weight.shape[1:]]
    found = run(
        x.unflatten(2, sides), weight.to(x.dtype)[:, None], padding=padding, dilation=dilation, groups=x.shape[1]
    )
    return found.flatten(2)


def dilated(weight: Tensor, dilation: int) -> Tensor:
    """The kernel ``[..., C, taps, ...]`` with zeros between its taps; axes after the first are taps."""
    if dilation == 1:
        return weight
    lengths = [dilation * (n - 1) + 1 for n in weight.shape[1:]]
    out = weight.new_zeros(weight.shape[0], *lengths)
    out[(slice(None), *(slice(None, None, dilation) for _ in lengths))] = weight
    return out


def correlation_map(
    weight: Tensor,
    sides: tuple[int, ...],
    dilation: int = 1,
    *,
    left: Tensor | None = None,
    right: Tensor | None = None,
    batch: int = 1,
    kv_heads: int | None = None,
) -> ToeplitzMap:
    """The map of ``correlate``, gated on either side by ``[B, C, N]``."""
    kernel = dilated(weight.detach(), dilation)
    axes = range(1, kernel.ndim)
    return ToeplitzMap(
        kernel.flip(*axes)[None].expand(batch, *kernel.shape),
        queries=sides,
        keys=sides,
        first=[-(length // 2) for length in kernel.shape[1:]],
        left=left,
        right=right,
        kv_heads=kv_heads,
    )


def causal_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """sum_{j <= i} kernel_{i-j} x_j for ``[B, C, N]`` and ``[C, L]`` or ``[B, C, L]``, by FFT in the working type of x."""
    n, length, work = x.shape[2], min(kernel.shape[-1], x.shape[2]), working_dtype(x.dtype)
    size = n + length - 1
    spectrum = torch.fft.rfft(x.to(work), n=size) * torch.fft.rfft(kernel[..., :length].to(work), n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :n]


def token_gate(v: Tensor, gate: Tensor) -> tuple[Tensor, AttentionMap]:
    """gate * v for values ``[B, H, N, E]`` and a gate of the same shape, with its map."""
    out = gate.to(v.dtype) * v
    return out, channel_map(DiagonalMap(planes(gate), domain="token"), v.shape[3])
