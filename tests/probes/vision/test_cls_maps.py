"""Where the class token looks, and whether it finds an object."""

import math

import pytest
import torch
from vision_nets import llava, vision

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.probes.examples import random_rows
from workbench.probes.vision.cls_maps import class_maps, map_overlap, smallest_set
from workbench.probes.vision.grid import Grid, grid_of

GRID = Grid(3, 4, (2, 2), start=2, cls=0, others=(1,), tokens=14)


def test_the_row_of_the_class_token_is_read():
    rows = random_rows(2, 3, 14, causal=False)
    found = class_maps(AttentionMap.from_dense(rows), GRID)
    assert found.query == "class token"
    torch.testing.assert_close(found.weight[0], rows[:, :, 0, 2:])
    torch.testing.assert_close(found.image(0, 1, image=1), rows[1, 1, 0, 2:].view(3, 4))
    torch.testing.assert_close(found.image(0), rows[0, :, 0, 2:].mean(0).view(3, 4))
    share = rows[:, :, 0, 2:] / rows[:, :, 0, 2:].sum(-1, keepdim=True)
    torch.testing.assert_close(found.entropy(0), -(share * share.log()).sum(-1))
    table = found.frame()
    torch.testing.assert_close(torch.tensor(table["mass"].to_numpy()), rows[:, :, 0, 2:].sum(-1).mean(0))


def test_without_a_class_token_it_is_the_mean_row():
    rows = random_rows(1, 2, 12, causal=False)
    found = class_maps(AttentionMap.from_dense(rows), Grid(3, 4, tokens=12))
    assert found.query == "mean over patches"
    torch.testing.assert_close(found.weight[0], rows.mean(2))
    beside = class_maps(AttentionMap.from_dense(rows), Grid(2, 4, start=1))
    torch.testing.assert_close(beside.weight[0], rows[:, :, 1:9, 1:9].mean(2))


def test_any_token_can_be_asked():
    rows = random_rows(1, 2, 14, causal=False)
    found = class_maps(AttentionMap.from_dense(rows), GRID, query=13)
    assert found.query == "token 13"
    torch.testing.assert_close(found.weight[0], rows[:, :, 13, 2:])
    with pytest.raises(UnknownName):
        class_maps(AttentionMap.from_dense(rows), GRID, query=14)


def test_even_attention_has_the_entropy_of_all_patches():
    found = class_maps(AttentionMap.from_dense(torch.full((1, 1, 14, 14), 1 / 14, dtype=torch.float64)), GRID)
    assert float(found.entropy(0)) == pytest.approx(math.log(12))
    assert found.frame()["entropy_even"][0] == math.log(12)


def test_a_head_that_looks_at_no_patch_has_no_entropy():
    rows = torch.zeros(1, 2, 14, 14, dtype=torch.float64)
    rows[..., 0] = 1
    rows[:, 1, 0] = 1 / 14
    found = class_maps(AttentionMap.from_dense(rows), GRID)
    assert found.entropy(0)[0].isnan().tolist() == [True, False]
    assert list(found.undefined) == ["entropy, layer 0, image 0, head 0"]
    overlap = map_overlap(found, torch.ones(1, 3, 4))
    assert overlap.values["iou"][0].isnan().tolist() == [True, False]
    assert list(overlap.undefined) == ["layer 0, head 0"]


def test_pixels_are_between_the_patches():
    rows = random_rows(1, 1, 14, causal=False)
    found = class_maps(AttentionMap.from_dense(rows), GRID)
    small, large = found.image(0), found.pixels(0)
    assert large.shape == (6, 8)
    assert float(large[0, 0]) == float(small[0, 0])
    assert float(large.mean()) == pytest.approx(float(small.mean()), rel=0.2)
    wanted = (0.75 * small[0, 0] + 0.25 * small[0, 1]) * 0.75 + (0.75 * small[1, 0] + 0.25 * small[1, 1]) * 0.25
    assert float(large[1, 1]) == pytest.approx(float(wanted))


