import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.pairs import divergence
from workbench.probes.circuits import learning
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.hard_concrete import open_probability, sample
from workbench.probes.circuits.masked import masked
from workbench.probes.circuits.methods.ibcircuit import information
from workbench.probes.circuits.methods.ugs import shares

GRID = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


@given(st.floats(-4, 4))
@settings(max_examples=20, deadline=None)
def test_the_probability_of_an_open_hard_concrete_mask(logit):
    drawn = sample(torch.full_like(GRID, logit), GRID)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    expected = float(open_probability(torch.tensor(logit, dtype=torch.float64)))
    assert float((drawn > 0).double().mean()) == pytest.approx(expected, abs=2e-5)


def test_hard_concrete_as_published():
    u, a, b = 0.3, 0.7, 2 / 3
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / b))
    found = sample(torch.tensor([a, 5.0, -5.0]).double(), torch.tensor([u, 0.5, 0.5]).double())
    assert found.tolist() == pytest.approx([s * 1.2 - 0.1, 1, 0])


@given(st.floats(-3, 3), st.floats(0.2, 2))
@settings(max_examples=20, deadline=None)
def test_uniform_masks_are_p_on_average_and_open_to_a_gradient_with_probability_w(logit, window):
    p = 1 / (1 + math.exp(-logit))
    z = shares(torch.tensor([logit], dtype=torch.float64), GRID[None], window)
    assert float(z.mean()) == pytest.approx(p, abs=1e-4)
    assert float(((z > 0) & (z < 1)).double().mean()) == pytest.approx(window * p * (1 - p), abs=1e-4)


@given(st.floats(-2, 2), st.floats(0.5, 2))
@settings(max_examples=20, deadline=None)
def test_the_uniform_gradient_is_that_of_bernoulli_masks(logit, window):
    """E[d loss / d logit] = p (1 - p) (loss open - loss closed), for a loss that bends."""
    a = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((3 * shares(a, GRID[None], window)).sin().mean(), a)
    p = 1 / (1 + math.exp(-logit))
    assert float(slope) == pytest.approx(p * (1 - p) * math.sin(3), abs=2e-3)


@pytest.mark.parametrize("level", ["node", "edge"])
@pytest.mark.parametrize("draw", [sample, lambda a, u: shares(a, u[:, None])[:, 0]])
def test_the_gradient_of_the_loss_at_fixed_noise_is_a_finite_difference(make, make_pairs, level, draw):
    setting = Setting.of(make(), make_pairs(n=3))
    model = masked(setting, level)
    (batch,) = learning.batches(model, 16)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(model.names), generator=generator, dtype=torch.float64).requires_grad_()
    u = torch.rand(len(model.names), generator=generator, dtype=torch.float64)
    half = logits.detach().sigmoid() + 0.02  # draws that leave a mask strictly between 0 and 1
    u = torch.where(torch.arange(len(u)) % 2 == 0, 0.5 if draw is sample else half, u)
    scale = logits.detach().sigmoid() * (1 - logits.detach().sigmoid())

    def loss(a):
        if draw is sample:
            return divergence(batch.logits, model.logits(batch, sample(a, u)), batch.pairs).mean()
        # the window is a constant of the gradient, so the difference must hold it too
        keep = (0.5 - (u - a.sigmoid()) / scale).clamp(0, 1)
        return divergence(batch.logits, model.logits(batch, keep), batch.pairs).mean()

    (slope,) = torch.autograd.grad(
        divergence(batch.logits, model.logits(batch, draw(logits, u)), batch.pairs).mean(), logits
    )
    for number in slope.abs().argsort(descending=True)[:3].tolist():
        step = torch.zeros_like(logits)
        step[number] = 1e-6
        assert slope[number] != 0
        with torch.no_grad():
            difference = (loss(logits + step) - loss(logits - step)) / 2e-6
        assert float(difference) == pytest.approx(float(slope[number]), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_information_is_the_kl_of_the_gaussians(share):
    mu, sigma = torch.tensor([1.5, 0.7], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    h = mu + sigma * torch.randn(400_000, generator=generator, dtype=torch.float64)
    passed = torch.distributions.Normal(share * h + (1 - share) * mu, (1 - share) * sigma)
    whole = torch.distributions.Normal(mu, sigma)
    x = passed.loc + passed.scale * torch.randn(h.shape, generator=generator, dtype=torch.float64)
    logit = torch.logit(torch.tensor(share, dtype=torch.float64))
    sampled = (passed.log_prob(x) - whole.log_prob(x)).mean()
    assert float(information(logit)) == pytest.approx(float(sampled), abs=5e-3)
    assert float(information(logit)) == pytest.approx(share**2 - share - math.log(1 - share), abs=1e-12)
    constant = torch.distributions.kl_divergence(torch.distributions.Normal(mu, (1 - share) * sigma), whole)
    assert float(information(logit, 0.0)) == pytest.approx(float(constant), abs=1e-12)


def test_information_grows_and_nothing_passes_for_nothing():
    logits = torch.linspace(-20, 20, 200, dtype=torch.float64)
    found = information(logits)
    assert (found[logits > 0].diff() > 0).all()
    assert float(found[0]) == pytest.approx(0, abs=1e-8)


def test_the_objective_is_the_mean_over_examples_whatever_the_batches(make, make_pairs):
    setting = Setting.of(make(), make_pairs(n=5))
    model = masked(setting, "node")
    keep = torch.full((len(model.names),), 0.4, dtype=torch.float64)
    for name in learning.OBJECTIVES:
        means = []
        for prompts in (2, 5):
            rounds = learning.batches(model, prompts)
            loss = learning.objective(setting, name, len(rounds))
            means.append(sum(float(loss(batch, model.logits(batch, keep)).detach()) for batch in rounds) / len(rounds))
        assert means[0] == pytest.approx(means[1], abs=1e-9)
