"""Functions of the user's own as cells: ``module:function``."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.probes import Cell, Outcome, resolve


def call(job: Job) -> Outcome:
    def load() -> Any:
        raise AssertionError("this cell has no use for a model")

    probe = resolve(job.probe)
    probe.check(job)
    return probe.call(Cell(job, load))


MODULE = '''
import pandas as pd
import pyarrow as pa
from workbench.jobs.probes import Outcome

def score(model, pairs, seed, scale=1.0):
    """Mean token.

    And more."""
    return {"mean": scale * pairs.clean.double().mean(), "pairs": len(pairs), "seed": seed}

def rows(n, **rest):
    return [{"i": i, **rest} for i in range(n)]

def optional(model=None, task=None, examples=2):
    return {"model": model is not None, "task": getattr(task, "name", None), "examples": examples}

def words(tokenizer):
    return {"words": len(tokenizer)}

def told(cell):
    return Outcome(pa.table({"seed": [cell.job.seed]}), note="said")

def frame():
    return pd.DataFrame({"a": [1, 2]}, index=pd.Index(["x", "y"], name="at"))

def arrow():
    return pa.table({"a": [1]})

def number():
    return 3

def nested():
    return {"a": [1, 2]}

def placed(a, /):
    return {}

constant = 3
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "probes_of_mine.py").write_text(MODULE)
    (folder / "probes_broken.py").write_text("import no_such_module_at_all")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def own(function: str, **fields: Any) -> Job:
    return Job(f"probes_of_mine:{function}", **fields)


@pytest.mark.usefixtures("mine")
def test_parameters_of_a_function_are_filled_in_by_name() -> None:
    import workbench as wb

    model = wb.load("compiled-ioi")
    job = own("score", model="compiled-ioi", task="ioi", args={"scale": 2.0, "examples": 4}, seed=5)
    probe = resolve(job.probe)
    assert (probe.description, probe.needs_model, probe.needs_task) == ("Mean token.", "required", "required")
    assert probe.arguments == {"examples": 64, "scale": 1.0}
    probe.check(job)
    found = probe.call(Cell(job, lambda: model)).table.to_dict("records")
    pairs = wb.task("ioi").build(seed=5, tokenizer=model.tokenizer, n=4)
    assert found == [{"mean": 2 * float(pairs.clean.double().mean()), "pairs": 4, "seed": 5}]
    words = own("words", model="compiled-ioi")
    assert resolve(words.probe).call(Cell(words, lambda: model)).table["words"].tolist() == [len(model.tokenizer)]


@pytest.mark.usefixtures("mine")
def test_what_a_function_returns_becomes_a_table() -> None:
    assert call(own("rows", args={"n": 2, "x": "y"})).table.to_dict("list") == {"i": [0, 1], "x": ["y", "y"]}
    assert len(call(own("rows", args={"n": 0})).table) == 0
    assert call(own("frame")).table.to_dict("list") == {"at": ["x", "y"], "a": [1, 2]}
    assert call(own("arrow")).table.to_pydict() == {"a": [1]}
    told = call(own("told", seed=7))
    assert (told.table.to_pydict(), told.note) == ({"seed": [7]}, "said")
    for function, said in (
        ("number", "something of type int; a probe returns a DataFrame"),
        ("nested", "type list as 'a'"),
    ):
        with pytest.raises(WorkbenchError, match=said):
            call(own(function))


@pytest.mark.usefixtures("mine")
def test_what_a_function_could_do_without_is_left_out() -> None:
    assert call(own("optional")).table.to_dict("records") == [{"model": False, "task": None, "examples": 2}]
    found = call(own("optional", task="ioi", args={"examples": 9})).table.to_dict("records")
    assert found == [{"model": False, "task": "ioi", "examples": 9}]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("job", "said"),
    [
        (own("score", task="ioi"), "needs a model; add model: to the spec"),
        (own("score", model="compiled-ioi"), "needs a task; add task: to the spec"),
        (own("words"), "needs a model"),
        (own("number", model="compiled-ioi"), "looks at no model; got model 'compiled-ioi'"),
        (own("number", task="ioi"), "looks at no task; got task 'ioi'"),
        (own("number", args={"a": 1}), "no argument of probes_of_mine:number 'a'"),
        (own("score", model="m", task="ioi", args={"scal": 1}), "'scal'; known: examples, scale; nearest: scale"),
        (own("score", model="m", task="ioi", args={"examples": 0}), "argument examples of probes_of_mine:score"),
        (
            own("score", model="m", task="ioi", args={"seed": 1}),
            "seed of probes_of_mine:score is filled in from the job",
        ),
        (own("rows"), "probes_of_mine:rows needs n, which the job does not give"),
    ],
)
def test_jobs_that_do_not_fit_a_signature_are_refused(job: Job, said: str) -> None:
    with pytest.raises(WorkbenchError) as caught:
        resolve(job.probe).check(job)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_at_all:f", "cannot import no_such_module_at_all .*No module named"),
        ("probes_broken:f", "cannot import probes_broken .*no_such_module_at_all"),
        ("probes_of_mine:scor", "no function in probes_of_mine 'scor'; known: .*nearest: score"),
        ("probes_of_mine:constant", "is no function but of type int"),
        ("probes_of_mine:placed", "takes a by position alone"),
        ("not a module:f", "is written module:function"),
        ("a:b:c", "is written module:function"),
        ("a:", "is written module:function"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(name: str, said: str) -> None:
    with pytest.raises(WorkbenchError, match=said) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_an_analysis_by_its_path_is_called_as_an_analysis() -> None:
    probe = resolve("workbench.probes.sinks.scores:sinks")
    assert probe.name == "workbench.probes.sinks.scores:sinks"
    assert probe.arguments == resolve("sinks").arguments
