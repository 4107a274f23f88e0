"""The tile map in a real browser: colours, numbers, movement, keyboard, and data that changes under the user."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from browser import Shown
from playwright.sync_api import Page

from workbench.apps.components.tilemap import TILEMAP, tilemap_data

TOP, SIDE = 8, 640
LEFT, FEW, WORDS = 65, 37, 100
"""Where a map begins: beside positions of four digits, of one, and beside tokens."""
NAN = float("nan")
Open = Callable[..., Shown]


def data_of(values: Any, **options: Any) -> dict[str, Any]:
    rows, columns = np.shape(values)
    whole = {"queries": rows, "keys": columns, "view": [0, rows, 0, columns], "size": 1, "exact": True}
    return tilemap_data(values, **{**whole, **options})


def spot(
    row: float, column: float, rows: int, columns: int, high: int = SIDE, left: int | None = None
) -> tuple[float, float]:
    """Where the middle of a cell lies on the canvas, when rows x columns of them are in view."""
    left = left or (FEW if rows < 10 else LEFT)
    return left + (column + 0.5) / columns * SIDE, TOP + (row + 0.5) / rows * high


def pixel(page: Page, x: float, y: float) -> tuple[int, ...]:
    script = "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data]"
    return tuple(page.locator("canvas").evaluate(script, [x, y]))


def hover(page: Page, x: float, y: float) -> str:
    page.locator("canvas").hover(position={"x": x, "y": y})
    return page.locator(".status").inner_text()


def large(view: tuple[int, int, int, int] = (0, 4096, 0, 4096), size: int = 64, **options: Any) -> dict[str, Any]:
    q0, q1, k0, k1 = view
    rows, columns = -(-(q1 - q0) // size), -(-(k1 - k0) // size)
    values = np.random.default_rng(0).random((rows, columns))
    return tilemap_data(values, queries=4096, keys=4096, view=view, size=size, exact=size == 1, top=1.0, **options)


@pytest.mark.parametrize("scale", ["linear", "sqrt", "log"])
def test_colours_are_those_of_viridis(shown: Open, browser_page: Page, scale: str) -> None:
    values = np.array([[0.0, 1.0, 0.04], [0.25, NAN, 0.64]])
    shown(TILEMAP, data_of(values, scale=scale))
    high = round(SIDE * 2 / 3)
    for (row, column), value in np.ndenumerate(values):
        # beside the middle: values stand there
        x, y = spot(row, column, 2, 3, high)
        red, green, blue, alpha = pixel(browser_page, x - 60, y - 60)
        if np.isnan(value):
            assert (red, green, blue) == (240, 242, 246), "what is not there has the colour of the page's shade"
            continue
        level = {"linear": value, "sqrt": value**0.5, "log": max(0, 1 + np.log10(max(value, 1e-9)) / 4)}[scale]
        expected = np.array(mpl.colormaps["viridis"](level)[:3]) * 255
        assert np.abs(np.array([red, green, blue]) - expected).max() < 7, (value, expected)
        assert alpha == 255


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_signs_are_blue_and_orange_in_both_schemes(shown: Open, browser_page: Page, scheme: Any) -> None:
    browser_page.emulate_media(color_scheme=scheme)
    shown(TILEMAP, data_of([[0.7, -0.7]], signed=True, scale="linear"))
    high = 320
    plus, minus = (pixel(browser_page, *np.subtract(spot(0, column, 1, 2, high), 60)) for column in (0, 1))
    assert plus[2] > plus[0] + 60, plus
    assert minus[0] > minus[2] + 60, minus
    paper = pixel(browser_page, *np.subtract(spot(0, 0, 1, 2, high), (-100, 60)))
    assert paper == plus


def test_every_cell_tells_the_number_that_was_packed(shown: Open, browser_page: Page) -> None:
    values = np.array([[0.5, -0.125, 3e-5], [NAN, 2.0, 0.0]])
    shown(TILEMAP, data_of(values, signed=True, unit="logits", query_labels=["Ġa", "<b>"], key_labels=["x", "\n", " "]))
    high = round(SIDE * 2 / 3)
    for (row, column), value in np.ndenumerate(values):
        said = hover(browser_page, *spot(row, column, 2, 3, high, WORDS))
        words = f"query {row} {'a' if row == 0 else '<b>'} · key {column} {'x↵␣'[column]}: "
        assert re.sub("[\u2068\u2069]", "", said).startswith(words)
        told = said.split(": ")[1]
        if np.isnan(value):
            assert told == "not there"
            continue
        assert told.endswith(" logits")
        assert float(told.removesuffix(" logits").replace("\u2212", "-")) == pytest.approx(value, rel=0.01, abs=1e-12)
        assert browser_page.locator(".tip").inner_text() == said
    browser_page.mouse.move(5, 5)
    assert browser_page.locator(".status").inner_text() == ""
    assert browser_page.locator(".tip").is_hidden()


def test_cells_of_blocks_tell_what_they_cover(shown: Open, browser_page: Page) -> None:
    shown(TILEMAP, large())
    assert hover(browser_page, *spot(63, 1, 64, 64)).startswith("queries 4,032–4,095 · keys 64–127: 0.")
    assert "cells of 64 × 64 tokens" in browser_page.locator(".tools").inner_text()


def test_wheel_zooms_about_the_pointer_and_asks_once(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large())
    x, y = LEFT + SIDE * 0.25, TOP + SIDE * 0.75
    browser_page.locator("canvas").hover(position={"x": x, "y": y})
    for _ in range(5):
        browser_page.mouse.wheel(0, -200)
    ((event, view),) = part.events
    q0, q1, k0, k1 = view
    assert event == "view"
    assert all(isinstance(edge, int) for edge in view)
    assert 0 < q1 - q0 < 1000
    assert 0 < k1 - k0 < 1000
    assert (3072 - q0) / (q1 - q0) == pytest.approx(0.75, abs=0.02)
    assert (1024 - k0) / (k1 - k0) == pytest.approx(0.25, abs=0.02)
    for _ in range(20):
        browser_page.mouse.wheel(0, 400)
    assert part.events == [("view", [0, 4096, 0, 4096])]


def test_fully_shown_the_wheel_scrolls_the_page(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large())
    browser_page.evaluate("document.body.style.height = '4000px'")
    browser_page.locator("canvas").hover()
    browser_page.mouse.wheel(0, 300)
    assert part.events == []
    assert browser_page.evaluate("scrollY") > 0


def test_drag_moves_and_stays_inside(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large((1024, 2048, 1024, 2048), 16))
    box = browser_page.locator("canvas").bounding_box()
    assert box
    x, y = box["x"] + LEFT + 320, box["y"] + TOP + 320
    browser_page.mouse.move(x, y)
    browser_page.mouse.down()
    browser_page.mouse.move(x + 80, y - 160, steps=5)
    browser_page.mouse.up()
    assert part.events == [("view", [1024 + 256, 2048 + 256, 1024 - 128, 2048 - 128])]
    for _ in range(6):
        browser_page.mouse.move(x - 300, y)
        browser_page.mouse.down()
        browser_page.mouse.move(x + 300, y, steps=3)
        browser_page.mouse.up()
    assert part.events[-1] == ("view", [1280, 2304, 0, 1024])


def test_shift_and_drag_zooms_to_the_box(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large())
    box = browser_page.locator("canvas").bounding_box()
    assert box
    browser_page.keyboard.down("Shift")
    browser_page.mouse.move(box["x"] + LEFT + 160, box["y"] + TOP + 320)
    browser_page.mouse.down()
    browser_page.mouse.move(box["x"] + LEFT + 320, box["y"] + TOP + 480, steps=4)
    browser_page.mouse.up()
    browser_page.keyboard.up("Shift")
    assert part.events == [("view", [2048, 3072, 1024, 2048])]


def test_click_takes_a_cell_and_double_click_shows_all(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large((1024, 2048, 512, 1536), 16))
    x, y = spot(3, 10, 64, 64)
    browser_page.locator("canvas").click(position={"x": x, "y": y})
    ((event, (query, key)),) = part.events
    assert event == "cell"
    assert 1024 + 48 <= query < 1024 + 64
    assert 512 + 160 <= key < 512 + 176
    browser_page.wait_for_timeout(200)
    browser_page.locator("canvas").dblclick(position={"x": x, "y": y})
    sent = part.events
    assert [event for event, _ in sent] == ["cell", "view"]
    assert sent[-1] == ("view", [0, 4096, 0, 4096])


def test_a_click_beside_the_map_takes_nothing(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large())
    browser_page.locator("canvas").click(position={"x": 20, "y": 20})
    assert part.events == []


def test_keyboard_moves_zooms_and_takes(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large((1024, 2048, 1024, 2048), 16))
    browser_page.locator("canvas").focus()
    browser_page.keyboard.press("ArrowDown")
    assert part.events == [("view", [1126, 2151, 1024, 2048])]
    browser_page.keyboard.press("ArrowLeft")
    assert part.events == [("view", [1126, 2151, 921, 1946])]
    browser_page.keyboard.press("+")
    ((_, (q0, q1, *_rest)),) = part.events
    assert q1 - q0 == pytest.approx(640, abs=2)
    assert (q0 + q1) / 2 == pytest.approx((1126 + 2151) / 2, abs=2)
    browser_page.keyboard.press("0")
    assert part.events == [("view", [0, 4096, 0, 4096])]
    browser_page.keyboard.press("-")
    assert part.events == []


def test_keyboard_chooses_cells(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large(size=16))
    browser_page.locator("canvas").focus()
    browser_page.keyboard.press("Enter")
    assert part.events == [("cell", [2047, 2047])]
    browser_page.keyboard.press("Shift+ArrowRight")
    browser_page.keyboard.press("Shift+ArrowUp")
    browser_page.keyboard.press("Enter")
    ((_, (query, key)),) = part.events
    assert (query, key) == (2047 - 16, 2047 + 16)
    assert browser_page.locator(".status").inner_text().startswith("queries 2,016–2,031 · keys 2,048–2,063")


def test_the_tab_key_reaches_the_map_and_its_focus_is_seen(shown: Open, browser_page: Page) -> None:
    shown(TILEMAP, large())
    for _ in range(8):
        browser_page.keyboard.press("Tab")
        if browser_page.locator("canvas").evaluate("(canvas) => canvas.matches(':focus-visible')"):
            break
    style = browser_page.locator("canvas").evaluate("(canvas) => getComputedStyle(canvas).outlineStyle")
    assert style == "solid"


def test_the_scale_is_changed_without_the_host(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, data_of([[1.0, 0.04], [0.0, 0.04]], scale="linear"))
    x, y = np.subtract(spot(0, 1, 2, 2), 60)
    before = pixel(browser_page, x, y)
    browser_page.get_by_label("Colour scale").select_option("sqrt")
    assert part.events == [("scale", "sqrt")]
    assert np.abs(np.array(pixel(browser_page, x, y)[:3]) - np.array(mpl.colormaps["viridis"](0.2)[:3]) * 255).max() < 7
    assert pixel(browser_page, x, y) != before


def test_an_answer_to_the_user_does_not_move_the_view_and_a_jump_does(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large())
    part.live(large(source="a"))
    canvas = browser_page.locator("canvas")
    canvas.focus()
    for _ in range(6):
        browser_page.keyboard.press("+")
    ((_, view),) = part.events
    q0, q1, k0, k1 = view
    outwards = (q0 // 2 * 2, -(-q1 // 2) * 2, k0 // 2 * 2, -(-k1 // 2) * 2)
    part.update(large(outwards, 2, source="a"))
    assert canvas.evaluate("(canvas) => canvas.matches(':focus')")
    browser_page.keyboard.press("ArrowDown")
    ((_, moved),) = part.events
    assert moved[1] - moved[0] == pytest.approx(q1 - q0, abs=1), "the view was not widened to the picture's edges"
    # beside the new picture the coarse one is still there, for it is of the same source
    x, y = LEFT + SIDE / 2, TOP + SIDE - 10
    assert hover(browser_page, x, y).startswith("queries ")
    part.update(large((0, 512, 0, 512), 8, source="b"))
    browser_page.keyboard.press("0")
    assert part.events == [("view", [0, 4096, 0, 4096])]
    assert hover(browser_page, x, y) == "no picture of this part yet"


def test_without_a_source_no_older_picture_is_shown(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large())
    part.live(large())
    part.update(large((0, 512, 0, 512), 8))
    browser_page.locator("canvas").focus()
    browser_page.keyboard.press("0")
    assert hover(browser_page, LEFT + SIDE / 2, TOP + SIDE - 10) == "no picture of this part yet"


def test_the_same_view_is_asked_for_again_after_the_host_moved(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large())
    part.live(large())
    browser_page.locator("canvas").focus()
    browser_page.keyboard.press("+")
    ((_, view),) = part.events
    part.update(large((0, 2048, 0, 2048), 32))
    part.update(large())
    browser_page.keyboard.press("+")
    assert part.events == [("view", view)]


def test_new_data_leaves_one_of_everything_and_no_listener_behind(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large())
    part.live(large())
    for number in range(5):
        part.update(large(title=f"head {number}"))
    assert browser_page.locator("canvas").count() == 1
    assert browser_page.locator("h4").inner_text() == "head 4"
    browser_page.locator("canvas").click(position={"x": 300, "y": 300})
    assert [event for event, _ in part.events] == ["cell"]
    browser_page.evaluate("leave()")
    part.update(large(title="after it left"))
    assert browser_page.locator("h4").inner_text() == "head 4"


def test_tokens_are_written_on_the_axes_when_few_are_in_view(shown: Open, browser_page: Page) -> None:
    """Beside the map there is more ink with words than with positions alone, and more room for it."""
    tokens = [f"word{i}" for i in range(40)]
    values = np.random.default_rng(0).random((40, 40))
    shown(TILEMAP, data_of(values))
    ink = "(canvas, wide) => { const {data} = canvas.getContext('2d').getImageData(18, 8, wide - 24, 640);" \
        " return data.filter((value, i) => i % 4 === 3 && value > 100).length; }"  # fmt: skip
    few = browser_page.locator("canvas").evaluate(ink, 44)
    shown(TILEMAP, data_of(values, query_labels=tokens, key_labels=tokens))
    assert browser_page.locator("canvas").evaluate(ink, WORDS) > 3 * few > 0


def test_a_picture_that_cannot_be_read_is_told_in_its_place_and_mended(shown: Open, browser_page: Page) -> None:
    part = shown(TILEMAP, large())
    part.live(large())
    part.update({**large(), "image": "data:image/png;base64,aGVsbG8gd29ybGQsIGhlbGxvIHdvcmxkLCBoZWxsbw=="})
    assert browser_page.locator(".failure").inner_text().startswith("This figure could not be drawn: ")
    part.update(large())
    assert browser_page.locator(".failure").count() == 0


def test_the_map_fits_a_narrow_page(shown: Open, browser_page: Page) -> None:
    browser_page.set_viewport_size({"width": 420, "height": 700})
    shown(TILEMAP, large(title="a long title that must wrap somewhere " * 3))
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= 420
