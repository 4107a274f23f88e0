"""Importance of image tokens, stages, recycling, and the search for a schedule."""

import math

import pytest
import torch
from eager_nets import eager_llava
from vision_nets import llava

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.examples import random_maps
from workbench.probes.vision.erasure import random_vision_model
from workbench.probes.vision.grid import Grid, grid_of
from workbench.probes.vision.hiprune import received
from workbench.probes.vision.pruning import pruned_run, top_patches
from workbench.probes.vision.vflowopt import (
    Schedule,
    combined,
    patch_entropy,
    patch_importance,
    recycled,
    schedule_search,
    scheduled_run,
)
from workbench.sites import Site


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_entropy_of_a_patch_by_hand():
    grid = Grid(2, 3, (4, 2))
    images = noise(2, 3, 8, 6)
    got = patch_entropy(images, grid, bins=4)
    for image in range(2):
        grey = images[image].double().mean(0)
        low, high = float(grey.min()), float(grey.max())
        for patch in range(6):
            row, col = divmod(patch, 3)
            cells = grey[4 * row : 4 * row + 4, 2 * col : 2 * col + 2].flatten().tolist()
            counts = [0] * 4
            for value in cells:
                counts[min(3, int((value - low) / (high - low) * 4))] += 1
            wanted = -sum(c / 8 * math.log(c / 8) for c in counts if c)
            assert float(got[image, patch]) == pytest.approx(wanted)
    assert not patch_entropy(torch.ones(1, 1, 8, 6), grid).any()


def test_importance_is_the_weighted_sum_of_scaled_parts():
    maps, images, grid = random_maps(batch=2, tokens=12, causal=False), noise(2, 1, 24, 32), Grid(3, 4, (8, 8))
    table = patch_importance(maps, images, grid, weight=0.3)
    relevance, entropy = received(maps[1], grid), patch_entropy(images, grid)
    torch.testing.assert_close(table.values["relevance"], relevance)
    for image in range(2):
        parts = []
        for side in (relevance[image], entropy[image]):
            low, high = float(side.min()), float(side.max())
            parts.append([(float(x) - low) / (high - low) for x in side])
        wanted = [0.3 * a + 0.7 * b for a, b in zip(*parts, strict=True)]
        assert table.values["importance"][image].tolist() == pytest.approx(wanted)
    torch.testing.assert_close(table.null["relevance"], torch.full((2, 12), 1 / 12).double())
    flat = combined(torch.ones(1, 4), torch.tensor([[0.0, 1.0, 2.0, 4.0]]), 0.5)
    assert flat[0].tolist() == [0.0, 0.125, 0.25, 0.5]


def test_pixels_in_random_order_are_what_flat_patches_fall_below():
    """One busy patch among flat ones: its entropy is above the null, theirs is 0."""
    images = torch.zeros(1, 1, 16, 16)
    images[..., :8, :8] = noise(8, 8)
    table = patch_importance(AttentionMap.from_dense(torch.full((1, 1, 4, 4), 0.25)), images, Grid(2, 2, (8, 8)))
    assert table.values["entropy"][0, 1:].tolist() == [0.0] * 3
    assert float(table.values["entropy"][0, 0]) > 2 > float(table.null["entropy"].max())
    assert int(table.values["importance"].argmax()) == 0


def test_recycled_tokens_by_hand():
    tokens = noise(2, 7, 5).double()
    importance = noise(2, 7, seed=1).double()
    stay = torch.tensor([[1, 0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 1, 1, 0]]).bool()
    dead = torch.tensor([[0, 0, 0, 1, 0, 0, 0], [0] * 7]).bool()  # pruned by an earlier stage: no part of it
    got = recycled(tokens, ~stay & ~dead, stay, importance)
    for b in range(2):
        groups = {int(p): [int(p)] for p in stay[b].nonzero()[:, 0]}
        for p in range(7):
            if not stay[b, p] and not dead[b, p]:
                near = max(groups, key=lambda s: float(torch.cosine_similarity(tokens[b, p], tokens[b, s], dim=0)))
                groups[near].append(p)
        for kept, members in groups.items():
            share = torch.stack([importance[b, p] + 1e-6 for p in members])
            wanted = sum(w * tokens[b, p] for w, p in zip(share / share.sum(), members, strict=True))
            torch.testing.assert_close(got[b, kept], wanted)
        assert torch.equal(got[b, ~stay[b]], tokens[b, ~stay[b]])
    # Twins of a kept token change nothing.
    twins = tokens[:, [0, 0, 2, 2, 2]]
    kept = torch.tensor([[True, False, True, False, False]] * 2)
    torch.testing.assert_close(recycled(twins, ~kept, kept, torch.ones(2, 5).double())[:, [0, 2]], twins[:, [0, 2]])


def test_one_stage_without_recycling_is_plain_pruning():
    model, images, grid = random_vision_model()
    importance = noise(2, 12).double()
    gone = ~top_patches(importance, 5)
    for how in ("remove", "mean"):
        got = scheduled_run(model, images, importance, grid, Schedule((-1,), (5,), recycle=False), how=how)
        torch.testing.assert_close(got.logits, pruned_run(model, images, gone, grid, how=how).logits)
    merged = scheduled_run(model, images, importance, grid, Schedule((-1,), (5,)))
    assert not torch.allclose(merged.logits, pruned_run(model, images, gone, grid, how="remove").logits)


