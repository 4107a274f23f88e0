"""Long convolutions against recurrences and sums written out."""

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
from workbench.errors import UnknownName, WorkbenchError
from workbench.mixers.long_convolution import hyena, orchid
from workbench.patterns.per_channel import PerChannelMap

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N = 11


def given(name: str, tokens: int = N, **changes: Any) -> dict[str, Any]:
    return {**variants()[name].example(3, tokens, torch.float64), **changes}


def toeplitz(kernel: Tensor, length: int) -> Tensor:
    """Causal matrices ``[C, N, N]`` of kernels ``[C, L]``, entry by entry."""
    out = torch.zeros(len(kernel), length, length, dtype=kernel.dtype)
    for i in range(length):
        for j in range(i + 1):
            if i - j < kernel.shape[1]:
                out[:, i, j] = kernel[:, i - j]
    return out


def gate_times_static_kernel(op: Operator) -> None:
    p = given("base-conv")
    gate = torch.einsum("oc,bcn->bon", p["weight"], p["x"][..., 0]) + p["bias"][:, None]
    wanted = gate[..., None] * toeplitz(p["kernel"], N)
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ p["v"])
    # A gate of 1 and one tap give the value of one step ago.
    kernel = torch.zeros_like(p["kernel"])
    kernel[:, 1] = 1.0
    late, _ = op(**{**p, "weight": torch.zeros(3, 3).double(), "bias": torch.ones(3).double(), "kernel": kernel})
    torch.testing.assert_close(late[:, :, 1:], p["v"][:, :, :-1])


def two_state_spaces_run_as_recurrences(op: Operator) -> None:
    p = given("h3")
    q, k, v = (p[name][..., 0] for name in ("q", "k", "v"))
    wanted = torch.zeros(2, 3, N, dtype=torch.float64)
    for b in range(2):
        for c in range(3):
            states = [0j] * 4
            for i in range(N):
                shifted = sum(float(p["shift"][c, t] * k[b, c, i - t]) for t in range(4) if i >= t)
                u = (shifted + float(p["shift_skip"][c] * k[b, c, i])) * float(v[b, c, i])
                total = float(p["skip"][c]) * u
                for s in range(4):
                    step = cmath.exp(complex(-math.exp(p["decay"][c, s]), float(p["frequency"][c, s])))
                    states[s] = step * states[s] + u
                    total += (complex(p["cosine"][c, s], -p["sine"][c, s]) * states[s]).real
                wanted[b, c, i] = float(q[b, c, i]) * total
    out, found = op(**p)
    torch.testing.assert_close(out[..., 0], wanted)
    torch.testing.assert_close(found.dense() @ p["v"], wanted[..., None])


def the_filter_is_a_network_of_the_position(op: Operator) -> None:
    p = given("hyena")
    kernel = torch.zeros(3, N, dtype=torch.float64)
    for i in range(N):
        t, turn = i / 15, 2 * math.pi * i / 16
        waves = [*(math.cos(f * turn) for f in (1e-4, 1.0)), *(-math.sin(f * turn) for f in (1e-4, 1.0))]
        z = torch.tensor([t, *waves], dtype=torch.float64)
        raw = p["leave"] @ (p["hidden"] @ (p["enter"] @ z).sin()).sin()
        kernel[:, i] = raw * (-p["decay"].abs() * t).exp()
    kernel[:, 0] += p["skip"]
    wanted = p["leave_gate"] * toeplitz(kernel, N) * p["enter_gate"].transpose(2, 3)
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ p["v"])
    # A filter that is silent but for the skip: gates and value alone.
    silent, _ = op(**{**p, "leave": torch.zeros_like(p["leave"]), "skip": torch.ones(3).double()})
    torch.testing.assert_close(silent, p["leave_gate"] * p["enter_gate"] * p["v"])


