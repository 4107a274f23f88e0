"""Choices in the address: pages that use one word for different things, values that pages share, wrong values."""

from __future__ import annotations

from pages import drawn, open_page, settled


def go(page, name):
    page.switch_page(f"views/{name}.py")
    return settled(page.run())


def test_every_page_keeps_its_own_choices_and_shares_what_means_the_same(tmp_path):
    page = open_page("capture", tmp_path, source="filler", tokens="100", model="tiny-gated")
    page = go(page, "variants")
    assert page.selectbox(key="tokens").value == 64
    page.selectbox(key="tokens").set_value(16)
    page = go(settled(page.run()), "capture")
    assert page.number_input(key="tokens").value == 100
    assert page.selectbox(key="source").value == "filler"
    assert page.selectbox(key="model").value == "tiny-gated"
    assert go(page, "variants").selectbox(key="tokens").value == 16


def test_a_head_is_the_same_on_every_page(tmp_path):
    page = open_page("head", tmp_path, layer="2", head="3")
    page = go(page, "sinks")
    assert (page.selectbox(key="layer").value, page.selectbox(key="head").value) == (2, 3)
    assert "layer 2, head 3" in drawn(go(page, "head"), "tilemap map")["title"]


def test_a_wrong_value_is_told_until_another_one_is_chosen(tmp_path):
    page = open_page("atlas", tmp_path, sort="beauty")
    for _ in range(2):
        assert "no sorted by in the address 'beauty'" in page.warning[0].value
        page = settled(page.run())
    page.selectbox(key="sort").set_value("sink")
    assert not settled(page.run()).warning


def test_the_address_holds_what_was_chosen_and_no_default(tmp_path):
    page = open_page("head", tmp_path)
    assert set(page.query_params) == {"run"}
    page.selectbox(key="layer").set_value(page.selectbox(key="layer").options[2])
    page = settled(page.run())
    assert page.query_params["layer"] == page.selectbox(key="layer").options[2]
    page.selectbox(key="layer").select_index(0)
    assert set(settled(page.run()).query_params) == {"run"}
    assert open_page("head", tmp_path, layer="0").query_params["layer"] == "0"  # a link may name a default


def test_what_leaves_the_address_is_the_default_again(tmp_path):
    page = open_page("head", tmp_path, layer="2", view="10-50-0-40")
    assert drawn(page, "tilemap map")["view"] == [10, 50, 0, 40]
    for key in ("view", "layer"):
        del page.query_params[key]
    page = settled(page.run())
    assert page.selectbox(key="layer").value == 0
    assert drawn(page, "tilemap map")["view"][0] == 0


def test_a_choice_made_right_behind_another_loses_neither(tmp_path):
    page = open_page("head", tmp_path)
    page.selectbox(key="layer").select_index(2)
    page = settled(page.run())
    del page.query_params["layer"]  # as the browser sends it that has not heard of the layer yet
    page.selectbox(key="head").select_index(3)
    page = settled(page.run())
    assert (page.selectbox(key="layer").index, page.selectbox(key="head").index) == (2, 3)
    assert page.query_params["layer"] == page.selectbox(key="layer").options[2]


def test_what_nobody_chose_follows_its_default(tmp_path):
    page = open_page("circuit", tmp_path)
    assert page.selectbox(key="method").value == "patching"
    page.selectbox(key="model").set_value("tiny-softmax")
    page = settled(page.run())
    assert page.selectbox(key="method").value == "eap-ig"
    assert "method" not in page.query_params
