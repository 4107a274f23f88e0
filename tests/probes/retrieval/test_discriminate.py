"""Heads whose kind is known: compiled ones, and planted scores."""

from dataclasses import replace

import pytest
import torch
from copier import Copier

import workbench as wb
from workbench.errors import WorkbenchError
from workbench.probes.retrieval.discriminate import InductionOrRetrieval

OPTIONS = {"batches": 1, "sequences": 4, "period": (8, 12), "trials": 2}


def kinds(found):
    return {(row.layer, row.head): row.kind for row in found.frame().itertuples()}


def test_the_compiled_retrieval_head_does_no_induction():
    found = wb.induction_or_retrieval(wb.load("compiled-needle"), (48, 64), 2, **OPTIONS)
    named = kinds(found)
    assert named.pop((1, 1)) == "retrieval"
    assert set(named.values()) == {"neither"}
    table = found.frame().set_index(["layer", "head"])
    assert table.loc[(1, 1), "retrieval"] == 1
    assert table.loc[(1, 1), "induction"] < 0.1


def test_the_compiled_induction_head_retrieves_nothing_that_can_be_seen():
    found = wb.induction_or_retrieval(wb.load("compiled-induction"), (48,), 1, **OPTIONS)
    named = kinds(found)
    assert named.pop((1, 2)) == "induction?"
    assert set(named.values()) == {"undefined"}
    assert "retrieved no needle" in found.undefined["retrieval"]
    assert found.values["retrieval"][1].isnan().all()


def test_heads_of_the_trained_model_do_both_or_retrieve_alone():
    found = wb.induction_or_retrieval(wb.load("tiny-softmax"), (64,), 3, batches=2, sequences=4, trials=4)
    named = kinds(found)
    assert named[1, 6] == "both"
    assert named[1, 2] == "retrieval"
    assert {named[0, h] for h in range(8)} == {"neither"}
    assert "induction" not in named.values()  # what follows repeats here also fetches needles


def test_a_kind_needs_the_threshold_and_an_interval_above_the_null():
    def measure(*values):
        return {0: torch.tensor(values, dtype=torch.float64)}

    nan = float("nan")
    values = {
        "retrieval": measure(0.5, 0.5, 0.05, 0.5, nan, nan, 0.5),
        "induction": measure(0.6, 0.0, 0.4, 0.5, 0.5, 0.0, nan),
    }
    found = InductionOrRetrieval(
        title="planted",
        values=values,
        units=dict.fromkeys(values, "share"),
        low={"retrieval": measure(0.3, nan, 0.0, 0.05, nan, nan, 0.4), "induction": measure(0.5, 0, 0.3, 0.4, 0.4, 0, nan)},
        high=values,
        null={"retrieval": measure(0.1, 0.1, 0.1, 0.1, nan, nan, 0.1), "induction": measure(0.1, 0, 0.1, 0.1, 0.1, 0, nan)},
    )  # fmt: skip
    assert found.kinds()[0] == (
        "both",
        "retrieval",
        "induction",
        "induction",
        "induction?",
        "undefined",
        "retrieval?",
    )


def test_copies_that_a_repeat_explains_are_no_retrieval():
    model = wb.load("compiled-needle")
    result = wb.retrieval_heads(model, 48, 1, trials=2)
    assert result.beyond.equal(result.copied)
    explained = replace(result, beyond=torch.full_like(result.beyond, float("nan")))
    with pytest.raises(WorkbenchError, match="leave trials out"):
        wb.induction_or_retrieval(model, result=explained, **OPTIONS)
    found = wb.induction_or_retrieval(model, result=explained, batches=1, sequences=2)
    assert "follows a repeat" in found.undefined["retrieval"]
    assert set(kinds(found).values()) == {"undefined"}


def test_thresholds_are_shares():
    with pytest.raises(WorkbenchError, match=r"shares in \(0, 1\]"):
        wb.induction_or_retrieval(Copier(), 12, thresholds=(0.1, 2))
