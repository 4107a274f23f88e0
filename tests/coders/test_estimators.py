"""Coders on arrays: planted dictionaries are found, dead features stay few, scikit-learn's conventions hold."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError

FEW = {"steps": 40, "batch": 64}


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


@cache
def superposition(features: int, width: int, active: float, rows: int) -> tuple[Tensor, Tensor]:
    """Rows that are sums of a few of ``features`` unit vectors in ``width`` dimensions, and these vectors."""
    generator = torch.Generator().manual_seed(1)
    truth = unit(torch.randn(features, width, generator=generator))
    on = torch.rand(rows, features, generator=generator) < active / features
    return on * (0.5 + torch.rand(rows, features, generator=generator)) @ truth, truth


def found(decoder: Tensor, truth: Tensor) -> float:
    """Mean over true directions of the cosine with the nearest feature."""
    return float((unit(decoder) @ truth.T).amax(0).mean())


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_planted_directions_are_found(kind: str) -> None:
    x, truth = superposition(64, 24, 2, 20_000)
    options = {"prefixes": (0.5, 1.0)} if kind == "matryoshka" else {}
    coder = wb.SAE(kind=kind, features=64, k=2, seed=0, steps=1200, batch=512, options=options).fit(x)
    code = coder.transform(x)
    assert found(coder.decoder_, truth) > (0.95 if kind != "matryoshka" else 0.85)
    assert float((code > 0).any(0).float().mean()) > 0.99
    assert float((code > 0).sum(1).float().mean()) == pytest.approx(2, rel=0.05 if kind != "topk" else 0.2)


@pytest.mark.parametrize(
    ("kind", "sparsity", "options"),
    [
        ("relu", 1.5, {}),
        ("p-anneal", 1.5, {}),
        ("gated", 4.0, {}),
        ("jumprelu", 1.0, {}),
        ("jumprelu-tanh", 3.0, {"scale": 1.0}),
    ],
)
def test_kinds_with_a_penalty_find_most_of_them(kind: str, sparsity: float, options: dict[str, float]) -> None:
    x, truth = superposition(32, 16, 1.5, 20_000)
    coder = wb.SAE(kind=kind, features=32, sparsity=sparsity, seed=0, steps=1200, batch=512, options=options).fit(x)
    code = coder.transform(x)
    assert found(coder.decoder_, truth) > 0.85
    assert 0.5 < float((code > 0).sum(1).float().mean()) < 4


def test_active_subspace_start_keeps_features_alive() -> None:
    """Rows fill 24 of 256 dimensions. Directions that happen to lie in them win; with nothing to revive the others, they stay
    dead."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(256, 24, generator=generator)).Q.T
    on = torch.rand(20_000, 2048, generator=generator) < 6 / 2048
    codes = on * (0.5 + torch.rand(20_000, 2048, generator=generator))
    x = codes @ unit(torch.randn(2048, 24, generator=generator)) @ basis
    x = x + 1e-3 * torch.randn(20_000, 256, generator=generator)
    still = {"redraws": 0, "options": {"aux": 0.0}}
    dead = {}
    for start in ("active-subspace", "random"):
        coder = wb.SAE(features=2048, k=4, start=start, steps=150, batch=512, rate=5e-4, **still).fit(x)
        dead[start] = float((coder.transform(x) > 0).any(0).logical_not().float().mean())
    assert dead["active-subspace"] < 0.01
    assert dead["random"] > 0.5


def test_silent_features_are_drawn_anew() -> None:
    x, _ = superposition(32, 16, 1.5, 4000)
    dead = {}
    for redraws in (0, 20):
        coder = wb.SAE(features=128, k=2, start="random", steps=300, batch=256, redraws=redraws, options={"aux": 0.0})
        history = coder.fit(x).history_
        dead[redraws] = float((coder.transform(x) > 0).any(0).logical_not().float().mean())
        assert (sum(step.get("redrawn", 0) for step in history) > 0) == (redraws > 0)
        assert "redrawn" not in history[-1]
    assert dead[20] < 0.5 * dead[0]


