"""``train_sae`` as a cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from workbench.apps.texts import first_pieces, texts_of
from workbench.coders.coder import Coder
from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.probes import Cell, Outcome, resolve
from workbench.models.protocol import Model

SITE = "blocks.1.attn.hook_z"
SMALL: dict[str, Any] = {"features": 32, "k": 4, "steps": 4, "batch": 64, "context": 32}


@pytest.fixture(scope="module")
def model() -> Model:
    return wb.load("tiny-softmax")


@pytest.fixture
def call(model: Model) -> Any:
    def done(*, task: Any = None, seed: int = 0, **args: Any) -> Outcome:
        job = Job("train_sae", model="tiny-softmax", task=task, args={"site": SITE, **args}, seed=seed)
        probe = resolve("train_sae")
        probe.check(job)
        return probe.call(Cell(job, lambda: model))

    return done


def test_a_coder_is_trained_judged_on_other_texts_and_saved(call: Any, model: Model, tmp_path: Path) -> None:
    got = call(**SMALL, judged=5, seed=2)
    coder = wb.train_sae(model, SITE, texts_of(model, None, 2)[0], seed=2, **SMALL)
    held = first_pieces(model, texts_of(model, None, 10**6 + 2)[0], 5, context=32, bos=coder.about["prepend_bos"])
    assert held.ids.shape[0] == 5
    assert held.ids.shape[1] <= 32
    want = wb.coder_quality(coder, model, held, seed=2)
    row = got.table.to_dict("records")
    numbers = {"dead": want.dead, "tokens": want.tokens, "trained_tokens": 256}
    assert row == [{**want.values, **numbers}]
    assert {"l0", "fvu", "ce", "ce_coder", "ce_recovered_zero", "ce_recovered_mean"} <= set(row[0])
    loaded = wb.load_coder(got.saved.save(tmp_path / "coder"))
    assert isinstance(loaded, Coder)
    assert loaded.W_dec.equal(coder.W_dec)
    assert loaded.about["texts"] == "training mixture of the bundled models, seed 2"


def test_prompts_may_be_those_of_a_task(call: Any, model: Model) -> None:
    got = call(task={"name": "ioi", "split": "test"}, seed=1, **SMALL, judged=4)
    assert got.note == "trained on prompts of ioi, from seed 1"
    held = wb.task("ioi", split="test").build(seed=10**6 + 1, tokenizer=model.tokenizer, n=64).clean[:4]
    want = wb.coder_quality(got.saved, model, held, seed=1)
    assert got.table["ce"].tolist() == [want.value("ce")]


def test_of_a_file_the_last_tenth_is_kept_back(call: Any, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    lines = [f"The kind baker walked to the market {'again ' * i}." for i in range(20)]
    path.write_text("\n".join(lines))
    got = call(**SMALL, data=str(path))
    assert got.saved.W_dec.equal(wb.train_sae(model, SITE, lines[:-2], seed=0, **SMALL).W_dec)
    assert "without its last 2 texts" in got.note
    want = wb.coder_quality(got.saved, model, first_pieces(model, lines[-2:], 64, context=32, bos=None))
    assert got.table["tokens"].tolist() == [want.tokens]
    assert got.table["fvu"].tolist() == [want.fvu]
    path.write_text(lines[0])
    with pytest.raises(WorkbenchError, match="holds one text: there is none left to judge"):
        call(**SMALL, data=str(path))


def test_options_of_every_kind_are_taken(call: Any) -> None:
    got = call(
        features=16, kind="jumprelu", steps=2, batch=32, context=16, judged=2, rate=1, sparsity=0.5, data="filler"
    )
    assert got.saved.kind == "jumprelu"
    assert got.saved.options["sparsity"] == 0.5
    assert got.saved.about["rate"] == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"site": None}, "argument site of train_sae: Input should be a valid string"),
        ({"model": None}, "train_sae needs a model"),
        ({"kk": 1}, "no argument of train_sae with kind topk 'kk'; known: site, .*steps"),
        ({"kind": "topq"}, "no kind of coder 'topq'; known: relu, .*"),
        ({"kind": "relu", "k": 3}, "no argument of train_sae with kind relu 'k'"),
        ({"k": "few"}, "coder topk, option k: Input should be a valid integer; got 'few'"),
        ({"features": 0}, "argument features of train_sae is a whole number from 1; got 0"),
        ({"judged": 1.5}, "argument judged of train_sae"),
        ({"batch": "x"}, "argument batch of train_sae: Input should be a valid integer; got 'x'"),
        ({"rate": "x"}, "argument rate of train_sae: Input should be a valid number; got 'x'"),
        ({"start": "up"}, "no start 'up'"),
        ({"out": "folder"}, "no argument of train_sae with kind topk 'out'"),
        ({"seed": 3}, "no argument of train_sae with kind topk 'seed'"),
        ({"steps": 1, "tokens": 5}, "in steps or in tokens; got both"),
        ({"task": "ioi", "data": "filler"}, "reads data: or the prompts of task:; got 'filler' and 'ioi'"),
        ({"data": "nosuchfile"}, "no data 'nosuchfile': it is mixture, filler, task:NAME"),
        ({"data": "task:nosuch"}, "no task 'nosuch'"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(fields: dict[str, Any], said: str) -> None:
    record: dict[str, Any] = {"probe": "train_sae", "model": "tiny-softmax", "task": None}
    record |= {name: value for name, value in fields.items() if name in record}
    args = {"site": SITE} | {name: value for name, value in fields.items() if name not in record}
    with pytest.raises(WorkbenchError, match=said):
        resolve("train_sae").check(Job.of({**record, "args": args}))


def test_a_training_needs_a_site() -> None:
    with pytest.raises(WorkbenchError, match="train_sae needs a site to train on; add site: blocks.1.attn.hook_z"):
        resolve("train_sae").check(Job("train_sae", model="tiny-softmax"))
