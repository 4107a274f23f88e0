"""An image with attention over its patches: what is sent, and in real Chromium what is drawn, chosen and said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from browser import Shown
from playwright.sync_api import Page

from workbench.apps.components.patches import HELD, PATCHES, patches_data
from workbench.apps.components.pixels import image as pixels_of
from workbench.apps.components.pixels import unpacked
from workbench.errors import UnknownName, WorkbenchError

EVIL = "<img src=x onerror=alert(1)></script>"
PICTURE = np.full((16, 24), 100, dtype=np.uint8)
GRID = (2, 3)
NAN = float("nan")


def data_of(**options: Any) -> dict[str, Any]:
    """2 x 3 patches of 8 pixels, each with a weight of its own."""
    whole: dict[str, Any] = {"grid": GRID, "query": 1, "image": PICTURE, "weights": [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]}
    return patches_data(**{**whole, **options})


# ---- what is sent


def test_data_is_plain_and_complete() -> None:
    data = data_of(weights=torch.tensor([0.0, 0.1, float("nan"), 0.3, 0.4, 0.5]), windows=[[0, 0, 2, 2]])
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["weights"][2] is None
    assert (data["grid"], data["query"], data["top"], data["windows"]) == ([2, 3], 1, 0.5, [[0, 0, 2, 2]])
    assert (pixels_of(data["image"]) == PICTURE).all()


def test_the_weights_of_all_tokens_come_along_where_they_are_few() -> None:
    tile = np.arange(36.0).reshape(6, 6)
    data = data_of(tile=tile)
    assert data["top"] == 35
    assert unpacked(data["tile"], 35.0) == pytest.approx(tile, abs=0.01)
    many = HELD + 1
    long = patches_data(PICTURE, np.ones(many), grid=(1, many), query=0, tile=np.ones((many, many)))
    assert long["tile"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image": PICTURE.astype(float)}, "[height, width] or [height, width, 3] are needed; got float64 (16, 24)"),
        ({"image": np.zeros((4, 4, 4), np.uint8)}, "got uint8 (4, 4, 4)"),
        ({"grid": (0, 6)}, "got 0 x 6"),
        ({"weights": [1.0]}, "1 numbers for 2 x 3 patches and 0 further tokens, which are 6"),
        ({"extra": ["class"]}, "6 numbers for 2 x 3 patches and 1 further tokens, which are 7"),
        ({"windows": [[0, 0, 3, 1]]}, "window [0, 0, 3, 1] is no part of 2 x 3 patches"),
        ({"windows": [[1, 0, 1, 1]]}, "window [1, 0, 1, 1]"),
        ({"tile": np.ones((5, 6))}, "tile (5, 6) does not join the 6 tokens"),
    ],
)  # fmt: skip
def test_mistakes_are_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkbenchError, match=re.escape(said)):
        data_of(**options)


def test_unknown_queries_and_directions_list_what_there_is() -> None:
    with pytest.raises(UnknownName, match=r"0 \.\. 5"):
        data_of(query=6)
    with pytest.raises(UnknownName, match="from, to"):
        data_of(direction="both")


# ---- what is drawn

Open = Callable[..., Shown]


def opened(shown: Open, **options: Any) -> tuple[Shown, Page]:
    part = shown(PATCHES, data_of(**options))
    return part, part.page


def opaque(page: Page, strength: float = 1) -> None:
    page.get_by_label("Strength of the colours").fill(str(strength))
    painted(page)


def painted(page: Page) -> None:
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def colour_at(page: Page, x: float, y: float) -> list[int]:
    """Red, green, blue of the canvas at a place in CSS pixels."""
    script = "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data]"
    found: list[int] = page.locator("canvas").evaluate(script, [x, y])
    return found[:3]


def middle(row: int, column: int) -> dict[str, float]:
    """The middle of a patch on the canvas: the image is 520 pixels wide."""
    return {"x": (column + 0.5) * 520 / 3, "y": (row + 0.5) * 520 / 3}


def hover(page: Page, row: int, column: int) -> str:
    page.locator("canvas").hover(position=middle(row, column))
    return page.locator(".tip").inner_text()


def test_colours_lie_over_the_patches_as_strongly_as_the_slider_says(shown: Open) -> None:
    _, page = opened(shown)
    opaque(page)
    assert colour_at(page, **middle(1, 2)) == [253, 231, 37]  # the strongest weight, the end of viridis
    assert colour_at(page, **middle(0, 0)) == [68, 1, 84]
    opaque(page, 0)
    assert colour_at(page, **middle(1, 2)) == [100, 100, 100]  # the image alone


def test_every_query_has_a_scale_of_its_own(shown: Open) -> None:
    tile = np.diag([1.0, 1, 1, 0.1, 1, 1])
    _, page = opened(shown, weights=tile[1], tile=tile)
    opaque(page)
    page.locator("canvas").click(position=middle(1, 0))
    page.mouse.move(1200, 800)
    painted(page)
    assert colour_at(page, **middle(1, 0)) == [253, 231, 37]
    assert colour_at(page, **middle(0, 1)) == [68, 1, 84]


def test_the_scale_changes_colours_without_the_host(shown: Open) -> None:
    part, page = opened(shown)
    opaque(page)
    before = colour_at(page, **middle(0, 2))
    page.get_by_label("Colour scale").select_option("linear")
    painted(page)
    assert colour_at(page, **middle(0, 2)) != before
    assert part.events == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_signed_weights_are_blue_and_orange(shown: Open, browser_page: Page, scheme: Any) -> None:
    browser_page.emulate_media(color_scheme=scheme)
    _, page = opened(shown, weights=[1.0, -1.0, 0, 0, 0, 0], query=4, signed=True)
    opaque(page)
    plus, minus = (colour_at(page, **middle(0, column)) for column in (0, 1))
    assert plus[2] > plus[0] + 60, plus
    assert minus[0] > minus[2] + 60, minus


def test_hover_says_row_column_and_weight(shown: Open) -> None:
    _, page = opened(shown, weights=[0.0, 0.1, NAN, 0.3, 0.4, 1.0])
    assert hover(page, 1, 1) == "row 1, column 1: 0.4 weight"
    assert hover(page, 0, 2) == "row 0, column 2: not there"
    assert page.locator(".status").inner_text() == "row 0, column 2: not there"
    page.mouse.move(1200, 800)
    assert page.locator(".tip").is_hidden()


def test_a_click_chooses_the_query_and_tells_the_host_once(shown: Open) -> None:
    part, page = opened(shown)
    page.locator("canvas").click(position=middle(1, 0))
    assert part.events == [("query", 3)]
    assert page.locator(".caption").inner_text() == "Colour: where the query (row 1, column 0) looks"
    page.locator("canvas").click(position=middle(1, 0))
    assert part.events == []  # it is the query already


def test_arrow_keys_move_the_query_and_stop_at_the_edge(shown: Open) -> None:
    part, page = opened(shown)
    page.locator("canvas").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert part.events == [("query", 5)]  # the keys in one go are one question
    page.keyboard.press("Home")
    assert part.events == [("query", 0)]


@pytest.mark.parametrize(("direction", "said"), [("from", "1 weight"), ("to", "0.25 weight")])
def test_another_query_is_coloured_at_once_where_all_weights_are_there(shown: Open, direction: str, said: str) -> None:
    tile = np.zeros((6, 6))
    tile[3, 5], tile[5, 3] = 1.0, 0.25
    _, page = opened(shown, weights=np.zeros(6), tile=tile, direction=direction)
    page.locator("canvas").click(position=middle(1, 0))
    assert hover(page, 1, 2) == f"row 1, column 2: {said}"


def test_tokens_that_are_no_patches_are_buttons(shown: Open) -> None:
    part, page = opened(shown, weights=np.linspace(0, 1, 8), extra=["class token", EVIL], query=0)
    first, second = page.get_by_role("button").all()
    assert second.inner_text() == EVIL
    assert first.get_attribute("aria-pressed") == "true"
    assert "(class token)" in page.locator(".caption").inner_text()
    second.press("Enter")
    assert part.events == [("query", 1)]
    page.locator("canvas").click(position=middle(0, 0))
    assert part.events == [("query", 2)]
    assert page.locator("img").count() == 0


def test_windows_are_outlined(shown: Open) -> None:
    _, page = opened(shown, query=5)
    opaque(page, 0)
    assert colour_at(page, x=60, y=2) == [100, 100, 100]
    _, page = opened(shown, query=5, windows=[[0, 0, 2, 2]])
    opaque(page, 0)
    assert colour_at(page, x=60, y=2) == [255, 255, 255]


def test_new_data_is_drawn_in_place_and_the_keyboard_stays(shown: Open) -> None:
    part, page = opened(shown)
    part.live(data_of())
    page.locator("canvas").evaluate("canvas => (canvas.dataset.kept = 'yes')")
    page.locator("canvas").focus()
    opaque(page, 0.5)
    page.locator("canvas").focus()
    part.update(data_of(query=2, title=EVIL, weights=[0, 0, 0, 0, 0, 2.0]))
    assert page.locator("h4").inner_text() == EVIL
    assert page.locator("canvas").get_attribute("data-kept") == "yes"
    assert page.evaluate("document.querySelector('#widget').shadowRoot.activeElement.tagName") == "CANVAS"
    assert page.get_by_label("Strength of the colours").input_value() == "0.5"
    assert page.locator(".caption").inner_text() == "Colour: where the query (row 0, column 2) looks"
    assert hover(page, 1, 2) == "row 1, column 2: 2 weight"
