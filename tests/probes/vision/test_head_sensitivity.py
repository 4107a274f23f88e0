"""Heads that change without the image, and louder heads."""

import math

import pytest
import torch
from vision_nets import llava, vision

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.probes.tables import HeadTable
from workbench.probes.vision.erasure import random_vision_model
from workbench.probes.vision.grid import grid_of
from workbench.probes.vision.head_sensitivity import (
    head_amplification,
    head_sensitivity,
    total_sensitivity,
    visual_heads,
    without_image,
)
from workbench.sites import Site


def z_of(model, inputs, site):
    return model.run(inputs, read=[site]).acts[site].detach().double()


def test_the_divergence_of_a_text_s_last_token_by_hand():
    model, inputs = llava()
    table = head_sensitivity(model, inputs, draws=1)
    text = {"input_ids": torch.tensor([[1, 7, 8, 9, 10]])}
    for layer in range(2):
        site = f"text.blocks.{layer}.attn.hook_z"
        seen, blind = z_of(model, inputs, site)[0, -1], z_of(model, text, site)[0, -1]
        for head in range(4):
            by_hand = math.sqrt(sum(float(x - y) ** 2 for x, y in zip(seen[head], blind[head], strict=True)))
            assert float(table.values["sensitivity"][f"text.{layer}"][head]) == pytest.approx(by_hand, rel=1e-6)
            surge = float(blind[head].norm() / seen[head].norm())
            assert float(table.values["surge"][f"text.{layer}"][head]) == pytest.approx(surge, rel=1e-6)
    assert table.values["other_image"]["text.0"].isnan().all()
    assert "other_image" in table.undefined


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_the_divergence_over_patches_by_hand(how):
    model, images, _ = random_vision_model()
    table = head_sensitivity(model, images, without=how, draws=1)
    blank = torch.zeros_like(images) if how == "zero" else images.mean((2, 3), keepdim=True).expand_as(images)
    site = "blocks.0.attn.hook_z"
    seen, blind = z_of(model, images, site), z_of(model, blank, site)
    each = torch.stack(
        [
            torch.stack(
                [sum((seen[b, p, h] - blind[b, p, h]).square().sum() for p in range(12)) / 12 for h in range(2)]
            )
            for b in range(2)
        ]
    ).sqrt()
    torch.testing.assert_close(table.values["sensitivity"][0], each.mean(0))
    swapped = z_of(model, images.flip(0), site)
    other = (seen - swapped).square().sum(-1).mean(1).sqrt().mean(0)
    torch.testing.assert_close(table.values["other_image"][0], other)
    assert (table.low["sensitivity"][0] <= table.values["sensitivity"][0]).all()


def test_the_null_is_the_distance_between_noise_of_the_image_s_mean_and_spread():
    model, images, _ = random_vision_model()
    images = 3 + 0.5 * images
    table = head_sensitivity(model, images, draws=2, seed=4)
    generator = torch.Generator().manual_seed(4)
    mean, spread = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True, unbiased=False)
    site = "blocks.0.attn.hook_z"
    z = [z_of(model, mean + spread * torch.randn(images.shape, generator=generator), site) for _ in range(4)]
    gaps = [(z[i] - z[i + 1]).square().sum(-1).mean(1).sqrt() for i in (0, 2)]
    torch.testing.assert_close(table.null["sensitivity"][0], torch.stack(gaps).mean((0, 1)))
    assert torch.equal(table.null["other_image"][0], table.null["sensitivity"][0])


def test_batches_and_the_class_token():
    model, inputs, _ = vision("vit")
    both = head_sensitivity(model, inputs, draws=1)
    ones = [head_sensitivity(model, {"pixel_values": inputs["pixel_values"][i : i + 1]}, draws=1) for i in range(2)]
    mean = torch.stack([one.values["sensitivity"][1] for one in ones]).mean(0)
    torch.testing.assert_close(both.values["sensitivity"][1], mean)
    image = inputs["pixel_values"]
    blank = {"pixel_values": image.mean((2, 3), keepdim=True).expand_as(image)}
    site = "blocks.0.attn.hook_z"
    by_hand = (z_of(model, inputs, site) - z_of(model, blank, site))[:, 0].norm(dim=-1).mean(0)
    torch.testing.assert_close(both.values["sensitivity"][0], by_hand)


