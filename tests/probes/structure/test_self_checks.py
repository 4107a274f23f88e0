"""Consistency, bands, rollout and flow from outside: literal formulas, shifts that must not matter, odd cases."""

import inspect
import itertools
import math

import pytest
import torch

from workbench.maps import AttentionMap
from workbench.probes.examples import random_rows
from workbench.probes.structure.coding_rate import coding_rate, ista_sparsity
from workbench.probes.structure.consistency import consistency_of
from workbench.probes.structure.critical_bands import BASE, CriticalBands, critical_bands, octave_noise
from workbench.probes.structure.flow import flow
from workbench.probes.structure.pointers import pointer_fidelity
from workbench.probes.structure.rollout import rollout


def test_what_an_example_adds_to_all_answers_does_not_count():
    """Scores are those of the answers alone: a text in which both are unlikely is no other text."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 31, 2, dtype=torch.float64, generator=generator)
    shift = 20 * torch.randn(5, 31, 1, dtype=torch.float64, generator=generator)
    one, other = consistency_of(scores), consistency_of(scores + shift)
    torch.testing.assert_close(other.consistency, one.consistency)
    assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("examples", [24, 25])
def test_of_two_answers_each_is_the_label_of_its_half(examples):
    """The authors' rule for two answers, 1 above its median and 1/2 at it, read off their published code."""
    scores = torch.randn(4, examples, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    p = scores.softmax(-1)
    middle = p.quantile(0.5, dim=1, keepdim=True)
    calibrated = (p > middle).double() + (p == middle).double() / 2
    found = consistency_of(scores)
    assert int((found.labels == 0).sum(1).max()) - examples // 2 in (0, 1)
    last = calibrated[-1].argmax(-1)
    want = calibrated[torch.arange(4)[:, None], torch.arange(examples), last]
    sure = calibrated[-1].amax(-1) == 1
    torch.testing.assert_close(found.agreements[:, sure], want[:, sure])


def test_the_published_form_of_the_peak():
    """A peak of A = 4 octaves is a sensitivity of 1, one of 0 octaves 1/16."""
    table = torch.zeros(1, 2, 1)
    for octaves in (4.0, 2.5, 0.0):
        found = CriticalBands((BASE,), (0.0, 0.16), table, torch.zeros(1), 0.5, BASE, 1.0, octaves)
        assert found.peak_sensitivity == pytest.approx(2 ** (octaves - 4))


def test_centre_and_bandwidth_of_a_planted_sensitivity():
    """A classifier that errs from a planted noise on, Gaussian over the bands: the fit returns its centre and width."""
    height, mu, sigma = 3.0, 2.2, 1.1
    sizes = (0.0, *(0.16 * 2 ** (-(48 - i) / 12) for i in range(49)))
    images = torch.zeros(4, 1, 256, 256, dtype=torch.float64)

    def classifier(x):
        power = torch.fft.rfft2(x[:, 0]).abs().square()
        y, z = torch.fft.fftfreq(256) * 256, torch.fft.rfftfreq(256) * 256
        radius = (y[:, None] ** 2 + z**2).sqrt()
        sd = x[:, 0].std(dim=(-1, -2))
        band = (
            ((power * radius).sum((-2, -1)) / power.sum((-2, -1)).clamp(min=1e-30) / BASE)
            .clamp(min=1e-9)
            .log2()
            .round()
        )
        threshold = 0.16 * 2 ** -(height * torch.exp(-((band - mu) ** 2) / (2 * sigma**2)))
        wrong = (sd > threshold).long()
        return torch.nn.functional.one_hot(wrong, 2).double()

    found = critical_bands(classifier, images, torch.zeros(4, dtype=torch.long), deviations=sizes)
    assert len(found.centres) == 7
    assert found.centre == pytest.approx(BASE * 2**mu, rel=0.1)
    assert found.bandwidth == pytest.approx(2 * math.sqrt(math.log(4)) * sigma, rel=0.15)
    assert found.peak_sensitivity == pytest.approx(2 ** (height - 4), rel=0.1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rollout_of_grouped_heads_is_the_literal_product(groups):
    dense = [random_rows(2, 4, 7, seed=seed) for seed in range(3)]
    maps = [AttentionMap.from_dense(rows, kv_heads=groups) for rows in dense]
    want = torch.eye(7, dtype=torch.float64).repeat(2, 1, 1)
    for rows in dense:
        mixed = 0.5 * rows.mean(1) + 0.5 * torch.eye(7, dtype=torch.float64)
        want = mixed / mixed.sum(-1, keepdim=True) @ want
    torch.testing.assert_close(rollout(maps), want)
    torch.testing.assert_close(rollout(maps).sum(-1), torch.ones(2, 7, dtype=torch.float64))


def test_flow_through_one_layer_is_its_row():
    rows = random_rows(1, 3, 6, seed=4)
    want = 0.5 * rows.mean(1)[:, -1] + 0.5 * torch.eye(6, dtype=torch.float64)[-1]
    torch.testing.assert_close(flow(AttentionMap.from_dense(rows)).values["flow"], want, atol=2e-7, rtol=0)


def test_uniform_rows_have_the_logarithm_of_their_keys():
    even = torch.full((1, 1, 5, 11), 1 / 11, dtype=torch.float64)
    found = pointer_fidelity(AttentionMap.from_dense(even, offset=0), torch.tensor([3, -1, 10, 0, -1]))
    assert float(found.values["entropy"][0]) == pytest.approx(math.log2(11))
    assert float(found.values["fidelity"][0]) == pytest.approx(1 / 11)


def test_ista_is_its_formula_entry_by_entry():
    generator = torch.Generator().manual_seed(5)
    tokens, d = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 6))
    alive = 0
    for z in tokens:
        apart = [sum(d[i, j] * z[j] for j in range(6)) - z[i] for i in range(6)]
        step = [z[k] - 0.1 * sum(d[i, k] * apart[i] for i in range(6)) - 0.1 * 0.1 for k in range(6)]
        alive += sum(float(x) > 0 for x in step)
    assert float(ista_sparsity(tokens, d)) == pytest.approx(alive / 54)


