import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_within_budget() -> Callable[[Tensor, Sequence[Tensor], Tensor], None]:
    """``got``'s root mean square error against the float64 ``high`` is at most twice that of the plain same-dtype
    computations ``low`` plus one rounding. ``low`` holds the same computation in several orders of summation, so that one
    lucky rounding is not the bar."""

    def check(got: Tensor, low: Sequence[Tensor], high: Tensor) -> None:
        assert all(got.shape == high.shape == one.shape for one in low)
        finite = torch.isfinite(high)
        assert torch.equal(got[~finite].double(), high[~finite])
        if not finite.any():
            return

        def size(value: Tensor) -> float:
            return float(value[finite].double().square().mean().sqrt())

        error = size(got.double() - high)
        budget = 2 * max(size(one.double() - high) for one in low) + torch.finfo(torch.float32).eps * size(high)
        assert error <= budget, f"error {error:.3e} over the budget of {budget:.3e}"

    return check


@pytest.fixture
def compiled_for() -> Callable[[int, str], list[str]]:
    """``compiled_for(90, "aot_x:calls")``: names of the kernels that these calls compile for compute capability 9.0."""

    def compiled(capability: int, calls: str) -> list[str]:
        script = Path(__file__).parent / "compile_ahead.py"
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        command = [sys.executable, str(script), str(capability), calls]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line)["kernel"] for line in done.stdout.splitlines()]

    return compiled
