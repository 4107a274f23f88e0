"""Attribution graphs as JSON: against a file that circuit-tracer's own classes wrote, the schema, and the way back."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import Refused, WorkbenchError
from workbench.feature_graph import FeatureGraph, FeatureNodes
from workbench.probes.features.graph_json import cantor, read_feature_graph_json, uncantor, write_feature_graph_json
from workbench.probes.features.influence import influence, pruned

GOLDEN = Path(__file__).parents[2] / "golden"
THEIRS = GOLDEN / "sae" / "circuit_tracer" / "graph.json"
OURS = GOLDEN / "feature_graph.json"


def small() -> FeatureGraph:
    """Two tokens, features of both kinds, errors, a head and two logits."""
    nodes = FeatureNodes.of(
        ["embedding", "embedding", "feature", "attention feature", "feature", "error", "attention error", "head",
         "logit", "logit"],
        [-1, -1, 0, 1, 1, 0, 1, 1, 2, 2],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [7, 9, 5, 5, 5, -1, -1, 3, 42, 43],
        activation=[math.nan, math.nan, 1.5, 0.25, 2.0, *[math.nan] * 5],
        probability=[*[math.nan] * 8, 0.75, 0.125],
        label=["a", " b", "", "first letter", "", "", "", "", ' "cat"', " dog"],
    )  # fmt: skip
    ends = [(0, 2), (1, 2), (2, 3), (2, 4), (3, 4), (5, 4), (6, 8), (7, 9), (4, 8), (4, 9), (1, 8)]
    weights = [0.5, 1.25, 2.0, -0.75, 0.5, 0.125, 0.25, 0.5, 2.0, -1.5, 0.0625]
    meta = {"model": "toy", "prompt": "a b", "max_logits": 10, "mass": 0.95, "max_features": 100}
    source, target = (torch.tensor(side) for side in zip(*ends, strict=True))
    graph = FeatureGraph(
        nodes, source, target, torch.tensor(weights), ("a", " b"), meta, {"head": torch.arange(11) % 3}
    )
    return replace(graph, nodes=replace(graph.nodes, influence=influence(graph)))


def test_a_graph_of_circuit_tracer_is_read():
    graph = read_feature_graph_json(THEIRS)
    frame = graph.frame()
    assert frame["kind"].tolist() == ["embedding", "embedding", "feature", "feature", "error", "logit", "logit"]
    assert frame["layer"].tolist() == [-1, -1, 0, 1, 0, 2, 2]
    assert frame["feature"].tolist() == [11, 12, 5, 7, -1, 42, 43]
    assert frame["label"].tolist() == ["a", " b", "", "", "", " cat", " dog"]
    assert frame["activation"].tolist()[2:4] == [1.5, 2.25]
    assert frame["probability"].tolist()[5:] == [0.75, 0.125]
    assert frame["cumulative_influence"].tolist()[:5] == [0.9, 0.8, 0.3, 0.5, 0.95]
    assert graph.edge_frame()[["source", "target", "weight"]].values.tolist()[0] == [0, 2, 0.5]
    assert (graph.meta["model"], graph.meta["node_share"], graph.tokens) == ("gemma-2-2b", 0.8, ("a", " b"))


def test_a_graph_of_circuit_tracer_goes_back(tmp_path):
    """All that its file says, but the identifier of errors, in which its release 0.5 repeats the layer."""
    graph = read_feature_graph_json(THEIRS)
    written = json.loads(write_feature_graph_json(graph, tmp_path / "g.json", slug="tiny").read_text())
    given = json.loads(THEIRS.read_text())
    for mine, theirs in zip(written["nodes"], given["nodes"], strict=True):
        same = {key for key in theirs if mine[key] == theirs[key]}
        assert same == set(theirs) - ({"node_id", "jsNodeId"} if theirs["feature"] == -1 else set())
    renamed = {
        theirs["node_id"]: mine["node_id"] for mine, theirs in zip(written["nodes"], given["nodes"], strict=True)
    }
    assert written["links"] == [
        {**link, "source": renamed[link["source"]], "target": renamed[link["target"]]} for link in given["links"]
    ]
    assert written["qParams"] == given["qParams"]
    assert {key: written["metadata"][key] for key in given["metadata"]} == given["metadata"]


def test_the_file_is_the_golden_one(tmp_path):
    written = write_feature_graph_json(small(), tmp_path / "g.json", slug="golden", node_share=1, edge_share=1)
    assert json.loads(written.read_text()) == json.loads(OURS.read_text())


def test_a_graph_comes_back(tmp_path):
    graph = small()
    path = write_feature_graph_json(graph, tmp_path / "g.json", slug="g", node_share=1, edge_share=1)
    found = read_feature_graph_json(path)
    assert torch.equal(found.nodes.key, graph.nodes.key)
    for name in ("activation", "influence", "probability"):
        assert torch.equal(getattr(found.nodes, name).nan_to_num(-1), getattr(graph.nodes, name).nan_to_num(-1))
    assert found.nodes.label == graph.nodes.label
    assert torch.equal(found.weight, graph.weight.double())
    assert torch.equal(found.matrix().to_dense(), graph.matrix().to_dense().double())
    assert found.columns["head"].tolist() == graph.columns["head"].tolist()
    assert (found.meta, found.tokens) == (dict(graph.meta), graph.tokens)
    again = write_feature_graph_json(found, tmp_path / "h.json", slug="g", node_share=1, edge_share=1)
    assert json.loads(again.read_text())["links"] == json.loads(path.read_text())["links"]


def test_what_viewers_need_is_there(tmp_path):
    """Neuronpedia's schema; its viewer reads the probability out of the label of a logit, and takes nodes by unique id."""
    record = json.loads(
        write_feature_graph_json(small(), tmp_path / "g.json", slug="g", source_set="toy-16k").read_text()
    )
    assert {"metadata", "qParams", "nodes", "links"} == set(record)
    assert {"slug", "scan", "prompt_tokens", "prompt"} <= set(record["metadata"])
    assert record["metadata"]["feature_details"] == {"neuronpedia_source_set": "toy-16k"}
    assert record["metadata"]["pruning_settings"] == {"node_threshold": 0.8, "edge_threshold": 0.98}
    assert record["metadata"]["generation_settings"] == {
        "max_n_logits": 10,
        "desired_logit_prob": 0.95,
        "max_feature_nodes": 100,
    }
    ids = [node["node_id"] for node in record["nodes"]]
    assert len(set(ids)) == len(ids)
    for node in record["nodes"]:
        assert {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"} <= set(node)
        assert isinstance(node["layer"], str)
        assert isinstance(node["feature"], int)
        if node["feature_type"] == "logit":
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(node["token_prob"], abs=1e-3)
    assert sum(node["is_target_logit"] for node in record["nodes"]) == 1
    assert all(link["source"] in ids and link["target"] in ids for link in record["links"])


def test_influence_is_cumulative_and_of_the_whole_graph(tmp_path):
    """A viewer hides nodes above its threshold: those that pruning to it keeps must lie below, but for tokens and logits."""
    graph = small()
    record = json.loads(write_feature_graph_json(graph, tmp_path / "g.json", slug="g", node_share=0.5).read_text())
    shown = {
        node["node_id"]: node["influence"]
        for node in record["nodes"]
        if "feature" in node["jsNodeId"] or node["activation"]
    }
    whole = json.loads(
        write_feature_graph_json(graph, tmp_path / "w.json", slug="g", node_share=1, edge_share=1).read_text()
    )
    for node in whole["nodes"]:
        if node["node_id"] in shown:
            assert shown[node["node_id"]] == node["influence"]
    ordered = sorted(
        (node for node in whole["nodes"] if node["influence"] is not None), key=lambda node: -node["carried"]
    )
    values = [node["influence"] for node in ordered]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1)
    carried = [node["carried"] for node in ordered]
    assert values[0] == pytest.approx(carried[0] / sum(carried))


