"""Feature graphs in columns: what they refuse, their order, and the way to disk and back."""

import json
import math

import pytest
import torch

from workbench.errors import UnknownName, WorkbenchError
from workbench.feature_graph import NODE_KINDS, FeatureGraph, FeatureNodes


def nodes(**changed: object) -> FeatureNodes:
    columns = {
        "kind": ["embedding", "feature", "error", "logit"],
        "layer": [-1, 0, 0, 1],
        "position": [0, 1, 1, 1],
        "feature": [7, 5, -1, 42],
        "activation": [math.nan, 1.5, math.nan, math.nan],
        "label": ["a", "", "", "b"],
        "columns": {"pre": torch.tensor([0.0, 2.0, 0.0, 0.0])},
    }
    given = {**columns, **changed}
    first = [given.pop(name) for name in ("kind", "layer", "position", "feature")]
    return FeatureNodes.of(*first, **given)


def graph(**changed: object) -> FeatureGraph:
    given = {
        "nodes": nodes(), "source": torch.tensor([0, 1, 2]), "target": torch.tensor([1, 3, 3]),
        "weight": torch.tensor([0.5, -2.0, 0.25]), "tokens": ("a", " b"), "meta": {"model": "toy"},
        "columns": {"head": torch.tensor([0, 1, 0])}, **changed,
    }  # fmt: skip
    return FeatureGraph(**given)


def test_frames_and_matrix():
    found = graph()
    assert found.frame()["kind"].tolist() == ["embedding", "feature", "error", "logit"]
    assert found.frame()["token"].tolist() == ["a", " b", " b", " b"]
    assert found.edge_frame().columns.tolist() == ["source", "target", "weight", "head"]
    dense = torch.zeros(4, 4)
    dense[1, 0], dense[3, 1], dense[3, 2] = 0.5, -2.0, 0.25
    assert torch.equal(found.matrix().to_dense(), dense)
    assert found.logits.tolist() == [3]
    assert found.name(1) == "L0 feature 5 @ 1"
    assert found.name(2) == "L0 error @ 1"
    assert "1 feature" in repr(found)


def test_depth_follows_the_computation():
    """Embeddings, attention of a layer, its MLP and the stream behind it, the next layer, logits."""
    order = [
        "embedding",
        "attention feature",
        "head",
        "feature",
        "error",
        "residual feature",
        "attention feature",
        "logit",
    ]
    found = FeatureNodes.of(order, [-1, 0, 0, 0, 0, 0, 1, 2], [0] * 8, [0, 0, 1, 0, -1, 0, 0, 0]).depth.tolist()
    assert found == sorted(found)
    assert found[1] == found[2]
    assert found[3] == found[4] == found[5]
    assert len(set(found)) == 5


def test_taking_nodes_keeps_all_of_them():
    part = nodes().take(torch.tensor([3, 1]))
    assert part.key.tolist() == [[NODE_KINDS.index("logit"), 1, 1, 42], [NODE_KINDS.index("feature"), 0, 1, 5]]
    assert part.label == ("b", "")
    assert part.columns["pre"].tolist() == [0.0, 2.0]


def test_graphs_come_back_from_disk(tmp_path):
    given = graph()
    found = FeatureGraph.load(given.save(tmp_path / "g"))
    assert torch.equal(found.nodes.key, given.nodes.key)
    assert torch.equal(found.nodes.activation.nan_to_num(-1), given.nodes.activation.nan_to_num(-1))
    assert found.nodes.columns["pre"].tolist() == [0.0, 2.0, 0.0, 0.0]
    assert torch.equal(found.weight, given.weight)
    assert found.columns["head"].tolist() == [0, 1, 0]
    assert (found.tokens, found.meta) == (given.tokens, given.meta)
    with pytest.raises(WorkbenchError, match="exists already"):
        given.save(tmp_path / "g")


def test_damaged_folders_give_one_error(tmp_path):
    folder = graph().save(tmp_path / "g")
    record = json.loads((folder / "graph.json").read_text())
    (folder / "graph.json").write_text(json.dumps({**record, "edges": 9}))
    with pytest.raises(WorkbenchError, match="3 rows, 9 announced"):
        FeatureGraph.load(folder)
    (folder / "graph.json").write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(WorkbenchError, match="format 2"):
        FeatureGraph.load(folder)
    (folder / "edges.parquet").write_bytes(b"nothing")
    (folder / "graph.json").write_text(json.dumps(record))
    with pytest.raises(WorkbenchError, match="is damaged"):
        FeatureGraph.load(folder)
    (folder / "edges.parquet").unlink()
    with pytest.raises(WorkbenchError, match="edges.parquet is missing"):
        FeatureGraph.load(folder)
    with pytest.raises(WorkbenchError, match="no graph folder"):
        FeatureGraph.load(tmp_path / "h")


def test_plot_draws_nodes_and_edges():
    ax = graph().plot()
    assert len(ax.lines) == 3
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"embedding", "feature", "error", "logit"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": ["embedding", "gene", "error", "logit"]}, "gene"),
        ({"layer": [-2, 0, 0, 1]}, "layers of nodes count from -1"),
        ({"layer": torch.tensor([-1.0, 0, 0, 1])}, "whole number"),
        ({"position": [0, 1]}, "N=4 nodes"),
        ({"label": ["a"]}, "N=4 nodes"),
        ({"kind": ["embedding", "feature", "feature", "logit"], "feature": [7, 5, 5, 42]}, "occurs twice"),
        ({"columns": {"label": torch.zeros(4)}}, "cannot be called 'label'"),
        ({"columns": {"pre": torch.zeros(3)}}, "N=4 nodes"),
    ],
)
def test_nodes_that_are_none_are_refused(changed, message):
    with pytest.raises((WorkbenchError, UnknownName), match=message):
        nodes(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": torch.tensor([1, 3])}, "M=3 edges"),
        ({"weight": torch.tensor([0.5, math.nan, 1])}, "finite"),
        ({"source": torch.tensor([-1, 1, 2])}, "one is negative"),
        ({"target": torch.tensor([1, 3, 4])}, "one leads elsewhere"),
        ({"source": torch.tensor([0, 3, 2]), "target": torch.tensor([1, 1, 3])}, "leads back, from logit 42"),
        ({"source": torch.tensor([0, 1, 3])}, "leads back"),
        ({"tokens": ("a",)}, "position 1 and there are 1 tokens"),
        ({"columns": {"weight": torch.zeros(3)}}, "cannot be called 'weight'"),
    ],
)
def test_edges_that_are_none_are_refused(changed, message):
    with pytest.raises(WorkbenchError, match=message):
        graph(**changed)
