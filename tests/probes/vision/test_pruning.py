"""Runs in which image tokens are gone from some layer on."""

import pytest
import torch
import transformers as hf
from eager_nets import eager_llava
from random_nets import VISION, net, noise
from vision_nets import llava, vision

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.models.hf import HFModel
from workbench.probes.vision.erasure import random_vision_model
from workbench.probes.vision.grid import Grid, grid_of
from workbench.probes.vision.pruning import moved, pruned_run, pruning_curve, without_columns
from workbench.sites import Site


def first(count, n=12, batch=2):
    return torch.arange(n).expand(batch, -1) < count


def tiny_vit():
    import workbench as wb

    model = wb.load("tiny-vit")
    return model, wb.planted_images(6).images, wb.grid_of(model)


@pytest.mark.parametrize("layer", [-1, 0])
def test_removed_is_what_later_blocks_make_of_the_other_tokens_alone(layer):
    model, images, grid = tiny_vit()
    gone = torch.rand(6, 64, generator=torch.Generator().manual_seed(0)).argsort(1) < 40
    got = pruned_run(model, images, gone, grid, layer=layer, how="remove").logits
    net_ = model.net
    before = "blocks.0.hook_resid_pre" if layer < 0 else f"blocks.{layer}.hook_resid_post"
    x = model.run({"pixel_values": images}, read=[before]).acts[before]
    x = torch.stack([row[~lost] for row, lost in zip(x, gone, strict=True)])
    for block in net_.blocks[layer + 1 :]:
        x, _ = block(x, Mask(causal=False), None, None, None)
    wanted = net_.logits(net_.ln_final(x))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_removed_from_an_encoder_with_a_class_token():
    made = net(hf.ViTForImageClassification, hf.ViTConfig(**VISION, num_labels=5), implementation="eager")
    model, images = HFModel(made, name="vit"), noise(2, 3, 16, 16).double()
    grid = grid_of(model)
    gone = first(9, 16)
    got = pruned_run(model, images, gone, grid, how="remove")
    before = model.run({"pixel_values": images}, read=["blocks.0.hook_resid_pre"]).acts["blocks.0.hook_resid_pre"]
    stay = torch.cat([torch.zeros(1).long(), 1 + torch.arange(9, 16)])
    x = before[:, stay]
    for block in made.vit.layers if hasattr(made.vit, "layers") else made.vit.encoder.layer:
        found = block(x)
        x = found[0] if isinstance(found, tuple) else found
    wanted = made.classifier(made.vit.layernorm(x)[:, 0])
    torch.testing.assert_close(got.logits, wanted)


def test_hidden_by_the_attention_mask_or_by_the_patterns_is_the_same():
    model, inputs = eager_llava()
    grid = grid_of(model, inputs)
    gone = first(10, 16, 1)
    masked = pruned_run(model, inputs, gone, grid, how="remove")
    edit = without_columns(gone, grid)
    edited = model.run(inputs, edit={Site("pattern", layer, None, "text"): edit for layer in range(2)})
    # Eager attention of this family takes its softmax in float32.
    torch.testing.assert_close(masked.logits[:, -1], edited.logits[:, -1], atol=1e-5, rtol=1e-4)
    plain = model.run(inputs)
    assert float(moved(masked, plain, grid)[0].detach()) > 1e-3
    later = pruned_run(model, inputs, gone, grid, layer=0, how="remove")
    assert not torch.allclose(later.logits[:, -1], masked.logits[:, -1])


def test_without_columns_keeps_the_sums_of_rows():
    grid = Grid(1, 3, start=1)
    pattern = torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(1)).double().softmax(-1)
    gone = torch.tensor([[True, False, True], [False, False, False]])
    got = without_columns(gone, grid)(pattern)
    torch.testing.assert_close(got.sum(-1), pattern.sum(-1))
    assert not got[0][..., [1, 3]].any()
    torch.testing.assert_close(got[1], pattern[1])
    ratio = got[0][..., 2] / got[0][..., 0]
    torch.testing.assert_close(ratio, pattern[0][..., 2] / pattern[0][..., 0])
    alone = torch.zeros(1, 1, 1, 4)
    alone[..., 1] = 1.0
    assert not without_columns(torch.ones(1, 3, dtype=torch.bool), grid)(alone).any()