def test_a_pruned_graph_is_not_pruned_again(tmp_path):
    graph = pruned(small(), 0.7, 0.9)
    record = json.loads(write_feature_graph_json(graph, tmp_path / "g.json", slug="g", node_share=0.1).read_text())
    assert len(record["nodes"]) == len(graph.nodes)
    assert record["metadata"]["node_threshold"] == 0.7
    assert max(node["influence"] or 0 for node in record["nodes"]) == pytest.approx(0.7)


def test_what_cannot_be_uploaded_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"Lower node_share \(now 0.8\) or edge_share \(now 0.98\)"):
        write_feature_graph_json(small(), tmp_path / "g.json", slug="g", limit_bytes=2000)
    with pytest.raises(WorkbenchError, match="a slug is"):
        write_feature_graph_json(small(), tmp_path / "g.json", slug="a b")
    with pytest.raises(WorkbenchError, match="cannot write"):
        write_feature_graph_json(small(), tmp_path / "none" / "g.json", slug="g")
    assert not list(tmp_path.iterdir())


@given(st.integers(0, 200), st.integers(0, 2**20))
def test_pairs_are_numbered_without_loss(layer, index):
    assert uncantor(cantor(layer, index)) == (layer, index)


def test_pairs_are_numbered_along_diagonals():
    assert [cantor(*pair) for pair in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))] == [0, 1, 2, 3, 4, 5]


