"""Decoders against known directions, and features of two coders against each other."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_coders import coder_of, random_coder

from workbench.errors import WorkbenchError
from workbench.probes.features.truth import decoder_cosine, feature_agreement


def unit(rows, width, seed=0):
    torch.manual_seed(seed)
    found = torch.randn(rows, width, dtype=torch.float64)
    return found / found.norm(dim=1, keepdim=True)


def test_true_directions_in_another_order_and_scale_are_all_found():
    truth = unit(32, 16)
    order = torch.randperm(32)
    got = decoder_cosine(truth[order] * torch.rand(32, 1).add(0.1), truth)
    assert got.mean_max_cosine == pytest.approx(1)
    assert got.recovered_share == got.matched_share == 1
    assert order[got.nearest].tolist() == list(range(32))
    assert (order[got.pairs[:, 0]] == got.pairs[:, 1]).all()
    assert got.null["mean_max_cosine"] < 0.75
    assert got.null["recovered_share"] == 0


def test_cosines_keep_their_sign_and_both_means_differ():
    truth = torch.eye(3, dtype=torch.float64)
    rows = torch.stack([truth[0], truth[0], -truth[1], torch.zeros(3, dtype=torch.float64)])
    got = decoder_cosine(rows, truth)
    assert got.recovered.tolist() == [1, 0, 0]
    assert got.explained.tolist() == [1, 1, 0, 0]
    assert got.mean_max_cosine == pytest.approx(1 / 3)
    assert got.explained_mean == pytest.approx(1 / 2)
    assert got.matched_share == pytest.approx(1 / 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 5))
def test_the_assignment_is_the_best_of_all(seed, features, directions):
    rows, truth = unit(features, 4, seed), unit(directions, 4, seed + 1)
    got = decoder_cosine(rows, truth)
    cosine = rows @ truth.T
    if features > directions:
        cosine = cosine.T
    best = max(
        sum(float(cosine[i, j]) for i, j in enumerate(order))
        for order in itertools.permutations(range(cosine.shape[1]), cosine.shape[0])
    )
    assert float(got.matched.sum()) == pytest.approx(best, abs=1e-5)
    assert len(got.pairs) == min(features, directions)
    assert (got.recovered[got.pairs[:, 1]] >= got.matched - 1e-12).all()
    assert torch.allclose(got.recovered, (rows @ truth.T).amax(0))


def test_what_counts_as_a_coder():
    coder = coder_of(unit(6, 4))

    class Estimator:
        decoder_ = coder.W_dec.detach().numpy()
        encoder_ = coder.W_enc.detach().numpy()

    first, second = decoder_cosine(coder, unit(5, 4, 1)), decoder_cosine(Estimator(), unit(5, 4, 1))
    assert torch.equal(first.recovered, second.recovered)
    assert feature_agreement(coder, Estimator()).shared == 1


def test_two_coders_agree_where_both_directions_do():
    a = random_coder(8, 10)
    b = random_coder(8, 10, seed=1)
    order = torch.randperm(10)
    with torch.no_grad():
        b.W_dec.copy_(a.W_dec[order])
        b.W_enc.copy_(a.W_enc[:, order])
        b.W_enc[:, :4] = -b.W_enc[:, :4]
    got = feature_agreement(a, b)
    assert got.cosine.tolist() == pytest.approx([1.0] * 10)
    assert got.shared == 0.6
    assert (order[got.pairs[:, 1]] == got.pairs[:, 0]).all()
    assert feature_agreement(a.W_dec, b.W_dec).shared == 1
    assert got.null["matched_mean"] < 0.7
    assert got.best_a.shape == (10,)


def test_tables_figures_and_files(tmp_path):
    got = decoder_cosine(unit(6, 4), unit(5, 4, 1))
    assert set(got.frame()["measure"]) == set(got.null)
    got.plot()
    got.save(tmp_path / "cosine")
    pair = feature_agreement(unit(6, 4), unit(5, 4, 1))
    assert len(pair.frame()) == 5
    pair.plot()
    pair.save(tmp_path / "agreement")


def test_what_has_no_cosine_is_refused():
    with pytest.raises(WorkbenchError, match="width 4"):
        decoder_cosine(unit(6, 4), unit(5, 3))
    with pytest.raises(WorkbenchError, match="direction of zeros"):
        decoder_cosine(unit(6, 4), torch.zeros(2, 4))
    with pytest.raises(WorkbenchError, match="NaN"):
        decoder_cosine(unit(6, 4), torch.full((2, 4), float("nan")))
    with pytest.raises(WorkbenchError, match="4 and 3"):
        feature_agreement(unit(6, 4), unit(6, 3))
    with pytest.raises(WorkbenchError, match="above"):
        decoder_cosine(unit(6, 4), unit(5, 4), above=1.5)
