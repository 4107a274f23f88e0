"""Outlier tokens, the attention they get, and what is lost without them."""

import numpy as np
import pytest
import torch
from vision_nets import vision

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.examples import random_rows
from workbench.probes.vision.grid import Grid, grid_of
from workbench.probes.vision.registers import (
    PUBLISHED,
    OutlierTokens,
    outlier_attention,
    outlier_erasure,
    outlier_tokens,
    planted_outliers,
    valley,
)

GRID = Grid(6, 7, start=3, cls=0, others=(1, 2), tokens=45)


@pytest.mark.parametrize("each", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_planted_outliers_are_found_exactly(each, seed):
    tokens, truth = planted_outliers(GRID, images=4, each=each, seed=seed)
    found = outlier_tokens(tokens, GRID)
    assert torch.equal(found.outlier, truth)
    assert 1.5 < found.threshold < 9
    assert found.share == pytest.approx(each / 42)
    torch.testing.assert_close(found.norm, tokens[:, 3:].norm(dim=-1))
    torch.testing.assert_close(found.others, tokens[:, :3].norm(dim=-1))
    assert found.interval()[0] == pytest.approx(found.share)


@pytest.mark.parametrize("seed", range(8))
def test_norms_of_one_mode_have_no_outliers(seed):
    logs = 0.4 * torch.randn(500, generator=torch.Generator().manual_seed(seed)).double()
    assert valley(logs) is None
    tokens = logs.exp()[:480].view(4, 120, 1)
    found = outlier_tokens(tokens, Grid(10, 12))
    assert not found.outlier.any()
    assert np.isnan(found.threshold)
    assert list(found.undefined) == ["threshold"]
    assert found.bimodality == pytest.approx(1 / 3, abs=0.06)


def test_the_valley_lies_where_the_density_is_lowest():
    logs = torch.cat([torch.linspace(-0.2, 0.2, 300), torch.linspace(2.8, 3.2, 30)]).double()
    assert 1.3 < float(torch.tensor(valley(logs)).log()) < 2.6
    near, far = (torch.cat([0.2 * logs[:300], 0.2 * logs[:60] + gap]) for gap in (0.5, 0.9))
    assert valley(near) is None  # two modes less than a factor of 2 apart
    assert valley(far) is not None
    assert valley(torch.zeros(50, dtype=torch.float64)) is None


def test_bimodality_of_two_spikes_and_of_even_spread():
    def coefficient(values):
        return outlier_tokens(values.exp().view(1, -1, 1), Grid(20, 50), threshold=1.0).bimodality

    generator = torch.Generator().manual_seed(0)
    assert coefficient(torch.randn(1000, generator=generator).double()) == pytest.approx(1 / 3, abs=0.05)
    assert coefficient(torch.rand(1000, generator=generator).double()) == pytest.approx(5 / 9, abs=0.02)
    spikes = torch.cat([torch.zeros(500), torch.ones(500)]).double()
    assert coefficient(spikes) == pytest.approx(1, abs=0.01)


def test_a_published_threshold_is_an_option():
    tokens, truth = planted_outliers(GRID)
    assert torch.equal(outlier_tokens(tokens * 30, GRID, threshold=PUBLISHED).outlier, truth)
    assert not outlier_tokens(tokens, GRID, threshold=PUBLISHED).outlier.any()
    with pytest.raises(WorkbenchError, match="positive norm"):
        outlier_tokens(tokens, GRID, threshold=0.0)


def test_attention_to_outliers_is_the_mean_over_them():
    grid = Grid(4, 5, start=1, cls=0, tokens=21)
    rows = random_rows(3, 2, 21, causal=False)
    tokens, truth = planted_outliers(grid, images=3, each=2)
    truth[2] = False
    found = outlier_tokens(tokens, grid)
    found = OutlierTokens(**{**vars(found), "outlier": truth})
    table = outlier_attention(AttentionMap.from_dense(rows), found)
    for head in range(2):
        to, rest = [], []
        for image in range(2):  # the third holds no outlier and does not count
            received = rows[image, head, 1:, 1:].mean(0)
            to.append(float(received[truth[image]].mean()))
            rest.append(float(received[~truth[image]].mean()))
        assert float(table.values["to_outliers"][0][head]) == pytest.approx(np.mean(to))
        assert float(table.values["to_others"][0][head]) == pytest.approx(np.mean(rest))
        assert float(table.values["ratio"][0][head]) == pytest.approx(np.mean(np.array(to) / rest))
    torch.testing.assert_close(table.null["to_outliers"][0], torch.full((2,), 1 / 21, dtype=torch.float64))
    torch.testing.assert_close(table.null["ratio"][0], torch.ones(2, dtype=torch.float64))
    nothing = outlier_attention(
        AttentionMap.from_dense(rows), OutlierTokens(**{**vars(found), "outlier": truth & False})
    )
    assert nothing.values["to_outliers"][0].isnan().all()
    assert nothing.undefined
    with pytest.raises(WorkbenchError, match="2 images"):
        outlier_attention(AttentionMap.from_dense(rows[:2]), found)


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers", "clip", "siglip", "vit"])
def test_a_run_gives_its_tokens(name):
    model, inputs, _ = vision(name)
    grid = grid_of(model)
    site = f"{'vision.' if name == 'clip' else ''}blocks.1.hook_resid_post"
    with torch.no_grad():
        run = model.run(inputs, read=[site], maps=wb.capture())
    found = outlier_tokens(run, grid, threshold=1.0)
    assert found.site == site
    torch.testing.assert_close(found.norm, run.acts[site].norm(dim=-1)[:, grid.index])
    assert found.others.shape == (2, grid.start)
    assert len(outlier_attention(run, found).frame()) == 2 * 4
    with torch.no_grad():
        bare = model.run(inputs)
    if name == "clip":
        with pytest.raises(WorkbenchError, match=r"read=\['vision.blocks"):
            outlier_tokens(bare, grid)
    else:
        assert outlier_tokens(bare, grid).site == "output"


def with_outliers(model, grid, size=40.0):
    """An edit that makes two patches of every image large along one direction, as a network with outliers does."""
    width = model.shape.width
    direction = torch.nn.functional.one_hot(torch.tensor(0), width).double()

    def edit(values):
        out = values.clone()
        for place in (3, 10):
            out[:, int(grid.index[place])] += size * direction.to(values.dtype)
        return out

    return edit


def test_outliers_that_the_model_uses_cost_more_than_other_patches():
    model, inputs, _ = vision("dinov2")
    grid = grid_of(model)
    edit = with_outliers(model, grid)

    class Edited:
        """The model, with outliers made by its first layer."""

        name, shape, tokenizer = model.name, model.shape, None

        def run(self, tokens, read=(), edit=(), **options):
            made = edit.items() if edit else ()
            sites = {wb.Site.parse(site): fn for site, fn in made}
            first = wb.Site("resid_post", 0)
            later = sites.pop(first, None)
            whole = planted if later is None else lambda x: later(planted(x))
            return model.run(tokens, read, {first: whole, **sites}, **options)

    planted = edit
    network = Edited()
    with torch.no_grad():
        run = network.run(inputs, read=["blocks.0.hook_resid_post"])
    found = outlier_tokens(run, grid)
    assert found.outlier.sum(1).tolist() == [2, 2]
    images, site = inputs["pixel_values"], "blocks.0.hook_resid_post"
    curve = outlier_erasure(network, images, found, site=site)
    assert curve.counts == (1, 2)
    assert curve.metric == "cosine to the whole image"
    assert float(curve.base.mean()) == pytest.approx(1)
    # What is read off the outliers' direction goes with both of them and with no other patch.
    read = outlier_erasure(network, images, found, site=site, metric=lambda run: run.output[..., 0].amax(1)).frame()
    assert read["ranked"].iloc[1] < 0.5 * read["base"].iloc[1]
    assert read["random_low"].iloc[1] > 0.9 * read["base"].iloc[1]


def test_there_must_be_outliers():
    model, inputs, _ = vision("dinov2")
    grid = grid_of(model)
    found = outlier_tokens(torch.ones(2, 17, 4), grid)
    with pytest.raises(Refused, match="no outliers to replace"):
        outlier_erasure(model, inputs["pixel_values"], found, site="blocks.0.hook_resid_post")
    assert "bimodality" in found.undefined
