"""The page of known heads: scores with nulls, roles, and what a role is needed for."""

from __future__ import annotations

import pandas as pd
import pytest
from pages import links, open_page, plotted, python_of

import workbench as wb
from workbench.apps import work_heads
from workbench.apps.screen import head_scores
from workbench.apps.screen.head_grid import measure_of
from workbench.apps.screen.need import job
from workbench.errors import UnknownName


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One store for the module: what one test had computed, the next one finds."""
    return tmp_path_factory.mktemp("store")


ROLES = pd.DataFrame(
    {
        "layer": [0, 0, 1],
        "head": [0, 1, 0],
        "roles": ["previous, positional", "unclassified", "positional"],
        "previous": [0.9, 0.1, 0.2],
        "previous_null": [0.1, 0.1, 0.1],
        "positional": [1.0, 0.5, 0.9],
        "positional_null": [0.2, 0.2, 0.2],
    }
)


def test_roles_are_counted():
    counts = head_scores.role_counts(ROLES)
    assert counts["role"].tolist() == ["positional", "previous", "unclassified"]
    assert counts["which"].tolist() == ["0.0 1.0", "0.0", "0.1"]
    assert counts["heads"].tolist() == [2, 1, 1]


def test_a_role_is_shown_by_the_score_it_is_judged_by():
    table = head_scores.role_table(ROLES, "content")
    assert table["value"].tolist() == [1.0, 0.5, 0.9]
    assert not table["has it"].any()
    table = head_scores.role_table(ROLES, "previous")
    assert table["value"].tolist() == [0.9, 0.1, 0.2]
    assert table["has it"].tolist() == [True, False, False]


def test_one_measure_of_a_table_of_heads():
    frame = pd.DataFrame({"layer": [0], "head": [0], "a": [1.0], "a_null": [0.5], "a_low": [float("nan")], "b": [2.0]})
    assert measure_of(frame, "a").to_dict("list") == {"layer": [0], "head": [0], "value": [1.0], "null": [0.5]}
    with pytest.raises(UnknownName, match="'c'"):
        measure_of(frame, "c")


def test_scores_in_a_row_per_head():
    scores = wb.head_scores(wb.load("compiled-induction"), kinds=("previous", "induction"), batches=1, sequences=2)
    table = work_heads.wide(scores)
    assert len(table) == table[["layer", "head"]].drop_duplicates().shape[0]
    for one in scores.frame().itertuples():
        row = table[(table["layer"] == one.layer) & (table["head"] == one.head)].iloc[0]
        assert row[one.kind] == one.value
        assert row[f"{one.kind}_null"] == one.null


def test_the_induction_head_of_a_compiled_model(store):
    page = open_page("heads", store, model="compiled-induction")
    shown = plotted(page, "Where it looks grid")
    best = shown.loc[shown["value"].idxmax()]
    assert best["name"] == "1.2"
    assert best["value"] > 0.9
    assert best["null"] < 0.3
    assert {"low", "high"} <= set(shown)
    (code,) = python_of(page)
    exec(code, names := {})
    assert names["found"]["induction"].tolist() == pytest.approx(shown["value"].tolist())


def test_another_kind_stands_in_the_address(store):
    page = open_page("heads", store, model="compiled-induction", **{"score measure": "previous"})
    shown = plotted(page, "Where it looks grid")
    assert shown.loc[shown["value"].idxmax(), "name"].startswith("0.")


def test_roles_and_what_they_are_needed_for(store):
    page = open_page("heads", store, model="compiled-induction", known="roles")
    counts = page.dataframe[0].value.set_index("role")
    assert counts.loc["induction", "which"] == "1.2"
    curve = page.dataframe[-1].value
    assert curve["ranked"].iloc[0] > curve["base"].iloc[0] + 1
    assert curve["random"].iloc[0] < curve["base"].iloc[0] + 0.5
    plot, without = python_of(page)[1:]
    exec(without, names := {})
    assert names["found"].frame()["ranked"].tolist() == pytest.approx(curve["ranked"].tolist())
    exec(plot, names := {})
    assert [head[:2] for head in names["roles"].heads("induction")] == [(1, 2)]


def test_known_heads_in_the_text_of_a_run(store):
    page = open_page("heads", store, known="text", **{"score measure": "first"})
    shown = plotted(page, "first in a text grid")
    assert len(shown) == 32
    assert shown["value"].max() > 0.2
    (label,) = links(page)
    assert label.startswith("Look at head ")
    (code,) = python_of(page)
    exec(code, names := {})
    assert names["found"].frame()["value"].tolist() == pytest.approx(shown["value"].tolist())


def test_every_score_is_a_job_that_the_workbench_knows():
    for question in head_scores.SCORES.values():
        job(question.probe, "tiny-softmax", question.task, **question.args)


def test_scores_whose_table_is_not_of_heads(store):
    page = open_page("heads", store, model="compiled-induction", score="Which head reads which")
    table = page.dataframe[0].value
    best = head_scores.strongest_pairs(table, 1).iloc[0]
    assert (best["writer_layer"], best["reader_layer"], best["channel"]) == (0, 1, "k")
    exec(python_of(page)[0], names := {})
    assert len(names["found"].frame()) == len(table)


def test_measures_of_the_other_scores_are_columns_of_their_tables():
    model = wb.load("tiny-softmax")
    assert set(head_scores.SCORES["Position or content"].heads) <= set(work_heads.positions(model, 4, 16).frame())
    assert set(head_scores.SCORES["Kinds of tokens"].heads) <= set(work_heads.classes(model, 1, 20).frame())
    assert set(head_scores.SCORES["Follows a moved token"].heads) <= set(wb.moved_tokens(model, sequences=2).frame())
    assert set(head_scores.SCORES["By its weights alone"].heads) <= set(wb.weight_circuits(model).frame())
    held = wb.copy_suppression(model, sequences=1, layers=(1,), cause=True)
    assert set(head_scores.SCORES["Holds a copy back"].heads) <= set(held.frame())


def test_a_model_without_words_says_so(store):
    page = open_page("heads", store, model="tiny-vit")
    assert "did not come to an end" in page.error[0].value


def test_a_wrong_score_in_the_address_is_told(store):
    page = open_page("heads", store, model="compiled-induction", score="luck")
    assert any("no score in the address 'luck'" in one.value for one in page.warning)
