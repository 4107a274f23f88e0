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
