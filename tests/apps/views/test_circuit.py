"""The page of circuits, and what it has computed."""

from __future__ import annotations

import math

import pytest
import torch
from pages import drawn, open_page, python_of, settled

import workbench as wb
from workbench.apps.screen.circuit_view import OWN, Asked, head_of, options_of, reduced
from workbench.apps.work_circuit import (
    beside,
    chosen_parts,
    faithfulness_of,
    fitting_models,
    fitting_tasks,
    known_circuit,
    sizes,
    taken_away,
    task_of,
)
from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.results import load_result

ASKED = Asked("compiled-ioi", "ioi", "eap-ig", "edge", "counterfactual", 16, 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One results folder: what one test had computed the next one finds."""
    return tmp_path_factory.mktemp("store")


def said(page) -> str:
    return " ".join(one.value for one in page.markdown)


def test_the_known_circuit_is_found_and_counted(store):
    page = open_page("circuit", store)
    assert page.title[0].value == "Circuit"
    assert page.selectbox(key="model").value == "compiled-ioi"
    assert page.selectbox(key="task").options == ["ioi"]
    assert len(page.selectbox(key="method").options) == len(wb.methods()) == 17
    assert "**8** of 211 edges kept" in said(page)
    assert "**8 of 8** parts of the known circuit" in said(page)
    assert "AUROC **1.000**" in said(page)
    graph = drawn(page, "circuit graph")
    assert sum(edge["truth"] and edge["kept"] for edge in graph["edges"]) == 8
    table = page.dataframe[-1].value
    assert table["known"].sum() == 8
    assert list(table["score"].abs()) == sorted(table["score"].abs(), reverse=True)


def test_the_threshold_keeps_fewer(store):
    page = open_page("circuit", store, keep="3")
    assert "**3** of 211 edges kept" in said(page)
    assert "|score| ≥" in page.select_slider(key="keep").options[0]
    assert sum(edge["kept"] for edge in drawn(page, "circuit graph")["edges"]) == 3
    page.select_slider(key="keep").set_value(24)
    page = settled(page.run())
    assert page.query_params["keep"] == "24"
    assert sum(edge["kept"] for edge in drawn(page, "circuit graph")["edges"]) == 24


def test_the_code_finds_the_same_circuit(store):
    page = open_page("circuit", store, keep="5")
    names: dict = {}
    exec(python_of(page)[0], names)
    shown = page.dataframe[-1].value
    assert set(names["circuit"].frame().query("kept")["source"]) == set(shown[shown["kept"]]["source"])
    assert len(names["circuit"]) == 5


def test_a_line_shows_the_map_of_the_head_that_it_leads_into(store):
    page = open_page("circuit", store, part="a1.h2->a2.h0<q>")
    assert "a1" in page.subheader[0].value
    assert any("in the known circuit" in one.value for one in page.text)
    assert drawn(page, "circuit graph")["selected"] == {"source": "a1.h2", "target": "a2.h0", "channel": "q"}
    assert drawn(page, "circuit map")["title"].startswith("layer 2, head 0")
    (link,) = [one for one in page.get("page_link") if "closely" in one.proto.label]
    assert "layer=2" in link.proto.query_string
    assert "head=0" in link.proto.query_string


def test_what_stands_in_the_address_and_is_not_there_is_told(store):
    page = open_page("circuit", store, part="a9.h9", method="guess", keep="100000")
    told = " ".join(one.value for one in page.warning)
    assert "no method in the address 'guess'" in told
    assert "a9" in told
    assert "not in this circuit" in told


def test_faithfulness_with_random_controls(store):
    page = open_page("circuit", store, below="faithfulness")
    code = python_of(page)[-1]
    names: dict = {}
    exec(code, names)
    frame = page.dataframe[-1].value
    assert torch.allclose(torch.tensor(frame["faithfulness"].to_numpy()), names["curve"].faithfulness)
    assert {"random", "random_low", "random_high"} <= set(frame.columns)


def test_parts_are_taken_away_and_the_model_runs_again(store):
    page = open_page("circuit", store, below="without")
    before, after, nothing = page.dataframe[-2].value.to_dict("records")
    assert before["accuracy"] == 1.0
    assert after["metric"] == pytest.approx(before["metric"], rel=0.01)
    assert after["replaced"] == 211 - 8
    page.radio(key="without").set_value("circuit")
    page = settled(page.run())
    gone = page.dataframe[-2].value.to_dict("records")[1]
    assert gone["metric"] == pytest.approx(nothing["metric"], abs=0.01)
    page.radio(key="without").set_value("part")
    assert any("Click a head" in one.value for one in settled(page.run()).info)
    page = open_page("circuit", store, below="without", without="some", parts="a2.h0,a3.h1")
    names: dict = {}
    exec(python_of(page)[-1], names)
    assert page.dataframe[-2].value.to_dict("records") == names["table"].to_dict("records")
    assert names["table"]["replaced"][1] == sum(
        name.startswith(("a2.h0->", "a3.h1->")) for name in names["circuit"].names
    )


def test_two_methods_are_compared(store):
    page = open_page("circuit", store, below="methods", method="eap-ig", method2="eap", keep="8")
    groups = [edge["group"] for edge in drawn(page, "circuit graph")["edges"]]
    values = {one.label: one.value for one in page.metric}
    assert groups.count(2) == int(values["in both"])
    assert int(values["in both"]) + int(values["only by eap-ig"]) == 8
    assert int(values["in both"]) + int(values["only by eap"]) == 8
    names: dict = {}
    exec(python_of(page)[-1], names)
    kept = names["both"].frame()["kept"].value_counts()
    assert kept["in both"] == int(values["in both"])
    assert "acdc" in page.selectbox(key="method2").options
    assert "atp" not in page.selectbox(key="method2").options, "it scores no edges"


def test_a_model_without_a_known_circuit_offers_what_it_can_read(store):
    page = open_page("circuit", store, model="tiny-softmax", level="node", method="atp")
    tasks = page.selectbox(key="task").options
    assert any(name.startswith("ioi") and "% right" in name for name in tasks)
    assert not any(name.startswith("dyck") for name in tasks)
    assert "no circuit of this model is known" in said(page)


def test_options_that_the_method_does_not_have_are_told(store):
    page = open_page("circuit", store, method="eap-ig", options="tau=3")
    assert any("tau" in one.value for one in page.error)
    page = open_page("circuit", store, method="eap-ig", options="steps")
    assert any("name=value" in one.value for one in page.error)


# What it has computed


def test_tasks_of_models_with_a_known_circuit():
    assert task_of(known_circuit("compiled-backup")) == {"name": "needle", "corruption": "filler"}
    assert known_circuit("tiny-softmax") is None
    assert known_circuit("siit-ioi").names
    assert task_of(known_circuit("siit-ioi")) is None
    assert "tiny-vit" not in fitting_models(["tiny-vit", "tiny-softmax"])


def test_tasks_that_a_model_can_read_the_best_answered_first():
    table = fitting_tasks(wb.load("siit-ioi"))
    assert list(table["task"]) == ["ioi"]
    assert table["accuracy"][0] > 0.9


def test_faithfulness_read_back(tmp_path):
    from workbench.apps.work_circuit import judged

    model, task = wb.load("compiled-induction"), wb.task("induction")
    pairs = task.build(seed=0, tokenizer=model.tokenizer, n=4)
    wb.find_circuit(model, pairs, "eap", "edge", metric=task.metric).save(tmp_path / "circuit")
    curve = judged(model, task, pairs, str(tmp_path / "circuit"), controls=2)
    back = faithfulness_of(load_result(curve.save(tmp_path / "curve")))
    assert back.frame().equals(curve.frame())
    assert back.cpr == curve.cpr
    saved = load_result(beside(known_circuit("compiled-ioi"), known_circuit("compiled-ioi")).save(tmp_path / "other"))
    with pytest.raises(WorkbenchError, match="Beside is no faithfulness"):
        faithfulness_of(saved)


def test_taking_away_is_judged_on_what_is_left():
    model, task = wb.load("compiled-induction"), wb.task("induction")
    pairs = task.build(seed=0, tokenizer=model.tokenizer, n=4)
    circuit = known_circuit("compiled-induction")
    kept = [name for name, stays in zip(circuit.names, circuit.kept.tolist(), strict=True) if stays]
    away = taken_away(model, circuit, pairs, kept, metric=task.metric)
    only = taken_away(model, circuit, pairs, kept, keep=True, metric=task.metric)
    assert only["metric"][1] == pytest.approx(away["metric"][0], rel=1e-3)
    assert away["metric"][1] < away["metric"][0]
    assert away["replaced"].tolist() == [0, len(kept), len(circuit.names)]
    with pytest.raises(UnknownName, match="a9"):
        taken_away(model, circuit, pairs, ["a9.h9"])


def test_a_node_means_all_edges_out_of_it():
    circuit = Circuit.of("edge", ["input->a0.h0<q>", "a0.h0->m0", "a0.h0->logits"], [])
    assert chosen_parts(circuit, ["a0.h0"]) == [False, True, True]
    assert chosen_parts(circuit, ["a0.h0->m0"]) == [False, True, False]
    with pytest.raises(UnknownName):
        chosen_parts(circuit, ["logits"])


def test_two_circuits_part_by_part():
    first = Circuit("node", ("m0", "m1"), torch.tensor([1.0, 2.0]), torch.tensor([True, False]), {"method": "eap"})
    second = Circuit("node", ("m1", "m2"), torch.tensor([3.0, 4.0]), torch.tensor([True, True]), {"method": "atp"})
    both = beside(first, second)
    table = both.frame().set_index("part")
    assert table.loc["m0", "kept"] == "only in the first"
    assert table.loc["m1", "kept"] == "only in the second"
    assert table.loc["m1", "eap"] == 2.0
    assert math.isnan(table.loc["m0", "atp"])
    assert len(both.plot().collections) == 4
    with pytest.raises(WorkbenchError):
        beside(first, known_circuit("compiled-ioi"))


def test_the_head_behind_a_part():
    circuit = known_circuit("compiled-ioi")
    assert head_of("a1.h2->a2.h0<q>", circuit) == (2, 0)
    assert head_of("a3.h1->logits", circuit) == (3, 1)
    assert head_of("a1.h2", circuit) == (1, 2)
    assert head_of("input->m0", circuit) is None
    grouped = wb.circuit_graph(layers=2, heads=4, kv_heads=2)
    assert head_of("m0->a1.g1<k>", Circuit.of("edge", grouped.edges, [])) == (1, 2)


def test_numbers_of_parts_and_options_in_words():
    assert sizes(10) == [1, 2, 3, 4, 5, 6, 8, 10]
    assert sizes(1) == [1]
    assert options_of("steps=10 rule=left") == {"steps": 10, "rule": "left"}
    circuit = known_circuit("compiled-ioi")
    assert len(reduced(circuit, OWN)) == 8
    assert len(reduced(circuit, 1000)) == len(circuit.names)
    with pytest.raises(WorkbenchError, match="level"):
        _ = Asked("compiled-ioi", "ioi", "atp", "edge", "zero", 4, 0).job
    assert ASKED.job.key == ASKED.by("eap").by("eap-ig").job.key