def test_old_identifiers_are_read_from_the_number(tmp_path):
    record = json.loads(THEIRS.read_text())
    old = {node["node_id"]: f"n{i}" for i, node in enumerate(record["nodes"])}
    for node in record["nodes"]:
        node["node_id"] = old[node["node_id"]]
    for link in record["links"]:
        link["source"], link["target"] = old[link["source"]], old[link["target"]]
    (tmp_path / "g.json").write_text(json.dumps(record))
    assert read_feature_graph_json(tmp_path / "g.json").nodes.feature.tolist() == [0, 1, 5, 7, -1, 42, 43]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("links"), "it has no links"),
        (lambda r: r["metadata"].pop("scan"), "metadata.scan is no text"),
        (lambda r: r["metadata"].update(prompt_tokens=[1]), "prompt_tokens is no list of texts"),
        (lambda r: r["nodes"][0].pop("clerp"), "a node has no clerp"),
        (lambda r: r["nodes"][0].update(ctx_idx="0"), "a node has no ctx_idx"),
        (lambda r: r["nodes"].append(dict(r["nodes"][0])), "node_id is not unique"),
        (lambda r: r["links"][0].update(target="9_9_9"), "links to '9_9_9'"),
        (lambda r: r["links"][0].update(weight=None), "a link has no weight"),
        (lambda r: r["links"][0].update(weight=math.nan), "a link has no weight"),
        (lambda r: r["nodes"][2].update(feature_type="unexplored"), "of type 'unexplored'"),
        (lambda r: r["nodes"][2].update(feature_type="mlp"), "read_graph_json reads graphs of heads"),
        (lambda r: r["nodes"][2].update(layer="L0"), "'L0', which is no number"),
        (lambda r: r["nodes"][1].update(ctx_idx=5), "there are 2 tokens"),
        (lambda r: r["links"].append({"source": "3_42_1", "target": "0_5_1", "weight": 1.0}), "leads back"),
        (
            lambda r: r["nodes"][2].update(node_id="x", feature=None) or r["links"].clear(),
            "does not tell which feature",
        ),
    ],
)
def test_damaged_records_give_one_error(tmp_path, change, message):
    record = json.loads(THEIRS.read_text())
    change(record)
    (tmp_path / "g.json").write_text(json.dumps(record))
    with pytest.raises(WorkbenchError, match=message):
        read_feature_graph_json(tmp_path / "g.json")


def test_files_that_are_no_graph(tmp_path):
    with pytest.raises(WorkbenchError, match="no file"):
        read_feature_graph_json(tmp_path / "g.json")
    (tmp_path / "g.json").write_text("{")
    with pytest.raises(WorkbenchError, match="is not JSON"):
        read_feature_graph_json(tmp_path / "g.json")
    (tmp_path / "g.json").write_text("[]")
    with pytest.raises(WorkbenchError, match="it has no metadata"):
        read_feature_graph_json(tmp_path / "g.json")
    with pytest.raises(Refused, match="is a pickle"):
        read_feature_graph_json(tmp_path / "g.pt")
