"""How tokens lie in an image."""

import pytest
import torch
import transformers as hf
from vision_nets import DECODER, llava, vision

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.probes.vision.grid import Grid, grid_of, image_spans


def test_patches_are_counted_in_rows():
    grid = Grid(2, 3, (4, 5), start=1, cls=0, tokens=7)
    assert grid.patches == 6
    assert grid.size == (8, 15)
    assert grid.index.tolist() == [1, 2, 3, 4, 5, 6]
    assert grid.places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert grid.centres[4].tolist() == [6.0, 7.5]
    assert grid.of_tokens(torch.arange(7.0)).tolist() == [1, 2, 3, 4, 5, 6]
    pixels = grid.pixels(torch.arange(6.0))
    assert pixels.shape == (8, 15)
    assert pixels[3, 4] == 0
    assert pixels[4, 5] == 4


def test_rows_may_end_with_a_token_of_their_own():
    grid = Grid(2, 3, start=5, step=4)
    assert grid.index.tolist() == [5, 6, 7, 9, 10, 11]
    grid.check(12)
    grid.check(40)
    with pytest.raises(WorkbenchError, match="at least 12"):
        grid.check(11)


def test_coverage_of_a_pixel_mask_is_the_mean_over_the_patch():
    grid = Grid(2, 3, (4, 5))
    mask = torch.rand(8, 15, generator=torch.Generator().manual_seed(0)) > 0.5
    got = grid.covered(mask)
    for place, (row, col) in enumerate(grid.places.tolist()):
        assert got[place] == mask[row * 4 : row * 4 + 4, col * 5 : col * 5 + 5].double().mean()
    assert grid.covered(torch.ones(2, 2, 3)).shape == (2, 6)
    assert grid.covered(torch.ones(6)).shape == (6,)
    with pytest.raises(WorkbenchError, match="a mask is of pixels"):
        grid.covered(torch.ones(7, 15))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 0},
        {"start": -1},
        {"step": 2},
        {"patch": (0, 4)},
        {"start": 1, "cls": 3},
        {"tokens": 5},
        {"others": (2,)},
    ],
)
def test_what_is_no_grid_is_refused(wrong):
    with pytest.raises(WorkbenchError):
        Grid(**{"rows": 2, "cols": 3, **wrong})


def test_a_native_model_tells_its_grid():
    config = NativeConfig(
        layers=1, heads=2, width=8, head_width=4, vocab=3, positions="learned", causal=False, grid=(3, 5), patch=2
    )
    assert grid_of(NativeModel(NativeNet(config))) == Grid(3, 5, (2, 2), tokens=15)
    text = NativeConfig(layers=1, heads=2, width=8, head_width=4, vocab=3)
    with pytest.raises(Refused, match="reads text"):
        grid_of(NativeModel(NativeNet(text)))


@pytest.mark.parametrize(
    ("name", "cls", "others"),
    [
        ("vit", 0, 0),
        ("deit", 0, 1),
        ("dinov2", 0, 0),
        ("dinov2-registers", 0, 4),
        ("dinov3", 0, 4),
        ("clip-vision", 0, 0),
        ("clip", 0, 0),
        ("siglip", None, 0),
    ],
)
def test_an_encoder_tells_its_grid_and_its_maps_fit(name, cls, others):
    model, inputs, layers = vision(name)
    grid = grid_of(model)
    start = (cls is not None) + others
    stack = "vision" if name == "clip" else ""
    others = tuple(range(start - others, start))
    assert grid == Grid(4, 4, (4, 4), start, cls, others, tokens=start + 16, stack=stack)
    with torch.no_grad():
        run = model.run(inputs, maps=wb.capture(stats=("received",)))
    for layer in layers:
        grid.check(run.maps[layer].shape[3])


def test_other_image_sizes_are_counted_from_the_pixels():
    model, _, _ = vision("dinov2")
    grid = grid_of(model, {"pixel_values": torch.zeros(1, 3, 24, 32)})
    assert (grid.rows, grid.cols, grid.tokens) == (6, 8, 49)


def test_images_inside_of_a_text_are_found_by_their_token():
    model, inputs = llava()
    grid = grid_of(model, inputs)
    assert grid == Grid(4, 4, (4, 4), start=2, stack="text")
    assert grid_of(model, inputs, stack="vision").cls == 0
    with torch.no_grad():
        run = model.run(inputs, maps=wb.capture(stats=("received",)))
    grid.check(run.maps["text.0"].shape[3])
    whole = torch.tensor([[1] + [5] * 17 + [8]])
    assert grid_of(model, {"input_ids": whole}) == Grid(4, 4, (4, 4), start=2, cls=1, stack="text")
    merged = torch.tensor([[1] + [5] * 4 + [8]])
    assert grid_of(model, {"input_ids": merged}) == Grid(2, 2, (8, 8), start=1, stack="text")
    two = torch.tensor([[1] + [5] * 16 + [8] + [5] * 16 + [9]])
    assert grid_of(model, {"input_ids": two}, image=1).start == 18
    with pytest.raises(WorkbenchError, match="holds 2 images"):
        grid_of(model, {"input_ids": two})
    with pytest.raises(Refused, match="7 image tokens"):
        grid_of(model, {"input_ids": torch.tensor([[1] + [5] * 7])})
    with pytest.raises(Refused, match="different tokens"):
        grid_of(model, {"input_ids": torch.tensor([[1] + [5] * 16 + [8], [5] * 16 + [8, 9]])})
    with pytest.raises(Refused, match="no image token"):
        grid_of(model, {"input_ids": torch.tensor([[1, 2]])})


def test_models_without_one_grid_are_refused():
    from workbench.models.hf import HFModel

    swin = hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4]))
    with pytest.raises(Refused, match="stages"):
        grid_of(HFModel(swin))
    text = hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))
    with pytest.raises(Refused, match="no patch_size"):
        grid_of(HFModel(text))


def test_spans_of_a_token():
    assert image_spans(torch.tensor([5, 5, 1, 5, 2, 5]), 5) == [(0, 2), (3, 4), (5, 6)]
    assert image_spans(torch.tensor([1, 2]), 5) == []
