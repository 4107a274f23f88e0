"""Gated convolutions against loops over taps, and against matrices built one pair at a time."""

from __future__ import annotations

from collections.abc import Callable
from math import erf, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.patterns.per_channel import PerChannelMap

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N = 12


def given(name: str, tokens: int = N, **changes: Any) -> dict[str, Any]:
    return {**variants()[name].example(3, tokens, torch.float64), **changes}


def matrix(kernel: Tensor, grid: tuple[int, int], dilation: int = 1) -> Tensor:
    """The convolution of one channel with ``[side, side]``, pair by pair."""
    rows, columns = grid
    side = kernel.shape[0]
    out = torch.zeros(rows * columns, rows * columns, dtype=kernel.dtype)
    for i in range(rows * columns):
        for a in range(side):
            for b in range(side):
                y, x = i // columns + (a - side // 2) * dilation, i % columns + (b - side // 2) * dilation
                if 0 <= y < rows and 0 <= x < columns:
                    out[i, y * columns + x] += kernel[a, b]
    return out


def matrices(kernel: Tensor, grid: tuple[int, int], dilation: int = 1) -> Tensor:
    """One matrix per channel, ``[C, N, N]``."""
    return torch.stack([matrix(part, grid, dilation) for part in kernel])


def phi(value: Tensor) -> Tensor:
    return value.clone().apply_(lambda z: 0.5 * (1 + erf(z / sqrt(2))))


def large_kernels_in_two_steps(op: Operator) -> None:
    p = given("large-kernel-attention")
    grid = p["grid"]
    near, far = matrices(p["near"], grid), matrices(p["far"], grid, 3)
    wanted = torch.zeros(2, 3, N, 3 * N, dtype=torch.float64)
    for out in range(3):
        for source in range(3):
            block = p["mix"][out, source] * (far[source] @ near[source])
            wanted[:, out, :, source * N : (source + 1) * N] = p["gate"][:, out] * block
    found_out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(found_out, wanted @ p["v"])
    # Kernels and mixing that do nothing leave the square of the features.
    centre = {name: torch.zeros_like(p[name]) for name in ("near", "far")}
    centre["near"][:, 2, 2], centre["far"][:, 3, 3] = 1.0, 1.0
    v = p["gate"].reshape(2, 1, 3 * N, 1)
    squared, _ = op(**{**p, **centre, "mix": torch.eye(3, dtype=torch.float64), "v": v})
    torch.testing.assert_close(squared, p["gate"].square())


def product_of_four_features(op: Operator) -> None:
    p = given("recursive-gated-convolution")
    conv = matrices(p["kernel"], p["grid"])

    def f(x: Tensor, first: int) -> Tensor:
        return torch.stack([x[:, c] @ conv[first + c].T for c in range(x.shape[1])], 1)

    state = f(p["q"][:, :1], 0) * p["p"] / 3.0
    state = f(p["q"][:, 1:], 1) * torch.einsum("oc,bcn->bon", p["points"][0], state) / 3.0
    gate = torch.einsum("oc,bcn->bon", p["points"][1], state) / 3.0
    out, found = op(**p)
    torch.testing.assert_close(out[..., 0], f(p["v"][..., 0], 3) * gate)
    torch.testing.assert_close(found.dense(), gate[..., None] * conv[3:])
    # A kernel that does nothing and open gates: the value itself.
    still = torch.zeros_like(p["kernel"])
    still[:, 3, 3] = 1.0
    ones = {
        "p": torch.ones_like(p["p"]),
        "q": torch.ones_like(p["q"]),
        "points": [torch.ones(2, 1), torch.ones(4, 2) / 2],
    }
    same, _ = op(**{**p, **ones, "kernel": still, "alpha": 1.0})
    torch.testing.assert_close(same, p["v"])


def context_modulates_values(op: Operator) -> None:
    p = given("efficient-modulation")
    conv = matrices(p["kernel"], p["grid"])
    entered = torch.einsum("dc,bcn->bdn", p["enter"], p["x"][..., 0])
    seen = torch.stack([entered[:, d] @ conv[d].T for d in range(2)], 1)
    context = torch.einsum("cd,bdn->bcn", p["leave"], seen * phi(seen))
    out, found = op(**p)
    torch.testing.assert_close(out, context[..., None] * p["v"])
    torch.testing.assert_close(found.dense(), torch.diag_embed(context))


