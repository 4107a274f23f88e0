"""Attention flow through all layers, and points."""

import pytest
import torch
from vision_nets import llava

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_maps, random_rows
from workbench.probes.vision.erasure import erasure_curve
from workbench.probes.vision.grid import Grid, grid_of
from workbench.probes.vision.vl_sam import FlowHeat, flow_heat, point_prompts


def by_hand(weights, regularise):
    """S of all layers, [B, T, T], in literal loops over the definition."""
    batch, heads, length, _ = weights[0].shape
    one = torch.eye(length).double()
    flow = torch.zeros(batch, length, length).double()
    for rows in weights:
        mean = torch.zeros(batch, length, length).double()
        for b in range(batch):
            for h in range(heads):
                weight = sum(float(rows[b, h, q].max()) for q in range(length)) / length
                mean[b] += weight * rows[b, h] / heads
        if regularise:
            for key in range(length):
                seen = length - key
                mean[:, :, key] *= 1 - (seen - 1) / length
        flow = (one + mean) @ (flow + one)
    return flow


@pytest.mark.parametrize("regularise", [True, False])
def test_rows_of_the_flow_are_the_definition_s(regularise):
    maps = random_maps(layers=3, tokens=13, batch=2, heads=3)
    grid = Grid(3, 3, start=2)
    wanted = by_hand([amap.dense() for amap in maps], regularise)
    got = flow_heat(maps, grid, regularise=regularise)
    torch.testing.assert_close(got.heat, wanted[:, -1, 2:11])
    some = flow_heat(maps, grid, queries=[4, 11], regularise=regularise)
    torch.testing.assert_close(some.heat, (wanted[:, 4, 2:11] + wanted[:, 11, 2:11]) / 2)


def test_the_null_is_the_flow_of_even_attention():
    maps = random_maps(layers=2, tokens=13)
    even = torch.ones(13, 13).tril().double()
    even = (even / even.sum(1, keepdim=True)).expand(1, 2, 13, 13)
    found = flow_heat(maps, Grid(3, 3, start=2))
    torch.testing.assert_close(found.even, by_hand([even, even], True)[:, -1, 2:11])
    alike = flow_heat([AttentionMap.from_dense(even)] * 2, Grid(3, 3, start=2))
    torch.testing.assert_close(alike.heat, alike.even)


def test_uniform_attention_without_a_mask_is_closed_form():
    """T tokens, W = 1/T, A' = 1/T^2 everywhere: one layer gives heat 1/T^2 from another token, and nothing is damped."""
    flat = torch.full((1, 2, 10, 10), 0.1, dtype=torch.float64)
    found = flow_heat(AttentionMap.from_dense(flat), Grid(3, 3, start=1, cls=0, tokens=10))
    torch.testing.assert_close(found.heat, torch.full((1, 9), 0.01).double())
    assert float(found.weight[0][0, 0]) == pytest.approx(0.1)


def test_damping_turns_the_pull_of_early_keys_around():
    even = torch.ones(34, 34).tril().double()
    even = (even / even.sum(1, keepdim=True)).expand(1, 1, 34, 34)
    grid = Grid(4, 8, start=1)
    maps = [AttentionMap.from_dense(even)] * 6
    pulled = flow_heat(maps, grid, regularise=False).heat[0]
    damped = flow_heat(maps, grid).heat[0]
    assert float(pulled[0] / pulled[-1]) > 1.05
    assert float(damped[0] / damped[-1]) < 0.1


def test_padding_does_not_change_the_flow_and_neither_do_fused_maps():
    rows = random_rows(2, 2, 12)
    grid = Grid(3, 3, start=1)
    wanted = flow_heat([AttentionMap.from_dense(rows)] * 2, grid)
    eye = torch.eye(12).double().expand(2, 2, 12, 12)
    fused = SoftmaxMap(rows.clamp(min=1e-30).log(), eye, mask=Mask(causal=True), scale=1.0)
    torch.testing.assert_close(flow_heat([fused, fused], grid).heat, wanted.heat)
    real = torch.tensor([[True] * 12 + [False] * 3] * 2)
    long = torch.zeros(2, 2, 15, 15, dtype=torch.float64)
    long[..., :12, :12] = rows
    padded = SoftmaxMap(
        long.clamp(min=1e-30).log(), torch.eye(15).double().expand(2, 2, 15, 15),
        mask=Mask(causal=True, keys=real, queries=real), scale=1.0,
    )  # fmt: skip
    got = flow_heat([padded, padded], grid)
    torch.testing.assert_close(got.heat, wanted.heat)
    torch.testing.assert_close(got.even, wanted.even)
    first = flow_heat([AttentionMap.from_dense(rows[:1])] * 2, grid)
    torch.testing.assert_close(first.heat, wanted.heat[:1])


