"""The atlas page: every head's picture, in the order of a score, and the heads that are chosen."""

from __future__ import annotations

import numpy as np
from pages import drawn, open_page, python_of, settled

import workbench as wb


def test_every_head_has_its_picture_and_an_order(tmp_path):
    page = open_page("atlas", tmp_path)
    data = drawn(page, "wall")
    assert [(item["layer"], item["head"]) for item in data["items"]] == [(i, h) for i in range(4) for h in range(8)]
    page.selectbox(key="sort").set_value("sink")
    data = drawn(settled(page.run()), "wall")
    shown = [item["value"] for item in data["items"]]
    assert shown == sorted(shown, reverse=True)
    names: dict = {}
    exec(python_of(page)[0], names)
    shares = names["found"].frame().set_index(["layer", "head"])["share"]
    assert np.allclose(shown, [shares[item["layer"], item["head"]] for item in data["items"]])


def test_scores_that_need_the_model_are_a_job(tmp_path):
    page = open_page("atlas", tmp_path, sort="induction")
    data = drawn(page, "wall")
    best = data["items"][0]
    found = wb.head_scores(wb.load("tiny-softmax"), kinds=["induction"], batches=2, sequences=4).frame()
    row = found.loc[found["value"].idxmax()]
    assert (best["layer"], best["head"]) == (row["layer"], row["head"])
    assert abs(best["value"] - row["value"]) < 1e-6


def test_chosen_heads_stand_in_the_address_and_in_the_table(tmp_path):
    page = open_page("atlas", tmp_path, heads="2.3_0.1")
    assert drawn(page, "wall")["selected"] == [1, 19]
    assert list(zip(page.dataframe[0].value["layer"], page.dataframe[0].value["head"], strict=True)) == [(0, 1), (2, 3)]
    assert "no heads in the address" in open_page("atlas", tmp_path, heads="9.9").warning[0].value
