"""Circuits in other tools' files, against files kept beside the tests and what those tools demand of them."""

import json
from pathlib import Path

import pytest
import torch

from workbench.circuits import Circuit, circuit_graph
from workbench.errors import Refused, WorkbenchError
from workbench.interchange import (
    MIB_FRACTIONS,
    read_eap_json,
    read_graph_json,
    write_eap_json,
    write_graph_json,
    write_mib,
)

GOLDEN = Path(__file__).parent / "golden"
REQUIRED_NODE = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}


def numbered(graph, keep=4, places=()):
    """Scores 0, -1, 2, -3 ... in the order of the edges."""
    names = [f"{name}@{place}" for name in graph.edges for place in places] if places else graph.edges
    scores = torch.tensor([i * (-1.0) ** i for i in range(len(names))])
    circuit = Circuit("edge", names, scores, torch.zeros(len(names), dtype=torch.bool), {"model": "toy", "width": 8})
    return circuit.top(keep)


def test_eap_graph_is_the_golden_one(tmp_path):
    written = write_eap_json(numbered(circuit_graph(1, 2)), tmp_path / "g.json")
    assert json.loads(written.read_text()) == json.loads((GOLDEN / "eap_graph.json").read_text())


def test_eap_graph_comes_back(tmp_path):
    circuit = numbered(circuit_graph(2, 3))
    found = read_eap_json(write_eap_json(circuit, tmp_path / "g.json", width=5))
    assert found.names == circuit.names
    assert torch.equal(found.scores, circuit.scores)
    assert torch.equal(found.kept, circuit.kept)
    assert found.provenance["width"] == 5


def test_eap_graph_without_mlps_or_scores_is_read(tmp_path):
    record = json.loads(write_eap_json(numbered(circuit_graph(2, 2, mlp=False)), tmp_path / "g.json").read_text())
    for edge in record["edges"].values():
        del edge["score"]
    (tmp_path / "g.json").write_text(json.dumps(record))
    found = read_eap_json(tmp_path / "g.json")
    assert len(found) == 4
    assert not found.scores.any()


def test_eap_refusals(tmp_path):
    grouped = circuit_graph(2, 4, 2)
    with pytest.raises(Refused, match="one key-value head per query head"):
        write_eap_json(Circuit.of("edge", grouped.edges, []), tmp_path / "x.json", 16)
    with pytest.raises(Refused, match="over_positions"):
        write_eap_json(numbered(circuit_graph(1, 2), places=("A", "B")), tmp_path / "x.json")
    with pytest.raises(Refused, match="level='edge'"):
        write_eap_json(Circuit.of("node", ["a0.h0"], []), tmp_path / "x.json", 16)
    with pytest.raises(WorkbenchError, match="width="):
        write_eap_json(Circuit.of("edge", circuit_graph(1, 2).edges, []), tmp_path / "x.json")
    (tmp_path / "g.pt").write_bytes(b"")
    with pytest.raises(Refused, match="pickle"):
        read_eap_json(tmp_path / "g.pt")
    with pytest.raises(WorkbenchError, match="no file"):
        read_eap_json(tmp_path / "none.json")
    for text, message in (("{", "not JSON"), ("[]", "holds a list"), ("{}", "cfg, edges, nodes")):
        (tmp_path / "g.json").write_text(text)
        with pytest.raises(WorkbenchError, match=message):
            read_eap_json(tmp_path / "g.json")
    record = json.loads((GOLDEN / "eap_graph.json").read_text())
    (tmp_path / "g.json").write_text(json.dumps({**record, "edges": {**record["edges"], "m9->logits": {}}}))
    with pytest.raises(WorkbenchError, match="'m9->logits'"):
        read_eap_json(tmp_path / "g.json")
    (tmp_path / "g.json").write_text(json.dumps({**record, "cfg": {**record["cfg"], "parallel_attn_mlp": True}}))
    with pytest.raises(Refused, match="parallel"):
        read_eap_json(tmp_path / "g.json")