def test_sharp_heads_count_more():
    sharp = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    sharp[..., 4] = 1.0
    both = torch.cat([sharp, torch.full((1, 1, 9, 9), 1 / 9).double()], 1)
    found = flow_heat(AttentionMap.from_dense(both), Grid(3, 3), queries=[0])
    assert found.weight[0][0].tolist() == pytest.approx([1.0, 1 / 9])
    assert float(found.heat[0, 4]) == pytest.approx((1 + 1 / 81) / 2)
    assert float(found.heat[0, 5]) == pytest.approx(1 / 162)


def test_planted_objects_are_named_and_needed():
    import workbench as wb

    model, test = wb.load("tiny-vit"), wb.planted_images(40, seed=7)
    grid = wb.grid_of(model)
    with torch.no_grad():
        run = model.run(test.images, maps=wb.capture())
    heat = flow_heat(run, grid)
    table = point_prompts(heat).hits(test.planted).frame()
    assert table.positive[0] > 0.9 > 0.0625 == table.positive_null[0]
    assert table.negative[0] == 1.0
    curve = erasure_curve(model, test.images, heat.heat, grid, counts=[4], random=2).frame()
    assert float(curve.ranked[0]) < 0.3 < 0.9 < float(curve.random_low[0])


def test_points_of_a_planted_map():
    grid = Grid(5, 5, (4, 4))
    heat = torch.full((1, 25), 0.3).double()
    heat[0, [6, 7, 18]] = torch.tensor([1.0, 0.9, 0.8]).double()  # 7 is no peak: 6 is its neighbour
    heat[0, [4, 11]] = torch.tensor([0.0, 0.05]).double()  # 11 touches 6
    found = point_prompts(FlowHeat(heat, heat, {}, grid), positive=3, negative=3)
    assert found.patch[found.positive].tolist() == [6, 18]
    assert found.patch[~found.positive].tolist() == [4]
    assert found.place[0].tolist() == [6.0, 6.0]
    assert found.place[1].tolist() == [14.0, 14.0]
    truth = torch.zeros(1, 5, 5)
    truth[0, 1, 1] = 1
    table = found.hits(truth).frame()
    assert table.positive[0] == 0.5
    assert table.negative[0] == 1.0
    assert table.positive_null[0] == pytest.approx(1 / 25)
    flat = point_prompts(FlowHeat(torch.ones(1, 25).double(), heat, {}, grid))
    assert len(flat.image) == 0
    assert "image 0" in flat.undefined


def test_a_text_that_holds_an_image():
    model, inputs = llava()
    grid = grid_of(model, inputs)
    run = model.run(inputs, maps=capture())
    found = flow_heat(run, grid)
    maps = [run.maps[f"text.{i}"].dense().double() for i in range(2)]
    torch.testing.assert_close(found.heat, by_hand(maps, True)[:, -1, 2:18])


def test_wrong_questions():
    grid = Grid(3, 3)
    with pytest.raises(Refused, match="signed"):
        flow_heat(AttentionMap.from_dense(torch.randn(1, 1, 9, 9)), grid)
    with pytest.raises(UnknownName, match="query token"):
        flow_heat(random_maps(tokens=9), grid, queries=[9])
    with pytest.raises(WorkbenchError, match="one batch"):
        flow_heat([*random_maps(1, tokens=9), *random_maps(1, batch=2, tokens=9)], grid)
    found = flow_heat(random_maps(tokens=9), grid)
    with pytest.raises(WorkbenchError, match="thresholds"):
        point_prompts(found, high=0.1, low=0.2)
    with pytest.raises(Refused, match="NaN"):
        point_prompts(FlowHeat(torch.full((1, 9), float("nan")), found.even, {}, grid))
    with pytest.raises(WorkbenchError, match="truth"):
        point_prompts(found).hits(torch.ones(2, 3, 3))
