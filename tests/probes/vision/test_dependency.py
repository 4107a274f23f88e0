"""Trees of which patch depends on which."""

import itertools

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.mixers.reversed import reversed_attention
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.vision.dependency import arborescence, dependency_tree, reverse
from workbench.probes.vision.grid import Grid

GRID = Grid(4, 5)


def planted(seed, strength=0.6, n=20):
    """A random tree, and weights [parent, child] that sum to 1 over parents and are largest at the child's parent."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    parent = torch.full((n,), -1)
    for i in range(1, n):
        parent[order[i]] = order[0 if i <= 8 else int(torch.randint(4, (1,), generator=generator))]
    weight = 0.5 + torch.rand(n, n, generator=generator, dtype=torch.float64)
    for child, above in enumerate(parent.tolist()):
        weight[:, child] *= (1 - strength) / weight[:, child].sum()
        if above >= 0:
            weight[above, child] += strength
        else:
            weight[:, child] /= weight[:, child].sum()
    return parent, weight


@pytest.mark.parametrize("seed", range(8))
def test_a_planted_tree_is_returned_exactly(seed):
    parent, weight = planted(seed)
    # Layers and heads that blur it, and the class token in front.
    noise = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(seed)).double()
    maps = []
    for layer in range(2):
        whole = torch.zeros(1, 3, 21, 21, dtype=torch.float64)
        whole[..., 1:, 1:] = weight + 0.01 * noise[layer]
        whole[..., 0] = 0.1
        maps.append(AttentionMap.from_dense(whole))
    grid = Grid(4, 5, start=1, cls=0, tokens=21)
    root = int((parent < 0).long().argmax())
    found = dependency_tree(maps, grid, draws=2)
    assert found.parent[0].tolist() == parent.tolist()
    assert arborescence(weight, root).tolist() == parent.tolist()


def test_the_root_of_a_planted_tree_is_where_most_mass_arrives():
    n = 20
    weight = torch.full((n, n), 0.01, dtype=torch.float64)
    parent = [-1] + [0] * 5 + [1 + i // 4 for i in range(14)]
    for child, above in enumerate(parent):
        if above >= 0:
            weight[above, child] = 1.0
    found = dependency_tree(AttentionMap.from_dense(weight[None, None]), GRID)
    assert found.parent[0].tolist() == parent
    assert int(found.root[0]) == 0
    assert found.depth[0].tolist() == [0] + [1] * 5 + [2] * 14
    assert found.leaf[0].sum() == 15
    assert float(found.summary()["depth"][0]) == pytest.approx(33 / 20)


def test_a_star_is_far_from_its_null():
    weight = torch.full((20, 20), 0.01, dtype=torch.float64)
    weight[7] = 1.0
    found = dependency_tree(AttentionMap.from_dense(weight[None, None]), GRID)
    table = found.summary()
    assert int(found.root[0]) == 7
    assert table["leaves"][0] == 19 / 20 > table["leaves_null_high"][0]
    assert table["depth"][0] == 19 / 20 < table["depth_null_low"][0]
    assert table["root"][0] > 2 * table["root_null_high"][0]
    # Every child still sends what it sent, to others.
    assert found.null["root"].shape == (16, 1)
    assert (found.null["root"] >= 1 / 20).all()


def best_of_all(weight, root):
    """Every choice of parents that is a tree, tried."""
    n = len(weight)
    children = [i for i in range(n) if i != root]
    best = None
    for choice in itertools.product(range(n), repeat=n - 1):
        parent = dict(zip(children, choice, strict=True))
        if any(a == b for a, b in parent.items()):
            continue
        ok = True
        for child in children:
            at, steps = child, 0
            while at != root and steps < n:
                at, steps = parent[at], steps + 1
            ok &= at == root
        total = sum(float(weight[above, child]) for child, above in parent.items())
        if ok and (best is None or total > best):
            best = total
    return best


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_no_other_tree_is_heavier(seed, n):
    weight = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parent = arborescence(weight, seed % n)
    total = sum(float(weight[above, child]) for child, above in enumerate(parent.tolist()) if above >= 0)
    assert total == pytest.approx(best_of_all(weight, seed % n))


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_arborescence_of_the_whole_graph(seed):
    n = 16
    weight = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    graph = nx.DiGraph()
    pairs = itertools.permutations(range(n), 2)
    graph.add_weighted_edges_from((i, j, float(weight[i, j])) for i, j in pairs if j != 3)
    wanted = [-1] * n
    for above, child in nx.maximum_spanning_arborescence(graph).edges:
        wanted[child] = above
    assert arborescence(weight, 3).tolist() == wanted
    assert arborescence(weight, 3, candidates=n).tolist() == wanted


def test_reversed_attention_counts_as_it_is():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    ones = torch.ones(1, 2, 20, dtype=torch.float64)
    _, amap = reversed_attention(q, k, v, ones / 2, ones[:, 0])
    found = dependency_tree(amap, GRID, draws=1)
    sent = amap.dense().mean(1)[0].fill_diagonal_(0)
    torch.testing.assert_close(found.mass[0], sent.sum(1))
    assert found.parent[0].tolist() == arborescence(sent, int(sent.sum(1).argmax())).tolist()


def test_reverse_is_the_softmax_over_the_other_axis():
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    amap = SoftmaxMap(q, k, mask=Mask(), scale=0.5)
    got = reverse(amap)
    assert got.row_sum == "columns"
    wanted = (0.5 * q @ k.transpose(-1, -2)).softmax(-2)
    torch.testing.assert_close(got.dense(), wanted, atol=1e-9, rtol=1e-9)
    with pytest.raises(Refused, match="no scores"):
        reverse(AttentionMap.from_dense(amap.dense()))


def test_leaves_go_first_and_the_rest_is_a_tree():
    maps = [AttentionMap.from_dense(random_rows(2, 2, 20, causal=False, seed=s)) for s in range(2)]
    found = dependency_tree(maps, GRID, draws=1)
    before = torch.ones(2, 20, dtype=torch.bool)
    for patches in (20, 15, 8, 1):
        stay = found.keep(patches)
        assert stay.sum(1).tolist() == [patches] * 2
        assert (stay <= before).all()
        assert stay[torch.arange(2), found.root].all()
        for parent, here in zip(found.parent, stay, strict=True):
            assert all(here[above] for above in parent[here].tolist() if above >= 0)
        before = stay
    lost = (~found.keep(19)).nonzero()
    for image, patch in lost.tolist():
        assert found.leaf[image, patch]
        assert found.mass[image, patch] == found.mass[image][found.leaf[image]].min()


def test_images_do_not_mix_and_wrong_inputs_are_refused():
    rows = random_rows(3, 2, 20, causal=False)
    whole = dependency_tree(AttentionMap.from_dense(rows), GRID, draws=1)
    for i in range(3):
        one = dependency_tree(AttentionMap.from_dense(rows[i : i + 1]), GRID, draws=1)
        assert torch.equal(whole.parent[i], one.parent[0])
        torch.testing.assert_close(whole.mass[i], one.mass[0])
    with pytest.raises(Refused, match="signed"):
        dependency_tree(AttentionMap.from_dense(torch.randn(1, 1, 20, 20)), GRID)
    with pytest.raises(Refused, match="candidates=16"):
        dependency_tree(AttentionMap.from_dense(torch.ones(1, 1, 289, 289) / 289), Grid(17, 17))
    with pytest.raises(WorkbenchError, match="can stay"):
        whole.keep(0)
