"""Gradients of the top-k encoder."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from encode_problems import cast, dense, normal, problem
from torch import Tensor

from workbench.kernels.topk_encode import topk_encode

Budget = Callable[[Tensor, Sequence[Tensor], Tensor], None]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FAST = ("cpu", "triton")
NAMES = ("x", "weight", "bias", "centre")


def gradients(code: Callable[..., Tensor], given: dict[str, Any], seed: Tensor) -> list[Tensor]:
    leaves = [given[name].detach().clone().requires_grad_() for name in NAMES]
    values = code(*leaves)
    return list(torch.autograd.grad(values, leaves, seed.to(values.dtype)))


def dense_code(k: int, excluded: Tensor | None) -> Callable[..., Tensor]:
    """Values by torch's own autograd of the dense formula."""
    return lambda *leaves: torch.relu(dense(*leaves, excluded).topk(k).values)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradients_by_finite_differences(impl: str) -> None:
    given = problem(5, 4, 12)

    def code(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor) -> Tensor:
        return topk_encode(x, weight, bias, centre=centre, k=3, excluded=given["excluded"], impl=impl).values

    leaves = [given[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(code, leaves)
    assert torch.autograd.gradgradcheck(code, leaves)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_stay_within_the_error_budget(impl: str, dtype: torch.dtype, assert_within_budget: Budget) -> None:
    n, k = 40, 9
    given = cast(problem(n, 24, 100), dtype)
    given["x"], given["bias"] = given["x"] + 0.5, given["bias"] - 14.0  # some places stay empty
    excluded, seed = given["excluded"], normal(9, n, k)
    high = gradients(dense_code(k, excluded), cast(given, torch.float64), seed.float().double())

    def code(form: str) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor) -> Tensor:
            got = topk_encode(x, weight, bias, centre=centre, k=k, excluded=excluded, impl=form)
            wanted = topk_encode(x, weight, bias, centre=centre, k=k, excluded=excluded, impl="reference")
            assert torch.equal(got.indices, wanted.indices)
            assert (got.indices < 0).any()
            return got.values

        return run

    got = gradients(code(impl), given, seed)
    # The plain computation: dense products of the rounded inputs, rounded to their type at the end.
    low = [gradients(dense_code(k, excluded), given, seed), gradients(code("reference"), given, seed)]
    for i, name in enumerate(NAMES):
        assert got[i].dtype == given[name].dtype
        assert_within_budget(got[i], [one[i] for one in low], high[i])
    assert (got[1][:, excluded] == 0).all()


@pytest.mark.parametrize("impl", FAST)
def test_gradients_are_the_same_bit_for_bit_from_run_to_run(impl: str) -> None:
    given, seed = cast(problem(30, 16, 30), torch.float32), normal(9, 30, 8)
    leaves = [given[name].requires_grad_() for name in NAMES]
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        try:
            values = topk_encode(*leaves[:3], centre=leaves[3], k=8, impl=impl).values
            found.append(torch.autograd.grad(values, leaves, seed.float()))
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, bias = normal(0, 4, 3), normal(1, 3, 9), normal(2, 9)
    assert not topk_encode(x, weight, bias, k=2).values.requires_grad
    weight.requires_grad_()
    got = topk_encode(x, weight, bias, k=2)
    assert not got.indices.requires_grad
    got.values.sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None
