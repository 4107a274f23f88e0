"""The page of retrieval heads: its grid, its scores and what they cost, and heads switched off."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from pages import computed, links, open_page, plotted, python_of

import workbench as wb
from workbench.apps import work_retrieval
from workbench.apps.screen import needle_view
from workbench.apps.screen.need import job
from workbench.jobs.job import Job
from workbench.results import SavedResult


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One store for the module: what one test had computed, the next one finds."""
    return tmp_path_factory.mktemp("store")


SMALL = {"model": "compiled-needle", "lengths": "32-64", "depths": "2", "trials": "2"}


def test_the_grid_is_the_mean_recall_of_each_cell():
    tensors = {
        "length": torch.tensor([32, 32, 64, 64]),
        "depth": torch.tensor([0.0, 0.0, 0.0, 1.0]),
        "recall": torch.tensor([1.0, 0.0, 1.0, 0.5]),
    }
    grid = needle_view.recall_grid(SavedResult("RetrievalResult", pd.DataFrame(), tensors, {}))
    assert grid["recall"].tolist() == [0.5, 1.0, 0.5]
    assert grid["trials"].tolist() == [2, 1, 1]


def test_lengths_that_a_model_does_not_accept_are_no_choice():
    assert needle_view.fitting(512) == ["32-64", "64-128", "64-128-256", "128-256-512"]
    assert needle_view.fitting(64) == ["32-64"]
    assert len(needle_view.fitting(None)) == len(needle_view.LENGTHS)


def test_a_prediction_comes_from_tests_of_the_same_model(tmp_path):
    def small() -> Job:
        found = job(needle_view.PROBE, "compiled-needle", lengths=[32, 64], depths=2, trials=2)
        assert needle_view.seconds(found) is None
        return found

    computed(tmp_path, small)
    same = job(needle_view.PROBE, "compiled-needle", lengths=[32, 64], depths=2, trials=2)
    took = needle_view.seconds(same)
    assert took is not None
    assert took > 0
    long = job(needle_view.PROBE, "compiled-needle", lengths=[64, 128], depths=4, trials=2)
    # twice the tokens at each of twice the depths, and rows twice as long
    assert needle_view.seconds(long) == pytest.approx(took * 8)
    assert needle_view.seconds(job(needle_view.PROBE, "tiny-softmax", lengths=[32], depths=2, trials=1)) is None


def test_needles_of_a_model_with_a_known_retrieval_head(store):
    page = open_page("retrieval", store, **SMALL)
    shown = plotted(page, "retrieval heads grid")
    assert shown[shown["value"] > 0.5]["name"].tolist() == ["1.1"]
    assert shown.loc[shown["value"].idxmax(), "null"] < 0.2
    metrics = {one.label: one.value for one in page.metric}
    assert metrics["retrieval heads"] == "1 of 8"
    assert metrics["prompts with the needle found"] == "8 of 8"
    for code in python_of(page):
        exec(code, names := {})
        assert names["found"].heads()[0][:2] == (1, 1)
    assert links(page) == {}
    assert any("Capture a run" in one.value for one in page.caption)


def test_a_score_without_an_interval_has_none(store):
    page = open_page("retrieval", store, **SMALL, by="looks")
    shown = plotted(page, "retrieval heads grid")
    assert "null" in shown
    assert "low" not in shown


def test_heads_switched_off(tmp_path):
    page = open_page("retrieval", tmp_path, **SMALL, needle="without", random="2")
    table = next(one.value for one in page.dataframe if "ranked" in one.value)
    assert table["base"].iloc[0] == 1
    assert table["ranked"].iloc[0] == 0
    assert table["random"].iloc[0] == 1
    exec(python_of(page)[0], names := {})
    assert names["found"].frame()["ranked"].tolist() == table["ranked"].tolist()[: len(names["found"].counts)]


def test_a_long_test_is_asked_for_first(store):
    page = open_page("retrieval", store, model="tiny-softmax", lengths="4096-8192-16384", depths="11", trials="16")
    assert any("not known yet" in one.value for one in page.info)
    assert not page.get("vega_lite_chart")
    assert [one.label for one in page.button] == ["Run it"]


def test_other_scores_find_the_same_head(store):
    page = open_page("retrieval", store, model="compiled-needle", needle="scores", score="Finds the document")
    shown = plotted(page, "Finds the document grid")
    assert shown.loc[shown["value"].idxmax(), "name"] == "1.1"
    exec(python_of(page)[0], names := {})
    assert names["found"].top("score", 1)[0][:2] == (1, 1)


def test_every_other_score_is_a_job_that_the_workbench_knows():
    for question in needle_view.SCORES.values():
        job(question.probe, "tiny-softmax", question.task, **question.args)


def test_jobs_that_are_more_than_one_call():
    model = wb.load("compiled-needle")
    pairs = wb.task("needle", length=64, corruption="filler", split="test").build(0, model.tokenizer, 4)
    assert work_retrieval.early_heads(model, pairs).top("importance", 1)[0][:2] == (1, 1)
    echo = work_retrieval.echo_heads(wb.load("compiled-induction"), period=16)
    assert echo.top("induction", 1)[0][:2] == (1, 2)
    kinds = work_retrieval.induction_or_retrieval(model)
    assert kinds.top("retrieval", 1)[0][:2] == (1, 1)
    gates = work_retrieval.streaming_gates(model, pairs, sink=2, recent=8, steps=1)
    assert gates.frame()["gate"].between(0, 1).all()


def test_a_model_that_cannot_be_asked_says_why(store):
    page = open_page("retrieval", store, model="tiny-vit")
    assert "did not come to an end" in page.error[0].value


def test_a_wrong_score_in_the_address_is_told(store):
    open_page("retrieval", store, **SMALL)  # computed, so that the page is drawn at once
    page = open_page("retrieval", store, **SMALL, by="luck")
    assert any("no score in the address 'luck'" in one.value for one in page.warning)
    assert "by" not in page.query_params
