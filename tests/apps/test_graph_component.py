"""The graph component: where things stand, what is drawn, and that it can be used in a real browser."""

from __future__ import annotations

import json

import pytest
import torch

import workbench as wb
from workbench.apps.components.graph import BESIDE, GRAPH, attribution_data, circuit_data
from workbench.circuits import Circuit
from workbench.errors import WorkbenchError
from workbench.feature_graph import FeatureGraph, FeatureNodes

EDGES = ("input->a0.h0<q>", "input->a0.h1<v>", "input->m0", "a0.h0->m0", "a0.h1->logits", "m0->logits")


def edges(scores=(3.0, -2.0, 0.5, 0.25, 1.0, -4.0), keep=3) -> Circuit:
    names = EDGES
    return Circuit("edge", names, torch.tensor(scores), torch.ones(len(names), dtype=torch.bool)).top(keep)


def by(items, **wanted):
    (found,) = [item for item in items if all(item[name] == value for name, value in wanted.items())]
    return found


def test_layers_go_upwards_and_heads_to_the_right():
    data = circuit_data(edges())
    spots = {node["id"]: (node["column"], node["row"]) for node in data["nodes"]}
    assert spots["a0.h0"] == (1.0, 1.0)
    assert spots["a0.h1"] == (2.0, 1.0)
    assert spots["m0"] == (0.0, 1.5)
    assert spots["input"][1] == 0.0
    assert spots["logits"][1] == 2.0
    assert data["rows"] == ["input", "layer 0", "logits"]
    assert data["columns"] == ["MLP", "head 0", "head 1"]
    assert by(data["nodes"], id="a0.h0")["ports"] == "qkv"
    assert by(data["nodes"], id="m0")["ports"] == ""


def test_key_value_heads_stand_under_the_heads_that_read_them():
    graph = wb.circuit_graph(layers=2, heads=4, kv_heads=2, mlp=False)
    data = circuit_data(Circuit.of("edge", graph.edges, graph.edges))
    second = by(data["nodes"], id="a1.g1")
    assert second["column"] == 2.5
    assert 1.0 < second["row"] < by(data["nodes"], id="a1.h3")["row"] == 2.0
    assert second["ports"] == "kv"
    assert by(data["nodes"], id="a1.h3")["ports"] == "q"


def test_kept_edges_and_their_ends():
    data = circuit_data(edges(), threshold=2.0)
    assert {edge["score"] for edge in data["edges"] if edge["kept"]} == {3.0, -2.0, -4.0}
    assert {node["id"] for node in data["nodes"] if node["kept"]} == {"input", "a0.h0", "a0.h1", "m0", "logits"}
    assert not by(circuit_data(edges(keep=1))["nodes"], id="a0.h0")["kept"]
    assert data["threshold"] == 2.0
    assert data["left_out"] == 0
    json.dumps(data, allow_nan=False)


def test_the_known_circuit_is_drawn_whether_it_was_found_or_not():
    truth = Circuit.of("edge", EDGES, ["input->a0.h0<q>", "a0.h0->m0"])
    data = circuit_data(edges(keep=1), truth=truth, limit=1)
    missed = by(data["edges"], source="a0.h0", target="m0")
    assert (missed["truth"], missed["kept"]) == (True, False)
    assert by(data["edges"], source="m0")["truth"] is False
    assert [node["id"] for node in data["nodes"] if node["truth"]] == ["input", "a0.h0", "m0"]


def test_a_circuit_of_nodes_is_marked_by_a_truth_of_edges():
    nodes = Circuit(
        "node", ("a0.h0", "a0.h1", "m0"), torch.tensor([1.0, -2.0, 0.0]), torch.tensor([True, False, False])
    )
    truth = Circuit.of("edge", EDGES, ["input->a0.h1<v>", "a0.h1->logits"])
    data = circuit_data(nodes, truth=truth)
    assert data["edges"] == []
    assert data["rows"] == ["layer 0"]
    head = by(data["nodes"], id="a0.h1")
    assert (head["truth"], head["kept"], head["score"], head["row"]) == (True, False, -2.0, 0.0)


def test_of_many_edges_the_strongest_are_drawn_and_the_rest_is_counted():
    graph = wb.circuit_graph(layers=4, heads=4)
    scores = torch.arange(1.0, graph.n_edges + 1)
    circuit = Circuit("edge", graph.edges, scores, torch.ones(graph.n_edges, dtype=torch.bool))
    data = circuit_data(circuit.top(100), limit=60)
    drawn = [edge["score"] for edge in data["edges"]]
    assert sorted(drawn) == list(scores[-60:].tolist())
    assert data["left_out"] == 40
    beside = circuit_data(circuit.top(10), limit=60)
    assert len(beside["edges"]) == 10 + BESIDE
    with pytest.raises(WorkbenchError, match="from 1"):
        circuit_data(circuit, limit=0)


