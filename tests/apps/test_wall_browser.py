"""The wall of heads in a real browser: colours, choosing by pointer and keyboard, and what does not fit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from browser import Shown
from PIL import Image
from playwright.sync_api import Locator, Page

from workbench.apps.components.wall import WALL, wall_data

Open = Callable[..., Shown]


def wall_of(layers: int, each: int, **options: Any) -> dict[str, Any]:
    """Heads whose pictures are bright above and not there below."""
    picture = np.array([[1.0, 1.0], [np.nan, 0.25]])
    items = [
        {"layer": l, "head": h, "text": f"<b>text {l}.{h}</b>", "value": l + h / 100}
        for l in range(layers)
        for h in range(each)
    ]
    return wall_data([picture] * len(items), items, **options)


def colour_in(thumb: Locator, x: float, y: float) -> np.ndarray:
    """The colour on the screen at a share of the width and height of an element."""
    picture = np.asarray(Image.open(io.BytesIO(thumb.screenshot())).convert("RGB"))
    return picture[int(y * len(picture)), int(x * picture.shape[1])].astype(int)


@pytest.mark.parametrize("index", [0, 5, 11])
def test_every_head_shows_its_own_cut_of_the_picture(shown: Open, browser_page: Page, index: int) -> None:
    pictures = [np.array([[1.0, 1.0], [np.nan, (i / 11) ** 2]]) for i in range(12)]
    items = [{"layer": i // 4, "head": i % 4, "text": "", "value": None} for i in range(12)]
    shown(WALL, wall_data(pictures, items))
    thumb = browser_page.locator(".thumb").nth(index)
    assert np.abs(colour_in(thumb, 0.25, 0.25) - (253, 231, 37)).max() < 4
    assert np.abs(colour_in(thumb, 0.25, 0.75) - (240, 242, 246)).max() < 4
    expected = np.array(mpl.colormaps["viridis"](index / 11)[:3]) * 255
    assert np.abs(colour_in(thumb, 0.75, 0.75) - expected).max() < 7


def test_click_opens_and_with_shift_or_ctrl_selects(shown: Open, browser_page: Page) -> None:
    part = shown(WALL, wall_of(3, 4, selected=[2]))
    heads = browser_page.locator(".head")
    heads.nth(5).click()
    assert part.events == [("open", 5)]
    heads.nth(7).click(modifiers=["Shift"])
    heads.nth(0).click(modifiers=["ControlOrMeta"])
    heads.nth(2).click(modifiers=["Shift"])
    assert part.events == [("select", [2, 7]), ("select", [0, 2, 7]), ("select", [0, 7])]
    assert [heads.nth(i).get_attribute("aria-selected") for i in (0, 2, 7)] == ["true", "false", "true"]
    assert "12 heads, 2 selected" in browser_page.locator(".tools").inner_text()
    browser_page.get_by_role("button", name="Select none").click()
    assert part.events == [("select", [])]
    assert browser_page.get_by_role("button", name="Select none").is_disabled()


def test_a_rectangle_selects_what_it_touches(shown: Open, browser_page: Page) -> None:
    part = shown(WALL, wall_of(3, 4))
    heads = browser_page.locator(".head")
    first, last = heads.nth(1).bounding_box(), heads.nth(6).bounding_box()
    assert first
    assert last
    browser_page.mouse.move(first["x"] + 10, first["y"] + 10)
    browser_page.mouse.down()
    browser_page.mouse.move(last["x"] + 10, last["y"] + 10, steps=4)
    assert browser_page.locator(".lasso").is_visible()
    browser_page.mouse.up()
    assert part.events == [("select", [1, 2, 5, 6])]
    assert browser_page.locator(".lasso").is_hidden()
    third = heads.nth(8).bounding_box()
    assert third
    browser_page.keyboard.down("Shift")
    browser_page.mouse.move(third["x"] + 10, third["y"] + 10)
    browser_page.mouse.down()
    browser_page.mouse.move(third["x"] + 40, third["y"] + 40, steps=2)
    browser_page.mouse.up()
    browser_page.keyboard.up("Shift")
    assert part.events == [("select", [1, 2, 5, 6, 8])]


def test_keyboard_walks_opens_and_selects(shown: Open, browser_page: Page) -> None:
    part = shown(WALL, wall_of(3, 4))
    browser_page.locator(".head").first.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowUp", "ArrowUp", "Enter"):
        browser_page.keyboard.press(key)
    assert part.events == [("open", 1)]
    for key in ("End", "ArrowDown", "Home", "Space", "ArrowRight", "Space", "Escape"):
        browser_page.keyboard.press(key)
    assert part.events == [("select", [4]), ("select", [4, 5]), ("select", [])]
    assert browser_page.locator(".head:focus").count() == 1
    assert browser_page.locator(".head[tabindex='0']").count() == 1
    assert browser_page.locator(".status").inner_text() == "Layer 1, head 1: 1.01 · <b>text 1.1</b>"


def test_what_is_said_of_a_head_is_read_and_shown_on_hover(shown: Open, browser_page: Page) -> None:
    shown(WALL, wall_of(2, 2, title="<i>All</i>"))
    browser_page.locator(".head").nth(3).hover()
    words = "Layer 1, head 1: 1.01 · <b>text 1.1</b>"
    assert browser_page.locator(".status").inner_text() == words
    assert browser_page.get_by_role("option", name=words).count() == 1
    assert browser_page.locator("h4").inner_text() == "<i>All</i>"


@pytest.mark.parametrize(("width", "across"), [(1920, 32), (1280, 32), (700, 10)])
def test_a_wall_of_many_heads_keeps_layers_in_rows_while_they_fit(
    shown: Open, browser_page: Page, width: int, across: int
) -> None:
    browser_page.set_viewport_size({"width": width, "height": 900})
    part = shown(WALL, wall_of(32, 32))
    heads = browser_page.locator(".head")
    assert heads.count() == 1024
    tops = browser_page.locator(".wall").evaluate("(wall) => [...wall.children].map((head) => head.offsetTop)")
    assert tops.count(tops[0]) == across
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= width
    heads.nth(33).focus()
    browser_page.keyboard.press("ArrowDown")
    browser_page.keyboard.press("Enter")
    assert part.events == [("open", 33 + across)]


def test_new_data_keeps_the_place_of_the_keyboard(shown: Open, browser_page: Page) -> None:
    part = shown(WALL, wall_of(2, 4))
    part.live(wall_of(2, 4))
    browser_page.locator(".head").nth(6).focus()
    part.update(wall_of(2, 4, selected=[1], title="sorted"))
    assert browser_page.locator(".head:focus").get_attribute("aria-label") == "Layer 1, head 2: 1.02 · <b>text 1.2</b>"
    assert browser_page.locator(".head[aria-selected='true']").count() == 1
    part.update(wall_of(1, 3))
    assert browser_page.locator(".head").count() == 3
    browser_page.locator(".head").nth(2).click()
    assert part.events == [("open", 2)]
