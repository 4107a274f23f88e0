"""The page of features: dashboards, the heads behind them, the quality of a coder, and a training."""

from __future__ import annotations

import json

import pytest
import torch
from pages import drawn, open_page, python_of, settled

import workbench as wb
from workbench.apps.components.examples import example_row, examples_data
from workbench.apps.work_features import (
    SavedBoard,
    bars,
    board_at,
    dashboards,
    densities,
    heads_of_features,
    matching,
    usable_coder,
)
from workbench.errors import WorkbenchError
from workbench.probes.features.feature_pages import Example, FeatureDashboard, FeaturePage
from workbench.run import Provenance

FEW = {"texts": "8"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One results folder: what one test had computed the next one finds."""
    return tmp_path_factory.mktemp("store")


def listed(page):
    return next(
        one.value for one in page.dataframe if "top_token" in one.value.columns and "mean" not in one.value.columns
    )


def test_every_feature_is_listed_and_one_is_shown(store):
    page = open_page("features", store, **FEW)
    assert page.title[0].value == "Features"
    assert page.selectbox(key="coder").value == "tiny-softmax/z-1"
    assert not any("discrete" in option for option in page.selectbox(key="coder").options)
    table = listed(page)
    assert len(table) == 512
    assert list(table["largest"]) == sorted(table["largest"], reverse=True)
    feature = page.number_input(key="feature").value
    data = drawn(page, "examples")
    assert data["title"] == f"Feature {feature}"
    first = data["groups"][0]["rows"][0]
    assert max(first["values"]) == first["values"][first["at"]]
    assert any("Active at" in one.value for one in page.markdown)


def test_a_feature_is_opened_by_its_link_and_its_code_gives_the_same(store):
    other = int(listed(open_page("features", store, **FEW))["feature"][2])
    page = open_page("features", store, feature=str(other), **FEW)
    assert drawn(page, "examples")["title"] == f"Feature {other}"
    code = next(text for text in python_of(page) if f"board.plot(feature={other})" in text)
    names: dict = {}
    exec(code, names)
    shown = listed(page).set_index("feature").loc[other]
    assert names["board"].page(other).largest == pytest.approx(shown["largest"], rel=1e-5)
    assert len(names["board"].pages) == 512


def test_heads_of_a_feature_have_links(store):
    page = open_page("features", store, **FEW)
    links = [one.proto for one in page.get("page_link") if one.proto.label.startswith("layer 1, head ")]
    assert len(links) == 3
    assert all("layer=1" in link.query_string and "head=" in link.query_string for link in links)


def test_features_are_found_by_token_and_by_head(store):
    page = open_page("features", store, find="THE", through="3", **FEW)
    table = listed(page)
    assert 0 < len(table) < 512
    assert set(table["head"]) == {3}
    page.text_input(key="find").set_value("no such token anywhere")
    page = settled(page.run())
    assert any("No feature fits" in one.value for one in page.info)


def test_a_transcoder_has_no_heads(store):
    page = open_page("features", store, coder="tiny-softmax/mlp-2", **FEW)
    assert "head" not in listed(page).columns
    assert not [one for one in page.get("page_link") if one.proto.label.startswith("layer ")]


def test_quality(store):
    page = open_page("features", store, look="quality", **FEW)
    values = {one.label: one.value for one in page.metric}
    assert values["active per token"] == "16"
    assert values["unexplained variance"].endswith("%")
    names: dict = {}
    exec(python_of(page)[0], names)
    table = page.dataframe[0].value
    assert names["found"].frame()["value"].tolist() == pytest.approx(table["value"].tolist(), rel=1e-4)


def test_a_coder_is_trained_and_then_looked_at(store):
    ask = {"look": "train", "train_model": "siit-ioi", "train_layer": "1", "train_features": "64", "train_steps": "10",
           "train_batch": "256"}  # fmt: skip
    page = open_page("features", store, **ask)
    assert any("Press Train" in one.value for one in page.info)
    page = open_page("features", store, trains="1", **ask)
    assert {one.label for one in page.metric} == {"active per token", "unexplained variance", "never active"}
    (button,) = [one for one in page.button if one.label == "See its features"]
    button.click()
    page = settled(page.run())
    assert page.selectbox(key="coder_model").value == "siit-ioi"
    assert any(
        "trained here: siit-ioi, blocks.1.attn.hook_z" in option for option in page.selectbox(key="coder").options
    )
    assert len(listed(page)) == 64


def test_another_model_is_refused_in_one_line(store):
    page = open_page("features", store, coder_model="compiled-ioi", **FEW)
    assert len(page.error) == 1
    assert "did not come to an end" in page.error[0].value


def test_what_stands_in_the_address_and_is_not_there_is_told(store):
    page = open_page("features", store, coder="nothing", feature="100000", **FEW)
    told = " ".join(one.value for one in page.warning)
    assert "no coder in the address 'nothing'" in told
    assert "100000" in told


# What it has computed


def one_page(feature: int, tokens=("the", "<b>cat</b>"), heads=(0.2, 0.8)) -> FeaturePage:
    example = Example("top", 0, 1, 2.0, 1, tokens, (0.0, 2.0))
    lower = Example("0-20%", 0, 0, 0.2, 0, tokens, (0.2, 0.0))
    return FeaturePage(feature, 0.25, 1.0, 2.0, torch.tensor([3.0, 1.0]), (example, lower), (("sat", 0.5),), (("ran", -0.5),),
                       torch.tensor(heads, dtype=torch.float64), ((4, 0.9),))  # fmt: skip


def board(*pages: FeaturePage) -> FeatureDashboard:
    return FeatureDashboard("topk", 8, ("a",), ("b",), 1, 4, pages, ("a note",), Provenance("some model"))


def test_pages_are_read_back_as_they_were(tmp_path):
    whole = board(one_page(3), one_page(5, heads=()))
    back = board_at(SavedBoard(whole).save(tmp_path / "pages"))
    assert back.frame().equals(whole.frame())
    assert back.examples().equals(whole.examples())
    assert [one.values for one in back.page(3).examples] == [(0.0, 2.0), (0.2, 0.0)]
    assert back.page(3).histogram.tolist() == [3.0, 1.0]
    assert back.notes == ("a note",)
    assert back.provenance.model == "some model"
    (tmp_path / "pages" / "pages.json").write_text("{")
    with pytest.raises(WorkbenchError, match=r"pages\.json is damaged"):
        board_at(tmp_path / "pages")


def test_the_dashboards_of_a_job(tmp_path):
    found = dashboards(wb.load("tiny-softmax"), "tiny-softmax/z-0", number=2, features=[1, 2])
    assert [page.feature for page in found.saved.board.pages] == [1, 2]
    assert list(found.table["feature"]) == [1, 2]
    with pytest.raises(WorkbenchError, match="discrete-sae"):
        usable_coder("tiny-softmax/discrete")


def test_features_by_head_and_by_token():
    whole = board(one_page(3), one_page(5, tokens=("a", "DOG"), heads=(0.9, 0.1)))
    assert heads_of_features(whole)["features"].tolist() == [1, 1]
    assert heads_of_features(board(one_page(3)))["features"].tolist() == [0, 1]
    assert heads_of_features(whole)["share"].tolist() == pytest.approx([0.55, 0.45])
    assert matching(whole, "dog")["feature"].tolist() == [5]
    assert matching(whole, "SAT")["feature"].tolist() == [3, 5]
    assert matching(whole, "", 1)["feature"].tolist() == [3]
    assert len(heads_of_features(board(one_page(3, heads=())))) == 0
    assert len(bars([0.1, 0.2]).patches) == 2
    assert "1 never active" not in densities(whole).get_title()


def test_rows_of_examples():
    data = examples_data([("top", [example_row(["a", "b"], [1.0, float("nan")], at=0)])])
    assert data["groups"][0]["rows"][0]["values"] == [1.0, 0.0]
    assert data["top"] == 1.0
    json.dumps(data, allow_nan=False)
    with pytest.raises(WorkbenchError):
        example_row(["a"], [1.0, 2.0])
    with pytest.raises(WorkbenchError):
        example_row(["a"], [1.0], at=1)
    with pytest.raises(WorkbenchError):
        examples_data([], top=0.0)