def test_a_head_that_cannot_see_the_image_has_none_and_its_null_has_none():
    """Head 0 has no values to read: z is its bias whatever the image is."""
    config = NativeConfig(
        layers=1, heads=2, width=16, head_width=8, vocab=3, positions="learned", causal=False, grid=(3, 4), patch=2, channels=1,
        bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    net = NativeNet(config).eval()
    with torch.no_grad():
        net.blocks[0].attn.W_V[0] = 0.0
        net.blocks[0].attn.b_V[0] = 1.0
    images = torch.randn(3, 1, 6, 8, generator=torch.Generator().manual_seed(1))
    table = head_sensitivity(NativeModel(net), images)
    for name in ("sensitivity", "other_image"):
        assert float(table.values[name][0][0]) < 1e-5 < 0.1 < float(table.values[name][0][1])
        assert float(table.null[name][0][0]) < 1e-5
    assert float(table.values["surge"][0][0]) == pytest.approx(1.0, abs=1e-5)
    assert visual_heads(table, surge=1e9) == [Site("z", 0, 1)]


def planted_table():
    rows = {0: torch.tensor([1.0, 4.0, 3.0, 2.0]), 1: torch.tensor([9.0, 0.5, 7.0, 8.0])}
    surge = {0: torch.tensor([1.0, 3.0, 1.0, 1.0]), 1: torch.ones(4)}
    null = {0: torch.full((4,), 0.5), 1: torch.full((4,), 0.25)}
    return HeadTable(
        "planted", {"sensitivity": rows, "surge": surge}, {"sensitivity": "", "surge": ""}, null={"sensitivity": null}
    )


def test_the_sensitive_half_of_each_layer_without_those_that_surge():
    table = planted_table()
    assert visual_heads(table) == [Site("z", 1, 0), Site("z", 1, 3), Site("z", 0, 2), Site("z", 0, 3)]
    assert Site("z", 0, 1) in visual_heads(table, surge=4.0)
    assert visual_heads(table, share=0.25) == [Site("z", 1, 0), Site("z", 0, 2)]
    assert total_sensitivity(table, 3) == (24.0, 1.5)
    with pytest.raises(WorkbenchError, match="number of heads"):
        total_sensitivity(table, 9)
    with pytest.raises(UnknownName, match="measure with a null"):
        total_sensitivity(table, 1, "surge")
    with pytest.raises(WorkbenchError, match="share"):
        visual_heads(table, share=0.0)


def test_amplified_heads_by_hand_and_random_ones():
    model, images, _ = random_vision_model()
    sites = [Site("z", 0, 1), Site("z", 0, 0)]
    curve = head_amplification(model, images, sites, counts=[1, 2], factor=3.0, random=3)

    def by_hand(z):
        out = z.clone()
        out[:, :, 1] = 3 * out[:, :, 1]
        return out

    run = model.run(images, edit={"blocks.0.attn.hook_z": by_hand})
    p, q = (r.logits.detach().double().log_softmax(-1) for r in (model.run(images), run))
    torch.testing.assert_close(curve.ranked[0], (p.exp() * (p - q)).sum(-1), atol=1e-6, rtol=1e-4)
    # Two of two heads are the same two heads, whoever drew them.
    torch.testing.assert_close(curve.random[:, 1], curve.ranked[1].expand(3, -1))
    same = head_amplification(model, images, sites, factor=1.0, random=1)
    assert not same.ranked.any()
    probability = head_amplification(model, images, sites, metric=lambda run: run.logits.softmax(-1)[:, 0], random=1)
    torch.testing.assert_close(probability.base, model.run(images).logits.softmax(-1)[:, 0].detach().double())


def test_a_text_that_holds_an_image_is_amplified():
    model, inputs = llava()
    heads = visual_heads(head_sensitivity(model, inputs, draws=1))
    assert {site.stack for site in heads} == {"text"}
    curve = head_amplification(model, inputs, heads, random=2)
    assert float(curve.ranked[0, 0]) > 0
    assert curve.counts == (len(heads),)


def test_padding_after_a_text_does_not_count():
    model, inputs = llava()
    heads = [Site("z", 0, 1, "text")]
    alone, alone_louder = head_sensitivity(model, inputs, draws=1), head_amplification(model, inputs, heads, random=1)
    ids = torch.cat([inputs["input_ids"], torch.zeros(1, 3).long()], 1)
    padded = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": inputs["pixel_values"]}
    table, louder = head_sensitivity(model, padded, draws=1), head_amplification(model, padded, heads, random=1)
    for name in ("sensitivity", "surge"):
        torch.testing.assert_close(table.values[name]["text.1"], alone.values[name]["text.1"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(louder.ranked, alone_louder.ranked, atol=1e-6, rtol=1e-6)


def test_what_is_left_of_a_text():
    model, inputs = llava()
    grid = grid_of(model, inputs)
    mask = torch.ones(1, 21, dtype=torch.long)
    left = without_image({**inputs, "attention_mask": mask}, grid, "removed")
    assert left["input_ids"].tolist() == [[1, 7, 8, 9, 10]]
    assert left["attention_mask"].shape == (1, 5)
    assert "pixel_values" not in left


def test_wrong_questions():
    model, images, _ = random_vision_model()
    with pytest.raises(Refused, match="nothing to run on"):
        head_sensitivity(model, images, without="removed")
    with pytest.raises(UnknownName, match="take the image away"):
        head_sensitivity(model, images, without="blur")
    with pytest.raises(WorkbenchError, match="draws"):
        head_sensitivity(model, images, draws=0)
    with pytest.raises(WorkbenchError, match="hold an image"):
        head_sensitivity(model, {"input_ids": torch.zeros(1, 3).long()})
    with pytest.raises(WorkbenchError, match="visual_heads"):
        head_amplification(model, images, [Site("z", 0)])
    with pytest.raises(WorkbenchError, match="counts"):
        head_amplification(model, images, [Site("z", 0, 0)], counts=[2])