def test_transcoder_learns_what_rows_become() -> None:
    x, truth = superposition(32, 16, 1.5, 8000)
    line = torch.randn(16, 5, generator=torch.Generator().manual_seed(4))
    y = torch.relu(x @ truth.T - 0.3) @ torch.randn(32, 5, generator=torch.Generator().manual_seed(3)) + x @ line
    plain = wb.Transcoder(features=64, k=3, steps=500, batch=256).fit(x, y)
    skip = wb.Transcoder(features=64, k=3, skip=True, steps=500, batch=256).fit(x, y)

    def left(coder: wb.Transcoder) -> float:
        return float((coder.predict(x) - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum())

    assert left(skip) < left(plain) < 0.4
    assert skip.coder_.W_skip is not None
    assert skip.predict(x).shape == (8000, 5)
    assert clone(skip).get_params()["skip"] is True


def test_crosscoder_reads_lists_and_stacks() -> None:
    x, _ = superposition(32, 16, 1.5, 2000)
    coder = wb.Crosscoder(features=48, k=3, **FEW).fit([x, 10 * x[:, :7]])
    assert coder.coder_.writes == (16, 7)
    assert [part.shape[1] for part in coder.reconstruct([x, 10 * x[:, :7]])] == [16, 7]
    stacked = wb.Crosscoder(features=48, k=3, **FEW).fit(np.stack([x.numpy(), x.numpy()], 1))
    assert stacked.transform(np.stack([x.numpy(), x.numpy()], 1)).shape == (2000, 48)


def test_arrays_give_arrays_and_tensors_tensors() -> None:
    x, _ = superposition(32, 16, 1.5, 300)
    tensors, arrays = (wb.SAE(features=24, k=2, **FEW).fit(data) for data in (x, x.numpy()))
    assert isinstance(tensors.decoder_, Tensor)
    assert isinstance(arrays.encoder_, np.ndarray)
    assert arrays.decoder_.shape == (24, 16)
    assert arrays.encoder_.shape == (16, 24)
    code = arrays.transform(x.numpy())
    np.testing.assert_allclose(arrays.inverse_transform(code), arrays.reconstruct(x.numpy()), atol=1e-5)
    np.testing.assert_array_equal(code, tensors.transform(x).numpy())
    double = wb.SAE(features=24, k=2, **FEW).fit(x.double())
    assert double.decoder_.dtype == torch.float64


def test_estimators_follow_scikit_learn() -> None:
    x, _ = superposition(32, 16, 1.5, 300)
    sae = wb.SAE("batchtopk", features=24, k=2, **FEW)
    assert clone(sae).get_params() == sae.get_params()
    assert sae.set_params(k=3).k == 3
    pipe = make_pipeline(StandardScaler(), sae).fit(x.numpy())
    assert pipe.transform(x.numpy()).shape == (300, 24)
    assert pipe[-1].n_features_in_ == 16
    with pytest.raises(NotFittedError, match="call fit"):
        wb.SAE().transform(x)


def test_the_same_seed_gives_the_same_coder() -> None:
    x, _ = superposition(32, 16, 1.5, 300)
    one, same, other = (wb.SAE(features=24, k=2, seed=seed, **FEW).fit(x) for seed in (0, 0, 1))
    assert torch.equal(one.decoder_, same.decoder_)
    assert not torch.equal(one.decoder_, other.decoder_)
    assert [step["loss"] for step in one.history_] == [step["loss"] for step in same.history_]


def test_saved_and_loaded(tmp_path: Path) -> None:
    x, _ = superposition(32, 16, 1.5, 300)
    for kind in ("topk", "gated", "jumprelu"):
        sae = wb.SAE(kind=kind, features=24, **({"k": 2} if kind == "topk" else {}), **FEW).fit(x)
        again = wb.SAE.load(sae.save(tmp_path / kind))
        assert again.kind == kind
        torch.testing.assert_close(again.transform(x), sae.transform(x), rtol=0, atol=0)


def test_progress_is_told() -> None:
    x, _ = superposition(32, 16, 1.5, 300)
    seen: list[tuple[int, int]] = []
    wb.SAE(features=24, k=2, steps=3, progress=lambda done, total: seen.append((done, total))).fit(x)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_what_is_wrong_is_told() -> None:
    x, _ = superposition(32, 16, 1.5, 300)
    bad = x.clone()
    bad[3, 4] = float("nan")
    with pytest.raises(WorkbenchError, match="X holds NaN"):
        wb.SAE(features=24, k=2, **FEW).fit(bad)
    with pytest.raises(WorkbenchError, match=r"X is \[N, D\] with at least one row; got \[300\]"):
        wb.SAE(features=24, k=2, **FEW).fit(x[:, 0])
    with pytest.raises(UnknownName, match="kind of coder 'top'"):
        wb.SAE(kind="top", **FEW).fit(x)
    with pytest.raises(UnknownName, match="start 'warm'; known: active-subspace, random"):
        wb.SAE(features=24, k=2, start="warm", **FEW).fit(x)
    with pytest.raises(WorkbenchError, match=r"fit\(X, Y\)"):
        wb.Transcoder(features=24, k=2).fit(x)
    with pytest.raises(WorkbenchError, match="one row per sample; got 300 and 299"):
        wb.Transcoder(features=24, k=2).fit(x, x[1:])
    with pytest.raises(WorkbenchError, match="at least two places"):
        wb.Crosscoder(features=24, k=2).fit([x])
    with pytest.raises(WorkbenchError, match="reads rows of width 16; got"):
        wb.SAE(features=24, k=2, **FEW).fit(x).transform(x[:, :5])
    with pytest.raises(WorkbenchError, match="step 0: the loss is nan|too large"):
        wb.SAE(features=24, k=2, normalise="none", rate=1e30, steps=30).fit(x)
