"""The page of attribution graphs, and the files that people bring along."""

from __future__ import annotations

import json

import pytest
import torch
from pages import drawn, open_page, python_of, settled

import workbench as wb
from workbench.apps.work_attribution import (
    drawable,
    file_of,
    graph_of,
    known_node,
    models_with_transcoders,
    paths_table,
    read_file,
    reduced,
    store_file,
    stored_files,
)
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.feature_graph import FeatureGraph, FeatureNodes


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One results folder: what one test had computed the next one finds."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def graph():
    return graph_of(wb.load("tiny-softmax"), "tiny-softmax", "Ruth gave a snack to", max_features=64)


def names(data) -> set[str]:
    return {node["id"] for node in data["nodes"]}


def test_a_prompt_is_explained(store):
    page = open_page("attribution", store)
    assert page.title[0].value == "Attribution graph"
    data = drawn(page, "attribution graph")
    assert data["columns"][1:3] == ["Later", "Adam"]
    assert any(node["kind"] == "logit" and node["label"] == "Adam" for node in data["nodes"])
    assert {"feature", "error", "embedding", "logit"} == {node["kind"] for node in data["nodes"]}
    assert any("replacement" in one.value for one in page.markdown)
    paths = page.dataframe[-1].value
    assert paths["share"].is_monotonic_decreasing
    assert "logit 'Adam'" in paths["path"][0]
    found: dict = {}
    exec(python_of(page)[0], found)
    assert {found["small"].name(i) for i in range(len(found["small"].nodes))} == names(data)


def test_pruning_on_the_server_leaves_less(store):
    page = open_page("attribution", store, nodes="0.5")
    few = names(drawn(page, "attribution graph"))
    page.slider(key="nodes").set_value(0.8)
    more = names(drawn(settled(page.run()), "attribution graph"))
    assert few < more


def test_the_node_in_focus_has_links_both_ways(store):
    page = open_page("attribution", store)
    node = next(one["id"] for one in drawn(page, "attribution graph")["nodes"] if one["kind"] == "feature")
    page = open_page("attribution", store, node=node)
    assert drawn(page, "attribution graph")["selected"] == node
    tables = [one.value for one in page.dataframe if list(one.value.columns) == ["name", "weight"]]
    assert len(tables) == 2
    (link,) = [one.proto for one in page.get("page_link") if one.proto.label == "What this feature stands for"]
    assert "coder=tiny-softmax" in link.query_string
    assert f"feature={node.split()[2]}" in link.query_string


def test_surroundings_and_pinned_nodes(store):
    page = open_page("attribution", store)
    whole = names(drawn(page, "attribution graph"))
    node = next(one["id"] for one in drawn(page, "attribution graph")["nodes"] if one["kind"] == "feature")
    page = open_page("attribution", store, node=node, part="around", top="2")
    around = names(drawn(page, "attribution graph"))
    assert node in around
    assert around < whole
    (pin,) = [one for one in page.button if one.label == "Pin"]
    page = settled(pin.click().run())
    assert page.query_params["pins"] == node
    page = open_page("attribution", store, part="pinned", pins=node)
    assert names(drawn(page, "attribution graph")) == {node}
    page = open_page("attribution", store, part="pinned")
    assert any("Pin nodes first" in one.value for one in page.info)


def test_two_tokens_and_what_is_no_token(store):
    page = open_page("attribution", store, token="Adam", against="Ruth")
    assert any(node["label"] == "Adam - Ruth" for node in drawn(page, "attribution graph")["nodes"])
    page = open_page("attribution", store, against="Ruth")
    assert any("compared with a first one" in one.value for one in page.error)
    page = open_page("attribution", store, token="nonsuch")
    assert any("did not come to an end" in one.value for one in page.error)


def test_an_example_of_a_task(store):
    page = open_page("attribution", store, **{"from": "task", "task": "ioi", "seed": "3"})
    labels = [node["label"] for node in drawn(page, "attribution graph")["nodes"] if node["kind"] == "logit"]
    found: dict = {}
    exec(python_of(page)[0], found)
    assert labels == [found["small"].nodes.label[int(found["small"].logits[0])]]


