"""``find_circuit`` and ``circuit_score`` as cells."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import workbench as wb
from workbench.circuits import Circuit
from workbench.errors import WorkbenchError
from workbench.jobs.job import LARGEST_SEED, Job
from workbench.jobs.probes import Cell, Outcome, resolve

COLUMNS = [
    "level",
    "parts",
    "kept",
    "faithfulness",
    "cpr",
    "cmd",
    "random_cpr",
    "random_cmd",
    "auroc",
    "average_precision",
    "prevalence",
    "metric",
    "metric_of_nothing",
    "accuracy",
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: wb.load(name) for name in ("compiled-ioi", "compiled-induction")}


@pytest.fixture
def call(models: dict[str, Any]) -> Any:
    def done(probe: str, task: Any = "ioi", seed: int = 0, model: str = "compiled-ioi", **args: Any) -> Outcome:
        job = Job(probe, model=model, task=task, args=args, seed=seed)
        found = resolve(probe)
        found.check(job)
        return found.call(Cell(job, lambda: models[model]))

    return done


def pairs(models: dict[str, Any], seed: int, n: int, **options: Any) -> Any:
    return wb.task("ioi", **options).build(seed=seed, tokenizer=models["compiled-ioi"].tokenizer, n=n)


def test_a_circuit_is_that_of_the_function(call: Any, models: dict[str, Any], tmp_path: Path) -> None:
    got = call("find_circuit", {"name": "ioi", "split": "test"}, seed=3, method="eap-ig", steps=2, examples=8, top=9)
    task, model = wb.task("ioi", split="test"), models["compiled-ioi"]
    want = wb.find_circuit(model, pairs(models, 3, 8, split="test"), "eap-ig", metric=task.metric, steps=2).top(9)
    pd.testing.assert_frame_equal(got.table, want.frame())
    assert got.table["kept"].sum() == 9
    assert Circuit.load(got.saved.save(tmp_path / "c")).frame().equals(want.frame())


def test_without_arguments_a_cell_does_what_the_command_does(call: Any, models: dict[str, Any]) -> None:
    want = wb.find_circuit(models["compiled-ioi"], pairs(models, 0, 64), metric=wb.task("ioi").metric)
    assert want.provenance["method"] == "eap-ig"
    got = call("find_circuit")
    pd.testing.assert_frame_equal(got.table, want.frame())
    assert got.saved.provenance["method"] == "eap-ig"


def test_methods_that_compare_activations_get_the_negatives(call: Any, models: dict[str, Any]) -> None:
    options: dict[str, Any] = {"epochs": 1, "features": 16, "trials": 1}
    got = call("find_circuit", seed=2, method="discrete-sae", examples=8, options={"examples": 4}, **options)
    negatives = wb.task("ioi").contrast().build(seed=2, tokenizer=models["compiled-ioi"].tokenizer, n=8)
    model, metric = models["compiled-ioi"], wb.task("ioi").metric
    want = wb.find_circuit(model, negatives, "discrete-sae", metric=metric, seed=2, **options, examples=4)
    pd.testing.assert_frame_equal(got.table, want.frame())
    assert got.saved.provenance["options"]["examples"] == 4
    other = wb.find_circuit(model, pairs(models, 2, 8), "discrete-sae", metric=metric, seed=2, **options, examples=4)
    assert not other.frame().equals(want.frame())


def test_a_method_that_draws_draws_by_the_jobs_seed(call: Any) -> None:
    for seed in (0, 5):
        found = call("find_circuit", seed=seed, method="ugs", steps=1, examples=4)
        assert found.saved.provenance["options"]["seed"] == seed
    assert call("find_circuit", seed=5, method="ugs", steps=1, examples=4, options={"seed": 1}).saved.provenance["options"][
        "seed"
    ] == 1  # fmt: skip


def test_a_score_is_one_row_from_pairs_of_the_next_seed(call: Any, models: dict[str, Any]) -> None:
    got = call("circuit_score", seed=4, method="eap", examples=8, top=8, controls=3)
    model, task = models["compiled-ioi"], wb.task("ioi")
    found = wb.find_circuit(model, pairs(models, 4, 8), "eap", metric=task.metric).top(8)
    judged = wb.faithfulness(model, found, pairs(models, 5, 8), metric=task.metric, controls=3, seed=4)
    row = got.table.to_dict("records")[0]
    assert list(got.table) == COLUMNS
    assert len(got.table) == 1
    assert row == {
        "level": "edge",
        "parts": 211,
        "kept": 8,
        "faithfulness": judged.own,
        "cpr": judged.cpr,
        "cmd": judged.cmd,
        "random_cpr": float(judged.random_cpr.mean()),
        "random_cmd": float(judged.random_cmd.mean()),
        "auroc": wb.auroc(found, model.ground_truth),
        "average_precision": wb.auprc(found, model.ground_truth),
        "prevalence": 8 / 211,
        "metric": judged.full,
        "metric_of_nothing": judged.empty,
        "accuracy": 1.0,
    }
    assert row["auroc"] > 0.99
    assert got.saved.names == found.names
    assert got.saved.kept.equal(found.kept)


def test_a_score_is_about_other_prompts_than_those_that_found_the_circuit() -> None:
    model, task = wb.load("tiny-softmax"), wb.task("ioi")
    args: dict[str, Any] = {"method": "eap", "level": "node", "examples": 4, "controls": 0}
    job = Job("circuit_score", model="tiny-softmax", task="ioi", args=args, seed=7)
    got = resolve(job.probe).call(Cell(job, lambda: model))
    of = {
        seed: wb.faithfulness(
            model,
            got.saved,
            task.build(seed=seed, tokenizer=model.tokenizer, n=4),
            metric=task.metric,
            controls=0,
        ).cpr
        for seed in (7, 8)
    }
    assert got.table["cpr"].tolist() == [of[8]]
    assert of[7] != of[8]


def test_the_last_seed_has_a_next_one(call: Any) -> None:
    assert len(call("circuit_score", seed=LARGEST_SEED, method="eap", level="node", examples=2, controls=0).table) == 1


def test_a_truth_about_another_task_judges_nothing(call: Any) -> None:
    got = call("circuit_score", "induction", method="eap", examples=4, controls=1)
    row = got.table.iloc[0]
    assert all(math.isnan(row[name]) for name in ("auroc", "average_precision", "prevalence"))
    assert "faithfulness is undefined" in got.note
    assert row["accuracy"] < 1
    assert got.table.dtypes["auroc"] == "float64"


def test_nodes_and_parts_at_positions_are_judged_by_the_truth_about_edges(call: Any, models: dict[str, Any]) -> None:
    truth = models["compiled-ioi"].ground_truth
    nodes = call("circuit_score", method="eap", level="node", examples=4, controls=0).table.iloc[0]
    assert (nodes["level"], nodes["auroc"]) == ("node", 1.0)
    assert math.isnan(nodes["random_cpr"])
    placed = call("circuit_score", method="eap", positions="spans", examples=4, controls=0)
    assert placed.table["parts"][0] > 211
    assert placed.table["auroc"][0] == wb.auroc(placed.saved.over_positions(), truth)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"task": None}, "find_circuit needs a task; add task: to the spec"),
        ({"model": None}, "find_circuit needs a model; add model: to the spec"),
        ({"method": "eapp"}, "no circuit method 'eapp'; known: .*nearest: eap"),
        ({"method": 3}, "argument method of find_circuit: Input should be a valid string; got 3"),
        ({"stpes": 3}, "no argument of find_circuit with method eap-ig 'stpes'; known: method, .*nearest: steps"),
        ({"steps": "many"}, "method 'eap-ig', option steps: Input should be a valid integer; got 'many'"),
        ({"level": "edges"}, "no circuit level 'edges'"),
        ({"level": 1}, "argument level of find_circuit: Input should be a valid string"),
        ({"method": "atp", "level": "edge"}, "method 'atp' has no edge level"),
        ({"ablation": "zeros"}, "no ablation 'zeros'; known: .*nearest: zero"),
        ({"method": "path-patching", "ablation": "zero"}, "cannot use ablation 'zero'"),
        ({"positions": "some"}, "no positions 'some'; known: all, each, spans"),
        ({"method": "discrete-sae-published", "positions": "each"}, "does not tell positions apart"),
        ({"top": 0}, "argument top of find_circuit is a whole number from 1; got 0"),
        ({"examples": True}, "argument examples of find_circuit is a whole number from 1; got True"),
        ({"batch": 0}, "argument batch of find_circuit"),
        ({"controls": 2}, "no argument of find_circuit with method eap-ig 'controls'"),
        ({"steps": 2, "options": {"steps": 3}}, "argument steps of find_circuit is given twice"),
        ({"options": {"epochs": 3}}, "no option of 'eap-ig' 'epochs'"),
        ({"options": 3}, "argument options of find_circuit: Input should be an object; got 3"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(fields: dict[str, Any], said: str) -> None:
    record = {"probe": "find_circuit", "model": "compiled-ioi", "task": "ioi"}
    record |= {name: value for name, value in fields.items() if name in record}
    job = Job.of({**record, "args": {name: value for name, value in fields.items() if name not in record}})
    with pytest.raises(WorkbenchError, match=said):
        resolve("find_circuit").check(job)


def test_a_score_takes_controls() -> None:
    fields: dict[str, Any] = {"model": "compiled-ioi", "task": "ioi"}
    resolve("circuit_score").check(Job("circuit_score", **fields, args={"controls": 0}))
    with pytest.raises(WorkbenchError, match="argument controls of circuit_score is a whole number from 0; got -1"):
        resolve("circuit_score").check(Job("circuit_score", **fields, args={"controls": -1}))
