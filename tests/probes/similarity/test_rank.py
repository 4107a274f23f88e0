"""Ranks of matrices whose singular values are known, and bounds that enclose what is not computed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import SENTENCE, random_rows
from workbench.probes.similarity import rank
from workbench.probes.similarity.rank import effective_rank, rank_bounds, rank_collapse
from workbench.probes.similarity.streams import stream_collapse
from workbench.run import Activations, Run


def literal(matrix: torch.Tensor) -> float:
    s = torch.linalg.svdvals(matrix)
    p = s / s.sum()
    return math.exp(-sum(float(x) * math.log(float(x)) for x in p if x > 0))


def test_identity_even_and_causal_attention(dense) -> None:
    n = 30
    assert float(effective_rank(dense(torch.eye(n)[None, None]))) == pytest.approx(n)
    even = dense(torch.full((1, 1, n, n), 1 / n))
    assert float(effective_rank(even)) == pytest.approx(1, abs=1e-6)
    causal = torch.ones(n, n).tril().double() / torch.arange(1, n + 1)[:, None]
    assert float(effective_rank(dense(causal[None, None]))) == pytest.approx(literal(causal))
    # Its inverse is bidiagonal, so the rank is full, and yet few directions hold the map.
    assert int(torch.linalg.matrix_rank(causal)) == n
    found = rank_collapse([dense(torch.eye(n)[None, None]), even, dense(causal[None, None])])
    assert [float(found.values["rank95"][i]) for i in (0, 1)] == [math.ceil(0.95 * n), 1]
    assert [float(found.values["rank99"][i]) for i in (0, 1)] == [math.ceil(0.99 * n), 1]
    assert float(found.values["residual"][0]) == pytest.approx(math.sqrt(1 - 1 / n))
    assert float(found.values["residual"][1]) == pytest.approx(0, abs=1e-7)
    # Even causal attention is its own null; its residual has a closed form in harmonic numbers.
    for name in ("effective_rank", "rank95", "rank99", "residual"):
        assert float(found.null[name][2]) == pytest.approx(float(found.values[name][2]))
    harmonic = sum(1 / i for i in range(1, n + 1))
    mean = [sum(1 / i for i in range(j, n + 1)) / n for j in range(1, n + 1)]
    assert float(found.values["residual"][2]) == pytest.approx(math.sqrt(1 - n * sum(m * m for m in mean) / harmonic))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 100))
def test_rank_r_is_bounded_by_r_and_known_from_r_singular_values(r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.rand(2, 3, *shape, generator=generator).double() for shape in ((20, r), (r, 20)))
    weights = left @ right
    amap = AttentionMap.from_dense(weights / weights.sum(-1, keepdim=True))
    exact = effective_rank(amap)
    assert bool((exact <= r + 1e-6).all())
    for got in rank_bounds(amap, r):
        torch.testing.assert_close(got, exact, atol=1e-6, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.integers(1, 30), st.booleans())
def test_bounds_enclose_the_effective_rank(seed: int, r: int, causal: bool) -> None:
    amap = AttentionMap.from_dense(random_rows(1, 2, 30, seed=seed, causal=causal))
    exact, (least, most) = effective_rank(amap), rank_bounds(amap, r, iterations=30)
    assert bool((least <= exact * (1 + 1e-6)).all())
    # Energy of 1e-12 of the whole counts as rounding: a singular value of 1e-6 is worth 1e-5 of the effective rank.
    assert bool((most >= exact * (1 - 2e-5)).all())
    measures = rank_collapse(amap).values, rank_collapse(amap, rank=r).values
    for name in ("rank95", "rank99"):
        assert bool((measures[1][f"{name}_least"][0] <= measures[0][name][0] + 1).all())
        assert bool((measures[1][name][0] >= measures[0][name][0] - 1).all())
    torch.testing.assert_close(measures[0]["residual"][0], measures[1]["residual"][0])


def test_all_singular_values_give_the_exact_rank_with_grouped_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 40, 8, generator=generator) for heads in (4, 2))
    amap = SoftmaxMap(q, k, mask=Mask(causal=True))
    exact = effective_rank(amap)
    expected = torch.tensor([[literal(amap.dense()[b, h].double()) for h in range(4)] for b in range(2)])
    torch.testing.assert_close(exact, expected.double(), atol=1e-4, rtol=1e-4)
    for got in rank_bounds(amap, 40):
        torch.testing.assert_close(got, exact, atol=1e-3, rtol=1e-3)


def test_bounds_of_a_padded_batch_are_those_of_its_sequences(padded, alone) -> None:
    whole = rank_collapse(padded, rank=14).values["effective_rank"]
    parts = [rank_collapse(run, rank=14).values["effective_rank"] for run in alone]
    for layer in whole:
        torch.testing.assert_close(
            whole[layer], torch.stack([part[layer] for part in parts]).mean(0), atol=1e-3, rtol=1e-3
        )
        torch.testing.assert_close(
            whole[layer], rank_collapse(padded).values["effective_rank"][layer], atol=1e-3, rtol=1e-3
        )


def test_block_maps_have_the_rank_of_their_blocks(dense) -> None:
    assert float(effective_rank(dense(torch.eye(24)[None, None]), size=4)) == pytest.approx(6)
    found = rank_collapse(dense(torch.eye(24)[None, None]), size=4)
    assert float(found.values["residual"][0]) == pytest.approx(math.sqrt(1 - 1 / 6))


def test_long_maps_are_refused_unless_bounded(monkeypatch) -> None:
    amap = AttentionMap.from_dense(random_rows(1, 1, 20))
    monkeypatch.setattr(rank, "EXACT", 16)
    with pytest.raises(Refused, match="rank_bounds"):
        effective_rank(amap)
    assert len(rank_collapse(amap, rank=4).frame()) == 1
    assert effective_rank(amap, size=2).isfinite().all()
    with pytest.raises(WorkbenchError, match="one of them"):
        rank_collapse(amap, size=2, rank=2)
    with pytest.raises(WorkbenchError, match="rank=0"):
        rank_bounds(amap, 0)


def test_one_matrix_at_a_time_gives_the_same(dense, monkeypatch) -> None:
    amap = dense(random_rows(2, 3, 12) * 0.5)
    exact = effective_rank(amap)
    head = rank._one_head(rank.aligned(0, amap, None), 1)
    assert head.shape[1] == 1
    torch.testing.assert_close(rank._measures(rank._spectrum(head, None))["effective_rank"][:, 0], exact[:, 1])
    assert rank_collapse(dense(torch.zeros(1, 2, 4, 4), row_sum="<=1")).undefined == {
        "0": "a map without weight has no rank"
    }
    assert bool(effective_rank(dense(torch.zeros(1, 2, 4, 4), row_sum="<=1")).isnan().all())


def stream(x: torch.Tensor, mask: torch.Tensor | None = None) -> Run:
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    return Run(
        Tokens(torch.zeros(x.shape[:2], dtype=torch.int64), real), acts=Activations({"blocks.0.hook_resid_post": x})
    )


def test_streams_of_equal_and_of_orthogonal_tokens() -> None:
    equal = stream_collapse(stream(torch.ones(1, 8, 5)))
    assert float(equal.values["residual"][0]) == pytest.approx(0, abs=1e-7)
    assert float(equal.values["effective_rank"][0]) == pytest.approx(1, abs=1e-5)
    apart = stream_collapse(stream(torch.eye(8)[None]))
    assert float(apart.values["residual"][0]) == pytest.approx(math.sqrt(1 - 1 / 8))
    assert float(apart.values["effective_rank"][0]) == pytest.approx(8)
    x = torch.randn(1, 400, 16, generator=torch.Generator().manual_seed(0))
    found = stream_collapse(stream(x))
    assert float(found.values["residual"][0]) == pytest.approx(float(found.null["residual"][0]), abs=0.01)
    assert float(found.values["effective_rank"][0]) == pytest.approx(float(found.null["effective_rank"][0]), rel=0.02)


def test_padding_is_no_token_and_one_token_is_no_stream() -> None:
    x = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[False] * 2 + [True] * 6])
    one, two = (
        stream_collapse(run) for run in (stream(x), stream(torch.cat([torch.full((1, 2, 5), 9.0), x], 1), mask))
    )
    for name in one.values:
        torch.testing.assert_close(one.values[name], two.values[name])
        torch.testing.assert_close(one.null[name], two.null[name])
    lonely = stream_collapse(stream(x[:, :1]))
    assert bool(lonely.values["residual"].isnan())
    assert lonely.undefined
    with pytest.raises(WorkbenchError, match="hook_resid_mid"):
        stream_collapse(stream(x), site="resid_mid")
    with pytest.raises(UnknownName):
        stream_collapse(stream(x), site="z")


def test_an_untrained_model_without_skips_would_collapse() -> None:
    """Averaging by even attention, layer after layer, takes a stream to rank one; the model's own stream stays apart."""
    model = wb.load("tiny-softmax")
    sites = [f"blocks.{layer}.hook_resid_post" for layer in range(model.shape.layers)]
    run = model.run(SENTENCE, read=sites)
    own = stream_collapse(run).values["residual"]
    x = run.acts[sites[0]].detach().double()
    n = x.shape[1]
    even = torch.ones(n, n).double().tril() / torch.arange(1, n + 1)[:, None]
    residuals = []
    for _ in range(6):
        x = even @ x
        residuals.append(float(stream_collapse(stream(x)).values["residual"]))
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 0.2 < float(own.min())
