"""Similar layers are found, and exchanging patterns is measured on models whose layers are known."""

import pytest
import torch

import workbench as wb
from workbench.errors import WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
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