def test_gates_count_unless_asked_for_what_is_inside():
    rows = random_rows(1, 2, 14, causal=False)
    amap = GatedMap(AttentionMap.from_dense(rows), torch.full((1, 2, 14), 0.5, dtype=torch.float64))
    torch.testing.assert_close(class_maps(amap, GRID).weight[0] * 2, class_maps(amap, GRID, raw=True).weight[0])


def test_the_smallest_set_that_holds_a_mass():
    share = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert smallest_set(share, 0.4).tolist() == [False, True, False, False]
    assert smallest_set(share, 0.41).tolist() == [False, True, True, False]
    assert smallest_set(share, 0.95).tolist() == [True] * 4


def planted(sharp):
    """A head that looks at the object, one that looks everywhere, one that looks elsewhere; and the object."""
    truth = torch.zeros(2, 3, 4, dtype=torch.bool)
    truth[0, :2, 1:3] = True
    truth[1, 1:, 2:] = True
    inside = truth.flatten(1).double()
    heads = torch.stack([inside * sharp + 1, torch.ones_like(inside), (1 - inside) * sharp + 1], 1)
    rows = torch.full((2, 3, 14, 14), 1 / 14, dtype=torch.float64)
    rows[:, :, 0, :2] = 0
    rows[:, :, 0, 2:] = heads / heads.sum(-1, keepdim=True)
    return AttentionMap.from_dense(rows), truth


def test_a_head_on_the_object_finds_it_and_others_do_not():
    amap, truth = planted(1000.0)
    found = map_overlap(class_maps(amap, GRID), truth)
    for measure in ("inside", "pointing", "iou"):
        value, null = found.values[measure][0], found.null[measure][0]
        assert float(value[0]) > 0.7
        assert float(value[2]) < 0.05
        assert float(null[0]) < 0.5
    assert float(found.values["pointing"][0][0]) == 1
    assert float(found.values["inside"][0][1]) == pytest.approx(1 / 3)
    assert float(found.null["inside"][0][1]) == pytest.approx(1 / 3)
    # Of 4 equal patches that hold everything the first three hold 60%.
    assert float(found.values["iou"][0][0]) == pytest.approx(3 / 4)


def test_the_null_of_the_overlap_is_that_of_random_sets():
    amap, truth = planted(1000.0)
    null = float(map_overlap(class_maps(amap, GRID), truth, draws=4000).null["iou"][0][0])
    # Three of twelve patches at random, four in the object: k in common with hypergeometric probability.
    wanted = sum(math.comb(4, k) * math.comb(8, 3 - k) / math.comb(12, 3) * k / (7 - k) for k in range(4))
    assert null == pytest.approx(wanted, abs=0.01)


def test_pixel_masks_count_by_half_patches():
    amap, truth = planted(1000.0)
    pixels = GRID.pixels(truth.flatten(1))
    one, two = map_overlap(class_maps(amap, GRID), truth), map_overlap(class_maps(amap, GRID), pixels)
    assert torch.equal(one.values["iou"][0], two.values["iou"][0])
    with pytest.raises(WorkbenchError, match="a mask for each"):
        map_overlap(class_maps(amap, GRID), truth[:1])
    with pytest.raises(Refused, match="half of no patch"):
        map_overlap(class_maps(amap, GRID), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2-registers", "dinov3", "clip", "siglip"])
def test_image_encoders_are_answered(name):
    model, inputs, layers = vision(name)
    grid = grid_of(model)
    with torch.no_grad():
        run = model.run(inputs, maps=wb.capture())
    found = class_maps(run, grid)
    assert tuple(found.weight) == layers
    dense = run.maps[layers[0]].dense().double()
    wanted = dense.mean(2) if grid.cls is None else dense[:, :, 0, grid.start :]
    torch.testing.assert_close(found.weight[layers[0]], wanted, atol=1e-7, rtol=1e-6)


def test_the_last_word_of_a_text_looks_at_the_image():
    model, inputs = llava()
    grid = grid_of(model, inputs)
    with torch.no_grad():
        run = model.run(inputs, maps=wb.capture())
    found = class_maps(run, grid, query=20)
    dense = run.maps["text.1"].dense().double()
    torch.testing.assert_close(found.weight["text.1"], dense[:, :, 20, 2:18], atol=1e-7, rtol=1e-6)
