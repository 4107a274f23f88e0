"""The Titans memory against its equations, with gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.mixers.titans import VARIANTS

Operator = Callable[..., tuple[Tensor, AttentionMap]]
RECORDS = {record.name: record for record in VARIANTS}


def example(name: str, tokens: int) -> dict[str, Any]:
    return RECORDS[name].example(0, tokens, torch.float64)


def learn(
    given: dict[str, Any], weights: list[Tensor], network: Callable[[list[Tensor], Tensor], Tensor], v: Tensor
) -> tuple[Tensor, Tensor]:
    """Momentum and forgetting token by token, with autograd's gradient: outputs and losses of one head of one example.

    Weights, q, k, v and rates are those of that head."""
    momentum = [torch.zeros_like(w) for w in weights]
    outs, losses = [], []
    for t in range(v.shape[0]):
        loss = (network(weights, given["k"][t]) - v[t]).square().sum() / 2
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        momentum = [given["eta"][t] * s - given["theta"][t] * g for s, g in zip(momentum, slopes, strict=True)]
        weights = [(1 - given["alpha"][t]) * w + s for w, s in zip(weights, momentum, strict=True)]
        outs.append(network(weights, given["q"][t]))
        losses.append(loss.detach())
    return torch.stack(outs), torch.stack(losses)


def of_head(given: dict[str, Any], b: int, h: int) -> dict[str, Tensor]:
    return {name: given[name][b, h] for name in ("q", "k", "theta", "eta", "alpha")}


def linear_memory_is_momentum_descent(op: Operator) -> None:
    given = example("titans-linear-memory", 12)
    out, amap = op(**given)
    v = given["v"].repeat_interleave(2, 1)
    for b, h in ((0, 0), (1, 3)):
        start = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
        wanted, _ = learn(of_head(given, b, h), [start], lambda w, x: w[0] @ x, v[b, h])
        torch.testing.assert_close(out[b, h], wanted.detach())
    torch.testing.assert_close(amap.matvec(given["v"]), out)
    # a row by the transporter of the pair (memory, momentum)
    given = example("titans-linear-memory", 90)
    _, amap = op(**given)
    i, k = 77, given["k"]
    memory, momentum = given["q"][:, :, i], torch.zeros_like(given["q"][:, :, i])
    row = torch.zeros(2, 4, 90, dtype=torch.float64)
    for t in range(i, -1, -1):
        theta, eta, alpha = (given[name][:, :, t, None] for name in ("theta", "eta", "alpha"))
        both = memory + momentum
        held = (both * k[:, :, t]).sum(-1, keepdim=True)
        row[:, :, t] = (theta * held)[..., 0]
        memory, momentum = (1 - alpha) * memory - theta * held * k[:, :, t], eta * both
    torch.testing.assert_close(amap.rows(i, i + 1)[:, :, 0], row)


def without_momentum_and_forgetting_it_is_the_delta_rule(op: Operator) -> None:
    given = example("titans-linear-memory", 20)
    given["eta"], given["alpha"] = torch.zeros_like(given["eta"]), torch.zeros_like(given["alpha"])
    k, theta, v = given["k"], given["theta"], given["v"].repeat_interleave(2, 1)
    state = torch.zeros(2, 4, 5, 4, dtype=torch.float64)
    wanted = []
    for t in range(20):
        error = v[:, :, t] - (k[:, :, t, None] @ state)[..., 0, :]
        state = state + theta[:, :, t, None, None] * k[:, :, t, :, None] * error[..., None, :]
        wanted.append((given["q"][:, :, t, None] @ state)[..., 0, :])
    torch.testing.assert_close(op(**given)[0], torch.stack(wanted, 2))


def linear_identities(op: Operator) -> None:
    linear_memory_is_momentum_descent(op)
    without_momentum_and_forgetting_it_is_the_delta_rule(op)


def mlp(weights: list[Tensor], x: Tensor) -> Tensor:
    return weights[0] @ torch.nn.functional.gelu(weights[1] @ x)


def deep_memory_is_momentum_descent_and_its_map_the_derivative(op: Operator) -> None:
    given = example("titans-deep-memory", 6)
    out, amap = op(**given)
    v = given["v"].repeat_interleave(2, 1)
    for b, h in ((0, 0), (1, 1)):
        weights = [given[name][h].clone().requires_grad_() for name in ("w1", "w2")]
        values = v[b, h].clone().requires_grad_()
        wanted, losses = learn(of_head(given, b, h), weights, mlp, values)
        torch.testing.assert_close(out[b, h], wanted.detach())
        torch.testing.assert_close(amap.native()[b, h], losses)
        blocks = torch.zeros(6, 4, 6, 4, dtype=torch.float64)
        for i in range(6):
            for c in range(4):
                blocks[i, c] = torch.autograd.grad(wanted[i, c], values, retain_graph=True)[0]
        torch.testing.assert_close(amap.dense()[b, h], blocks.diagonal(0, 1, 3).mean(-1))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "titans-linear-memory": linear_identities,
    "titans-deep-memory": deep_memory_is_momentum_descent_and_its_map_the_derivative,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    IDENTITIES[name](RECORDS[name].operator)


def test_the_derivative_times_a_direction_is_the_change_of_the_output() -> None:
    given = example("titans-deep-memory", 7)
    out, amap = RECORDS["titans-deep-memory"](**given)
    way, step = torch.randn_like(given["v"]), 1e-5
    ahead, _ = RECORDS["titans-deep-memory"](**{**given, "v": given["v"] + step * way})
    behind, _ = RECORDS["titans-deep-memory"](**{**given, "v": given["v"] - step * way})
    torch.testing.assert_close(amap.matvec(way), (ahead - behind) / (2 * step), atol=1e-8, rtol=1e-6)
    assert amap.exactness == "jacobian"
    assert amap.retention.shape == amap.surprise.shape == out.shape[:3]
    assert bool((amap.retention > 0).all())


def test_a_memory_of_three_thousand_tokens_gives_rows_and_blocks() -> None:
    given = example("titans-linear-memory", 3000)
    _, amap = RECORDS["titans-linear-memory"](**{name: part.float() for name, part in given.items()})
    row = amap.rows(2999, 3000)
    assert row.shape == (2, 4, 1, 3000)
    torch.testing.assert_close(amap.blocks(1000).sum((-2, -1)), amap.row_sums().sum(-1), atol=1e-2, rtol=1e-3)


def test_errors_name_the_argument() -> None:
    given = example("titans-linear-memory", 5)
    for name, wrong in (
        ("theta", given["theta"][:, :1]),
        ("k", given["k"][..., :2]),
        ("v", given["v"][:, :1].expand(-1, 3, -1, -1)),
    ):
        with pytest.raises(WorkbenchError, match=f"^{name} "):
            RECORDS["titans-linear-memory"](**{**given, name: wrong})
    given = example("titans-deep-memory", 5)
    for name, wrong in (("w1", given["w1"][:1]), ("w2", given["w2"][:, :2]), ("v", given["v"][..., :2])):
        with pytest.raises(WorkbenchError, match=f"^{name} "):
            RECORDS["titans-deep-memory"](**{**given, name: wrong})
