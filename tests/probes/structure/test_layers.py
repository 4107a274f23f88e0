"""Internal consistency, coding rate and critical bands on planted data."""

import math

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.probes.examples import needles
from workbench.probes.structure.coding_rate import coding_rate, coding_rates, ista_sparsity
from workbench.probes.structure.consistency import consistency_of, internal_consistency, weighted_vote
from workbench.probes.structure.critical_bands import BASE, critical_bands, octave_noise


def planted(layers=8, examples=40, flip=3, bias=0.0):
    """Scores of two answers: from layer ``flip`` on the last layer's label, before it the other; ``bias`` for answer 0 in every
    layer but the last."""
    label = torch.arange(examples) % 2
    scores = torch.zeros(layers, examples, 2, dtype=torch.float64)
    noise = torch.rand(layers, examples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for layer in range(layers):
        shown = label if layer >= flip else 1 - label
        scores[layer, torch.arange(examples), shown] = 1 + 0.1 * noise[layer]
        if layer < layers - 1:
            scores[layer, :, 0] += bias
    return scores


def test_a_planted_flip_layer_gives_the_exact_consistency():
    found = consistency_of(planted(8, flip=3))
    assert found.consistency.tolist() == pytest.approx([4 / 7] * 40)  # layers 3 .. 6 of the seven before the last
    assert found.frame()["agreement"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert found.labels[-1].tolist() == [i % 2 for i in range(40)]


def test_without_calibration_a_biased_layer_is_mis_scored():
    scores = planted(8, flip=3, bias=5.0)
    with_it, without = consistency_of(scores), consistency_of(scores, calibrate=False)
    assert with_it.consistency.tolist() == pytest.approx([4 / 7] * 40)
    assert without.frame()["agreement"].tolist()[:7] == [0.5] * 7  # answer 0 everywhere
    assert without.consistency.tolist() == pytest.approx([1.0, 0.0] * 20)


def test_ties_count_their_share_and_the_null_is_chance():
    scores = planted(3, flip=0)
    scores[0] = 0.0
    found = consistency_of(scores, calibrate=False)
    assert found.frame()["agreement"].tolist() == [0.5, 1, 1]
    assert found.frame()["agreement_null"].tolist() == pytest.approx([0.5] * 3, abs=0.1)


def test_labels_are_those_of_the_logit_lens():
    model = wb.load("tiny-softmax")
    pairs = needles(model, n=12)
    answers = pairs.answer[:, 0].unique()
    found = internal_consistency(model, pairs, answers, calibrate=False)
    with torch.no_grad():
        run = model.run(pairs.clean)
    rows = run.logits[torch.arange(12), pairs.position][:, answers]
    assert found.labels[-1].tolist() == rows.argmax(-1).tolist()
    assert float(found.consistency.mean()) > 0.3
    text = internal_consistency(
        model, ["Mary and John went", "Mary and John went to the store"], answers, calibrate=False
    )
    with torch.no_grad():
        one = model.run("Mary and John went").logits[0, -1, answers]
    torch.testing.assert_close(text.scores[-1, 0].argmax(), one.argmax())


def test_chains_are_weighed_by_their_consistency():
    assert weighted_vote(["a", "b", "b"], [0.9, 0.1, 0.2]) == pytest.approx({"a": 0.75, "b": 0.25})
    with pytest.raises(WorkbenchError, match="as many consistencies"):
        weighted_vote(["a"], [0.1, 0.2])


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: consistency_of(torch.zeros(1, 4, 2)), WorkbenchError, "two layers"),
        (lambda: consistency_of(torch.zeros(3, 1, 2)), Refused, "calibrate=False"),
        (lambda: internal_consistency(wb.load("tiny-softmax"), "the", [5]), WorkbenchError, "two or more"),
        (lambda: coding_rate(torch.zeros(4, 8), torch.zeros(2, 6, 3)), WorkbenchError, r"\[H, D, p\]"),
        (lambda: critical_bands(lambda x: x, torch.zeros(2, 3), torch.zeros(2)), WorkbenchError, "images are floats"),
    ],
)
def test_wrong_arguments_are_named(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_the_rate_of_tokens_along_a_subspace_is_analytic():
    """m tokens spread evenly over the p axes of one of two orthogonal subspaces: p/2 log(1 + 1/eps); the other adds nothing."""
    p, copies, eps = 4, 5, 0.01
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    spaces = torch.stack([basis[:, :p], basis[:, p : 2 * p]])
    tokens = 3 * basis[:, :p].T.repeat(copies, 1)  # lengths do not matter
    assert float(coding_rate(tokens, spaces, eps)) == pytest.approx(p / 2 * math.log(1 + 1 / eps))
    spread = torch.cat([tokens, basis[:, p : 2 * p].T.repeat(copies, 1)])
    assert float(coding_rate(spread, spaces, eps)) == pytest.approx(2 * p / 2 * math.log(1 + 0.5 / eps))
    one = basis[:, :1].T.repeat(20, 1)
    assert float(coding_rate(one, spaces, eps)) == pytest.approx(0.5 * math.log(1 + p / eps))


def test_the_rate_has_the_gradient_of_differences():
    g = torch.Generator().manual_seed(1)
    tokens = torch.randn(5, 6, dtype=torch.float64, generator=g, requires_grad=True)
    spaces = torch.linalg.qr(torch.randn(2, 6, 3, dtype=torch.float64, generator=g)).Q
    assert torch.autograd.gradcheck(lambda z: coding_rate(z, spaces), tokens)


def test_rates_of_a_model_are_those_of_its_streams():
    model = wb.load("tiny-softmax")
    texts = ["Mary and John went to the store", "John gave a book"]
    both = coding_rates(model, texts)
    alone = [coding_rates(model, [text]) for text in texts]
    want = (alone[0].values["rate"] + alone[1].values["rate"]) / 2
    torch.testing.assert_close(both.values["rate"], want, rtol=1e-4, atol=0)
    assert both.values["sparsity"].isfinite().all()
    assert (both.values["sparsity"] < 1).all()


def test_ista_leaves_what_the_penalty_does_not_take():
    eye = torch.eye(4, dtype=torch.float64)
    tokens = torch.tensor([[0.5, 0.005, -0.2, 0.02]], dtype=torch.float64)
    assert float(ista_sparsity(tokens, eye)) == 0.5  # 0.5 and 0.02 are above step x penalty = 0.01
    with pytest.raises(WorkbenchError, match="dictionary"):
        ista_sparsity(tokens, torch.eye(3))


def test_noise_lies_in_its_octave():
    noise = octave_noise((3, 2, 32, 32), 7.0, torch.Generator().manual_seed(0))
    assert noise.std(dim=(-1, -2)).flatten().tolist() == pytest.approx([1.0] * 6)
    assert torch.equal(noise[:, 0], noise[:, 1])
    power = torch.fft.fft2(noise[0, 0]).abs() ** 2
    y = torch.fft.fftfreq(32) * 32
    radius = (y[:, None] ** 2 + y[None] ** 2).sqrt()
    inside = (radius >= 7 / 2**0.5) & (radius < 7 * 2**0.5)
    assert float(power[~inside].sum() / power.sum()) < 1e-20


@pytest.mark.parametrize("band", [1, 2])
def test_the_band_that_a_classifier_reads_is_found(band):
    """A classifier that tells two gratings of one frequency apart is only disturbed by noise of that octave."""
    g = torch.Generator().manual_seed(band)
    cycles = round(BASE * 2**band)
    wave = torch.sin(2 * torch.pi * cycles * torch.arange(32, dtype=torch.float64) / 32).expand(32, 32)
    labels = torch.arange(60) % 2
    images = torch.randn(60, 1, 32, 32, generator=g, dtype=torch.float64) * 0.02
    images += 0.1 * torch.where(labels[:, None, None, None] == 1, wave.T, wave)

    def classifier(x):
        return torch.stack([(x * wave).sum((1, 2, 3)), (x * wave.T).sum((1, 2, 3))], 1).abs()

    found = critical_bands(classifier, images, labels, deviations=(0, 0.4, 0.8, 1.6, 3.2), level=0.7)
    assert int(found.sensitivity.nan_to_num(-1).argmax()) == band
    assert found.centre == pytest.approx(BASE * 2**band, rel=0.35)
    assert found.bandwidth < 2.5
    assert found.correct[:, 0].mean() == 1.0


def test_a_classifier_that_guesses_is_refused_and_one_that_nothing_disturbs_is_undefined():
    images, labels = torch.randn(8, 1, 16, 16), torch.arange(8) % 2
    with pytest.raises(WorkbenchError, match="without noise"):
        critical_bands(lambda x: torch.zeros(len(x), 2), images, labels)
    told = torch.nn.functional.one_hot(labels).float()
    found = critical_bands(lambda x: told, images, labels)
    assert math.isnan(found.centre)
    assert "use more noise" in found.reason
    assert found.sensitivity.isnan().all()


def test_tiny_vit_has_a_critical_band():
    from workbench.datasets.patches import planted_images

    model = wb.load("tiny-vit")
    planted = planted_images(64, seed=3)
    found = critical_bands(lambda x: model.run(x).logits, planted.images, planted.label, deviations=(0, 0.5, 1, 2, 4))
    assert found.correct[:, 0].mean() > 0.9
    assert found.correct[:, -1].mean() < 0.9
