"""Frequency, direction and place modules against explicit gates, matrices and transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.frequency_spatial import (
    adaptive_cross_fusion_attention,
    frequency_spatial_attention,
    triple_feature_fusion_attention,
)

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def example(name: str, count: int = 12) -> dict[str, Any]:
    return variants()[name].example(11, count, torch.float64)


def picture(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[B, C, rows, columns]``."""
    return x.transpose(2, 3).flatten(1, 2).unflatten(2, grid)


def of_tokens(pictures: Tensor) -> Tensor:
    """``[B, 2, N, 4]``."""
    return pictures.flatten(2).unflatten(1, (2, 4)).transpose(2, 3)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def coefficients_and_places_gate(op: Operator) -> None:
    given = example("frequency-spatial-attention")
    x = picture(given["x"], given["grid"])
    rows, columns = given["grid"]
    summed = torch.zeros(2, 8, dtype=torch.float64)
    for c in range(8):
        u, w = given["frequencies"][c // 2]
        for i in range(rows):
            for j in range(columns):
                wave = math.cos(math.pi * u * (i + 0.5) / rows) * math.cos(math.pi * w * (j + 0.5) / columns)
                wave *= (math.sqrt(2) if u else 1) * (math.sqrt(2) if w else 1) / math.sqrt(rows * columns)
                summed[:, c] += x[:, c, i, j] * wave
    gate = sigmoid((summed @ given["squeeze"].T).clamp(min=0) @ given["expand"].T)
    scaled = x * gate[:, :, None, None]
    summary = torch.stack([scaled.amax(1), scaled.std(1, correction=0)], 1)
    place = sigmoid(torch.nn.functional.conv2d(summary, given["kernel"][None], padding=3))
    out, found = op(**given)
    torch.testing.assert_close(out, of_tokens(scaled * place))
    gates = of_tokens(gate[:, :, None, None] * place)
    torch.testing.assert_close(found.dense(), torch.diag_embed(gates.mean(-1)))
    # Gates of weights 0 are 1/2 each.
    none = {name: torch.zeros_like(given[name]) for name in ("expand", "kernel")}
    out, _ = op(**{**given, **none})
    torch.testing.assert_close(out, given["v"] / 4)


def quarters_have_directions(op: Operator) -> None:
    given = example("adaptive-cross-fusion-attention")
    x = picture(given["x"], given["grid"])

    def excited(pooled: Tensor) -> Tensor:
        return (pooled @ given["squeeze"].T).clamp(min=0) @ given["expand"].T

    gate = sigmoid(excited(x.mean((-2, -1))) + excited(x.amax((-2, -1))))[:, :, None, None]
    summary = torch.stack([(x * gate).mean(1), (x * gate).amax(1)], 1)
    gate = gate * sigmoid(torch.nn.functional.conv2d(summary, given["kernel"][None], padding=3))
    first, second, third, fourth = (gate * picture(given["v"], given["grid"])).chunk(4, 1)
    wanted = torch.cat(
        [
            first * given["plane"].unflatten(1, given["grid"]),
            second * given["column"][:, :, None],
            third * given["row"][:, None, :],
            torch.nn.functional.conv2d(fourth, given["convolution"][:, None], padding=1, groups=2),
        ],
        1,
    )
    out, found = op(**given)
    torch.testing.assert_close(out, of_tokens(wanted))
    inner = found.native().dense()
    assert (inner[:, :6] == torch.diag_embed(inner[:, :6].diagonal(0, -2, -1))).all()
    torch.testing.assert_close(inner @ given["v"].transpose(2, 3).reshape(2, 8, 12, 1), wanted.view(2, 8, 12, 1))


def three_domains_are_mixed(op: Operator) -> None:
    given = example("triple-feature-fusion-attention")
    v, (rows, columns) = picture(given["v"], given["grid"]), given["grid"]
    shares = given["logits"].exp() / given["logits"].exp().sum(1, keepdim=True)
    # The whole spectrum, with the half that a real transform leaves out, averaged with its mirror image where both are there.
    whole = torch.zeros(8, rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            at = (i, j) if j <= columns // 2 else (-i % rows, columns - j)
            mirrored = (-at[0] % rows, at[1]) if at[1] in (0, columns / 2) else at
            whole[:, i, j] = (given["spectrum"][:, at[0], at[1]] + given["spectrum"][:, mirrored[0], mirrored[1]]) / 2
    spectral = torch.fft.ifft2(torch.fft.fft2(v) * whole).real
    kernel = torch.zeros(8, 5, 5, dtype=torch.float64)
    for c in range(8):
        (a, d), (b, f) = given["scales"][c].tolist(), given["shifts"][c].tolist()
        slope = [-((t - b) / a) / math.sqrt(a) * math.exp(-((t - b) ** 2) / (2 * a * a)) for t in range(-2, 3)]
        hat = [
            2 / (math.sqrt(3 * d) * math.pi**0.25) * (1 - ((t - f) / d) ** 2) * math.exp(-((t - f) ** 2) / (2 * d * d))
            for t in range(-2, 3)
        ]
        for one in (slope, hat):
            kernel[c] += torch.outer(*[torch.tensor(one, dtype=torch.float64)] * 2)
    banded = torch.nn.functional.conv2d(v, kernel[:, None], padding=2, groups=8)
    mixed = [shares[:, d, None].unflatten(2, given["grid"]) for d in range(3)]
    wanted = mixed[0] * given["weight"][:, None, None] * v + mixed[1] * spectral + mixed[2] * banded
    out, found = op(**given)
    torch.testing.assert_close(out, of_tokens(wanted))
    torch.testing.assert_close(found.matvec(given["v"]), of_tokens(wanted))
    only = torch.zeros_like(given["logits"])
    only[:, 0] = 800
    out, found = op(**{**given, "logits": only, "weight": torch.ones_like(given["weight"])})
    torch.testing.assert_close(out, given["v"])
    torch.testing.assert_close(found.dense(), torch.eye(12, dtype=torch.float64).expand(2, 2, 12, 12))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "frequency-spatial-attention": coefficients_and_places_gate,
    "adaptive-cross-fusion-attention": quarters_have_directions,
    "triple-feature-fusion-attention": three_domains_are_mixed,
}


def test_the_first_frequency_is_the_mean() -> None:
    given = example("frequency-spatial-attention")
    x = picture(given["x"], given["grid"])
    none = torch.zeros_like(given["kernel"])
    out, _ = frequency_spatial_attention(**{**given, "frequencies": ((0, 0),), "kernel": none})
    gate = sigmoid((x.mean((-2, -1)) * 12**0.5 @ given["squeeze"].T).clamp(min=0) @ given["expand"].T)
    torch.testing.assert_close(out, of_tokens(x * gate[:, :, None, None] / 2))


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example("frequency-spatial-attention")
    for name, value, message in (
        ("frequencies", ((0, 0),) * 3, "split the 8 channels evenly; got 3"),
        ("expand", given["expand"][:4], r"expand is floating point \[8, 3\]"),
        ("kernel", given["kernel"][:, :6, :6], "odd size"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            frequency_spatial_attention(**{**given, name: value})
    given = example("adaptive-cross-fusion-attention")
    for name, value, message in (
        ("plane", given["plane"][:, :3], r"plane is floating point \[2, 12\]"),
        ("convolution", given["convolution"][:, :2, :2], "odd size"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            adaptive_cross_fusion_attention(**{**given, name: value})
    given = example("triple-feature-fusion-attention")
    for name, value, message in (
        ("taps", 4, "taps is odd"),
        ("spectrum", given["spectrum"][..., :1], r"spectrum is floating point \[8, 3, 3\]"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            triple_feature_fusion_attention(**{**given, name: value})


def test_oblong_kernels_and_negative_scales_are_refused() -> None:
    for name, argument in (
        ("frequency-spatial-attention", "kernel"),
        ("adaptive-cross-fusion-attention", "kernel"),
        ("adaptive-cross-fusion-attention", "convolution"),
    ):
        given = example(name)
        with pytest.raises(WorkbenchError, match=f"{argument} is .* odd size s"):
            variants()[name](**{**given, argument: given[argument][:, 1:]})
    given = example("triple-feature-fusion-attention")
    with pytest.raises(WorkbenchError, match="scales of wavelets are positive"):
        variants()["triple-feature-fusion-attention"](**{**given, "scales": -given["scales"]})