def orchid_kernel(p: dict[str, Any], correlation: bool) -> Tensor:
    """The kernel ``[B, C, N]`` by sums over tokens and frequencies."""
    x = p["x"][..., 0]
    table = [[cmath.exp(-2j * math.pi * f * i / N) for i in range(N)] for f in range(N)]
    turn = torch.tensor(table, dtype=torch.complex128)

    def spectrum(weight: Tensor) -> Tensor:
        mixed = torch.zeros_like(x)
        for i in range(N):
            for t in range(3):
                mixed[:, :, i] += weight[:, t] * x[:, :, (i + t - 1) % N]
        return (turn * mixed[:, :, None]).sum(-1)

    made = spectrum(p["first"])
    made = made.conj() * spectrum(p["second"]) if correlation else made.abs() + 0j
    taps = p["spectral"]
    even = torch.stack([(taps[:, 0] + taps[:, 2]) / 2, taps[:, 1], (taps[:, 0] + taps[:, 2]) / 2], 1)
    smooth = torch.zeros_like(made)
    for f in range(N):
        for t in range(3):
            smooth[:, :, f] += even[:, t] * made[:, :, (f + t - 1) % N]
    kernel = (turn.conj() * smooth[:, :, None]).sum(-1) / N
    assert kernel.imag.abs().max() < 1e-12
    return kernel.real / math.sqrt(N)


def input_makes_a_circulant(correlation: bool) -> Callable[[Operator], None]:
    def identity(op: Operator) -> None:
        p = given("orchid-correlation" if correlation else "orchid")
        kernel = orchid_kernel(p, correlation)
        wanted = torch.zeros(2, 3, N, N, dtype=torch.float64)
        for i in range(N):
            for j in range(N):
                wanted[:, :, i, j] = kernel[:, :, (i - j) % N]
        wanted = p["leave_gate"] * wanted * p["enter_gate"].transpose(2, 3)
        out, found = op(**p)
        torch.testing.assert_close(found.dense(), wanted)
        torch.testing.assert_close(out, wanted @ p["v"])
        rolled = {name: p[name].roll(4, 2) for name in ("x", "enter_gate", "leave_gate", "v")}
        torch.testing.assert_close(op(**{**p, **rolled})[0], out.roll(4, 2))

    return identity


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "base-conv": gate_times_static_kernel,
    "h3": two_state_spaces_run_as_recurrences,
    "hyena": the_filter_is_a_network_of_the_position,
    "orchid": input_makes_a_circulant(correlation=False),
    "orchid-correlation": input_makes_a_circulant(correlation=True),
}


@pytest.mark.parametrize("name", ["base-conv", "h3", "hyena", "orchid"])
def test_wide_heads_are_channels_side_by_side(name: str) -> None:
    p = given(name)
    narrow, channels = variants()[name](**p)
    wide = {key: p[key].transpose(1, 3) for key in p if isinstance(p[key], Tensor) and p[key].ndim == 4}
    out, found = variants()[name](**{**p, **wide})
    assert isinstance(found, PerChannelMap)
    torch.testing.assert_close(out, narrow.transpose(1, 3))
    torch.testing.assert_close(found.native().dense(), channels.dense())


def test_long_sequences_take_linear_memory() -> None:
    p = given("h3", 20_000)
    out, found = variants()["h3"](**p)
    torch.testing.assert_close(found.matvec(p["v"]), out, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(found.rows(0, 5).sum(-1), found.row_sums()[:, :, :5])


def test_refusals() -> None:
    p = given("orchid")
    with pytest.raises(UnknownName, match="no conditioning 'phase'; known: magnitude, correlation"):
        orchid(**{**p, "conditioning": "phase"})
    with pytest.raises(WorkbenchError, match="first has an odd number of taps"):
        orchid(**{**p, "first": p["first"][:, :2]})
    p = given("hyena")
    with pytest.raises(WorkbenchError, match="11 tokens are more than longest=4"):
        hyena(**{**p, "longest": 4})
    with pytest.raises(WorkbenchError, match="pairs of waves"):
        hyena(**{**p, "enter": p["enter"][:, :4]})
    with pytest.raises(WorkbenchError, match="leave_gate is floating point"):
        hyena(**{**p, "leave_gate": p["leave_gate"][:, :, 1:]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["base-conv", "h3", "hyena", "orchid", "orchid-correlation"])
def test_half_precision_is_transformed_in_the_working_type(name: str, dtype: torch.dtype) -> None:
    p = variants()[name].example(3, 40, dtype)
    wide = {key: x.double() if isinstance(x, Tensor) else x for key, x in p.items()}
    out, found = variants()[name](**p)
    wanted, _ = variants()[name](**wide)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=3e-2 * float(wanted.abs().max()))
    torch.testing.assert_close(found.matvec(p["v"]).double(), wanted, rtol=0, atol=3e-2 * float(wanted.abs().max()))
