"""Relevance of pixels against rules written out, gradients and conservation; salient maps against loops and known shapes."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.datasets.patches import planted_images
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.structure import salient
from workbench.probes.structure.conv_relevance import RULES, layers_of, pixel_deletion, relevance_map, templates
from workbench.probes.structure.salient import area_scores, context_saliency, salient_relevance


def network(bias=False, pool=nn.MaxPool2d, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=bias), nn.ReLU()),
        pool(2),
        nn.Flatten(),
        nn.Linear(12, 3, bias=bias),
    ).double().eval()  # fmt: skip


def pictures(n=2, seed=0):
    return torch.randn(n, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix(layer, shape):
    """A layer as a matrix ``[inputs, outputs]`` and what it adds, found by asking."""
    size = math.prod(shape)
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
    eye = torch.eye(size, dtype=torch.float64).view(size, *shape)
    return layer(eye).flatten(1) - zero, zero


def by_hand(layer, a, r, rule):
    """One layer's rule, contribution by contribution; ``a`` and ``r`` flat."""
    w, b = matrix(layer, a.shape)
    x, out = a.flatten(), torch.zeros(a.numel(), dtype=torch.float64)
    for o in range(w.shape[1]):
        if not bool((x * w[:, o]).any()) and float(b[o]) == 0:
            continue  # nothing was given
        if rule == "epsilon":
            parts, bias = x * w[:, o], b[o]
            out += parts / (parts.sum() + bias) * r[o]
        elif rule == "gamma":
            parts, bias = x * (w[:, o] + 0.25 * w[:, o].clamp(min=0)), b[o] + 0.25 * b[o].clamp(min=0)
            out += parts / (parts.sum() + bias) * r[o]
        else:
            parts = x * w[:, o]
            up, down = parts.clamp(min=0), parts.clamp(max=0)
            top, low = up.sum() + b[o].clamp(min=0), down.sum() + b[o].clamp(max=0)
            if float(low) == 0:
                out += up / top * r[o]
            elif float(top) == 0:
                out += down / low * r[o]
            else:
                out += (2 * up / top - down / low) * r[o]
    return out.view(a.shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_rules_as_written_out(rule, bias):
    cnn, images = network(bias, nn.AvgPool2d), pictures(1)
    conv, relu, pool, _, last = layers_of(cnn)
    first = relu(conv(images))[0]
    second = pool(first[None])[0]
    logits = last(second.flatten())
    r = torch.zeros(3, dtype=torch.float64)
    r[1] = logits[1]
    r = by_hand(last, second.flatten(), r, rule).flatten()
    r = by_hand(pool, first, r, "epsilon" if rule == "gamma" else rule).flatten()
    want = by_hand(conv, images[0], r.view(first.shape).flatten(), rule)
    found = relevance_map(cnn, images, 1, rule=rule, epsilon=0)
    torch.testing.assert_close(found.maps[0], want.sum(0))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))
