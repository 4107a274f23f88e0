"""Networks over tokens: derivatives against formulas and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from math import erf, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import UnknownName, WorkbenchError

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N = 6


def given(name: str, tokens: int = N, **changes: Any) -> dict[str, Any]:
    return {**variants()[name].example(3, tokens, torch.float64), **changes}


def phi(value: Tensor) -> Tensor:
    return value.clone().apply_(lambda z: 0.5 * (1 + erf(z / sqrt(2))))


def slope(value: Tensor) -> Tensor:
    return phi(value) + value * (-value.square() / 2).exp() / (2 * torch.pi) ** 0.5


def differences(op: Operator, p: dict[str, Any]) -> Tensor:
    """d o_ic / d v_jc averaged over channels, by central differences of the output."""
    v, step = p["v"], 1e-5
    out = torch.zeros(*v.shape[:3], N, dtype=torch.float64)
    for h in range(v.shape[1]):
        for j in range(N):
            for e in range(v.shape[3]):
                moved = torch.zeros_like(v)
                moved[:, h, j, e] = step
                change = (op(**{**p, "v": v + moved})[0] - op(**{**p, "v": v - moved})[0]) / (2 * step)
                out[:, h, :, j] += change[:, h, :, e] / v.shape[3]
    return out


def network(v: Tensor, p: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output of the token network and its derivative ``[B, H, E, N, N]`` at v."""
    z = torch.einsum("oj,bhje->bhoe", p["first"], v) + p["first_bias"][:, None]
    out = torch.einsum("io,bhoe->bhie", p["second"], z * phi(z)) + p["second_bias"][:, None]
    return out, torch.einsum("io,bhoe,oj->bheij", p["second"], slope(z), p["first"])


def two_matrices_and_a_slope(op: Operator) -> None:
    p = given("mlp-mixer")
    wanted, derivative = network(p["v"], p)
    out, found = op(**p)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(found.dense(), derivative.mean(2))
    torch.testing.assert_close(found.dense(), differences(op, p), atol=1e-7, rtol=1e-6)
    # Far on the positive side GELU is the identity, and the map the static product of the matrices.
    _, found = op(**{**p, "first_bias": torch.full((7,), 50.0).double()})
    torch.testing.assert_close(found.dense(), (p["second"] @ p["first"]).expand(2, 2, N, N))


def the_gate_mixes_tokens(op: Operator) -> None:
    p = given("ninformer")
    v, w = p["v"], p["weight"].view(2, 2, 2, 2)
    gate, derivative = network(v, p)
    projected = torch.einsum("hegf,bgnf->bhne", w, v)
    out, found = op(**p)
    torch.testing.assert_close(out, gate * projected)
    own = torch.einsum("hehe->he", w)
    wanted = derivative * projected.transpose(2, 3)[..., None]
    wanted = wanted + torch.diag_embed((gate * own[:, None]).transpose(2, 3))
    torch.testing.assert_close(found.dense(), wanted.mean(2))
    torch.testing.assert_close(found.dense(), differences(op, p), atol=1e-7, rtol=1e-6)
    # A token network that is zero but for its bias mixes nothing.
    _, found = op(**{**p, "first": torch.zeros_like(p["first"])})
    assert not (found.dense() * (1 - torch.eye(N, dtype=torch.float64))).any()
    assert found.dense().any()


def no_token_sees_another(op: Operator) -> None:
    p = given("activator")
    x = p["v"].transpose(1, 2).reshape(2, N, 4)
    z, value = torch.einsum("oc,bnc->bno", p["gate"], x), torch.einsum("oc,bnc->bno", p["value"], x)
    wanted = torch.einsum("co,bno->bnc", p["leave"], z * phi(z) * value)
    out, found = op(**p)
    torch.testing.assert_close(out, wanted.view(2, N, 2, 2).transpose(1, 2))
    inner = slope(z)[..., None] * p["gate"] * value[..., None] + (z * phi(z))[..., None] * p["value"]
    own = torch.einsum("co,bnoc->bnc", p["leave"], inner).view(2, N, 2, 2).mean(-1).transpose(1, 2)
    torch.testing.assert_close(found.dense(), torch.diag_embed(own))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "mlp-mixer": two_matrices_and_a_slope,
    "ninformer": the_gate_mixes_tokens,
    "activator": no_token_sees_another,
}


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("silu", lambda z: z / (1 + (-z).exp())),
        ("relu", lambda z: z.clamp(min=0)),
        ("sigmoid", lambda z: 1 / (1 + (-z).exp())),
    ],
)
def test_activations(activation: str, function: Callable[[Tensor], Tensor]) -> None:
    p = given("activator", activation=activation)
    x = p["v"].transpose(1, 2).reshape(2, N, 4)
    wanted = (function(x @ p["gate"].T) * (x @ p["value"].T)) @ p["leave"].T
    out, _ = variants()["activator"](**p)
    torch.testing.assert_close(out.transpose(1, 2).reshape(2, N, 4), wanted)


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="no activation 'tanh'; known: gelu, silu, relu, sigmoid"):
        variants()["activator"](**given("activator", activation="tanh"))
    with pytest.raises(WorkbenchError, match=r"first is floating point \[hidden, 6\]"):
        variants()["mlp-mixer"](**given("mlp-mixer", first=torch.ones(7, 5)))
    with pytest.raises(WorkbenchError, match=r"weight is floating point \[4, 4\]"):
        variants()["ninformer"](**given("ninformer", weight=torch.ones(2, 2)))