def test_a_file_is_looked_at_by_its_link(store, graph):
    page = open_page("attribution", store, **{"from": "file"})
    assert any("Nothing was brought along" in one.value for one in page.info)
    key = store_file(store / "graphs", file_of(wb.pruned(graph), "a <b>name</b>"))
    page = open_page("attribution", store, **{"from": "file", "file": key})
    assert page.selectbox(key="file").options[0].startswith("<bos> Ruth gave a snack to, ")
    found: dict = {}
    exec(python_of(page)[0], found)
    assert names(drawn(page, "attribution graph")) == {found["small"].name(i) for i in range(len(found["small"].nodes))}


def test_what_stands_in_the_address_and_is_not_there_is_told(store):
    page = open_page("attribution", store, node="L9 feature 1 @ 0", nodes="7")
    told = " ".join(one.value for one in page.warning)
    assert "not in what is kept" in told
    assert "no nodes in the address '7'" in told


# Functions


def test_files_are_kept_once_and_only_if_they_can_be_read(tmp_path, graph):
    folder = tmp_path / "graphs"
    with pytest.raises(WorkbenchError, match="the file is not JSON"):
        store_file(folder, b"{")
    with pytest.raises(WorkbenchError, match="the file is not JSON"):
        store_file(folder, b"\xff\xfe\x00")
    with pytest.raises(WorkbenchError, match="no attribution graph"):
        store_file(folder, b"[]")
    assert stored_files(folder) == {}
    content = file_of(graph, "graph")
    assert store_file(folder, content) == store_file(folder, content)
    ((key, path),) = stored_files(folder).items()
    assert path == folder / f"{key}.json"
    assert [one.name for one in folder.iterdir()] == [path.name]


def test_a_written_graph_is_read_again(tmp_path, graph):
    small = wb.pruned(graph)
    path = tmp_path / "graph.json"
    path.write_bytes(file_of(small, "my graph"))
    back = read_file(path)
    assert len(back.nodes) == len(small.nodes)
    assert torch.allclose(back.weight.double(), small.weight.double(), atol=1e-5)
    record = json.loads(path.read_text())
    assert record["metadata"]["slug"] == "my-graph"
    for node in record["nodes"]:
        node.pop("carried", None)
    path.write_text(json.dumps(record))
    assert bool(read_file(path).nodes.influence.isfinite().all()), "influence that the file has not is computed"


def test_of_large_graphs_the_strongest_nodes_are_drawn(graph):
    weakest = graph.name(int(graph.nodes.influence.argmin()))
    small = drawable(graph, (weakest,), most=20)
    kept = {small.name(i) for i in range(len(small.nodes))}
    assert len(kept) == 20
    assert weakest in kept
    assert {graph.name(int(i)) for i in graph.logits} <= kept
    assert graph.name(int(graph.nodes.influence.argmax())) in kept
    assert drawable(graph, most=10**6) is graph


def test_a_graph_without_logits_stays_whole():
    nodes = FeatureNodes.of(["embedding", "feature"], [-1, 0], [0, 0], [1, 2])
    bare = FeatureGraph(nodes, torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]), ("a",))
    assert reduced(bare, 0.5, 0.5) is bare
    assert known_node(bare, "L0 feature 2 @ 0")
    assert not known_node(bare, "L0 feature 3 @ 0")
    assert not known_node(bare, "<script>")


def test_paths_and_what_is_refused(graph):
    table = paths_table(wb.pruned(graph), 3)
    assert list(table.columns) == ["share", "raises", "path"]
    assert len(table) == 3
    model = wb.load("tiny-softmax")
    assert models_with_transcoders() == ["tiny-softmax"]
    with pytest.raises(WorkbenchError, match="empty"):
        graph_of(model, "tiny-softmax", "  ")
    with pytest.raises(Refused, match=r"at most 1,024"):
        graph_of(model, "tiny-softmax", "the " * 1100)
    with pytest.raises(UnknownName):
        graph_of(model, "compiled-ioi", "the cat")
