"""Attention distance in pixels."""

import math

import pytest
import torch
from vision_nets import by_hops, vision

import workbench as wb
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.vision.distances import attention_distance
from workbench.probes.vision.grid import Grid, grid_of
from workbench.probes.vision.on_patches import image_mods


def literal(rows, grid):
    total, index = 0.0, grid.index.tolist()
    for p, here in zip(index, grid.centres.tolist(), strict=True):
        for q, there in zip(index, grid.centres.tolist(), strict=True):
            total += float(rows[p, q]) * math.dist(here, there)
    return total / grid.patches


@pytest.mark.parametrize("grid", [Grid(3, 4, (8, 4), start=1, cls=0, tokens=13), Grid(2, 3, (1, 7), start=2, step=4)])
def test_it_is_the_literal_sum_and_so_is_its_null(grid):
    tokens = grid.tokens or 12
    rows = random_rows(2, 2, tokens, causal=False)
    found = attention_distance(AttentionMap.from_dense(rows), grid)
    even = literal(torch.full((tokens, tokens), 1 / tokens), grid)
    for head in range(2):
        wanted = sum(literal(rows[b, head], grid) for b in range(2)) / 2
        assert float(found.values["distance"][0][head]) == pytest.approx(wanted, rel=1e-12)
        assert float(found.null["distance"][0][head]) == pytest.approx(even, rel=1e-6)


def test_even_attention_over_a_row_has_a_closed_form():
    n, patch = 12, 5
    found = attention_distance(
        AttentionMap.from_dense(torch.full((1, 1, n, n), 1 / n, dtype=torch.float64)), Grid(1, n, (5, patch))
    )
    assert float(found.values["distance"][0]) == pytest.approx(patch * (n**2 - 1) / (3 * n), rel=1e-12)
    assert float(found.null["distance"][0]) == pytest.approx(patch * (n**2 - 1) / (3 * n), rel=1e-12)


def test_local_heads_are_nearer_than_global_ones():
    grid = Grid(9, 9, (16, 16))
    heads = torch.stack([by_hops(9, 9, 0), by_hops(9, 9, 1), by_hops(9, 9, 3), torch.full((81, 81), 1 / 81)])
    found = attention_distance(AttentionMap.from_dense(heads[None].double()), grid).values["distance"][0]
    assert found[0] == 0
    assert (found.diff() > 0).all()
    assert 16 < found[1] < 16 * 2**0.5


def test_mass_beside_the_patches_is_divided_out():
    grid = Grid(2, 2, (3, 3), start=1, cls=0, tokens=5)
    rows = torch.full((5, 5), 0.1, dtype=torch.float64)
    rows[:, 0] = 0.6
    found = attention_distance(AttentionMap.from_dense(rows[None, None]), grid)
    wanted = 3 * (2 + 2**0.5) / 4
    assert float(found.values["distance"][0]) == pytest.approx(0.4 * wanted)
    assert float(found.values["distance_on_patches"][0]) == pytest.approx(wanted)
    rows[:, 0], rows[:, 1:] = 1, 0
    nothing = attention_distance(AttentionMap.from_dense(rows[None, None]), grid)
    assert nothing.values["distance_on_patches"][0].isnan().all()
    assert list(nothing.undefined) == ["distance_on_patches, layer 0, head 0"]


def test_fused_maps_and_summaries_answer_as_dense_ones():
    grid = Grid(5, 4, (2, 3), start=1, cls=0, tokens=21)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 21, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    fused = SoftmaxMap(q, k, mask=Mask())
    dense = attention_distance(AttentionMap.from_dense(fused.dense()), grid).frame()
    summary = SoftmaxMap(q, k, mask=Mask()).precompute(wb.capture(mass=image_mods(grid), keep=False))
    for other in (fused, summary):
        difference = attention_distance(other, grid).frame() - dense
        assert float(difference.abs().to_numpy().max()) < 1e-5


def test_large_grids_are_walked_in_chunks():
    grid = Grid(48, 48, (14, 14), tokens=48 * 48)
    q = torch.zeros(1, 1, 48 * 48, 4)
    found = attention_distance(SoftmaxMap(q, q, mask=Mask()), grid)
    assert float(found.values["distance"][0]) == pytest.approx(float(found.null["distance"][0]), rel=1e-6)
    assert float(found.values["distance"][0]) == pytest.approx(0.5214 * 48 * 14, rel=2e-3)  # a random pair in a square


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip"])
def test_image_encoders_are_answered(name):
    model, inputs, layers = vision(name)
    with torch.no_grad():
        run = model.run(inputs, maps=wb.capture())
    found = attention_distance(run, grid_of(model))
    assert found.layers == layers
    assert all(0 < x < 17 for x in found.frame()["distance"])