def test_mib_submission_of_importances(tmp_path):
    circuits = {
        ("ioi", "gpt2"): numbered(circuit_graph(1, 2)),
        ("arithmetic_addition", "llama3"): numbered(circuit_graph(2, 2)),
    }
    folder = write_mib(circuits, tmp_path / "submission")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json")) == [
        "arithmetic-addition_llama3/importances.json",
        "ioi_gpt2/importances.json",
    ]
    assert read_eap_json(folder / "ioi_gpt2" / "importances.json").names == circuit_graph(1, 2).edges


def test_mib_submission_of_nine_circuits(tmp_path):
    circuit = numbered(circuit_graph(3, 4))
    folder = write_mib({("ioi", "interpbench"): circuit}, tmp_path / "submission", kept=True) / "ioi_interpbench"
    sizes = {path.stem: len(read_eap_json(path)) for path in folder.iterdir()}
    n = len(circuit.names)
    assert sizes == {f"{100 * f:g}": int(f * n) for f in MIB_FRACTIONS}
    assert set(sizes) == {"0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50"}
    half = read_eap_json(folder / "50.json")
    assert torch.equal(half.kept, circuit.top(int(0.5 * n)).kept)
    with pytest.raises(WorkbenchError, match="at least one"):
        write_mib({}, tmp_path / "other")


def test_attribution_graph_is_the_golden_one(tmp_path):
    circuit = numbered(circuit_graph(1, 2), places=("0", "1", "2"))
    written = write_graph_json(circuit, tmp_path / "g.json", slug="toy-graph", tokens=["a", " b", " c"], answer="d")
    record = json.loads(written.read_text())
    assert record == json.loads((GOLDEN / "attribution_graph.json").read_text())
    assert {"slug", "scan", "prompt_tokens", "prompt"} <= set(record["metadata"])
    assert set(record["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    ids = [node["node_id"] for node in record["nodes"]]
    assert len(set(ids)) == len(ids)
    assert all(set(node) >= REQUIRED_NODE for node in record["nodes"])
    assert {end for link in record["links"] for end in (link["source"], link["target"])} == set(ids)


@pytest.mark.parametrize("places", [(), ("0", "1"), ("END", "S2")])
@pytest.mark.parametrize("graph", [circuit_graph(2, 2), circuit_graph(2, 4, 2)])
def test_attribution_graph_comes_back(tmp_path, places, graph):
    circuit = numbered(graph, 9, places)
    found = read_graph_json(write_graph_json(circuit, tmp_path / "g.json", slug="g"))
    rows = zip(circuit.names, circuit.kept.tolist(), circuit.scores.tolist(), strict=True)
    kept = {name: score for name, keep, score in rows if keep}
    assert dict(zip(found.names, found.scores.tolist(), strict=True)) == kept
    assert found.kept.all()


def test_attribution_graph_refusals(tmp_path):
    circuit = numbered(circuit_graph(1, 2), places=("0", "5"))
    with pytest.raises(WorkbenchError, match="there are 2 tokens"):
        write_graph_json(circuit, tmp_path / "g.json", slug="g", tokens=["a", "b"])
    with pytest.raises(WorkbenchError, match="are spans"):
        write_graph_json(numbered(circuit_graph(1, 2), places=("S1",)), tmp_path / "g.json", slug="g", tokens=["a"])
    with pytest.raises(WorkbenchError, match="slug"):
        write_graph_json(circuit, tmp_path / "g.json", slug="a b/c")
    with pytest.raises(Refused, match="level='edge'"):
        write_graph_json(Circuit.of("node", ["a0.h0"], []), tmp_path / "g.json", slug="g")
    record = json.loads((GOLDEN / "attribution_graph.json").read_text())
    record["nodes"][0]["feature_type"] = "cross layer transcoder"
    (tmp_path / "g.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match="cross layer transcoder"):
        read_graph_json(tmp_path / "g.json")
    record = json.loads((GOLDEN / "attribution_graph.json").read_text())
    record["links"][0]["source"] = "7_7_7"
    (tmp_path / "g.json").write_text(json.dumps(record))
    with pytest.raises(WorkbenchError, match="7_7_7"):
        read_graph_json(tmp_path / "g.json")