@pytest.mark.parametrize("how", ["mean", "remove"])
def test_the_curve_beside_a_literal_loop_and_random_tokens(how):
    model, images, grid = random_vision_model()
    curve = pruning_curve(model, images, [first(9), first(3)], grid, how=how, random=3)
    assert curve.counts == (3, 9)
    assert not curve.base.any()
    plain = model.run({"pixel_values": images}).logits.detach().double().log_softmax(-1)
    for i, kept in enumerate((first(9), first(3))):
        run = pruned_run(model, images, ~kept, grid, how=how)
        q = run.logits.detach().double().log_softmax(-1)
        wanted = [
            float(sum(p.exp() * (p - r) for p, r in zip(a, b, strict=True))) for a, b in zip(plain, q, strict=True)
        ]
        torch.testing.assert_close(curve.ranked[i], torch.tensor(wanted).double(), atol=1e-6, rtol=1e-4)
    assert curve.random.shape == (3, 2, 2)
    again = pruning_curve(model, images, [first(9), first(3)], grid, how=how, random=3)
    assert torch.equal(curve.random, again.random)


def test_one_image_gives_the_numbers_it_gives_in_a_batch():
    model, images, grid = random_vision_model()
    both = pruning_curve(model, images, first(5), grid, how="remove", random=1)
    one = pruning_curve(model, images[1:], first(5)[1:], grid, how="remove", random=1)
    torch.testing.assert_close(both.ranked[0, 1:], one.ranked[0], atol=1e-6, rtol=1e-4)


def test_the_prediction_after_a_padded_text_is_that_of_its_last_real_token():
    model, inputs = llava()
    grid = grid_of(model, inputs)
    ids = torch.cat([inputs["input_ids"], torch.zeros(1, 3).long()], 1)
    padded = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": inputs["pixel_values"]}
    kept = first(6, 16, 1)
    for how in ("mean", "remove"):
        alone = pruning_curve(model, inputs, kept, grid, how=how, random=1)
        got = pruning_curve(model, padded, kept, grid, how=how, random=1)
        torch.testing.assert_close(got.ranked, alone.ranked, atol=1e-6, rtol=1e-6)


def test_a_model_without_a_head_is_judged_by_its_output():
    model, inputs, _ = vision("dinov2")
    grid = grid_of(model)
    curve = pruning_curve(model, inputs, first(12, 16), grid, layer=0, random=2)
    run, plain = pruned_run(model, inputs, ~first(12, 16), grid, layer=0), model.run(inputs)
    wanted = 1 - torch.cosine_similarity(run.output[:, 0], plain.output[:, 0])
    torch.testing.assert_close(curve.ranked[0], wanted.detach())
    assert curve.metric.startswith("1 - cosine")


def test_wrong_questions():
    model, images, grid = random_vision_model()
    with pytest.raises(WorkbenchError, match="same number"):
        pruning_curve(model, images, torch.stack([first(3)[0], first(4)[0]]), grid)
    with pytest.raises(WorkbenchError, match="another number"):
        pruning_curve(model, images, [first(3), first(3).flip(1)], grid)
    with pytest.raises(WorkbenchError, match="bool"):
        pruning_curve(model, images, first(3).float(), grid)
    with pytest.raises(UnknownName, match="way of pruning"):
        pruning_curve(model, images, first(3), grid, how="zero")
    with pytest.raises(WorkbenchError, match="before the first"):
        pruning_curve(model, images, first(3), grid, layer=-2)
    with pytest.raises(WorkbenchError, match="of 1 images"):
        pruning_curve(model, images, first(3)[:1], grid)
    other, inputs = llava()
    with pytest.raises(Refused, match="eager"):
        pruned_run(other, inputs, first(3, 16, 1), grid_of(other, inputs), layer=0, how="remove")
