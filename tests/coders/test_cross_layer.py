"""Cross-layer transcoders: literal sums, gradients, planted features that write into later layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor

from workbench.coders.coder import Progress
from workbench.coders.cross_layer import CrossLayer, check_memory
from workbench.coders.cross_layer_estimator import CrossLayerTranscoder
from workbench.coders.cross_layer_kinds import jump_relu, make_cross_layer
from workbench.coders.cross_layer_train import train_cross_layer
from workbench.coders.sites import site_rows
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.native import NativeModel

L, D, F, OUT, K = 3, 5, 7, 4, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {"k": K}, "batchtopk": {"k": K}, "jumprelu": {"threshold": 0.3, "bandwidth": 1e-4, "pre_act": 0.01},
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coder_of(kind: str, *, skip: bool = True, seed: int = 0) -> CrossLayer:
    coder = make_cross_layer(kind, L, D, F, width_out=OUT, skip=skip, **OPTIONS[kind]).double()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(coder.named_parameters()):
            if name != "log_threshold":
                parameter.copy_(normal(*parameter.shape, seed=100 * seed + i))
    return coder


def now(step: int = 0, silent: Tensor | None = None) -> Progress:
    return Progress(step, 10, torch.zeros(L, F) if silent is None else silent, 100)


def test_outputs_are_the_literal_triple_loop_bit_by_bit() -> None:
    coder = coder_of("topk")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in coder.parameters():  # small whole numbers: sums in float64 are exact in any order
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator))
    x = torch.randint(-4, 5, (6, L, D), generator=generator).double()
    f, y = coder.encode_all(x).detach(), coder(x).detach()
    coder.requires_grad_(False)
    for n in range(len(x)):
        for layer in range(L):
            pre = [
                sum(x[n, layer, d] * coder.W_enc[layer, d, i] for d in range(D)) + coder.b_enc[layer, i]
                for i in range(F)
            ]
            kept = sorted(float(p) for p in pre)[-K:]
            assert sorted(float(v) for v in f[n, layer] if v > 0) == [v for v in kept if v > 0]
            for i in range(F):
                assert float(f[n, layer, i]) in (0.0, float(pre[i]))
        for target in range(L):
            for out in range(OUT):
                total = coder.b_dec[target, out].clone()
                for source in range(target + 1):
                    for i in range(F):
                        total += f[n, source, i] * coder.decoder(source, target)[i, out]
                for d in range(D):
                    total += x[n, target, d] * coder.W_skip[target, d, out]
                assert float(y[n, target, out]) == float(total)


@pytest.mark.parametrize("kind", OPTIONS)
def test_layers_one_by_one_are_all_layers_at_once(kind: str) -> None:
    coder, x = coder_of(kind), normal(8, L, D, seed=9)
    if kind == "batchtopk":
        coder.threshold.fill_(0.7)
    f = coder.encode_all(x)
    one = torch.stack([coder.encode(layer, x[:, layer]) for layer in range(L)], 1)
    assert torch.allclose(f, one, atol=1e-12)
    y = torch.stack([coder.decode_at(t, [f[:, s] for s in range(t + 1)]) + coder.skip(t, x[:, t]) for t in range(L)], 1)
    assert torch.allclose(coder(x), y, atol=1e-12)
    assert torch.allclose(coder(x.view(2, 4, L, D)), y.view(2, 4, L, OUT), atol=1e-12)
    values, indices = f.topk(F, dim=-1)
    assert torch.allclose(
        coder.decode_sparse(values, indices.masked_fill(values == 0, -1)), coder.decode(f), atol=1e-12
    )
    joined = torch.stack([torch.cat([coder.decoder(s, t) for t in range(s, L)], 1).norm(dim=1) for s in range(L)])
    assert torch.allclose(coder.decoder_norms(), joined)


@pytest.mark.parametrize("kind", OPTIONS)
def test_gradients_are_finite_differences(kind: str) -> None:
    coder = coder_of(kind, seed=2)
    x, y = normal(9, L, D, seed=3), normal(9, L, OUT, seed=4)
    loss = coder.objective(x, y, now(4)).loss
    loss.backward()
    for name, parameter in coder.named_parameters():
        if name == "log_threshold":  # straight-through, see below
            continue
        assert parameter.grad is not None
        for at in range(0, parameter.numel(), max(1, parameter.numel() // 7)):
            flat, size = parameter.data.view(-1), 1e-6
            kept = float(flat[at])
            with torch.no_grad():
                flat[at] = kept + size
                up = float(coder.objective(x, y, now(4)).loss)
                flat[at] = kept - size
                down = float(coder.objective(x, y, now(4)).loss)
                flat[at] = kept
            assert float(parameter.grad.view(-1)[at]) == pytest.approx((up - down) / (2 * size), rel=1e-5, abs=1e-6), (
                name
            )


def test_the_threshold_has_the_slope_of_the_smoothed_loss() -> None:
    """Over pre-activations evenly spread around the threshold, the slope of the loss averaged over a window of thresholds is the
    difference of the losses at its ends over its width."""
    eps, theta = 0.5, torch.tensor([[0.8], [1.1]], dtype=torch.float64)
    weight = torch.tensor([[1.7], [-0.4]], dtype=torch.float64)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 1000  # no point on a window's edge
    pre = grid[:, None, None].expand(-1, 2, 1)

    def loss(threshold: Tensor) -> Tensor:
        return (jump_relu(pre, threshold, eps) * weight).sum() / len(grid)

    threshold = theta.clone().requires_grad_()
    loss(threshold).backward()
    assert threshold.grad is not None
    for at in range(2):
        shift = torch.zeros_like(theta)
        shift[at] = eps / 2
        difference = float(loss(theta + shift) - loss(theta - shift)) / eps
        assert float(threshold.grad[at]) == pytest.approx(difference, rel=1e-9)
    for distance, slope in ((0.49, -theta / eps), (-0.49, -theta / eps), (0.51, torch.zeros_like(theta))):
        threshold.grad = None
        jump_relu((theta + distance * eps)[None], threshold, eps).sum().backward()
        assert threshold.grad is not None
        assert torch.allclose(threshold.grad, slope)


def test_the_price_of_jumprelu_is_its_formula() -> None:
    coder = coder_of("jumprelu", skip=False)
    x, y = normal(9, L, D, seed=3), normal(9, L, OUT, seed=4)
    coder.requires_grad_(False)
    terms = coder.objective(x, y, now(step=4))
    f, pre, norms, theta = coder.encode_all(x), coder.pre_all(x), coder.decoder_norms(), coder.threshold
    price = below = error = 0.0
    for n in range(9):
        for layer in range(L):
            error += float((coder(x)[n, layer] - y[n, layer]).square().sum()) / 9
            for i in range(F):
                price += float(torch.tanh(4.0 * norms[layer, i] * f[n, layer, i])) / 9
                below += float(norms[layer, i] * max(0.0, float(theta[layer, i] - pre[n, layer, i]))) / 9
    assert float(terms.loss) == pytest.approx(error + 0.1 * 5 / 10 * price + 0.01 * below)
    assert torch.equal(terms.active, (f > 0).sum(0).float())


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_dead_features_learn_from_what_is_left(kind: str) -> None:
    silent = torch.zeros(L, F)
    silent[1, 4] = 100.0
    coder, x, y = coder_of(kind), normal(9, L, D, seed=3), normal(9, L, OUT, seed=4)
    with torch.no_grad():
        coder.W_enc[1, :, 4], coder.b_enc[1, 4] = 0.0, 1e-3  # positive, and never among the largest
    for record, alive in ((torch.zeros(L, F), False), (silent, True)):
        coder.zero_grad()
        terms = coder.objective(x, y, now(1, record))
        terms.loss.backward()
        assert coder.W_dec[1].grad is not None
        assert (float(coder.W_dec[1].grad[4].abs().sum()) > 0) == alive
        assert ("auxiliary" in terms.parts) == alive
    left = y - coder(x) if kind == "topk" else y - terms.output
    guess = torch.zeros_like(left)
    guess[:, 1:] = 1e-3 * coder.W_dec[1][4]
    wanted = (guess - left).square().sum((1, 2)).mean() / (L * (D // 2))
    assert float(terms.parts["auxiliary"]) == pytest.approx(float(wanted.detach()))
    assert float(terms.loss.detach()) == pytest.approx(float(terms.parts["error"] + terms.parts["auxiliary"] / 32))


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_saved_coder_comes_back(kind: str, tmp_path: Path) -> None:
    coder, x = coder_of(kind), normal(4, L, D)
    if kind == "batchtopk":
        coder.threshold.fill_(0.7)
    coder.about = {"reads": ["blocks.0.ln2.hook_normalized"] * L, "model": "m"}
    coder.save(tmp_path / "c")
    back = CrossLayer.load(tmp_path / "c")
    assert back.kind == kind
    assert back.options == coder.options
    assert back.about == coder.about
    assert torch.equal(back(x), coder(x))
    with pytest.raises(WorkbenchError, match="exists already"):
        coder.save(tmp_path / "c")


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    coder = coder_of("topk")
    with pytest.raises(WorkbenchError, match=r"no cfg\.json"):
        CrossLayer.load(tmp_path)
    folder = coder.save(tmp_path / "c")
    (folder / "sae_weights.safetensors").write_bytes(b"no")
    with pytest.raises(WorkbenchError, match="damaged"):
        CrossLayer.load(folder)
    with torch.no_grad():
        coder.b_dec[0, 0] = float("nan")
    with pytest.raises(WorkbenchError, match="NaN or infinity in b_dec"):
        CrossLayer.load(coder.save(tmp_path / "nan"))
    other = coder.save(tmp_path / "other")
    (other / "cfg.json").write_text('{"architecture": "topk"}')
    with pytest.raises(WorkbenchError, match="'topk', not 'workbench-cross-layer'"):
        CrossLayer.load(other)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(Refused, match="351 decoders of 16384 x 2304: 13,249,806,336 numbers, 49.4 GiB"):
        make_cross_layer("topk", 26, 2304, 16384, k=8)
    assert check_memory(26, 1024, 2304) == 4 * 351 * 1024 * 2304
    with pytest.raises(UnknownName, match="jumprelu"):
        make_cross_layer("relu", 2, 4, 8)
    with pytest.raises(WorkbenchError, match="sparsity"):
        make_cross_layer("topk", 2, 4, 8, k=2, sparsity=1.0)
    coder = coder_of("topk")
    for layer in (-1, L):
        with pytest.raises(UnknownName):
            coder.encode(layer, normal(2, D))
    with pytest.raises(WorkbenchError, match="later ones"):
        coder.decoder(2, 1)
    with pytest.raises(WorkbenchError, match=r"\[\.\.\., 3, 5\]"):
        coder(normal(2, L, D + 1))
    with pytest.raises(WorkbenchError, match="codes of 3 layers"):
        coder.decode_at(1, [normal(2, F)] * 3)


def planted(
    n: int, seed: int = 0, layers: int = 3, width: int = 32, count: int = 20
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A stream that features enter at their layer and stay in; each writes into its own MLP's output and all later ones."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        rows = torch.randn(*shape, generator=generator)
        return rows / rows.norm(dim=-1, keepdim=True)

    reads, writes = unit(layers, count, width), [unit(count, layers - layer, width) for layer in range(layers)]
    active = (torch.rand(n, layers, count, generator=generator) < 0.06) * (
        torch.rand(n, layers, count, generator=generator) + 0.5
    )
    x = torch.einsum("nlf,lfd->nld", active, reads).cumsum(1)
    y = torch.zeros(n, layers, width)
    for source in range(layers):
        for step in range(layers - source):
            y[:, source + step] += active[:, source] @ writes[source][:, step]
    return x, y, [w.flatten(1) for w in writes]


def test_planted_features_are_found_where_transcoders_of_single_layers_fail() -> None:
    x, y, writes = planted(8000)
    options: dict[str, Any] = {"features": 32, "kind": "batchtopk", "k": 2, "steps": 400, "batch": 128, "rate": 6e-3}
    cross = CrossLayerTranscoder(**options).fit(x, y)
    for layer, truth in enumerate(writes):
        found = cross.decoders_[layer].flatten(1)
        found = found / found.norm(dim=1, keepdim=True).clamp(min=1e-9)
        assert float(((truth / truth.norm(dim=1, keepdim=True)) @ found.T).amax(1).mean()) > 0.95
    l0 = float((cross.transform(x) > 0).sum((1, 2)).float().mean())
    assert l0 == pytest.approx(2 * 3, rel=0.01)
    error = cross.fvu(x, y)
    for layer in (1, 2):  # what features of earlier layers write into
        inside = x[:, layer : layer + 1], y[:, layer : layer + 1]
        assert float(error[layer]) < 0.5 * float(CrossLayerTranscoder(**options).fit(*inside).fvu(*inside))


def test_the_estimator_follows_scikit_learn(tmp_path: Path) -> None:
    x, y, _ = planted(500)
    model = CrossLayerTranscoder(features=6, k=2, steps=5, batch=64)
    assert clone(model).get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        model.transform(x)
    model.fit(x.numpy(), y.numpy())
    assert isinstance(model.transform(x.numpy()), np.ndarray)
    assert torch.equal(model.reconstruct(x), model.coder_(x))
    assert model.encoders_.shape == (3, 32, 6)
    assert [tuple(w.shape) for w in model.decoders_] == [(6, 3, 32), (6, 2, 32), (6, 1, 32)]
    back = CrossLayerTranscoder.load(model.save(tmp_path / "c"))
    assert back.get_params() == model.get_params()
    assert torch.equal(back.transform(x), model.transform(x))
    again = CrossLayerTranscoder(features=6, k=2, steps=5, batch=64).fit(x, y)
    assert torch.equal(again.coder_.W_enc, model.coder_.W_enc)
    with pytest.raises(WorkbenchError, match="NaN"):
        model.fit(x * float("nan"), y)
    with pytest.raises(WorkbenchError, match=r"does not vary in layers \[1\]"):
        model.fit(x, y * torch.tensor([1.0, 0.0, 1.0])[:, None])
    with pytest.raises(WorkbenchError, match="same N and L"):
        model.fit(x, y[:-1])
    with pytest.raises(WorkbenchError, match=r"\[N, L, D\]"):
        model.fit(x[:, 0], y)


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_scale_of_the_data_is_folded_into_the_weights(kind: str) -> None:
    x, y, _ = planted(400)
    options: dict[str, Any] = {"features": 6, "kind": kind, "k": 2, "steps": 20, "batch": 64, "skip": True}
    plain = CrossLayerTranscoder(**options).fit(x, y)
    factors = torch.tensor([2.0, 8.0, 0.5])[:, None]  # powers of two scale floats without rounding
    scaled = CrossLayerTranscoder(**options).fit(factors * x, 4 * factors * y)
    assert torch.allclose(scaled.transform(factors * x), plain.transform(x), atol=1e-5)
    assert torch.allclose(scaled.reconstruct(factors * x), 4 * factors * plain.reconstruct(x), atol=1e-5)


def test_a_transcoder_learns_from_a_model(small_model: NativeModel, small_texts: list[str]) -> None:
    calls: dict[str, Any] = {"features": 12, "k": 3, "steps": 30, "batch": 64, "block": 256, "rate": 5e-3}
    coder = train_cross_layer(small_model, small_texts, **calls)
    assert coder.about["reads"] == [f"blocks.{i}.ln2.hook_normalized" for i in range(2)]
    assert coder.about["writes"] == [f"blocks.{i}.hook_mlp_out" for i in range(2)]
    rows = next(site_rows(small_model, [*coder.about["reads"], *coder.about["writes"]], small_texts[-4:]))
    x, y = (torch.stack([rows[site] for site in coder.about[which]], 1) for which in ("reads", "writes"))
    fvu = float((coder(x) - y).square().sum() / (y - y.mean(0)).square().sum())
    assert fvu < 0.7
    assert coder.about["recipe"]["fvu"] < 0.7
    assert torch.equal(coder.W_enc, train_cross_layer(small_model, small_texts, **calls).W_enc)
    one = train_cross_layer(small_model, small_texts, layers=[1], reads="resid_mid", **calls)
    assert one.about["reads"] == ["blocks.1.hook_resid_mid"]
    with pytest.raises(Refused, match="of 30 steps"):
        train_cross_layer(small_model, iter(small_texts), **calls)
    with pytest.raises(WorkbenchError, match="ascending"):
        train_cross_layer(small_model, small_texts, layers=[1, 0], **calls)
