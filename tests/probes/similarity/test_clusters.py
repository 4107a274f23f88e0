"""Planted families of heads are told apart by the codes of their patterns, and by nothing when there is nothing."""

import pytest
import torch

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.similarity.clusters import cluster_heads
from workbench.probes.similarity.patterns import FAMILIES, HeadPatterns, head_patterns, planted_heads


@pytest.fixture(scope="module")
def planted():
    maps, families = planted_heads(grid=6, copies=6)
    return head_patterns(maps), families


@pytest.fixture(scope="module")
def found(planted):
    importance = {
        (layer, head): 1.0 if FAMILIES[head] == "row" else 0.1 * head for layer in range(6) for head in range(6)
    }
    return cluster_heads(planted[0], 6, importance=importance)


def test_a_pattern_pools_weights_by_overlap(dense) -> None:
    n, side = 10, 4
    weights = torch.rand(1, 1, n, n, generator=torch.Generator().manual_seed(0))
    weights = weights / weights.sum(-1, keepdim=True)
    share = torch.zeros(side, n)
    for cell in range(side):
        for token in range(n):
            share[cell, token] = max(0.0, min(token + 1, (cell + 1) * n / side) - max(token, cell * n / side))
    expected = (share / share.sum(1, keepdim=True)) @ weights[0, 0] @ share.T
    got = head_patterns(dense(weights), side=side)
    torch.testing.assert_close(got.patterns[0], expected.double(), atol=1e-6, rtol=1e-6)
    assert got.patterns.sum(2).flatten().tolist() == pytest.approx([1.0] * side)
    exact = head_patterns(dense(weights), side=n).patterns[0]
    torch.testing.assert_close(exact, dense(weights).dense()[0, 0])
    assert head_patterns(dense(weights), side=25).patterns.sum(2).flatten().tolist() == pytest.approx([1.0] * 25)
    with pytest.raises(WorkbenchError, match="2 x 2"):
        head_patterns(dense(weights), side=1)


def test_even_heads_are_their_own_null(dense) -> None:
    causal = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    found = head_patterns(dense(causal[None, None]), side=4)
    torch.testing.assert_close(found.patterns, found.null, atol=1e-6, rtol=1e-6)
    assert float(found.frame()["from_even"][0]) == pytest.approx(0, abs=1e-6)


def test_planted_rings_stand_at_their_distance() -> None:
    maps, families = planted_heads(grid=6, copies=3, noise=0.0)
    assert families[:6] == FAMILIES
    for copy, amap in enumerate(maps):
        ring = amap.dense()[0, FAMILIES.index("ring"), 1:, 1:]
        y, x = torch.arange(36) // 6, torch.arange(36) % 6
        distance = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())
        strength = [float((ring * (distance == k)).sum(1).mean()) for k in range(6)]
        assert max(range(6), key=strength.__getitem__) == 1 + copy % 3
        assert float(amap.dense()[0, FAMILIES.index("cls"), 1:, 0].min()) > 0.9


def test_codes_separate_the_six_families(planted, found) -> None:
    codes, components = found.separation(planted[1])
    assert codes > 0.5  # measured .58 to .80 over grids of 4, 6, 8, noise .3 and 1, two seeds
    assert components > 0.5
    assert found.silhouette > 0.5 > 0.1 > found.silhouette_shuffled
    assert 0 < found.error_pca < 0.2
    assert 0 < found.error < 0.4
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [planted[1][i] for i in order]
    assert found.separation(shuffled)[0] < 0.1
    from sklearn.metrics import adjusted_rand_score

    assert adjusted_rand_score(planted[1], found.cluster.numpy()) > 0.6


def test_importance_is_connected_with_clusters(planted, found) -> None:
    explained, chance, p = found.connection()
    assert explained > 0.7 > chance
    assert p < 0.01
    generator = torch.Generator().manual_seed(0)
    noise = {(layer, head): float(torch.rand(1, generator=generator)) for layer in range(6) for head in range(6)}
    from dataclasses import replace

    other = replace(
        found, importance=torch.tensor([noise[key] for key in zip(found.layer, found.head, strict=True)]).double()
    )
    assert other.connection()[2] > 0.02
    assert int(found.clusters()["patterns"].sum()) == 36
    assert all(part != part for part in cluster_heads(planted[0], 2, steps=1, embedding="pca").connection())


def test_the_same_seed_gives_the_same_and_clusters_may_be_found(planted) -> None:
    one = cluster_heads(planted[0], steps=40, seed=3)
    torch.rand(5)  # what else is drawn does not matter
    two = cluster_heads(planted[0], steps=40, seed=3)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.embedding, two.embedding)
    assert not torch.equal(one.codes, cluster_heads(planted[0], 2, steps=1, seed=4, embedding="pca").codes)
    assert len(set(one.cluster.tolist()) - {-1}) >= 2
    before = torch.random.get_rng_state()
    cluster_heads(planted[0], 3, steps=1, embedding="pca")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_mistakes_are_told(planted) -> None:
    few = head_patterns(planted_heads(grid=3, copies=1)[0], side=8)
    with pytest.raises(Refused, match="8 or more"):
        cluster_heads(few, 2)
    with pytest.raises(WorkbenchError, match="got 40"):
        cluster_heads(planted[0], 40)
    with pytest.raises(UnknownName, match="tsne"):
        cluster_heads(planted[0], 2, embedding="umap")
    with pytest.raises(WorkbenchError, match="a label per pattern"):
        cluster_heads(planted[0], 2, steps=1, embedding="pca").separation(["a"])
    same = HeadPatterns(torch.ones(9, 8, 8).double(), torch.ones(9, 8, 8).double(), (0,) * 9, (0,) * 9, tuple(range(9)))
    with pytest.raises(Refused, match="equal"):
        cluster_heads(same, steps=1, embedding="pca")
    nearly = HeadPatterns(same.patterns.clone(), same.null, same.sequence, same.layer, same.head)
    nearly.patterns[:, 0, 0] += torch.rand(9, generator=torch.Generator().manual_seed(0)).double()
    found = cluster_heads(nearly, steps=1, embedding="pca")
    assert ("silhouette" in found.undefined) == (found.silhouette != found.silhouette)