def test_flow_never_exceeds_any_cut():
    """Max-flow of two layers against every cut of the middle tokens, by hand."""
    dense = [random_rows(1, 2, 4, seed=seed) for seed in (6, 7)]
    low, high = (0.5 * rows.mean(1)[0] + 0.5 * torch.eye(4, dtype=torch.float64) for rows in dense)
    found = flow([AttentionMap.from_dense(rows) for rows in dense]).values["flow"][0]
    for end in range(4):
        cuts = [
            sum(float(low[m, end]) if m in side else float(high[3, m]) for m in range(4))
            for n in range(5)
            for side in itertools.combinations(range(4), n)
        ]
        assert float(found[end]) == pytest.approx(min(cuts), abs=1e-6)


@pytest.mark.parametrize(
    ("function", "name", "published"),
    [
        (coding_rate, "epsilon", 0.01),
        (ista_sparsity, "step", 0.1),
        (ista_sparsity, "penalty", 0.1),
        (critical_bands, "bands", 7),
        (critical_bands, "deviations", (0, 0.02, 0.04, 0.08, 0.16)),
        (critical_bands, "level", 0.5),
        (rollout, "residual", 0.5),
        (flow, "residual", 0.5),
    ],
)
def test_published_constants_are_the_defaults(function, name, published):
    assert inspect.signature(function).parameters[name].default == published


def test_bands_are_octaves_from_1_75_cycles_on():
    assert BASE == 1.75
    noise = octave_noise((64, 1, 64, 64), BASE * 4, torch.Generator().manual_seed(0))[:, 0]
    power = torch.fft.fft2(noise).abs().square().mean(0)
    place = torch.fft.fftfreq(64) * 64
    radius = (place[:, None].square() + place.square()).sqrt()
    inside = (radius >= 7 / math.sqrt(2)) & (radius < 7 * math.sqrt(2))
    assert float(power[~inside].sum() / power.sum()) < 1e-12
    assert float(power[inside].std() / power[inside].mean()) < 0.5
