"""Anchors, buffers and registers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vision_nets import llava

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_maps, random_rows
from workbench.probes.vision.grid import Grid, grid_of
from workbench.probes.vision.hiprune import ANCHOR, BUFFER, PRUNED, REGISTER, hiprune, neighbours, received
from workbench.probes.vision.pruning import pruning_curve


def by_hand(shallow, deep, rows, cols, keep, alpha):
    """The definition, word by word, for one image: the why of each patch."""
    why = [PRUNED] * (rows * cols)
    order = sorted(range(rows * cols), key=lambda p: (-shallow[p], p))
    anchors = order[: min(keep, max(1, round(keep * alpha / 5)))]
    left = keep - len(anchors)
    for anchor in anchors:
        why[anchor] = ANCHOR
    for anchor in anchors:
        row, col = anchor // cols, anchor % cols
        for i, j in ((row, col - 1), (row, col + 1), (row - 1, col), (row + 1, col)):
            if left and 0 <= i < rows and 0 <= j < cols and why[i * cols + j] == PRUNED:
                why[i * cols + j] = BUFFER
                left -= 1
    for patch in sorted(range(rows * cols), key=lambda p: (-deep[p], p)):
        if left and why[patch] == PRUNED:
            why[patch] = REGISTER
            left -= 1
    return why


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), keep=st.integers(1, 19), alpha=st.sampled_from([0.1, 0.5, 1.0]))
def test_the_choice_is_the_definition_s(seed, keep, alpha):
    maps = random_maps(layers=3, batch=2, tokens=21, causal=False, seed=seed)
    grid = Grid(4, 5, start=1, cls=0, tokens=21)
    found = hiprune(maps, grid, keep=keep, alpha=alpha, draws=1)
    assert found.layers == (1, 2)
    for image in range(2):
        # Attention received: over both heads and all 21 queries, the class token's too.
        shallow, deep = (
            [sum(float(amap.dense()[image, h, q, 1 + p]) for h in range(2) for q in range(21)) / 42 for p in range(20)]
            for amap in maps[1:]
        )
        torch.testing.assert_close(found.object_mass[image], torch.tensor(shallow).double())
        assert found.why[image].tolist() == by_hand(shallow, deep, 4, 5, keep, alpha)
    assert found.kept.sum(1).tolist() == [keep, keep]


def test_published_sizes():
    """192 of 576 on a grid of 24 x 24: four anchors at alpha 0.1, layers 9 and 22 of 24."""
    grid = Grid(24, 24, tokens=576)
    flat = AttentionMap.from_dense(torch.full((1, 1, 576, 576), 1 / 576))
    busy = torch.zeros(1, 1, 576, 576)
    busy[..., [30, 100, 300, 410]] = 0.25
    maps = dict.fromkeys(range(24), flat) | {9: AttentionMap.from_dense(busy)}
    for keep, anchors in ((192, 4), (128, 3), (64, 1)):
        found = hiprune(maps, grid, keep=keep, draws=1)
        assert found.layers == (9, 22)
        assert int((found.why == ANCHOR).sum()) == anchors
        assert int((found.why == BUFFER).sum()) == 4 * anchors
        assert int(found.kept.sum()) == keep


def test_rows_of_the_grid_do_not_wrap():
    grid = Grid(3, 4)
    assert neighbours(grid, 0) == [1, 4]
    assert neighbours(grid, 4) == [5, 0, 8]  # not 3, the last patch of the row above
    assert neighbours(grid, 7) == [6, 3, 11]
    assert neighbours(grid, 5) == [4, 6, 1, 9]
    weight = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
    weight[..., 4] = 1.0
    found = hiprune(AttentionMap.from_dense(weight), grid, keep=4, alpha=1.0, draws=1)
    assert found.why[0].nonzero()[:, 0].tolist() == [0, 4, 5, 8]


def test_recall_is_the_share_of_mass_and_random_patches_have_their_share():
    maps = random_maps(batch=3, tokens=12, causal=False)
    found = hiprune(maps, Grid(3, 4), keep=5, alpha=0.5, draws=400)
    mass = received(maps[1], Grid(3, 4))
    for image in range(3):
        kept = found.kept[image].nonzero()[:, 0].tolist()
        wanted = sum(float(mass[image, p]) for p in kept) / float(mass[image].sum())
        assert float(found.recall()["deep"][image]) == pytest.approx(wanted)
    # The mean over draws nears 5 / 12: the standard error of 1,200 draws is below .003 here.
    assert float(found.random["deep"].mean()) == pytest.approx(5 / 12, abs=0.01)
    table = found.summary()
    assert (table.recall_low <= table.recall).all()
    assert (table.recall <= table.recall_high).all()
    torch.testing.assert_close(found.even, torch.full((2, 12), 1 / 12).double())


def test_planted_patches_are_kept_and_needed():
    import workbench as wb

    model, test = wb.load("tiny-vit"), wb.planted_images(60, seed=5)
    grid = wb.grid_of(model)
    with torch.no_grad():
        run = model.run(test.images, maps=wb.capture(stats=("received",), keep=False))
    found = hiprune(run, grid, keep=8)
    kept, chance = found.inside(test.planted)
    assert float(kept.mean()) > 0.75 > 0.125 == float(chance.mean())
    curve = pruning_curve(model, test.images, found.kept, grid, layer=0, how="remove", random=3).frame()
    assert float(curve.ranked[0]) < 0.1 < 2 < float(curve.random_low[0])


def test_maps_that_are_fused_padded_or_inside_a_text():
    rows = random_rows(2, 2, 12, causal=False)
    dense = hiprune(AttentionMap.from_dense(rows), Grid(3, 4), keep=5, draws=1)
    eye = torch.eye(12).double().expand(2, 2, 12, 12)
    fused = SoftmaxMap(rows.log(), eye, mask=Mask(), scale=1.0)
    assert torch.equal(hiprune(fused, Grid(3, 4), keep=5, draws=1).why, dense.why)
    # Padding after the patches: neither its queries nor its keys count.
    real = torch.tensor([[True] * 12 + [False] * 3] * 2)
    long = torch.zeros(2, 2, 15, 15, dtype=torch.float64)
    long[..., :12, :12] = rows
    mask = Mask(keys=real, queries=real)
    hidden = long.clamp(min=1e-30).log()
    padded = SoftmaxMap(hidden, torch.eye(15).double().expand(2, 2, 15, 15), mask=mask, scale=1.0)
    torch.testing.assert_close(received(padded, Grid(3, 4)), dense.deep_mass)
    model, inputs = llava()
    run = model.run(inputs, maps=capture())
    found = hiprune(run, grid_of(model, inputs, stack="vision"), keep=6, draws=2)
    assert found.layers == ("vision.0", "vision.1")
    curve = pruning_curve(model, inputs, found.kept, grid_of(model, inputs), how="remove", random=2)
    assert float(curve.ranked[0, 0]) > 0


def test_wrong_questions():
    maps, grid = random_maps(tokens=12, causal=False), Grid(3, 4)
    with pytest.raises(WorkbenchError, match="can be kept"):
        hiprune(maps, grid, keep=12)
    with pytest.raises(WorkbenchError, match="alpha"):
        hiprune(maps, grid, keep=3, alpha=0.0)
    with pytest.raises(WorkbenchError, match="draws"):
        hiprune(maps, grid, keep=3, draws=0)
    with pytest.raises(UnknownName, match="layer"):
        hiprune(maps, grid, keep=3, object_layer=7)
    with pytest.raises(WorkbenchError, match="share of the depth"):
        hiprune(maps, grid, keep=3, deep_layer=1.0)
    with pytest.raises(Refused, match="signed"):
        hiprune(AttentionMap.from_dense(torch.randn(1, 1, 12, 12)), grid, keep=3)
    with pytest.raises(WorkbenchError, match="truth"):
        hiprune(maps, grid, keep=3).inside(torch.ones(2, 3, 4))
    nothing = AttentionMap.from_dense(torch.zeros(1, 1, 12, 12))
    found = hiprune(nothing, grid, keep=3, draws=1)
    assert found.recall()["deep"].isnan().all()
    assert "object recall, image 0" in found.undefined
