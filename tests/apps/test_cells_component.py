"""The squares of a grid's cells: their states, marks and keys, in a real browser."""

from __future__ import annotations

import time

import pytest

from workbench.apps.components.cells import CELLS, STATES, TITLED, cells_data
from workbench.errors import WorkbenchError

MIXED = ["done", "failed", "running", "missing"]


def test_what_is_sent_is_short_whatever_the_titles_are():
    few = cells_data(MIXED, titles=["a", "b", "c", "d"], selected=2)
    assert (few["states"], few["titles"], few["selected"]) == ("dfrm", ["a", "b", "c", "d"], 2)
    many = cells_data(MIXED * 2500, titles=["x" * TITLED] * 10_000)
    assert len(many["states"]) == 10_000
    assert many["titles"] == []
    assert cells_data([])["states"] == ""
    assert len({state[0] for state in STATES}) == len(STATES)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"states": ["gone"]}, "no state of a cell 'gone'"),
        ({"states": MIXED, "titles": ["a"]}, "1 titles for 4 cells"),
        ({"states": MIXED, "selected": 4}, "cell 4 is not one of the 4 cells"),
    ],
)
def test_what_does_not_fit_together_is_refused(given, told):
    with pytest.raises(WorkbenchError, match=told):
        cells_data(**given)


def test_cells_are_told_opened_and_walked_through(shown):
    titles = ["<b>first</b>", "second", "third", "fourth"]
    figure = shown(CELLS, cells_data(MIXED, titles=titles, title="night"))
    page = figure.page
    assert page.locator("h4").inner_text() == "night"
    assert [page.locator("label").nth(i).inner_text() for i in range(4)] == [f"1 {name}" for name in STATES]
    canvas = page.locator("canvas.map")
    size = canvas.bounding_box()["width"] / 4
    canvas.hover(position={"x": size / 2, "y": 3})
    assert page.locator(".status").inner_text() == "cell 1 of 4, done: <b>first</b>"
    canvas.click(position={"x": 1.5 * size, "y": 3})
    assert figure.events == [("cell", 1)]
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):
        canvas.press(key)
    assert page.locator(".status").inner_text() == "cell 4 of 4, missing: fourth"
    canvas.press("Home")
    canvas.press("Enter")
    assert figure.events == [("cell", 0)]


def test_every_state_looks_different_in_both_themes(shown):
    figure = shown(CELLS, cells_data(MIXED))
    for scheme in ("light", "dark"):
        figure.page.emulate_media(color_scheme=scheme)
        figure.page.wait_for_timeout(200)
        squares = figure.page.evaluate(
            """() => {
                const all = [];
                const find = (node) => { if (node.shadowRoot) find(node.shadowRoot);
                    for (const child of node.children ?? []) { if (child.matches("canvas.map")) all.push(child); find(child); } };
                find(document);
                const canvas = all[0], pen = canvas.getContext("2d"), size = canvas.width / 4;
                return [0, 1, 2, 3].map((i) => [...pen.getImageData(i * size + 2, 2, 1, 1).data].join());
            }"""
        )
        assert len(set(squares)) == 4, (scheme, squares)


def test_ten_thousand_cells_are_drawn_at_once_and_changed_in_place(shown):
    figure = shown(CELLS, cells_data(["missing"] * 10_000))
    figure.live(cells_data(["missing"] * 10_000))
    box = figure.page.locator("canvas.map").bounding_box()
    assert box["height"] < 700
    figure.page.locator("canvas.map").focus()
    began = time.perf_counter()
    figure.update(cells_data(["done"] * 9_999 + ["failed"]))
    assert time.perf_counter() - began < 2
    assert figure.page.locator("label").first.inner_text() == "9,999 done"
    figure.page.locator("canvas.map").press("End")
    assert figure.page.locator(".status").inner_text() == "cell 10,000 of 10,000, failed"
