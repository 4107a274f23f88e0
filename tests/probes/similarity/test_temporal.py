"""Energy, bands and disparity of temporal maps have closed forms; amplifying gives back the energy that guidance took."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.native_config import NativeConfig
from workbench.models.native_net import NativeNet
from workbench.probes.examples import SENTENCE, random_rows
from workbench.probes.similarity.temporal import (
    amplified,
    guided,
    high_band,
    motion_edit,
    motion_gain,
    temporal_bands,
    temporal_disparity,
)


def test_energy_of_identity_and_of_even_attention(dense) -> None:
    n = 16
    found = temporal_bands([dense(torch.eye(n)[None, None]), dense(torch.full((1, 1, n, n), 1 / n))])
    assert [float(found.values["energy"][i]) for i in (0, 1)] == pytest.approx([1, 1 / n])
    # The DFT of one frame alone is flat: the band of 7 of 16 indices has 7/16 of the energy. Even rows have frequency 0 only.
    assert [float(found.values["high_share"][i]) for i in (0, 1)] == pytest.approx([7 / 16, 0], abs=1e-12)
    assert [float(found.null["high_share"][i]) for i in (0, 1)] == pytest.approx([7 / 16, 0], abs=1e-12)
    assert [float(found.null["energy"][i]) for i in (0, 1)] == pytest.approx([1 / n, 1 / n])


def test_bands_are_those_of_literal_fourier_sums(dense) -> None:
    n, tau = 9, 2
    rows = random_rows(1, 1, n, causal=False)
    high = 0.0
    for row in rows[0, 0]:
        for f in range(n):
            if abs(f - n / 2) <= tau:
                real = sum(float(x) * math.cos(2 * math.pi * f * s / n) for s, x in enumerate(row))
                imaginary = sum(float(x) * math.sin(2 * math.pi * f * s / n) for s, x in enumerate(row))
                high += (real**2 + imaginary**2) / n / n
    found = temporal_bands(dense(rows), tau)
    assert float(found.values["high"][0]) == pytest.approx(high)
    assert high_band(9, 2).nonzero()[:, 0].tolist() == [3, 4, 5, 6]
    assert high_band(8, 1).nonzero()[:, 0].tolist() == [3, 4, 5]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.integers(4, 20), st.floats(0.5, 1.9))
def test_energies_add_up_and_rows_keep_their_sums(seed: int, n: int, tau: float) -> None:
    weights = random_rows(2, 2, n, seed=seed, causal=False)
    found = temporal_bands(AttentionMap.from_dense(weights), tau).values
    torch.testing.assert_close(found["low"][0] + found["high"][0], weights.square().sum(-1).mean(-1).mean(0))
    assert bool((found["low"][0] >= 0).all())
    louder = amplified(weights, 2.0, tau)
    torch.testing.assert_close(louder.sum(-1), weights.sum(-1))
    torch.testing.assert_close(amplified(weights, 1.0, tau), weights)
    more = temporal_bands(AttentionMap.from_dense(louder), tau).values
    torch.testing.assert_close(more["high"][0], 4 * found["high"][0])
    torch.testing.assert_close(more["low"][0], found["low"][0])


def test_the_null_is_the_mean_over_shuffles(dense) -> None:
    rows = random_rows(1, 1, 12, causal=False).expand(1, 1, 12, 12)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(400):
        order = torch.rand(1, 1, 12, 12, generator=generator).argsort(-1)
        draws.append(float(temporal_bands(dense(rows.gather(-1, order))).values["high"][0]))
    mean = sum(draws) / len(draws)
    spread = math.sqrt(sum((x - mean) ** 2 for x in draws) / len(draws) / len(draws))
    assert float(temporal_bands(dense(rows)).null["high"][0]) == pytest.approx(mean, abs=4 * spread)


def test_amplifying_gives_back_the_energy_that_guidance_took() -> None:
    weights = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1).double()
    even = torch.full_like(weights, 1 / 16)
    after = guided(weights, even, 0.4)
    assert bool((after.square().sum(-1).mean(-1) < weights.square().sum(-1).mean(-1)).all())
    beta = motion_gain(weights, after)
    assert beta.shape == (3, 2)
    assert bool((beta > 1).all())
    back = amplified(after, beta)
    torch.testing.assert_close(back.square().sum(-1).mean(-1), weights.square().sum(-1).mean(-1))
    assert guided(weights, even, 1.0).equal(even)
    torch.testing.assert_close(motion_gain(weights, weights), torch.ones(3, 2).double())
    assert bool(motion_gain(weights, even).isnan().all())  # no high band to amplify
    assert bool(motion_gain(even, weights).isnan().any())  # the low band alone has more


def test_disparity_from_the_reference_block(dense) -> None:
    maps = [random_rows(2, 2, 8, seed=seed, causal=False) for seed in range(3)]
    found = temporal_disparity([dense(m) for m in maps], 1)
    each = (maps[2] - maps[1]).flatten(2).norm(dim=-1)
    torch.testing.assert_close(found.values["disparity"][2], each.mean(0))
    torch.testing.assert_close(found.values["relative"][2], (each / maps[1].flatten(2).norm(dim=-1)).mean(0))
    assert found.values["disparity"][1].tolist() == [0, 0]
    even = (maps[1] - 1 / 8).flatten(2).norm(dim=-1).mean(0)
    torch.testing.assert_close(found.null["disparity"][0], even)
    closer = temporal_disparity([dense(guided(maps[0], maps[1], 0.3)), dense(maps[1])], 1).values["disparity"][0]
    torch.testing.assert_close(closer, 0.7 * found.values["disparity"][0])
    with pytest.raises(UnknownName, match="reference"):
        temporal_disparity([dense(m) for m in maps], "up1")
    with pytest.raises(WorkbenchError, match="average over places"):
        temporal_disparity([dense(maps[0]), dense(maps[1][:1])], 1)


def test_the_edit_acts_on_a_model_that_sees_all_frames_and_is_refused_on_a_causal_one() -> None:
    config = NativeConfig(layers=2, heads=2, width=16, head_width=8, vocab=13, causal=False)
    torch.manual_seed(0)
    model = wb.NativeModel(NativeNet(config).eval())
    frames = torch.arange(16)[None] % 13
    site = "blocks.0.attn.hook_pattern"
    plain = model.run(frames, read=[site])
    assert plain.logits is not None
    moved = []
    for beta in (1.0, 1.5, 3.0):
        run = model.run(frames, edit={site: motion_edit(beta)})
        assert run.logits is not None
        moved.append(float((run.logits - plain.logits).detach().norm()))
    assert moved[0] < 1e-4 < moved[1] < moved[2]
    with pytest.raises(Refused, match="causal"):
        wb.load("tiny-softmax").run(SENTENCE, edit={site: motion_edit(1.5)})


def test_mistakes_are_told(dense) -> None:
    with pytest.raises(Refused, match="frequency 0"):
        temporal_bands(dense(torch.eye(6)[None, None]), 3)
    with pytest.raises(WorkbenchError, match="not negative"):
        high_band(8, -1)
    with pytest.raises(WorkbenchError, match="one shape"):
        guided(torch.zeros(2, 2), torch.zeros(3, 3))
    with pytest.raises(WorkbenchError, match="one shape"):
        motion_gain(torch.zeros(2, 2), torch.zeros(3, 3))
    dead = temporal_bands(dense(torch.zeros(1, 1, 8, 8), row_sum="<=1"))
    assert bool(dead.values["energy"][0].isnan().all())
    assert dead.undefined
