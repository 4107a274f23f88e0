"""Similar layers are found, and exchanging patterns is measured on models whose layers are known."""

import math

import pytest
import torch

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.similarity.sharing import replaced, sharing
from workbench.run import Run


def run_of(*weights: torch.Tensor) -> Run:
    ids = torch.zeros(1, weights[0].shape[-1], dtype=torch.int64)
    maps = {layer: AttentionMap.from_dense(weight) for layer, weight in enumerate(weights)}
    return Run(Tokens.of(ids), maps=maps)


def test_alike_layers_are_candidates_and_the_ends_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 3, 9, 9, generator=generator).mul(3).softmax(-1) for _ in range(2))
    found = sharing(run_of(a, a, a, b, b, b))
    assert found.groups == ((1, 2), (3, 4))
    assert torch.allclose(found.similarity.diagonal(), torch.ones(6, dtype=torch.float64))
    x, y = a.double().mean(1)[0], b.double().mean(1)[0]
    cosines = [float(x[i] @ y[i] / (x[i].norm() * y[i].norm())) for i in range(9)]
    assert float(found.similarity[0, 3]) == pytest.approx(sum(cosines) / 9)
    assert sharing(run_of(a, a, a, b, b, b), size=1).groups == found.groups
    coarse = sharing(run_of(a, a, a, b, b, b), size=3).similarity
    assert float(coarse[0, 3]) > float(found.similarity[0, 3])
    assert sharing(run_of(a, a, a, b, b, b), skip=0).groups == ((0, 1, 2), (3, 4, 5))
    table = found.frame()
    assert table[table["shared"]][["layer", "other"]].values.tolist() == [[1, 2], [3, 4]]


def test_exchanging_patterns_costs_nothing_with_itself_and_much_with_another() -> None:
    model = wb.load("compiled-induction")
    pairs = wb.task("induction").build(seed=0, tokenizer=model.tokenizer, n=4)
    found = replaced(model, pairs.clean, [(1, 1), (1, 0)])
    same, other = found.rows
    assert abs(same[2]) < 1e-12
    assert same[3] > 0.1, "shuffled keys must hurt"
    assert other[2] > 0.1
    assert found.frame()["layer"].tolist() == [1, 1]


def test_mistakes_are_told(tmp_path) -> None:
    a = torch.full((1, 1, 4, 4), 0.25)
    with pytest.raises(WorkbenchError, match="captured 1"):
        sharing(run_of(a))
    with pytest.raises(WorkbenchError, match="threshold=2"):
        sharing(run_of(a, a), threshold=2)
    with pytest.raises(WorkbenchError, match="maps of one shape"):
        sharing(run_of(a, torch.full((1, 1, 4, 5), 0.2)))
    with pytest.raises(WorkbenchError, match="no exchanges"):
        replaced(wb.load("compiled-induction"), "a b", [])
    found = sharing(run_of(a, a, a, a))
    assert found.plot().get_xlabel() == "layer"
    assert (found.save(tmp_path / "sharing") / "table.parquet").is_file()


def test_js_and_nulls_are_those_of_literal_loops() -> None:
    rows = [random_rows(2, 3, 7, seed=seed) for seed in range(2)]
    found = sharing([AttentionMap.from_dense(r) for r in rows], measure="js", skip=0)

    def entropy(p: torch.Tensor) -> float:
        return -sum(float(x) * math.log2(float(x)) for x in p if x > 0)

    overlaps, chance = [], []
    for b in range(2):
        for i in range(7):
            x, y = (r[b, :, i].mean(0) for r in rows)
            overlaps.append(1 - (entropy((x + y) / 2) - (entropy(x) + entropy(y)) / 2))
            chance.append(float(x.sum() * y.sum()) / (i + 1) / float(x.norm() * y.norm()))
    assert float(found.similarity[0, 1]) == pytest.approx(sum(overlaps) / 14)
    assert found.similarity.diagonal().tolist() == pytest.approx([1, 1])
    cosines = sharing([AttentionMap.from_dense(r) for r in rows], skip=0)
    assert float(cosines.null[0, 1]) == pytest.approx(sum(chance) / 14)
    assert float(cosines.low[0, 1]) <= float(cosines.similarity[0, 1]) <= float(cosines.high[0, 1])


def test_layers_without_common_keys_share_nothing_and_queries_without_weight_do_not_count() -> None:
    a, b = torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 6, 6)
    a[..., 0], b[..., 3:] = 1.0, 1 / 3
    for measure in ("cosine", "js"):
        found = sharing(run_of(a, b), measure=measure, skip=0)
        assert float(found.similarity[0, 1]) == pytest.approx(0, abs=1e-6)
        assert float(found.null[0, 1]) > 0.05
        half = a.clone()
        half[:, :, 3:] = 0
        alike = sharing([AttentionMap.from_dense(x, row_sum="<=1") for x in (a, half)], measure=measure, skip=0)
        assert float(alike.similarity[0, 1]) == pytest.approx(1)
    with pytest.raises(UnknownName, match="cosine, js"):
        sharing(run_of(a, b), measure="l2")


def test_long_maps_are_walked_in_rows() -> None:
    """4,096 tokens: four dense maps of two heads would be half a gigabyte in float32."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for _ in range(2):
        q, k = (torch.randn(1, 2, 4096, 8, generator=generator) for _ in range(2))
        maps.append(SoftmaxMap(q, k, mask=Mask(causal=True, window=64)))
    found = sharing(maps, skip=0)
    assert 0 < float(found.similarity[0, 1]) < 1
    blocks = sharing(maps, skip=0, size=64)
    assert float(blocks.similarity[0, 1]) > float(found.similarity[0, 1])
