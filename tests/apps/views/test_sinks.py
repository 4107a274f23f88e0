"""The page of sinks, and what every page does with its address."""

from __future__ import annotations

from pages import open_page, python_of, settled


def test_sinks_of_the_first_run(tmp_path):
    page = open_page("sinks", tmp_path)
    assert page.title[0].value == "Sinks"
    (code,) = python_of(page)
    names: dict = {}
    exec(code, names)
    assert len(names["found"].frame()) > 0
    page.slider(key="epsilon").set_value(0.5)
    assert "epsilon=0.5" in python_of(settled(page.run()))[0]


def test_values_in_the_address_that_do_not_exist_are_told(tmp_path):
    page = open_page("sinks", tmp_path, epsilon="7", run="nothing")
    told = " ".join(one.value for one in page.warning)
    assert "no epsilon in the address '7'" in told
    assert "no run in the address 'nothing'" in told