def test_two_stages_of_a_text_that_holds_an_image():
    """By hand: after the second stage the last token sees the three tokens of the second stage, before it eight."""
    model, inputs = eager_llava()
    grid = grid_of(model, inputs)
    importance = noise(1, 16).double()
    plan = Schedule((-1, 0), (8, 3), recycle=False)
    reads = [Site("pattern", layer, None, "text") for layer in range(2)]
    run = scheduled_run(model, inputs, importance, grid, plan, read=[Site("z", 1, None, "text")])
    assert run.logits.shape[:2] == (1, 21)
    order = importance[0].argsort(descending=True)
    seen = scheduled_run(model, inputs, importance, grid, plan, read=reads)
    for layer, keep in enumerate((8, 3)):
        row = seen.acts[reads[layer]][0, :, -1]
        alive = row[:, grid.index].sum(0) > 0
        assert sorted(alive.nonzero()[:, 0].tolist()) == sorted(order[:keep].tolist())
        torch.testing.assert_close(row.sum(-1), torch.ones(4).double(), atol=1e-6, rtol=1e-6)


def test_the_share_of_a_schedule():
    assert Schedule((-1,), (5,)).share(10, 4) == 0.5
    assert Schedule((0, 2), (5, 2)).share(10, 4) == pytest.approx((10 + 5 + 5 + 2) / 40)
    for layers, keep in (((0, 0), (5, 2)), ((0, 1), (2, 5)), ((0,), (0,)), ((), ())):
        with pytest.raises(WorkbenchError, match="stages"):
            Schedule(layers, keep)


def test_the_search_ranks_by_the_first_half_and_judges_on_the_second():
    import workbench as wb

    model, test = wb.load("tiny-vit"), wb.planted_images(16, seed=3)
    grid = wb.grid_of(model)
    with torch.no_grad():
        run = model.run(test.images, maps=wb.capture())
    parts = patch_importance(run, test.images, grid).values
    relevance, entropy = parts["relevance"], parts["entropy"]
    found = schedule_search(
        model, test.images, relevance, entropy, grid, layers=(-1, 0), budget=0.25, weights=(0.0, 1.0), random=2
    )
    table = found.frame()
    assert (table.share <= 0.25).all()
    assert (table.searched.diff().dropna() >= 0).all()
    assert found.best.weight == 1.0
    assert table.held_out[0] < 0.15 < 0.3 < table.random_low[0]
    assert table.random[1:].isna().all()
    # One of them by hand: the cosine of mean patches after the last block.
    at = 1
    plan = found.schedules[at]
    site = "blocks.1.hook_resid_post"
    importance = combined(relevance, entropy, plan.weight)
    pruned = scheduled_run(model, test.images, importance, grid, plan, read=[Site.parse(site)]).acts[site].detach()
    whole = model.run(test.images, read=[site]).acts[site].detach()
    stay = top_patches(importance, plan.keep[-1])
    for image in range(16):
        x, y = pruned[image][stay[image]].double().mean(0), whole[image].double().mean(0)
        wanted = 1 - float(x @ y / x.norm() / y.norm())
        got = torch.cat([found.searched[at], found.held_out[at]])[image]
        assert float(got) == pytest.approx(wanted, abs=1e-6)


def test_a_search_in_a_text():
    model, inputs = llava()
    grid = grid_of(model, inputs)
    many = {name: value.expand(2, *value.shape[1:]) for name, value in inputs.items()}
    relevance, entropy = noise(2, 16).double(), noise(2, 16, seed=1).double()
    found = schedule_search(model, many, relevance, entropy, grid, layers=(-1,), budget=0.5, how="mean", random=2)
    assert {plan.keep for plan in found.schedules} == {(8,)}
    assert (found.searched >= 0).all()


def test_wrong_questions():
    model, images, grid = random_vision_model()
    weight = noise(2, 12).double()
    with pytest.raises(UnknownName, match="that others follow"):
        schedule_search(model, images, weight, weight, grid, layers=(0,))
    with pytest.raises(Refused, match="fits a budget"):
        schedule_search(model, images, weight, weight, grid, layers=(-1,), budget=0.01)
    with pytest.raises(WorkbenchError, match="budget"):
        schedule_search(model, images, weight, weight, grid, layers=(-1,), budget=1.0)
    with pytest.raises(WorkbenchError, match="two images"):
        schedule_search(model, images[:1], weight[:1], weight[:1], grid, layers=(-1,))
    with pytest.raises(UnknownName, match="way of pruning"):
        scheduled_run(model, images, weight, grid, Schedule((-1,), (5,)), how="drop")
    with pytest.raises(WorkbenchError, match="importance"):
        scheduled_run(model, images, weight, grid, Schedule((-1,), (13,)))
    with pytest.raises(WorkbenchError, match="images are"):
        patch_entropy(images[..., :4], grid)
    with pytest.raises(WorkbenchError, match="weight"):
        patch_importance(random_maps(tokens=12, causal=False), noise(1, 1, 6, 8), grid, weight=2.0)
