"""Analyses as cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import workbench as wb
from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.probes import Cell, Outcome, resolve
from workbench.models.protocol import Model

TEXT = "When Mary and John went to the store, John gave a ring to"


@pytest.fixture(scope="module")
def model() -> Model:
    return wb.load("tiny-softmax")


@pytest.fixture
def call(model: Model) -> Any:
    def done(probe: str, *, task: Any = None, seed: int = 0, **args: Any) -> Outcome:
        job = Job(probe, model="tiny-softmax", task=task, args=args, seed=seed)
        found = resolve(probe)
        found.check(job)
        return found.call(Cell(job, lambda: model))

    return done


def same(got: Outcome, want: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(got.table, want)


def test_prompts_are_those_of_the_task_and_the_result_is_saved(call: Any, model: Model, tmp_path: Path) -> None:
    got = call("sinks", task={"name": "ioi", "split": "test"}, seed=3, examples=2, epsilon=0.2, layers=[0, 2])
    pairs = wb.task("ioi", split="test").build(seed=3, tokenizer=model.tokenizer, n=2)
    want = wb.sinks(model.run(pairs.clean, maps=wb.capture(layers=[0, 2]), logits=None), epsilon=0.2)
    same(got, want.frame())
    assert set(got.table["layer"]) == {0, 2}
    assert wb.load_result(got.saved.save(tmp_path / "r")).type == "SinkResult"


def test_sixteen_prompts_unless_told_otherwise(call: Any, model: Model) -> None:
    pairs = wb.task("induction").build(seed=0, tokenizer=model.tokenizer, n=16)
    want = wb.sinks(model.run(pairs.clean, maps=wb.capture(layers=[0]), logits=None))
    same(call("sinks", task="induction", layers=0), want.frame())


def test_a_text_or_several_take_the_place_of_a_task(call: Any, model: Model) -> None:
    for text in (TEXT, [TEXT, "Then Mary gave"]):
        got = call("sinks", text=text, layers=1)
        same(got, wb.sinks(model.run(text, maps=wb.capture(layers=[1]), logits=None)).frame())


def test_plain_numbers_are_a_table_without_a_saved_result(call: Any, model: Model) -> None:
    got = call("waad", text=TEXT, layers=1)
    want = wb.waad(model.run(TEXT, maps=wb.capture()).maps[1])
    assert got.table["value"].tolist() == want.double().flatten().tolist()
    assert got.saved is None


def test_what_an_analysis_cannot_say_is_noted(call: Any) -> None:
    got = call("massive-activations", text=TEXT)
    assert got.note.startswith("activations is undefined: none is above 100")
    assert len(got.table) == 0
    assert list(got.table)


def test_lengths_may_be_one_or_several(call: Any, model: Model) -> None:
    """A plain list in a spec multiplies, so that cells get single numbers."""
    for lengths, depths in ((64, 2), ([64, 96], [0.0, 1.0])):
        got = call("retrieval_heads", lengths=lengths, depths=depths, trials=1, seed=5)
        chosen = (tuple(each) if isinstance(each, list) else each for each in (lengths, depths))
        same(got, wb.retrieval_heads(model, *chosen, trials=1, seed=5).frame())


def test_one_number_is_a_sequence_of_one_where_only_a_sequence_is_taken(call: Any) -> None:
    same(
        call("token-pruning", text=TEXT, keep=0.5, random=1),
        call("token-pruning", text=TEXT, keep=[0.5], random=1).table,
    )


def test_an_analysis_draws_by_the_jobs_seed(call: Any, model: Model) -> None:
    first, second = (call("head-scores", seed=seed, batches=1, sequences=2) for seed in (1, 2))
    assert not first.table.equals(second.table)
    head_scores = wb.analyses()["head-scores"]
    same(second, head_scores(model, batches=1, sequences=2, seed=2).frame())


def test_layers_go_to_an_analysis_that_chooses_them_itself(call: Any) -> None:
    assert set(call("head-scores", batches=1, sequences=2, layers=1).table["layer"]) == {1}
    assert set(call("moved-tokens", sequences=2, layers=[0, 3]).table["layer"]) == {0, 3}


def test_clean_and_corrupted_prompts_go_to_an_analysis_that_compares_them(call: Any, model: Model) -> None:
    pairs = wb.task("induction").build(seed=0, tokenizer=model.tokenizer, n=2)
    same(call("recovery", task="induction", examples=2), wb.recovery(model, pairs).frame())
    assert resolve("recovery").needs_task == "required"
    assert "text" not in (resolve("recovery").arguments or {})


def test_arguments_are_told_as_far_as_they_go() -> None:
    sinks, retrieval = resolve("sinks"), resolve("retrieval-heads")
    assert sinks.arguments is not None
    assert {"text", "examples", "layers", "epsilon"} <= set(sinks.arguments)
    assert (sinks.needs_task, retrieval.needs_task) == ("optional", "no")
    assert retrieval.arguments is not None
    assert not {"text", "examples", "layers", "seed", "model"} & set(retrieval.arguments)
    assert sinks.description.endswith("?")


@pytest.mark.parametrize(
    ("probe", "fields", "said"),
    [
        ("sinks", {"model": None, "args": {"text": TEXT}}, "sinks needs a model; add model: to the spec"),
        ("sinks", {}, "sinks looks at prompts: give text: or task:"),
        ("sinks", {"task": "ioi", "args": {"text": TEXT}}, "looks at a text or at the prompts of a task; got both"),
        ("sinks", {"args": {"text": " "}}, "argument text of sinks holds no words"),
        ("sinks", {"args": {"text": [TEXT, ""]}}, "argument text of sinks holds no words"),
        ("sinks", {"args": {"text": []}}, "argument text of sinks holds no words"),
        ("sinks", {"args": {"text": 3}}, "argument text of sinks: Input should be a valid string; got 3"),
        ("sinks", {"args": {"text": TEXT, "examples": 2}}, "examples of sinks counts prompts of a task"),
        (
            "sinks",
            {"task": "ioi", "args": {"examples": 0}},
            "argument examples of sinks is a whole number from 1; got 0",
        ),
        ("sinks", {"task": "ioi", "args": {"epsilom": 1}}, "no argument of sinks 'epsilom'; known: .*nearest: epsilon"),
        ("sinks", {"task": "ioi", "args": {"epsilon": "x"}}, "sinks, option epsilon: Input should be a valid number"),
        ("sinks", {"task": "ioi", "args": {"mask": 3}}, "sinks, option mask: Input should be an instance of Mask"),
        ("sinks", {"task": "ioi", "args": {"layers": 1.5}}, "argument layers of sinks"),
        ("recovery", {}, "recovery needs a task"),
        ("retrieval-heads", {"task": "ioi"}, "retrieval-heads looks at no task; got task 'ioi'"),
        ("retrieval-heads", {"args": {"seed": 1}}, "no argument of retrieval-heads 'seed'"),
        ("retrieval-heads", {"args": {"lengths": "long"}}, "retrieval-heads, option lengths"),
        ("retrieval-heads", {"args": {"progress": "bar"}}, "option progress: Input should be callable"),
        ("eviction", {"task": "ioi"}, "eviction needs window: give window: ..."),
        ("masking", {}, "masking needs result, which a job cannot make; call workbench.probes.retrieval.masking"),
        ("composition", {"args": {"layers": 0}}, "no argument of composition 'layers'"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(probe: str, fields: dict[str, Any], said: str) -> None:
    job = Job.of({"probe": probe, "model": "tiny-softmax", **fields})
    with pytest.raises(WorkbenchError, match=said) as caught:
        resolve(probe).check(job)
    assert "\n" not in str(caught.value)
