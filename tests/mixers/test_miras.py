"""Miras's memories against their update rules, with losses and gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.mixers.miras import VARIANTS

Operator = Callable[..., tuple[Tensor, AttentionMap]]
RECORDS = {record.name: record for record in VARIANTS}
Learner = Callable[[list[Tensor], list[Tensor], float, float], tuple[list[Tensor], Tensor]]


def example(name: str, tokens: int) -> dict[str, Any]:
    return RECORDS[name].example(0, tokens, torch.float64)


def network(weights: list[Tensor], x: Tensor) -> Tensor:
    if len(weights) == 1:
        return weights[0] @ x
    return x + layer_norm(weights[0] @ gelu(weights[1] @ x), x.shape)


def learn(
    given: dict[str, Any],
    b: int,
    h: int,
    v: Tensor,
    loss: Callable[[Tensor, int], Tensor],
    read: Callable[[list[Tensor]], list[Tensor]],
    update: Callable[[list[Tensor], list[Tensor], int], list[Tensor]],
    retention: Callable[[list[Tensor], list[Tensor]], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One head of one example: ``read`` makes weights of what is carried, ``update`` changes that by the gradient."""
    carried = [given[name][h].clone().requires_grad_() for name in ("w1", "w2") if given[name] is not None]
    outs, losses, kept = [], [], []
    for t in range(v.shape[0]):
        weights = read(carried)
        cost = loss(network(weights, given["k"][b, h, t]) - v[t], t)
        slopes = torch.autograd.grad(cost, weights, create_graph=True)
        carried = update(carried, list(slopes), t)
        outs.append(network(read(carried), given["q"][b, h, t]))
        losses.append(cost.detach())
        kept.append(retention(read(carried), weights).detach())
    return torch.stack(outs), torch.stack(losses), torch.stack(kept)


