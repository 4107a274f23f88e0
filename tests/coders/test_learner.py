"""Training steps: the start, the schedule, and going on from a saved state to the last bit."""

from __future__ import annotations

import json

import pytest
import torch

from workbench.coders.catalogue import coder_kinds, make_coder
from workbench.coders.learner import Learner, default_rate
from workbench.coders.start import active_subspace, geometric_median
from workbench.errors import WorkbenchError


def rows(n: int = 64, width: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def learner_of(kind: str, steps: int = 20, **options: object) -> Learner:
    extra = {"k": 3} if kind in ("topk", "batchtopk", "matryoshka") else {}
    coder = make_coder(kind, 10, 24, generator=torch.Generator().manual_seed(0), **extra)
    return Learner(coder, steps=steps, rows=64, **options)


@pytest.mark.parametrize("kind", coder_kinds())
def test_going_on_from_a_state_changes_no_bit(kind: str) -> None:
    whole = learner_of(kind, dead_after=64)
    wanted = [whole.step(rows(seed=i)) for i in range(20)]
    first = learner_of(kind, dead_after=64)
    for i in range(9):
        first.step(rows(seed=i))
    tensors, labels = first.state()
    second = learner_of(kind, dead_after=64)
    second.restore({name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(labels)))
    for i in range(9, 20):
        assert second.step(rows(seed=i)) == wanted[i]
    one, other = whole.finish(), second.finish()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_rate_warms_up_and_cools_down() -> None:
    learner = learner_of("topk", steps=100, rate=1.0)
    factors = []
    for at in range(100):
        learner.at = at
        factors.append(learner._schedule())
    assert factors[0] == 0.5
    assert factors[1] == factors[79] == 1.0
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert default_rate(2**14) == 3e-4 < default_rate(2**12) == 6e-4


def test_decoder_rows_keep_norm_one_where_the_kind_wants_it() -> None:
    for kind, unit in (("topk", True), ("relu", False)):
        learner = learner_of(kind, normalise="none", rate=0.05)
        for i in range(5):
            learner.step(rows(seed=i))
        norms = learner.coder.W_dec.detach().norm(dim=1)
        assert bool(torch.allclose(norms, torch.ones(24), atol=1e-5)) == unit


def test_geometric_median_ignores_outliers() -> None:
    x = rows(101)
    x[0] = 1e6
    middle = geometric_median(x)
    assert float((middle - x[1:].mean(0)).norm()) < 0.5
    around = (x - middle) / (x - middle).norm(dim=1, keepdim=True)
    assert float(around.sum(0).norm()) < 1e-2  # its defining property


def test_active_subspace_is_that_of_the_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 5, generator=generator)).Q.T
    x = torch.randn(500, 5, generator=generator) @ basis + 3
    found = active_subspace(x + 1e-4 * torch.randn(500, 40, generator=generator))
    assert len(found) == 5
    torch.testing.assert_close(found.T @ found, basis.T @ basis, atol=1e-3, rtol=0)
    x[:, 7] += 1000 * torch.randn(500, generator=generator)  # one huge dimension hides nothing
    assert len(active_subspace(x)) == 6


def test_start_is_taken_from_the_first_rows() -> None:
    learner = learner_of("topk")
    x = rows(500)
    learner.start(x)
    scaled = x * learner.scale_in
    assert float(scaled.norm(dim=1).mean()) == pytest.approx(10**0.5, rel=1e-5)
    torch.testing.assert_close(learner.coder.b_dec.detach(), geometric_median(scaled))
    read = learner.coder.W_enc.detach().T
    torch.testing.assert_close(read / read.norm(dim=1, keepdim=True), learner.coder.W_dec.detach())
    written = learner.coder(scaled) - learner.coder.b_dec  # of the size that explains most
    assert float((written * (scaled - learner.coder.b_dec - written)).sum()) == pytest.approx(0, abs=1e-2)


def test_what_is_wrong_is_told() -> None:
    bad = rows()
    bad[1, 1] = float("inf")
    with pytest.raises(WorkbenchError, match="finite numbers"):
        learner_of("topk").start(bad)
    learner = learner_of("topk", steps=1)
    learner.step(rows())
    with pytest.raises(WorkbenchError, match="is over"):
        learner.step(rows())
    with pytest.raises(WorkbenchError, match="at least one step"):
        learner_of("topk", steps=0)
