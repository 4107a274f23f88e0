"""Published constants of the analyses of images, and their formulas on grids of odd sizes with tokens beside the patches."""

import inspect
import math

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

from workbench.maps import AttentionMap
from workbench.probes.vision import hiprune as pruned
from workbench.probes.vision import registers
from workbench.probes.vision.distances import attention_distance
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.hops import hops
from workbench.probes.vision.token_cut import token_cut

GRIDS = [
    Grid(3, 5, (7, 9), start=2, cls=0, others=(1,), tokens=17),
    Grid(4, 4, (8, 8), tokens=16),
    Grid(3, 4, (4, 8), start=3, cls=1, others=(0,), step=5, tokens=19),
]


def maps_on(grid, seed=0):
    rows = torch.rand(
        2, 3, grid.tokens, grid.tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return rows / rows.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "name", "published"),
    [
        (token_cut, "tau", 0.2),
        (token_cut, "eps", 1e-5),
        (pruned.hiprune, "alpha", 0.1),
        (pruned.hiprune, "object_layer", 9 / 24),
    ],
)
def test_published_constants_are_the_defaults(function, name, published):
    assert inspect.signature(function).parameters[name].default == published
    assert registers.PUBLISHED == 150


@pytest.mark.parametrize("grid", GRIDS)
def test_hops_and_distance_are_their_sums_over_pairs_of_patches(grid):
    rows = maps_on(grid)
    step = grid.step
    places = [(r, c, grid.start + step * r + c) for r in range(grid.rows) for c in range(grid.cols)]
    strength = torch.zeros(2, 3, max(grid.rows, grid.cols), dtype=torch.float64)
    distance = torch.zeros(2, 3, dtype=torch.float64)
    for r, c, p in places:
        for r2, c2, q in places:
            mass = rows[:, :, p, q] / grid.patches
            strength[:, :, max(abs(r - r2), abs(c - c2))] += mass
            distance += mass * math.hypot((r - r2) * grid.patch[0], (c - c2) * grid.patch[1])
    amap = AttentionMap.from_dense(rows)
    torch.testing.assert_close(hops(amap, grid).strength[0][:, :-2], strength.mean(0))
    torch.testing.assert_close(attention_distance(amap, grid).values["distance"][0], distance.mean(0))


@pytest.mark.parametrize("grid", GRIDS)
def test_hiprune_is_its_steps_one_after_the_other(grid):
    """Anchors by the object layer, neighbours that never wrap around a row, registers by the deep layer; budgets are exact."""
    shallow, deep, keep = maps_on(grid), maps_on(grid, seed=1), grid.patches // 2
    found = pruned.hiprune(
        [AttentionMap.from_dense(m) for m in (shallow, deep)], grid, keep=keep, alpha=1.0, object_layer=0, deep_layer=1
    )
    for b in range(2):
        a, d = (m[b].mean((0, 1))[grid.index] for m in (shallow, deep))
        why = [0] * grid.patches
        anchors = a.argsort(descending=True)[: round(keep / 5)].tolist()
        for patch in anchors:
            why[patch] = 1
        left = keep - len(anchors)
        for patch in anchors:
            r, c = divmod(patch, grid.cols)
            for r2, c2 in ((r, c - 1), (r, c + 1), (r - 1, c), (r + 1, c)):
                there = 0 <= r2 < grid.rows and 0 <= c2 < grid.cols
                if there and left and not why[r2 * grid.cols + c2]:
                    why[r2 * grid.cols + c2] = 2
                    left -= 1
        for patch in d.argsort(descending=True).tolist():
            if left and not why[patch]:
                why[patch] = 3
                left -= 1
        assert found.why[b].tolist() == why
    assert found.kept.sum(1).tolist() == [keep] * 2


def test_two_blobs_are_cut_as_scipy_cuts_them():
    grid = Grid(9, 11, (16, 16))
    down, right = torch.meshgrid(torch.arange(9), torch.arange(11), indexing="ij")
    inside = ((down - 3) ** 2 + (right - 4) ** 2 <= 7).flatten()
    generator = torch.Generator().manual_seed(5)
    sides = torch.eye(2, 16)
    features = torch.where(inside[:, None], sides[0], sides[1]) + 0.15 * torch.randn(99, 16, generator=generator)
    unit = torch.nn.functional.normalize(features, dim=-1).double()
    edges = np.where((unit @ unit.T).numpy() > 0.2, 1.0, 1e-5)
    degree = np.diag(edges.sum(1))
    vector = eigh(degree - edges, degree, subset_by_index=[1, 1])[1][:, 0]
    side = vector > vector.mean()
    side = side if side[np.abs(vector).argmax()] else ~side
    found = token_cut(features[None], grid)
    assert torch.equal(found.side[0].flatten(), torch.from_numpy(side))
    assert float(found.overlap(inside.view(1, 9, 11))[0]) > 0.95