def agree(
    op: Operator, given: dict[str, Any], rule: Callable[[int, int], dict[str, Any]], derivative: bool = True
) -> None:
    """Outputs, losses, retention and, by one backward pass per number, the map."""
    out, amap = op(**given)
    n, e = given["q"].shape[2:]
    shared = given["v"].repeat_interleave(given["q"].shape[1] // given["v"].shape[1], 1)
    for b, h in ((0, 1), (1, 0)):
        v = shared[b, h].clone().requires_grad_()
        wanted, losses, kept = learn(given, b, h, v, **rule(b, h))
        torch.testing.assert_close(out[b, h], wanted.detach())
        torch.testing.assert_close(amap.native()[b, h], losses)
        torch.testing.assert_close(amap.retention[b, h], kept)
        if derivative:
            blocks = torch.zeros(n, e, n, e, dtype=torch.float64)
            for i in range(n):
                for c in range(e):
                    blocks[i, c] = torch.autograd.grad(wanted[i, c], v, retain_graph=True)[0]
            torch.testing.assert_close(amap.dense()[b, h], blocks.diagonal(0, 1, 3).mean(-1))


def square(new: list[Tensor], old: list[Tensor]) -> Tensor:
    return sum(((a - b) ** 2).sum() / 2 for a, b in zip(new, old, strict=True))


def descend(given: dict[str, Any], b: int, h: int) -> Callable[[list[Tensor], list[Tensor], int], list[Tensor]]:
    def update(carried: list[Tensor], slopes: list[Tensor], t: int) -> list[Tensor]:
        alpha, eta = given["alpha"][b, h, t], given["eta"][b, h, t]
        return [alpha * w - eta * g for w, g in zip(carried, slopes, strict=True)]

    return update


def delta_rule(given: dict[str, Any], strength: Tensor) -> Tensor:
    """S_t = alpha S_{t-1} - strength k (k^T S_{t-1} - v^T) from the given matrix, in a loop."""
    state = given["w1"].transpose(-1, -2).expand(2, 2, 4, 4)
    v, k, q = given["v"].repeat_interleave(2, 1), given["k"], given["q"]
    out = []
    for t in range(k.shape[2]):
        error = (k[:, :, t, None] @ state)[..., 0, :] - v[:, :, t]
        step = strength[:, :, t, None, None] * k[:, :, t, :, None] * error[..., None, :]
        state = given["alpha"][:, :, t, None, None] * state - step
        out.append((q[:, :, t, None] @ state)[..., 0, :])
    return torch.stack(out, 2)


def matrix(given: dict[str, Any]) -> dict[str, Any]:
    """The same with a matrix for a memory."""
    return {**given, "w1": given["w1"][:, :, :4], "w2": None}


def moneta_is_its_update_rule_and_the_delta_rule_for_squares(op: Operator) -> None:
    given = example("moneta", 6)

    def rule(power: float, norm: float) -> Callable[[int, int], dict[str, Any]]:
        return lambda b, h: {
            "loss": lambda e, t: (e.abs() ** power).sum(),
            "read": lambda sums: [a / (a.abs() ** norm).sum() ** ((norm - 2) / norm) for a in sums],
            "update": descend(given, b, h),
            "retention": square,
        }

    agree(op, given, rule(3.0, 4.0))
    agree(op, {**given, "loss_power": 1.5, "norm_power": 3.0}, rule(1.5, 3.0), derivative=False)
    linear = {**matrix(given), "loss_power": 2.0, "norm_power": 2.0}
    torch.testing.assert_close(op(**linear)[0], delta_rule(linear, 2 * given["eta"]), rtol=1e-10, atol=1e-10)


def yaad_is_its_update_rule_and_the_delta_rule_without_a_threshold(op: Operator) -> None:
    given = example("yaad", 6)

    def rule(b: int, h: int) -> dict[str, Any]:
        def loss(e: Tensor, t: int) -> Tensor:
            limit = given["delta"][b, h, t]
            return (e**2).sum() / 2 if e.norm() <= limit else limit * e.abs().sum()

        return {"loss": loss, "read": lambda w: w, "update": descend(given, b, h), "retention": square}

    agree(op, given, rule)
    given = matrix({**given, "delta": torch.full_like(given["delta"], 1e9)})
    torch.testing.assert_close(op(**given)[0], delta_rule(given, given["eta"]), rtol=1e-10, atol=1e-10)
    # below any error the length of a value no longer matters, only the signs of the errors
    given["delta"] = torch.full_like(given["delta"], 1e-9)
    still = given["alpha"].cumprod(2)[..., None, None] * given["w1"][:, None]
    torch.testing.assert_close(op(**given)[0], (still @ given["q"][..., None])[..., 0], atol=1e-7, rtol=0)


def memora_is_its_update_rule(op: Operator) -> None:
    for shape in ("mlp", "matrix"):
        given = example("memora", 6) if shape == "mlp" else matrix(example("memora", 6))

        def rule(b: int, h: int, given: dict[str, Any] = given) -> dict[str, Any]:
            return {
                "loss": lambda e, t: (e**2).sum() / 2,
                "read": lambda logs: [log.softmax(-1) for log in logs],
                "update": lambda logs, slopes, t: [
                    given["alpha"][b, h, t] * log.log_softmax(-1) - given["eta"][b, h, t] * g
                    for log, g in zip(logs, slopes, strict=True)
                ],
                "retention": lambda new, old: sum((a * (a / b).log()).sum() for a, b in zip(new, old, strict=True)),
            }

        agree(op, given, rule)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "moneta": moneta_is_its_update_rule_and_the_delta_rule_for_squares,
    "yaad": yaad_is_its_update_rule_and_the_delta_rule_without_a_threshold,
    "memora": memora_is_its_update_rule,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    IDENTITIES[name](RECORDS[name].operator)


def test_the_examples_of_yaad_have_errors_on_both_sides_of_the_threshold() -> None:
    near, same = [], []
    for seed in range(6):  # the first token of each: later memories differ
        given = RECORDS["yaad"].example(seed, 1, torch.float64)
        squares = RECORDS["yaad"](**{**given, "delta": torch.full_like(given["delta"], 1e9)})[1].surprise
        near.append((2 * squares).sqrt() <= given["delta"])
        same.append(RECORDS["yaad"](**given)[1].surprise == squares)
    assert torch.equal(torch.stack(near), torch.stack(same))
    assert 0 < int(torch.stack(near).sum()) < 24


def test_a_memory_of_zeros_stays_finite() -> None:
    given = matrix(example("moneta", 4))
    given["w1"] = torch.zeros_like(given["w1"]).requires_grad_()
    out, amap = RECORDS["moneta"](**given)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert bool(given["w1"].grad.isfinite().all())
    assert bool(amap.dense().isfinite().all())


def test_errors_name_the_argument() -> None:
    given = example("moneta", 5)
    for name, wrong in (
        ("eta", given["eta"][:, :1]),
        ("w2", given["w2"][:, :2]),
        ("loss_power", 1.0),
        ("norm_power", 1.5),
    ):
        with pytest.raises(WorkbenchError, match=f"^{name} "):
            RECORDS["moneta"](**{**given, name: wrong})