def test_two_circuits_over_each_other():
    other = edges(scores=(3.0, 0.0, 0.0, 9.0, 8.0, 0.0), keep=3)
    data = circuit_data(edges(), other=other)
    groups = {(edge["source"], edge["target"]): edge["group"] for edge in data["edges"]}
    assert groups["input", "a0.h0"] == 2
    assert groups["m0", "logits"] == 0
    assert groups["a0.h0", "m0"] == 1
    assert len(data["groups"]) == 3
    with pytest.raises(WorkbenchError, match="laid over"):
        circuit_data(edges(), other=Circuit.of("node", ["m0"], ["m0"]))


def test_what_is_selected_is_a_node_or_an_edge():
    assert circuit_data(edges(), selected="m0")["selected"] == "m0"
    assert circuit_data(edges(), selected="input->a0.h0<q>")["selected"] == {
        "source": "input", "target": "a0.h0", "channel": "q",
    }  # fmt: skip
    assert circuit_data(edges(), selected="nothing")["selected"] is None


def test_names_that_are_no_parts_are_refused():
    with pytest.raises(WorkbenchError, match="no node of a circuit"):
        circuit_data(Circuit.of("node", ["a0.h0", "something"], []))


def prompt_graph(many: int = 1) -> FeatureGraph:
    kinds = ["embedding", "embedding", *["feature"] * many, "error", "logit"]
    layers = [-1, -1, *[0] * many, 0, 1]
    positions = [0, 1, *[1] * many, 1, 1]
    features = [5, 6, *range(many), -1, 9]
    influence = [0.5, float("nan"), *[0.1] * many, 0.2, 0.0]
    nodes = FeatureNodes.of(
        kinds, layers, positions, features, influence=influence, label=["The", "cat", *[""] * many, "", "sat"]
    )
    last = len(kinds) - 1
    source = [0, 1, *range(2, 2 + many)]
    target = [2, 2, *[last] * many]
    weights = torch.linspace(-2.0, 1.0, len(source))
    return FeatureGraph(nodes, torch.tensor(source), torch.tensor(target), weights, ("The", "cat"))


def test_tokens_are_columns_and_layers_are_rows():
    data = attribution_data(prompt_graph(), selected="L0 feature 0 @ 1", pinned=["logit 9 @ 1"])
    feature = by(data["nodes"], id="L0 feature 0 @ 1")
    assert data["columns"] == ["The", "cat"]
    assert data["rows"] == ["tokens", "layer 0", "logits"]
    assert feature["row"] == 1.0
    assert abs(feature["column"] - data["spots"][1]) < 0.5
    assert by(data["nodes"], id="logit 9 @ 1")["row"] == 2.0
    assert by(data["nodes"], id="logit 9 @ 1")["truth"]
    assert by(data["nodes"], id="embedding 6 @ 1")["score"] is None
    assert data["selected"] == "L0 feature 0 @ 1"
    json.dumps(data, allow_nan=False)


def test_nodes_of_one_token_and_layer_do_not_lie_on_each_other():
    data = attribution_data(prompt_graph(many=11))
    spots = [(round(node["column"], 3), round(node["row"], 3)) for node in data["nodes"]]
    assert len(set(spots)) == len(spots)
    assert all(abs(node["row"] - 1) < 0.5 for node in data["nodes"] if node["kind"] in ("feature", "error"))
    assert data["spots"][1] - data["spots"][0] > 1.0


def test_the_strongest_lines_of_a_prompt_are_drawn():
    data = attribution_data(prompt_graph(many=5), limit=2)
    assert [edge["score"] for edge in data["edges"]] == sorted(
        (e["score"] for e in data["edges"]), key=abs, reverse=True
    )
    assert len(data["edges"]) == 2
    assert data["left_out"] == 5
    empty = FeatureGraph(FeatureNodes.of([], [], [], []), torch.zeros(0), torch.zeros(0), torch.zeros(0))
    with pytest.raises(WorkbenchError, match="no nodes"):
        attribution_data(empty)


# In a browser


def test_clicks_tell_node_and_edge(shown, browser_page):
    truth = Circuit.of("edge", EDGES, ["a0.h0->m0", "input->a0.h0<q>"])
    graph = shown(GRAPH, circuit_data(edges(), truth=truth, title="<img src=x onerror=alert(1)>"))
    page = browser_page
    assert page.locator("svg.graph .node").count() == 5
    assert page.locator("h4").inner_text() == "<img src=x onerror=alert(1)>"
    assert page.locator("img").count() == 0
    page.locator('[data-item="n a0.h1"]').click()
    page.locator('[data-item="e m0->logits<in>"] .hit').dispatch_event("click")
    assert graph.events == [("node", "a0.h1"), ("edge", {"source": "m0", "target": "logits", "channel": "in"})]


