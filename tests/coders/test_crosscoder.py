"""Crosscoders of two models that share some of their features: shared ones and exclusive ones are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from workbench.coders.catalogue import make_coder
from workbench.coders.crosscoder import relative_norms
from workbench.coders.estimators import Crosscoder
from workbench.errors import Refused, WorkbenchError
from workbench.results import load_result

SHARED, OWN = 20, 6


def two_models(n: int = 6000, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Activations of two "models" and the planted directions ``[F, 2 D]``: first the shared, then each model's own."""
    generator = torch.Generator().manual_seed(0)

    def unit(count: int) -> Tensor:
        rows = torch.randn(count, width, generator=generator)
        return rows / rows.norm(dim=1, keepdim=True)

    count = SHARED + 2 * OWN
    a, b = unit(count), unit(count)
    a[SHARED + OWN :] = 0
    b[SHARED : SHARED + OWN] = 0
    active = (torch.rand(n, count, generator=generator) < 0.05) * (torch.rand(n, count, generator=generator) + 0.5)
    return active @ a, active @ b, torch.cat([a, b], 1)


def test_shared_and_exclusive_features_of_two_models_are_told_apart() -> None:
    a, b, truth = two_models()
    model = Crosscoder("batchtopk", features=48, k=2, steps=400, batch=128, rate=8e-3).fit([a, 2 * b])
    coder = model.coder_
    rows = coder.W_dec / torch.tensor([1.0] * 24 + [2.0] * 24)
    cosine, match = (truth / truth.norm(dim=1, keepdim=True) @ (rows / rows.norm(dim=1, keepdim=True)).T).max(1)
    assert float(cosine.mean()) > 0.95
    assert match.unique().numel() > 0.9 * len(truth)
    sizes = [float(a.norm(dim=1).mean()), float(2 * b.norm(dim=1).mean())]
    norms = relative_norms(coder, scales=sizes, parts=["base", "chat"])
    share = norms.shares[match, 1]
    good = cosine > 0.95
    assert int(good.sum()) >= 0.85 * len(truth)
    shared, only_a, only_b = (
        share[part][good[part]] for part in (slice(SHARED), slice(SHARED, SHARED + OWN), slice(SHARED + OWN, None))
    )
    assert float(shared.min()) > 0.35
    assert float(shared.max()) < 0.65
    assert float(only_a.max()) < 0.2
    assert float(only_b.min()) > 0.8
    assert [round(float(group.median()), 1) for group in (only_a, shared, only_b)] == [0, 0.5, 1]
    wanted = ["shared"] * SHARED + ["only base"] * OWN + ["only chat"] * OWN
    kinds = norms.kinds
    right = [kinds[i] == kind for i, kind, seen in zip(match.tolist(), wanted, good, strict=True) if seen]
    assert sum(right) >= 0.9 * len(right)
    raw = relative_norms(coder)
    found = raw.shares[match[:SHARED][good[:SHARED]], 1]
    assert float((found - 2 / 3).abs().max()) < 0.15  # b is twice as large


def test_norms_are_those_of_the_parts(tmp_path: Path) -> None:
    coder = make_coder("topk", 7, 5, k=2, reads=(3, 4), writes=(3, 4))
    with torch.no_grad():
        coder.W_dec.zero_()
        coder.W_dec[0] = torch.tensor([3.0, 0, 0, 0, 0, 4.0, 0])
        coder.W_dec[1, 0] = 2.0
        coder.W_dec[2, 6] = 2.0
        coder.W_dec[3] = torch.tensor([1.0, 0, 0, 0, 0, 5.0, 0])
    norms = relative_norms(coder)
    assert norms.norms.tolist() == [[3, 4], [2, 0], [0, 2], [1, 5], [0, 0]]
    assert norms.kinds == ["shared", "only part 0", "only part 1", "between", "empty"]
    assert norms.shares[0].tolist() == [pytest.approx(3 / 7), pytest.approx(4 / 7)]
    assert bool(norms.cosines.isnan().all())  # parts of different widths
    assert relative_norms(coder, scales=[1.0, 4 / 3]).shares[0].tolist() == [0.5, 0.5]
    frame = norms.frame()
    assert list(frame.columns) == [
        "feature",
        "kind",
        "cosine",
        "norm part 0",
        "share part 0",
        "norm part 1",
        "share part 1",
    ]
    assert len(frame) == 5
    assert norms.plot().get_xlabel() == "share of the decoder's norm in part 1"
    saved = load_result(norms.save(tmp_path / "norms"))
    assert torch.equal(saved.tensors["norms"], norms.norms)


def test_cosines_between_parts_of_one_width() -> None:
    coder = make_coder("topk", 9, 2, k=1, reads=(3, 3, 3), writes=(3, 3, 3))
    with torch.no_grad():
        coder.W_dec.copy_(torch.tensor([[1.0, 0, 0, 1, 1, 0, 0, 0, 2], [0, 2, 0, 0, -1, 0, 0, 0, 0]]))
    coder.about = {"reads": ["0:hook_embed", "1:hook_embed", "2:hook_embed"]}
    norms = relative_norms(coder)
    assert norms.parts == ("0:hook_embed", "1:hook_embed", "2:hook_embed")
    assert norms.cosines.tolist() == [pytest.approx(0.5**0.5), pytest.approx(-1)]
    assert len(norms.plot().get_legend().get_texts()) == 3


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(Refused, match="one part"):
        relative_norms(make_coder("topk", 4, 8, k=2))
    coder = make_coder("topk", 6, 8, k=2, reads=(3, 3), writes=(3, 3))
    with pytest.raises(WorkbenchError, match="2 numbers above 0"):
        relative_norms(coder, scales=[1.0, 0.0])
    with pytest.raises(WorkbenchError, match="2 different names"):
        relative_norms(coder, parts=["a", "a"])