def two_receptive_fields_and_their_gates(op: Operator) -> None:
    p = given("spartan-spatial-mixer")
    grid = p["grid"]
    near = matrices(p["near"], grid)
    wide = matrices(p["farther"], grid, 2) @ matrices(p["far"], grid, 2)
    conv = torch.cat([near, wide])
    z = torch.stack([p["x"][:, c, :, 0] @ conv[c].T for c in range(4)], 1)
    active = z * phi(z)
    scale = torch.zeros(2, 4, dtype=torch.float64)
    for half in range(2):
        pooled = active[:, 2 * half : 2 * half + 2].sum(2) / N
        hidden = torch.einsum("hc,bc->bh", p["squeeze"][half], pooled).clamp(min=0)
        scale[:, 2 * half : 2 * half + 2] = 1 / (1 + (-torch.einsum("ch,bh->bc", p["expand"][half], hidden)).exp())
    weights = (scale[..., None] * phi(z))[..., None] * conv
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), weights)
    torch.testing.assert_close(out, weights @ p["v"])
    mixer, _ = op(**{**p, "v": p["x"]})
    torch.testing.assert_close(mixer[..., 0], scale[..., None] * active)


def the_derivative_passes_two_convolutions(op: Operator) -> None:
    p = given("ffnified-attention")
    first, second = matrices(p["query_key"], p["grid"]), matrices(p["attention_value"], p["grid"])
    z = torch.stack([p["v"][:, c, :, 0] @ first[c].T for c in range(2)], 1)
    density = (-z.square() / 2).exp() / (2 * torch.pi) ** 0.5
    slope = phi(z) + z * density
    out, found = op(**p)
    torch.testing.assert_close(out[..., 0], ((z * phi(z))[:, :, None] @ second.mT).squeeze(2))
    torch.testing.assert_close(found.dense(), second @ (slope[..., None] * first))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "large-kernel-attention": large_kernels_in_two_steps,
    "recursive-gated-convolution": product_of_four_features,
    "efficient-modulation": context_modulates_values,
    "spartan-spatial-mixer": two_receptive_fields_and_their_gates,
    "ffnified-attention": the_derivative_passes_two_convolutions,
}


@pytest.mark.parametrize("name", ["recursive-gated-convolution", "spartan-spatial-mixer", "efficient-modulation"])
def test_wide_heads_are_channels_side_by_side(name: str) -> None:
    """Two channels in each of two heads, in the place of four heads with one."""
    p = given(name)
    if name == "efficient-modulation":
        p["v"] = p["v"][..., :1]
        joined = {key: p[key].transpose(1, 3) for key in ("x", "v")}
    else:
        joined = {key: p[key].view(2, 2, 2, N).transpose(2, 3) for key in ("x", "v") if key in p}
    narrow, channels = variants()[name](**p)
    wide, found = variants()[name](**{**p, **joined})
    assert isinstance(found, PerChannelMap)
    torch.testing.assert_close(wide.transpose(2, 3).flatten(1, 2), narrow[..., 0])
    torch.testing.assert_close(found.native().dense(), channels.dense())
    torch.testing.assert_close(found.matvec(joined["v"]), wide)


def test_the_parts_of_large_kernel_attention_are_its_input_channels() -> None:
    p = given("large-kernel-attention")
    _, found = variants()["large-kernel-attention"](**p)
    assert [part.shape for part in found.native()] == [(2, 3, N, N)] * 3


def test_refusals() -> None:
    p = given("recursive-gated-convolution")
    hornet = variants()["recursive-gated-convolution"]
    with pytest.raises(WorkbenchError, match="halves the 4 channels 3 times"):
        hornet(**{**p, "points": [*p["points"], p["points"][1]]})
    with pytest.raises(WorkbenchError, match=r"points\[0\] is floating point \[2, 1\]"):
        hornet(**{**p, "points": p["points"][::-1]})
    with pytest.raises(WorkbenchError, match="kernel has an odd number of taps"):
        hornet(**{**p, "kernel": p["kernel"][..., :4]})
    with pytest.raises(WorkbenchError, match="grid is 2 positive sides"):
        hornet(**{**p, "grid": (12,)})
    p = given("spartan-spatial-mixer")
    with pytest.raises(WorkbenchError, match="even number of channels"):
        variants()["spartan-spatial-mixer"](**{**p, "x": p["x"][:, :3], "v": p["v"][:, :3]})
    p = given("efficient-modulation")
    with pytest.raises(WorkbenchError, match="whole number of times as wide"):
        variants()["efficient-modulation"](**{**p, "x": p["v"], "v": torch.cat([p["v"], p["x"]], 3)})
    p = given("large-kernel-attention")
    with pytest.raises(WorkbenchError, match=r"v is floating point \[2, 1, 36, 1\]"):
        variants()["large-kernel-attention"](**{**p, "v": p["gate"]})