def test_sign_is_told_by_colour_and_dashes_and_strength_by_width(shown, browser_page):
    shown(GRAPH, circuit_data(edges()))

    def line(name, what):
        return browser_page.locator(f'[data-item="e {name}"] path:not(.hit)').first.get_attribute(what)

    plus, minus, weak = "input->a0.h0<q>", "m0->logits<in>", "input->a0.h1<v>"
    assert line(minus, "stroke-dasharray")
    assert line(plus, "stroke-dasharray") is None
    assert line(minus, "stroke") != line(plus, "stroke")
    widths = [float(line(name, "stroke-width")) for name in (minus, plus, weak)]
    assert widths[0] > widths[1] > widths[2]
    assert "faint" in (line("a0.h0->m0<in>", "class") or "")
    assert line(plus, "class") is None


def test_what_is_missed_of_the_known_circuit_is_dotted(shown, browser_page):
    truth = Circuit.of("edge", EDGES, ["a0.h0->m0", "input->a0.h0<q>"])
    shown(GRAPH, circuit_data(edges(), truth=truth))
    missed, found = (browser_page.locator(f'[data-item="e {name}"]') for name in ("a0.h0->m0<in>", "input->a0.h0<q>"))
    assert missed.locator("path:not(.hit)").get_attribute("stroke-dasharray") == "1 6"
    assert missed.locator("polygon").count() == found.locator("polygon").count() == 1
    assert found.locator("path:not(.hit)").count() == 2
    assert "in the known circuit, not kept" in browser_page.locator(".keys").inner_text()
    assert browser_page.locator('[data-item="n a0.h1"] rect').count() == 1
    assert browser_page.locator('[data-item="n a0.h0"] rect').count() == 2


def test_it_is_used_with_the_keyboard(shown, browser_page):
    graph = shown(GRAPH, circuit_data(edges(), selected="input"))
    page = browser_page
    page.locator("svg.graph").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator(".status").inner_text().startswith("head 0 of layer 0")
    page.keyboard.press("ArrowRight")
    assert page.locator(".status").inner_text().startswith("head 1 of layer 0")
    page.keyboard.press("Shift+ArrowRight")
    assert page.locator(".status").inner_text().startswith("input → value input of head 1 of layer 0 · −2 · kept")
    page.keyboard.press("Enter")
    assert graph.events == [("edge", {"source": "input", "target": "a0.h1", "channel": "v"})]
    before = page.locator("svg.graph").get_attribute("viewBox")
    page.keyboard.press("+")
    assert page.locator("svg.graph").get_attribute("viewBox") != before
    page.keyboard.press("0")
    assert page.locator("svg.graph").get_attribute("viewBox") == before
    assert page.locator(".cursor").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".cursor").count() == 0


def test_the_pointer_tells_and_moves(shown, browser_page):
    graph = shown(GRAPH, attribution_data(prompt_graph(), title="a prompt"))
    page = browser_page
    page.locator('[data-item="n L0 feature 0 @ 1"]').hover()
    assert page.locator(".tip").is_visible()
    assert "L0 feature 0 at 1 'cat'" in page.locator(".tip").inner_text()
    assert page.locator(".edge.hot").count() == 3
    before = page.locator("svg.graph").get_attribute("viewBox")
    box = page.locator("svg.graph").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    assert page.locator(".tip").is_hidden()
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 90, steps=4)
    page.mouse.up()
    assert page.locator("svg.graph").get_attribute("viewBox") != before
    assert graph.events == []


def test_new_data_keeps_focus_view_and_place(shown, browser_page):
    graph = shown(GRAPH, circuit_data(edges()))
    graph.live(circuit_data(edges(), selected="m0"))
    page = browser_page
    page.locator("svg.graph").focus()
    page.keyboard.press("+")
    view = page.locator("svg.graph").get_attribute("viewBox")
    faint = page.locator("path.faint").count()
    graph.update(circuit_data(edges(keep=1), selected="m0"))
    assert page.locator("path.faint").count() == faint + 2
    assert page.locator("svg.graph").get_attribute("viewBox") == view
    assert page.locator(".cursor").count() == 1
    graph.update(attribution_data(prompt_graph()))
    assert page.locator("svg.graph").get_attribute("viewBox") != view
    assert page.locator(".cursor").count() == 0


def test_dark_and_light_pages_have_their_own_colours(shown, browser_page):
    shown(GRAPH, circuit_data(edges()))
    line = browser_page.locator('[data-item="e m0->logits<in>"] path:not(.hit)')
    light = line.get_attribute("stroke")
    browser_page.emulate_media(color_scheme="dark")
    browser_page.wait_for_timeout(200)
    assert line.get_attribute("stroke") != light
