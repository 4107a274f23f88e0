"""512 directions in 64 dimensions, about 5 at a time: what a dictionary must find with the estimator's own settings."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import workbench as wb

F, D, K = 512, 64, 5


@cache
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
    parts = []
    for _ in range(10):
        on = torch.rand(10_000, F, generator=generator) < K / F
        parts.append(on * (0.5 + torch.rand(10_000, F, generator=generator)) @ truth)
    return torch.cat(parts), truth


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_directions_are_found_and_features_live(kind: str) -> None:
    x, truth = data()
    coder = wb.SAE(kind=kind, features=F, k=K, seed=0).fit(x)
    code = coder.transform(x)
    nearest = torch.nn.functional.normalize(coder.decoder_, dim=1) @ truth.T
    assert float(nearest.amax(0).mean()) > 0.95
    assert float(nearest.amax(1).mean()) > 0.95
    assert float((code > 0).any(0).logical_not().float().mean()) < 0.01
    assert float((code > 0).sum(1).float().mean()) == pytest.approx(K, rel=0.05)