def test_without_biases_the_epsilon_rule_is_gradient_times_input(seed, pool):
    cnn, images = network(pool=pool, seed=seed), pictures(3, seed)
    found = relevance_map(cnn, images, 2, epsilon=0)
    x = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cnn(x)[:, 2].sum(), x)
    torch.testing.assert_close(found.maps, (grad * images).sum(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_relevances_sum_to_the_logit_without_biases_alone(rule):
    images = pictures(4)
    found = relevance_map(network(), images, 0, rule=rule, epsilon=0)
    torch.testing.assert_close(found.conserved, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found.maps.flatten(1).sum(1), found.logit)
    biased = relevance_map(network(bias=True), images, 0, rule=rule, epsilon=0)
    assert float((biased.conserved - 1).abs().min()) > 1e-4
    torch.testing.assert_close(biased.logit, network(bias=True)(images)[:, 0].detach())


def test_a_large_epsilon_takes_relevance():
    images = pictures(4)
    near, far = (relevance_map(network(), images, 0, epsilon=e) for e in (1e-9, 1.0))
    assert float((near.conserved - 1).abs().max()) < 1e-6
    assert bool((far.conserved.abs() < near.conserved.abs()).all())


def test_batch_norms_are_folded_in():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        value.copy_(torch.rand_like(value) + 0.5)
    plain = network()
    conv, relu = plain[0]
    cnn = nn.Sequential(conv, norm, relu, *plain[1:]).eval()
    before = copy.deepcopy(cnn.state_dict())
    folded = nn.Sequential(*layers_of(cnn))
    torch.testing.assert_close(folded(pictures()), cnn(pictures()))
    found = relevance_map(cnn, pictures(), 1)
    torch.testing.assert_close(found.maps, relevance_map(folded.eval(), pictures(), 1).maps)
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())


def test_one_image_has_the_same_map_alone():
    both = salient_relevance(network(), pictures(), patch=3, epsilon=0)
    alone = salient_relevance(network(), pictures()[1:], patch=3, epsilon=0)
    torch.testing.assert_close(both.maps[1:], alone.maps)
    torch.testing.assert_close(both.relevance[1:], alone.relevance)
    assert both.target[1] == network()(pictures())[1].argmax()


def literal(maps, patch, share, near, focus):
    """The definition at one scale, with loops; for square maps whose half is too small for a patch."""
    x = maps.clamp(min=0) / maps.max()
    n, half = len(x), patch // 2
    place = lambda i: min(max(i, 0), n - 1)  # noqa: E731
    patches, at = [], []
    for i in range(n):
        for j in range(n):
            span = range(-half, half + 1)
            patches.append(torch.stack([x[place(i + a), place(j + b)] for a in span for b in span]))
            at.append((i / n, j / n))
    out = torch.zeros(n * n, dtype=torch.float64)
    for i, mine in enumerate(patches):
        away = [
            float((mine - other).norm()) / patch / (1 + near * math.dist(at[i], at[j]))
            for j, other in enumerate(patches)
        ]
        nearest = sorted(away)[: max(1, round(share * n * n))]
        out[i] = 1 - math.exp(-sum(nearest) / len(nearest))
    out = (out / out.max()).view(n, n)
    foci = (out > focus).nonzero().tolist()
    final = out.clone()
    for i in range(n):
        for j in range(n):
            final[i, j] = out[i, j] * (1 - min(math.dist((i, j), other) for other in foci) / n)
    return final


@pytest.mark.parametrize("limit", [2**24, 100])
def test_saliency_as_written_out(limit, monkeypatch):
    monkeypatch.setattr(salient, "_LIMIT", limit)
    maps = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = context_saliency(maps, patch=5, scales=(1.0,), share=0.4, near=2.0, focus=0.7)
    for one, got in zip(maps, found, strict=True):
        torch.testing.assert_close(got, literal(one, 5, 0.4, 2.0, 0.7))


def test_a_spot_stands_out_and_flat_maps_do_not():
    maps = torch.zeros(3, 20, 24)
    maps[0, 6:9, 10:13] = 2.0
    maps[1] = 1.0
    maps[2] = -1.0
    found = context_saliency(maps, patch=3)
    assert float(found[0].max()) == 1.0
    spot = int(found[0].argmax())
    assert 6 <= spot // 24 < 9
    assert 10 <= spot % 24 < 13
    assert float(found[0, 15:, :5].max()) < 0.05
    assert not found[1:].any()
    assert float(found.min()) >= 0


def test_large_maps_are_made_smaller_first():
    maps = torch.zeros(1, 96, 128)
    maps[0, 40:56, 60:80] = 1.0
    found = context_saliency(maps, patch=3, size=32)
    assert found.shape == maps.shape
    assert float(found[0, 44:52, 64:76].mean()) > 10 * float(found[0, 80:].mean())


@pytest.fixture(scope="module")
def trained():
    """A small network without biases that tells planted shapes apart, and what it is shown."""
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, 6, bias=False),
    )  # fmt: skip
    data = planted_images(1500, split="train")
    optimiser = torch.optim.Adam(cnn.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        batch = torch.randint(1500, (48,), generator=generator)
        loss = nn.functional.cross_entropy(cnn(data.images[batch]), data.label[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    test = planted_images(16)
    inside = test.planted.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert float((cnn.eval()(test.images).argmax(1) == test.label).double().mean()) > 0.9
    return cnn, test, inside


@pytest.mark.parametrize("rule", RULES)
def test_a_trained_network_looks_at_the_shape_and_salient_maps_cover_it(trained, rule):
    cnn, test, inside = trained
    maps = salient_relevance(cnn, test.images, test.label, rule=rule, patch=3)
    assert float((maps.conserved - 1).abs().max()) < 1e-3
    table = area_scores(maps, inside).frame().set_index("layer")
    for row, least in (("relevance", 0.7), ("salient", 0.5)):
        assert table["inside"][row] > least
        assert table["inside"][row] > table["inside_null"][row] + 0.15
        assert table["pointing"][row] > 0.8
        assert table["covered"][row] > table["covered_null"][row] + 0.15
        assert table["area"][row] == 0.0625
    # Single pixels become an area: more of the shape is covered, and mass is spread over its surroundings.
    assert table["covered"]["salient"] > table["covered"]["relevance"] + 0.1
    assert table["inside"]["salient"] < table["inside"]["relevance"]
    alone = relevance_map(cnn, test.images, test.label, rule=rule)
    plain = area_scores(alone, inside).frame().set_index("layer")
    assert plain["covered"]["relevance"] == table["covered"]["relevance"]


def test_the_network_needs_the_pixels_that_are_relevant(trained):
    cnn, test, _ = trained
    maps = relevance_map(cnn, test.images, test.label)
    curve = pixel_deletion(cnn, test.images, maps.maps, test.label, counts=(16, 64), random=3)
    drop, by_chance = (curve.base - x.mean(tuple(range(x.ndim - 1))) for x in (curve.ranked, curve.random))
    assert bool((drop > by_chance + 3).float().mean() > 0.9)
    first = maps.maps.flatten(1).argsort(1, descending=True)[:, :16]
    erased = test.images.flatten(1).scatter(1, first, test.images.mean((2, 3)).expand(-1, 16)).view_as(test.images)
    want = cnn(erased).gather(1, test.label[:, None])[:, 0].detach().double()
    torch.testing.assert_close(curve.ranked[0], want)


def test_area_scores_in_closed_form():
    cnn, images, masks = templates()
    maps = salient_relevance(cnn, images, patch=3)
    table = area_scores(maps, masks).frame().set_index("layer")
    assert table["pointing"]["relevance"] == 1.0
    assert table["area"]["salient"] == pytest.approx(25 / 256)
    values = torch.tensor([[[4.0, 1.0, -3.0, 3.0]]])
    inside = torch.tensor([[[True, False, False, True]]])
    scores = salient._scores(values, inside)
    torch.testing.assert_close(scores, torch.tensor([[7 / 8, 1.0, 1.0]], dtype=scores.dtype), check_dtype=False)
    assert salient._scores(-values.abs(), inside).isnan().all()


def test_wrong_networks_and_inputs_are_refused_by_name():
    images = pictures()
    with pytest.raises(Refused, match="layer 0.1 is a GELU"):
        relevance_map(nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU())).eval(), images)
    with pytest.raises(Refused, match="follows no Conv2d"):
        relevance_map(nn.Sequential(nn.BatchNorm2d(2)).eval(), images)
    with pytest.raises(Refused, match="got a Linear"):
        relevance_map(nn.Linear(2, 2), images)
    with pytest.raises(WorkbenchError, match="eval"):
        relevance_map(network().train(), images)
    with pytest.raises(UnknownName, match="gamma"):
        relevance_map(network(), images, rule="deep")
    with pytest.raises(WorkbenchError, match="0 to 2"):
        relevance_map(network(), images, 3)
    with pytest.raises(WorkbenchError, match="floating point"):
        relevance_map(network(), images[0])
    with pytest.raises(Refused, match="logits"):
        relevance_map(nn.Sequential(nn.Conv2d(2, 3, 3)).double().eval(), images)
    with pytest.raises(Refused, match="smaller patch"):
        context_saliency(torch.rand(1, 4, 4), patch=5)
    with pytest.raises(WorkbenchError, match="odd"):
        context_saliency(torch.rand(1, 8, 8), patch=4)
    with pytest.raises(Refused, match="NaN"):
        context_saliency(torch.full((1, 8, 8), float("nan")))
    maps = relevance_map(network(), images)
    with pytest.raises(WorkbenchError, match="inside is bool"):
        area_scores(maps, torch.ones(2, 8, 8))
    with pytest.raises(Refused, match="empty"):
        area_scores(maps, torch.zeros(2, 8, 8, dtype=torch.bool))
    with pytest.raises(WorkbenchError, match="counts"):
        pixel_deletion(network(), images, maps.maps, counts=(0,))
