"""Spectral mixers against circulant matrices and transforms written out."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.spectral import fourier_mixing, fourier_values
from workbench.patterns.per_channel import PerChannelMap
from workbench.patterns.softmax import SoftmaxMap

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N = 12


def given(name: str, tokens: int = N, **changes: Any) -> dict[str, Any]:
    return {**variants()[name].example(3, tokens, torch.float64), **changes}


def circulant(half: Tensor, grid: tuple[int, int]) -> Tensor:
    """Matrices ``[..., N, N]`` of the real kernel with the half spectrum ``[..., rows, columns // 2 + 1]``, by sums of waves.

    A frequency beyond the half and its mirror carry conjugate numbers; on the lines that mirror onto themselves, what is not
    symmetric drops out."""
    rows, columns = grid
    kernel = torch.zeros(*half.shape[:-2], rows, columns, dtype=torch.float64)
    for y in range(rows):
        for x in range(columns):
            for r in range(rows):
                for c in range(columns // 2 + 1):
                    wave = half[..., r, c] * cmath.exp(2j * math.pi * (r * y / rows + c * x / columns))
                    kernel[..., y, x] += wave.real * (1 if c in (0, columns / 2) else 2) / (rows * columns)
    out = torch.zeros(*half.shape[:-2], N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(N):
            y, x = i // columns - j // columns, i % columns - j % columns
            out[..., i, j] = kernel[..., y % rows, x % columns]
    return out


def a_learned_spectrum_is_a_circulant(op: Operator) -> None:
    p = given("global-filter")
    wanted = circulant(torch.view_as_complex(p["spectrum"]), p["grid"])
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted.expand(2, 3, N, N))
    torch.testing.assert_close(out, wanted @ p["v"])
    ones = torch.zeros_like(p["spectrum"])
    ones[..., 0] = 1.0
    torch.testing.assert_close(op(**{**p, "spectrum": ones})[0], p["v"])


def spectral_first_attention_later(op: Operator) -> None:
    p = given("spectformer")
    wanted = circulant(torch.view_as_complex(p["spectrum"]), p["grid"])
    for layer in (0, 3):
        out, found = op(**{**p, "layer": layer})
        torch.testing.assert_close(found.dense(), wanted.expand(2, 3, N, N))
        torch.testing.assert_close(out, wanted @ p["v"])
    out, found = op(**{**p, "layer": 4})
    weights = (p["q"] @ p["k"].mT / 2).softmax(-1)
    torch.testing.assert_close(found.dense(), weights)
    torch.testing.assert_close(out, weights @ p["v"])
    torch.testing.assert_close(op(**{**p, "layer": 1, "spectral_layers": 1})[0], weights @ p["v"])


def the_input_makes_the_spectrum(op: Operator) -> None:
    p = given("adaptive-frequency-filter")
    rows, columns = p["grid"]
    half = torch.zeros(2, 4, rows, columns // 2 + 1, dtype=torch.complex128)
    for r in range(rows):
        for c in range(columns // 2 + 1):
            for i in range(N):
                turn = cmath.exp(-2j * math.pi * (r * (i // columns) / rows + c * (i % columns) / columns))
                half[:, :, r, c] += p["x"][:, :, i, 0] * turn / math.sqrt(N)
    for step in range(2):
        weight = torch.complex(p["weight"][step, 0], p["weight"][step, 1])
        bias = torch.complex(p["bias"][step, 0], p["bias"][step, 1])
        made = torch.stack([torch.einsum("so,bsrc->borc", weight[k], half[:, 2 * k : 2 * k + 2]) for k in range(2)], 1)
        made = (made + bias[..., None, None]).flatten(1, 2)

        def shrunk(part: Tensor) -> Tensor:
            return part.sign() * (part.abs() - 0.01).clamp(min=0)

        bend = shrunk if step else (lambda part: part.clamp(min=0))
        half = torch.complex(bend(made.real), bend(made.imag))
    wanted = circulant(half, p["grid"])
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ p["v"])


def real_part_of_two_transforms(op: Operator) -> None:
    x = torch.randn(2, N, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    across, down = (
        torch.exp(-2j * math.pi * torch.outer(torch.arange(n), torch.arange(n)).double() / n) for n in (6, N)
    )
    both = (down @ x.to(torch.complex128) @ across.T).real
    for heads in (1, 2):
        values = fourier_values(x, heads)
        out, found = op(v=values)
        torch.testing.assert_close(out.transpose(1, 2).flatten(2), both)
        torch.testing.assert_close(found.dense(), torch.cat([down.real, -down.imag], 1).expand(2, heads, N, 2 * N))
        torch.testing.assert_close(found.matvec(values), out)


def the_first_modes_of_a_cosine_transform(op: Operator) -> None:
    p = given("transform-once")
    basis = torch.zeros(5, N, dtype=torch.float64)
    for k in range(5):
        for j in range(N):
            basis[k, j] = math.cos(math.pi * (j + 0.5) * k / N) * math.sqrt((1 if k == 0 else 2) / N)
    wanted = p["gain"][..., None] * basis
    out, found = op(**p)
    assert found.domain == "frequency"
    torch.testing.assert_close(found.dense(), wanted.expand(2, 3, 5, N))
    torch.testing.assert_close(out, wanted @ p["v"])
    # All modes with a gain of 1 keep the length of the signal.
    whole, found = op(v=p["v"], gain=torch.ones(3, N, dtype=torch.float64))
    torch.testing.assert_close(whole.square().sum(2), p["v"].square().sum(2))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "global-filter": a_learned_spectrum_is_a_circulant,
    "spectformer": spectral_first_attention_later,
    "adaptive-frequency-filter": the_input_makes_the_spectrum,
    "fourier-mixing": real_part_of_two_transforms,
    "transform-once": the_first_modes_of_a_cosine_transform,
}


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (1, 12), (12, 1), (2, 6)])
def test_spectra_of_every_grid(grid: tuple[int, int]) -> None:
    spectrum = torch.randn(3, grid[0], grid[1] // 2 + 1, 2, generator=torch.Generator().manual_seed(1)).double()
    p = given("global-filter", grid=grid, spectrum=spectrum)
    a_learned = circulant(torch.view_as_complex(spectrum), grid)
    out, found = variants()["global-filter"](**p)
    torch.testing.assert_close(out, a_learned @ p["v"])
    torch.testing.assert_close(found.dense(), a_learned.expand(2, 3, N, N))


@pytest.mark.parametrize("name", ["global-filter", "adaptive-frequency-filter", "transform-once"])
def test_wide_heads_are_channels_side_by_side(name: str) -> None:
    p = given(name)
    narrow, channels = variants()[name](**p)
    wide = {key: p[key].transpose(1, 3) for key in ("x", "v") if key in p}
    out, found = variants()[name](**{**p, **wide})
    assert isinstance(found, PerChannelMap)
    torch.testing.assert_close(out, narrow.transpose(1, 3))
    torch.testing.assert_close(found.native().dense(), channels.dense())


def test_attention_layers_have_the_softmax_map() -> None:
    _, found = variants()["spectformer"](**given("spectformer", layer=9))
    assert isinstance(found, SoftmaxMap)


def test_refusals() -> None:
    with pytest.raises(WorkbenchError, match=r"spectrum is floating point \[3, 3, 3, 2\]"):
        variants()["global-filter"](**given("global-filter", spectrum=torch.ones(3, 3, 4, 2)))
    with pytest.raises(WorkbenchError, match="layers count from 0"):
        variants()["spectformer"](**given("spectformer", layer=-1))
    with pytest.raises(WorkbenchError, match="blocks of channels have 4 in all; got 1 of 2"):
        variants()["adaptive-frequency-filter"](
            **given("adaptive-frequency-filter", weight=torch.ones(2, 2, 1, 2, 2), bias=torch.ones(2, 2, 1, 2))
        )
    with pytest.raises(WorkbenchError, match="12 tokens have as many modes; got gains of 13"):
        variants()["transform-once"](**given("transform-once", gain=torch.ones(3, 13)))
    with pytest.raises(WorkbenchError, match="real and imaginary parts of every token"):
        fourier_mixing(torch.ones(1, 1, 5, 2))
