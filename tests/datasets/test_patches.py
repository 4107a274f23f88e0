"""Images with a planted shape, and the bundled model that reads them."""

import pytest
import torch

import workbench as wb
from workbench.datasets.patches import PATCH, SHAPES, planted_images, shapes
from workbench.errors import UnknownName, WorkbenchError


def test_the_shape_stands_where_it_is_said_to():
    found = planted_images(40, noise=0.0)
    drawn = shapes()
    for image, label, other, corrupt, box, planted in zip(
        found.images, found.label, found.other, found.corrupt, found.box.tolist(), found.planted, strict=True
    ):
        top, left, bottom, right = box
        assert torch.equal(image[0, top:bottom, left:right], drawn[label])
        assert torch.equal(corrupt[0, top:bottom, left:right], drawn[other])
        inside = torch.zeros(8 * PATCH, 8 * PATCH, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(planted.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1), inside)
        assert torch.equal(image[0][~inside], corrupt[0][~inside])


def test_quarters_say_nothing_about_the_label():
    """Those of the shape and of the decoy are each there once, apart from each other."""
    found = planted_images(30, noise=0.0)
    assert (found.decoy.flatten(1).sum(1) == 4).all()
    assert (found.planted.flatten(1).sum(1) == 4).all()
    wide = torch.nn.functional.max_pool2d(found.planted[:, None].float(), 3, 1, 1)[:, 0].bool()
    assert not (wide & found.decoy).any()
    quarters = shapes().unflatten(2, (2, 4)).unflatten(1, (2, 4)).permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2)
    patches = found.images.unflatten(3, (8, 4)).unflatten(2, (8, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    for image, label, decoy in zip(patches, found.label, found.decoy.flatten(1), strict=True):
        sets = [sorted(q.tolist() for q in quarters[s]) for s in range(len(SHAPES))]
        there = sorted(image[decoy].tolist())
        assert there in sets
        assert there != sets[int(label)]


def test_splits_and_seeds_differ_and_repeat():
    one, again = planted_images(5), planted_images(5)
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, planted_images(5, split="train").images)
    assert not torch.equal(one.images, planted_images(5, seed=1).images)
    assert planted_images(3, grid=(5, 7)).images.shape == (3, 1, 20, 28)
    with pytest.raises(UnknownName):
        planted_images(3, split="valid")
    with pytest.raises(WorkbenchError, match="5 x 5"):
        planted_images(3, grid=(4, 4))


@pytest.fixture(scope="module")
def answered():
    model, test = wb.load("tiny-vit"), planted_images(200, seed=1)
    with torch.no_grad():
        keys = [f"blocks.{layer}.attn.hook_k" for layer in range(2)]
        return model, test, model.run(test.images, maps=wb.capture(stats=("received",)), read=keys)


def test_the_bundled_model_names_the_shape(answered):
    model, test, run = answered
    right = (run.logits.argmax(1) == test.label).float().mean()
    assert right > 0.97
    corrupt = model.run(test.corrupt).logits.argmax(1)
    assert (corrupt == test.other).float().mean() > 0.97
    off = {f"blocks.{layer}.hook_attn_out": torch.zeros_like for layer in range(2)}
    assert (model.run(test.images, edit=off).logits.argmax(1) == test.label).float().mean() < 0.5


def test_its_last_layer_looks_at_the_planted_patches(answered):
    model, test, run = answered
    grid = wb.grid_of(model)
    found = wb.map_overlap(wb.class_maps(run, grid), test.planted)
    assert (found.values["pointing"][1] > 0.85).all()
    assert (found.values["inside"][1] > 0.6).all()
    torch.testing.assert_close(found.null["inside"][1], torch.full((4,), 1 / 16, dtype=torch.float64))
    assert (found.values["inside"][0] > found.null["inside"][0]).all()
    mean = wb.class_maps(run, grid).weight[1].mean(1)
    assert test.planted.flatten(1).gather(1, mean.argmax(1, keepdim=True)).float().mean() > 0.95


def test_rollout_points_at_the_planted_patches(answered):
    _, test, run = answered
    eye = torch.eye(64)
    first, second = (0.5 * run.maps[layer].dense().mean(1) + 0.5 * eye for layer in (0, 1))
    rollout = (second @ first).mean(1)
    hits = test.planted.flatten(1).gather(1, rollout.argmax(1, keepdim=True))
    assert hits.float().mean() > 0.9  # 1/16 by chance


def test_keys_of_the_last_layer_cut_the_shape_out(answered):
    model, test, run = answered
    found = wb.token_cut(run, wb.grid_of(model), draws=2)
    iou, moved = found.overlap(test.planted)
    assert float(iou.nanmean()) > 0.5
    assert float(moved.nanmean()) < 0.06


def test_an_untrained_network_points_nowhere(answered):
    model, test, _ = answered
    torch.manual_seed(0)
    from workbench.models.native_net import NativeNet

    untrained = wb.NativeModel(NativeNet(model.net.config).eval())
    with torch.no_grad():
        run = untrained.run(test.images, maps=wb.capture())
    found = wb.map_overlap(wb.class_maps(run, wb.grid_of(untrained)), test.planted)
    for layer in (0, 1):
        assert (found.values["inside"][layer] - found.null["inside"][layer]).abs().max() < 0.02


def test_it_needs_the_patches_it_looks_at(answered):
    model, test, run = answered
    grid = wb.grid_of(model)
    weight = wb.class_maps(run, grid).weight[1].mean(1)[:64]
    table = wb.erasure_curve(model, test.images[:64], weight, grid, counts=[4], random=4).frame()
    assert table["ranked"][0] < 0.4
    assert table["random_low"][0] > 0.75


def test_layer_0_is_the_more_local_one(answered):
    model, _, run = answered
    found = wb.attention_distance(run, wb.grid_of(model))
    # Layer 1 looks at one place from everywhere, which is as far as even attention.
    assert (found.values["distance"][0] < found.values["distance"][1]).all()
    assert (found.values["distance"][0] < found.null["distance"][0]).all()
