"""TokenCut against planted objects and the published steps written out."""

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage
from vision_nets import vision

from workbench.errors import WorkbenchError
from workbench.probes.vision.grid import Grid, grid_of
from workbench.probes.vision.token_cut import key_features, token_cut

GRID = Grid(12, 14, (16, 8))


def blobs(seed, noise=0.25, width=16, grid=GRID):
    """Features of an object on a background, and where the object is."""
    generator = torch.Generator().manual_seed(seed)
    top, left = int(torch.randint(7, (1,), generator=generator)), int(torch.randint(8, (1,), generator=generator))
    truth = torch.zeros(grid.rows, grid.cols, dtype=torch.bool)
    truth[top : top + 4, left : left + 5] = True
    two = torch.linalg.qr(torch.randn(width, 2, generator=generator))[0].T
    features = two[truth.flatten().long()] + noise * torch.randn(grid.patches, width, generator=generator)
    return features[None], truth[None]


@pytest.mark.parametrize("seed", range(10))
def test_the_object_of_two_blobs_is_found(seed):
    features, truth = blobs(seed, noise=0.1)
    found = token_cut(features, GRID)
    iou, null = found.overlap(truth)
    assert float(iou) > 0.95
    assert float(null.mean()) < 0.25
    rows, cols = truth[0].any(1).nonzero(), truth[0].any(0).nonzero()
    box = [rows.min() * 16, cols.min() * 8, rows.max() * 16 + 16, cols.max() * 8 + 8]
    assert found.box[0].tolist() == [float(x) for x in box]
    assert float(found.together[0]) > 0.9
    assert float(found.null.mean()) < 0.5


def published(features, dims, tau, eps):
    """The steps of the paper, with the dense solver."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    edges = np.where(unit @ unit.T > tau, 1.0, eps)
    degree = np.diag(edges.sum(1))
    values, vectors = linalg.eigh(degree - edges, degree)
    x = vectors[:, np.argsort(values)[1]]
    side = x > x.mean()
    seed = np.abs(x).argmax()
    side = side if side[seed] else ~side
    pieces, _ = ndimage.label(side.reshape(dims))
    return np.sort(values)[1], np.abs(x), side.reshape(dims), pieces == pieces.flatten()[seed]


@pytest.mark.parametrize(("tau", "eps"), [(0.2, 1e-5), (0.4, 1e-3), (0.0, 1e-5)])
def test_it_is_what_was_published(tau, eps):
    for seed in range(4):
        features, _ = blobs(seed, noise=0.5)
        found = token_cut(features, GRID, tau=tau, eps=eps)
        value, size, side, mask = published(features[0].double().numpy(), (12, 14), tau, eps)
        assert float(found.cut[0]) == pytest.approx(value, rel=1e-8, abs=1e-12)
        np.testing.assert_allclose(found.vector[0].abs().numpy(), size, atol=1e-8)
        assert (found.side[0].numpy() == side).all()
        assert (found.mask[0].numpy() == mask).all()


def test_images_do_not_mix():
    parts = [blobs(seed)[0] for seed in range(3)]
    whole = token_cut(torch.cat(parts), GRID)
    for i, part in enumerate(parts):
        one = token_cut(part, GRID)
        assert torch.equal(whole.mask[i], one.mask[0])
        assert float(whole.cut[i]) == float(one.cut[0])


def test_only_directions_count():
    features, _ = blobs(1)
    lengths = torch.rand(1, GRID.patches, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.equal(token_cut(features * lengths, GRID).mask, token_cut(features, GRID).mask)


def test_without_two_kinds_of_patches_there_is_no_cut():
    found = token_cut(torch.ones(1, 168, 3), GRID)
    assert found.box.isnan().all()
    assert found.cut.isnan().all()
    assert not found.mask.any()
    assert list(found.undefined) == ["image 0"]
    assert found.frame()["together"].isna().all()


def test_wrong_features_are_refused():
    with pytest.raises(WorkbenchError, match="features are"):
        token_cut(torch.ones(1, 167, 3), GRID)
    with pytest.raises(WorkbenchError, match="tau is a cosine"):
        token_cut(torch.ones(1, 168, 3), GRID, tau=2)


@pytest.mark.parametrize(
    ("name", "site"), [("dinov2-registers", "attn.hook_k"), ("siglip", "attn.hook_rot_k"), ("clip", "attn.hook_k")]
)
def test_keys_of_the_last_layer_that_was_read(name, site):
    model, inputs, _ = vision(name)
    grid = grid_of(model)
    stack = "vision." if name == "clip" else ""
    with torch.no_grad():
        run = model.run(inputs, read=[f"{stack}blocks.{layer}.{site}" for layer in (0, 1)])
    keys = key_features(run, grid)
    whole = run.acts[f"{stack}blocks.1.{site}"]
    torch.testing.assert_close(keys, whole.flatten(2)[:, grid.start :])
    assert not torch.equal(keys, key_features(run, grid, layer=0))
    found = token_cut(run, grid)
    assert found.mask.shape == (2, 4, 4)
    with pytest.raises(WorkbenchError, match="hook_k"):
        token_cut(model.run(inputs), grid)
