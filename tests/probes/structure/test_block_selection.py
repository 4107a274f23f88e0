"""Recall curves against sums written out, and the untrained rules against loops over blocks."""

import pytest
import torch

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.structure.block_selection import block_mean_scores, chunk_scores, selection_curves

GENERATOR = torch.Generator().manual_seed(0)
Q = torch.randn(2, 4, 22, 8, generator=GENERATOR, dtype=torch.float64)
K = torch.randn(2, 2, 22, 8, generator=GENERATOR, dtype=torch.float64)


def test_recall_is_the_mass_of_the_best_blocks() -> None:
    amap = SoftmaxMap(Q, K, mask=Mask(causal=True))
    scores = torch.randn(2, 4, 5, 5, generator=GENERATOR, dtype=torch.float64)
    found = selection_curves(amap, {"rule": scores}, 5, kept=(0.3, 1.0))
    mass = amap.blocks(5, "sum")
    for head in range(4):
        total = 0.0
        for b in range(2):
            for i in range(5):
                count = max(1, -(-3 * (i + 1) // 10))
                best = sorted(range(i + 1), key=lambda j, b=b, head=head, i=i: -float(scores[b, head, i, j]))[:count]
                total += float(mass[b, head, i, best].sum() / mass[b, head, i].sum())
        assert float(found.recall["rule"][head, 0]) == pytest.approx(total / 10)
    assert torch.allclose(found.recall["rule"][:, 1], torch.ones(4, dtype=torch.float64))
    kept = sum(max(1, -(-3 * (i + 1) // 10)) for i in range(5))
    assert float(found.sparsity[0]) == pytest.approx(1 - kept / 15)
    assert float(found.sparsity[1]) == 0


def test_the_oracle_bounds_every_rule_and_a_planted_rule_reaches_it() -> None:
    amap = SoftmaxMap(3 * Q, K, mask=Mask(causal=True))
    mass = amap.blocks(4, "sum")
    rules = {"planted": mass * 7, "means": block_mean_scores(3 * Q, K, 4), "against": -mass}
    found = selection_curves(amap, rules, 4)
    assert torch.equal(found.recall["planted"], found.recall["oracle"])
    for values in found.recall.values():
        assert bool((values <= found.recall["oracle"] + 1e-12).all())
    middle = found.kept.index(0.3)
    assert float(found.recall["oracle"][:, middle].mean()) > float(found.recall["random"][:, middle].mean())
    assert float(found.recall["means"][:, middle].mean()) > float(found.recall["against"][:, middle].mean())


def test_block_means_and_chunks_against_loops() -> None:
    found = block_mean_scores(Q, K, 5)
    for i in range(5):
        for j in range(5):
            q, k = Q[1, 3, 5 * i : 5 * i + 5].mean(0), K[1, 1, 5 * j : 5 * j + 5].mean(0)
            assert float(found[1, 3, i, j]) == pytest.approx(float(q @ k))
    bounds = [0, 3, 10, 11, 20]
    found = chunk_scores(Q, K, bounds, 4)
    chunks = [*zip(bounds, [*bounds[1:], 22], strict=True)]
    tokens = torch.zeros(22, 22, dtype=torch.float64)
    for a, b in chunks:
        for c, d in chunks:
            q, k = Q[0, 2, a:b].mean(0) * (b - a) ** 0.5, K[0, 1, c:d].mean(0) * (d - c) ** 0.5
            tokens[a:b, c:d] = q @ k
    for i in range(6):
        for j in range(6):
            cell = tokens[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert float(found[0, 2, i, j]) == pytest.approx(float(cell.mean()))


def test_mistakes_are_told() -> None:
    amap = SoftmaxMap(Q, K, mask=Mask(causal=True))
    with pytest.raises(WorkbenchError, match=r"scores of 'x' are \[B, H, Q/5, K/5\]"):
        selection_curves(amap, {"x": torch.ones(2, 4, 5, 4)}, 5)
    with pytest.raises(WorkbenchError, match="cannot be called 'oracle'"):
        selection_curves(amap, {"oracle": torch.ones(2, 4, 5, 5)}, 5)
    with pytest.raises(WorkbenchError, match="shares of the visible blocks"):
        selection_curves(amap, {}, 5, kept=(0.0,))
    with pytest.raises(Refused, match="no mass to recall"):
        selection_curves(AttentionMap.from_dense(-torch.ones(1, 1, 3, 3)), {}, 1)
    with pytest.raises(WorkbenchError, match="increasing starts"):
        chunk_scores(Q, K, [1, 3], 4)


def test_it_saves_and_draws(tmp_path) -> None:
    found = selection_curves(SoftmaxMap(Q, K, mask=Mask(causal=True)), {"means": block_mean_scores(Q, K, 5)}, 5)
    assert set(found.frame()["rule"]) == {"oracle", "random", "means"}
    assert found.plot().get_ylabel() == "attention mass kept"
    assert (found.save(tmp_path / "curves") / "table.parquet").is_file()
