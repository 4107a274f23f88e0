"""Edge cases of every form of the gated delta rule, and its Triton form in the interpreter and compiled ahead of time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_gated_delta_rule import (
    BETA,
    Budget,
    Q,
    V,
    budget,
    gradient_budget,
    gradients,
    pieces,
    problem,
)
from torch import Tensor
from torch.nn.functional import normalize

from workbench.kernels.gated_delta_rule import REDUCTIONS, delta_rows, gated_delta_rule

FUSED: list[dict[str, Any]] = [
    {"n": 1, "heads": (1, 1, 1, 1), "dtype": torch.float32},
    {"n": 63, "heads": (2, 1, 1, 2), "widths": (20, 10), "dtype": torch.bfloat16, "decay": None, "state": False},
    {"n": 100, "heads": (1, 1, 1, 1), "widths": (16, 40), "dtype": torch.float32, "strongest": 2.0},
    {"n": 129, "heads": (1, 1, 1, 1), "dtype": torch.bfloat16, "decay": 0.02},
]


@pytest.mark.parametrize(("given", "block"), zip(FUSED, (1, 7, 40, 70), strict=True))
def test_the_triton_form_stays_within_the_error_budget(
    given: dict[str, Any], block: int, assert_within_budget: Budget
) -> None:
    budget(problem(20, **given, batch=1), "triton", assert_within_budget, block)


@pytest.mark.parametrize("given", FUSED[1:3])
def test_gradients_of_the_triton_form_stay_within_the_error_budget(
    given: dict[str, Any], assert_within_budget: Budget
) -> None:
    gradient_budget(problem(21, **{**given, "n": 40}, batch=1), "triton", assert_within_budget)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_decay_of_minus_infinity_forgets_everything(impl: str) -> None:
    given = problem(5, 90, (1, 1, 1, 1), dtype=torch.float32, decay=0.1, batch=1)
    given["log_decay"][:, :, [20, 70]] = float("-inf")
    whole = gated_delta_rule(**given, block=10, impl=impl)
    part = {name: x[:, :, 70:] for name, x in given.items() if name != "state"}
    torch.testing.assert_close(whole.output[:, :, 70:], gated_delta_rule(**part, impl="reference").output)
    assert (whole.blocks["abs"][:, :, 7:, :7] == 0).all()
    assert (whole.blocks["abs"][:, :, 6, 2:6] > 0).all()
    assert all(torch.isfinite(x).all() for x in gradients(given, impl).values())


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_strong_decays_cost_no_digits_of_the_weak_ones_beside_them(impl: str, assert_within_budget: Budget) -> None:
    given = problem(6, 64, (1, 1, 1, 1), dtype=torch.float32, decay=0.01, batch=1)
    given["log_decay"][:, :, ::7] = -3000.0
    budget(given, impl, assert_within_budget, block=16)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_repeated_keys_with_full_strength_overwrite(impl: str) -> None:
    """With beta = 1 and one key, every write replaces the last one: the map is (q.k) times the identity."""
    n = 100
    k = normalize(torch.ones(1, 1, n, 8), dim=-1)
    got = delta_rows(k, k, torch.ones(1, 1, n), lo=0, hi=n, scale=1.0, impl=impl)
    torch.testing.assert_close(got[0, 0], torch.eye(n), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "block"), [(1, 100), (9, 6), (71, 70)])
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_padding_of_blocks_is_not_their_largest_value(impl: str, n: int, block: int) -> None:
    k, beta = normalize(torch.ones(1, 1, n, 8), dim=-1), torch.full((1, 1, n), 0.1)
    expected, got = (
        gated_delta_rule(-k, k, k, beta, block=block, reduce="max", impl=form).blocks["max"]
        for form in ("reference", impl)
    )
    last = expected[0, 0, -1]
    assert (last[:-1] < 0).all()
    assert n == 9 or last[-1] < 0  # a single token; more have cells above the diagonal
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_what_lies_around_the_inputs_in_memory_does_not_matter(impl: str) -> None:
    given = problem(12, 40, (1, 1, 1, 1), (20, 12), torch.float32, batch=1)

    def surrounded(x: Tensor) -> Tensor:
        room = torch.full([n + 3 for n in x.shape], float("nan"), dtype=x.dtype).transpose(1, 2)
        view = room.transpose(1, 2)[tuple(slice(1, n + 1) for n in x.shape)]
        return view.copy_(x)

    expected = gated_delta_rule(**given, block=16, reduce=REDUCTIONS, impl=impl)
    around = {name: surrounded(x) for name, x in given.items()}
    got = gated_delta_rule(**around, block=16, reduce=REDUCTIONS, impl=impl)
    assert all(torch.equal(value, pieces(expected)[name]) for name, value in pieces(got).items())
    for (name, value), wanted in zip(gradients(around, impl).items(), gradients(given, impl).values(), strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_ahead_of_time(capability: int, compiled_for: Callable[[int, str], list[str]]) -> None:
    assert set(compiled_for(capability, "aot_gated_delta_rule:kernels")) == {
        "prepare_kernel", "scan_kernel", "output_kernel", "map_kernel",
        "wanted_kernel", "backward_scan_kernel", "pairs_kernel", "gradient_kernel",
    }  # fmt: skip


def test_a_triton_form_that_cannot_run_raises() -> None:
    with pytest.raises(RuntimeError, match="float64"):
        gated_delta_rule(Q.double(), Q.double(), V.double(), BETA, impl="triton")
    wide = torch.zeros(1, 1, 2, 300)
    with pytest.raises(RuntimeError, match="width 300"):
        gated_delta_rule(wide, wide, wide, torch.zeros(1, 1, 2), impl="triton")
