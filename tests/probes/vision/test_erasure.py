"""Erasing patches in the order of a map."""

import pytest
import torch
from vision_nets import vision

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.vision.erasure import erasure_curve, mean_patch, random_vision_model
from workbench.probes.vision.grid import Grid, grid_of


def test_erased_pixels_are_the_mean_of_their_image():
    model, images, grid = random_vision_model()
    weight = torch.arange(12.0).flip(0).expand(2, -1)
    curve = erasure_curve(model, images, weight, grid, counts=[1, 5, 12], random=2)
    by_hand = images.clone()
    for patch in range(5):
        row, col = divmod(patch, 4)
        by_hand[:, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = images.mean((2, 3), keepdim=True)
    said = model.run(images).logits.argmax(1)
    wanted = model.run(by_hand).logits.double().softmax(1).gather(1, said[:, None])[:, 0]
    torch.testing.assert_close(curve.ranked[1], wanted.detach())
    torch.testing.assert_close(curve.base, model.run(images).logits.double().softmax(1).amax(1).detach())
    # With nothing left the order does not matter.
    torch.testing.assert_close(curve.random[:, 2], curve.ranked[2].expand(2, -1))
    last = erasure_curve(model, images, -weight, grid, counts=[5], random=1, first="least")
    torch.testing.assert_close(last.ranked[0], curve.ranked[1])


def test_a_token_becomes_the_mean_of_those_that_stay():
    grid = Grid(2, 2, start=1, cls=0, tokens=5)
    values = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    gone = torch.tensor([[True, False, False, True], [True, True, True, True]])
    got = mean_patch(gone, grid)(values)
    torch.testing.assert_close(got[0, 1], values[0, 2:4].mean(0))
    torch.testing.assert_close(got[0, 4], values[0, 2:4].mean(0))
    assert torch.equal(got[0, [0, 2, 3]], values[0, [0, 2, 3]])
    torch.testing.assert_close(got[1, 1:], values[1, 1:].mean(0).expand(4, -1))
    assert torch.equal(got[1, 0], values[1, 0])
    with pytest.raises(Refused, match="one vector per token"):
        mean_patch(gone, grid)(values[:, :, None])


def test_the_patch_that_decides_is_needed_and_others_are_not():
    """A metric of the pixels of patch 7 alone."""
    model, images, grid = random_vision_model()

    def seen(run):
        return run.tokens.inputs["pixel_values"][:, 0, 2:4, 6:8].abs().sum((1, 2))

    weight = torch.zeros(2, 12)
    weight[:, 7] = 1
    curve = erasure_curve(model, images, weight, grid, metric=seen, counts=[1], random=16)
    left = images.mean((2, 3), keepdim=True).abs().flatten() * 4
    torch.testing.assert_close(curve.ranked[0], left.double(), check_dtype=False)
    assert float((curve.random[:, 0] == curve.base).double().mean()) > 0.8


def test_at_most_so_many_patches_of_an_image():
    model, images, grid = random_vision_model()
    weight = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    whole = erasure_curve(model, images, weight, grid, counts=[1, 3], random=1)
    few = erasure_curve(model, images, weight, grid, counts=[3], random=1, limit=torch.tensor([1, 3]))
    torch.testing.assert_close(few.ranked[0, 0], whole.ranked[0, 0])
    torch.testing.assert_close(few.ranked[0, 1], whole.ranked[1, 1])


@pytest.mark.parametrize(
    ("name", "metric", "site"),
    [
        ("vit", "probability of the class", None),
        ("dinov2-registers", "cosine to the whole image", None),
        ("siglip", "cosine to the whole image", "blocks.0.hook_resid_post"),
    ],
)
def test_image_encoders_are_answered(name, metric, site):
    model, inputs, _ = vision(name)
    grid = grid_of(model)
    weight = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    curve = erasure_curve(model, inputs["pixel_values"], weight, grid, site=site, counts=[2, 8], random=2)
    assert curve.metric == metric
    assert curve.ranked.shape == (2, 2)
    assert curve.random.shape == (2, 2, 2)
    assert not torch.allclose(curve.ranked[1], curve.base)


def test_wrong_inputs_are_refused():
    model, images, grid = random_vision_model()
    weight = torch.rand(2, 12)
    for wrong, error, match in (
        ({"weight": weight[:, :3]}, WorkbenchError, "a weight for each"),
        ({"weight": weight * float("nan")}, Refused, "undefined"),
        ({"first": "some"}, UnknownName, "most"),
        ({"counts": [13]}, WorkbenchError, "between 1 and the 12"),
        ({"grid": Grid(3, 4)}, WorkbenchError, "patches cover"),
        ({"allowed": torch.zeros(2, 12, dtype=torch.bool)}, Refused, "allowed"),
        ({"random": 0}, WorkbenchError, "at least 1"),
    ):
        with pytest.raises(error, match=match):
            erasure_curve(**{"model": model, "images": images, "weight": weight, "grid": grid, **wrong})
