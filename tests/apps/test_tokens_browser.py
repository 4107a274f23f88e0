"""Coloured text in a real browser: what is written, how it is coloured, and how a token is chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from browser import Shown
from playwright.sync_api import Page

from workbench.apps.components.tokens import TOKENS, tokens_data

Open = Callable[..., Shown]
EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def page_of(labels: list[str], **options: Any) -> dict[str, Any]:
    n = len(labels)
    whole = {"start": 0, "total": n, "focus": n - 1, "direction": "from", "weights": np.linspace(0, 1, n)}
    return tokens_data(labels, **{**whole, **options})


def words(n: int) -> list[str]:
    return [f"Ġword{i}" for i in range(n)]


def colours(page: Page) -> list[tuple[int, ...] | None]:
    found = page.locator(".tokens").evaluate(
        "(tokens) => [...tokens.querySelectorAll('.token')].map((token) => getComputedStyle(token).backgroundColor)"
    )
    numbers = [tuple(map(int, re.findall(r"\d+", colour))) for colour in found]
    return [None if len(colour) == 4 else colour for colour in numbers]  # rgba(0, 0, 0, 0) is transparent


def status(page: Page) -> str:
    return re.sub("[\u2068\u2069]", "", page.locator(".status").inner_text())


def test_markup_in_tokens_is_text_and_never_runs(shown: Open, browser_page: Page) -> None:
    shown(TOKENS, page_of(["a", EVIL, "&lt;"], title=EVIL))
    assert browser_page.locator(".token").all_inner_texts() == ["a", EVIL, "&lt;"]
    assert browser_page.locator("h4").inner_text() == EVIL
    assert browser_page.locator(".workbench img, .workbench script").count() == 0
    assert browser_page.evaluate("window.hacked") is None


def test_signs_of_tokenizers_are_read_as_what_they_mean(shown: Open, browser_page: Page) -> None:
    labels = ["Ġthe", "▁cat", "Ċ", "\n", "\t", "Ġ", "  ", "", "##", "\u200b", "\x00", "\u00a0", "👩‍👩‍👧", "مرحبا"]
    shown(TOKENS, page_of(labels))
    written = browser_page.locator(".token").evaluate_all("(tokens) => tokens.map((token) => token.textContent)")
    assert written == [" the", " cat", "↵", "↵", "⇥", "␣", "␣␣", "∅", "##", "∅", "␀", "⍽", "👩‍👩‍👧", "مرحبا"]
    breaks = browser_page.locator(".tokens br").count()
    assert breaks == 2
    isolated = browser_page.locator(".token").last.evaluate("(token) => getComputedStyle(token).unicodeBidi")
    assert isolated == "isolate"


def test_words_without_signs_have_spaces_between_them(shown: Open, browser_page: Page) -> None:
    shown(TOKENS, page_of(["play", "##ing", "the", "game"]))
    assert browser_page.locator(".tokens").evaluate("(tokens) => tokens.textContent") == "playing the game"
    shown(TOKENS, page_of(["Ġplay", "ing", "Ġthe"]))
    assert browser_page.locator(".tokens").evaluate("(tokens) => tokens.textContent") == " playing the"


def test_text_from_right_to_left_runs_so(shown: Open, browser_page: Page) -> None:
    part = shown(TOKENS, page_of(["مرحبا", "بالعالم", "هذا", "abc"]))
    boxes = [browser_page.locator(".token").nth(i).bounding_box() for i in range(4)]
    lefts = [box["x"] for box in boxes if box]
    assert lefts == sorted(lefts, reverse=True)
    browser_page.locator(".token").nth(1).click()
    browser_page.keyboard.press("ArrowLeft")
    browser_page.keyboard.press("Enter")
    assert part.events == [("focus", 1), ("focus", 2)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_stronger_weights_stand_out_more_and_stay_readable(shown: Open, browser_page: Page, scheme: Any) -> None:
    browser_page.emulate_media(color_scheme=scheme)
    shown(TOKENS, page_of(words(6), weights=[0.0, 0.1, 0.3, 0.6, 1.0, np.nan]))
    shades = colours(browser_page)
    assert shades[5] is None
    bright = [sum(shade) for shade in shades[:5] if shade]
    assert bright == sorted(bright, reverse=scheme == "light")
    assert len(set(bright)) == 5
    ratios = browser_page.locator(".token").evaluate_all(CONTRAST)
    assert min(ratios) >= 4.5, ratios


CONTRAST = """(elements) => elements.map((element) => {
    const light = (css) => {
        const paint = new OffscreenCanvas(1, 1).getContext("2d");
        paint.fillStyle = css;
        paint.fillRect(0, 0, 1, 1);
        const shares = [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255);
        const [r, g, b] = shares.map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_around_the_text_is_readable(shown: Open, browser_page: Page, scheme: Any) -> None:
    browser_page.emulate_media(color_scheme=scheme)
    shown(TOKENS, page_of(words(6), total=600, title="title"))
    browser_page.locator(".token").first.hover()
    found = browser_page.locator("h4, button:not(:disabled), .note, label, .caption, .legend, .status")
    assert found.count() >= 8
    assert min(found.evaluate_all(CONTRAST)) >= 4.5


def test_negative_weights_are_orange(shown: Open, browser_page: Page) -> None:
    shown(TOKENS, page_of(words(3), weights=[-0.8, 0.0, 0.8], signed=True))
    minus, zero, plus = colours(browser_page)
    assert minus
    assert plus
    assert minus[0] > minus[2] + 60
    assert plus[2] > plus[0] + 60
    assert zero == (247, 247, 247)
    assert "−0.8" in browser_page.locator(".legend").inner_text()


def test_hover_tells_both_directions_and_colours_by_the_token(shown: Open, browser_page: Page) -> None:
    tile = np.array([[1.0, np.nan, np.nan], [0.75, 0.25, np.nan], [0.1, 0.3, 0.6]])
    shown(TOKENS, page_of(words(3), focus=2, weights=tile[2], tile=tile, direction="from"))
    before = colours(browser_page)
    assert "what token 2 “\u2068word2\u2069” attends to" in browser_page.locator(".caption").inner_text()
    browser_page.locator(".token").nth(1).hover()
    assert status(browser_page) == (
        "token 1 “word1” · from focus 2: 0.3 · to focus: not there · attends most to 0 “word0”: 0.75"
    )
    after = colours(browser_page)
    assert after[2] is None
    assert after[0] != before[0]
    browser_page.mouse.move(5, 5)
    assert colours(browser_page) == before
    assert status(browser_page) == ""


def test_the_other_direction_takes_columns(shown: Open, browser_page: Page) -> None:
    tile = np.array([[1.0, np.nan, np.nan], [0.75, 0.25, np.nan], [0.1, 0.3, 0.6]])
    shown(TOKENS, page_of(words(3), focus=0, weights=tile[:, 0], tile=tile, direction="to"))
    assert "which tokens attend to token 0" in browser_page.locator(".caption").inner_text()
    browser_page.locator(".token").nth(1).hover()
    assert status(browser_page) == (
        "token 1 “word1” · to focus 0: 0.75 · from focus: not there · most attended by 2 “word2”: 0.3"
    )
    assert [shade is None for shade in colours(browser_page)] == [True, False, False]


def test_without_a_tile_hover_tells_the_weight_and_leaves_the_colours(shown: Open, browser_page: Page) -> None:
    shown(TOKENS, page_of(words(3), weights=[0.125, 0.5, np.nan]))
    before = colours(browser_page)
    browser_page.locator(".token").nth(0).hover()
    assert status(browser_page) == "token 0 “word0” · from focus 2: 0.125"
    browser_page.locator(".token").nth(2).hover()
    assert status(browser_page) == "token 2 “word2” · from focus 2: not there"
    assert colours(browser_page) == before


def test_click_enter_and_number_choose_a_token(shown: Open, browser_page: Page) -> None:
    part = shown(TOKENS, page_of(words(256), start=256, total=1000, focus=300, weights=np.ones(256)))
    browser_page.locator(".token").nth(10).click()
    assert part.events == [("focus", 266)]
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Enter", "End", "Space"):
        browser_page.keyboard.press(key)
    assert part.events == [("focus", 267), ("focus", 511)]
    box = browser_page.get_by_label("Position of a token")
    box.fill("260")
    box.press("Enter")
    assert part.events == [("focus", 260)]
    box.fill("999")
    browser_page.get_by_role("button", name="Go").click()
    assert part.events == [("page", 768), ("focus", 999)]


def test_arrows_go_from_line_to_line(shown: Open, browser_page: Page) -> None:
    browser_page.set_viewport_size({"width": 500, "height": 900})
    part = shown(TOKENS, page_of(words(60)))
    browser_page.locator(".token").nth(1).click()
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
        browser_page.keyboard.press(key)
    (_, (_, below)) = part.events
    boxes = [browser_page.locator(".token").nth(i).bounding_box() for i in (1, below)]
    assert boxes[0]
    assert boxes[1]
    assert 20 < boxes[1]["y"] - boxes[0]["y"] < 40
    assert abs(boxes[1]["x"] - boxes[0]["x"]) < 60


def test_pages_are_turned_by_button_and_key(shown: Open, browser_page: Page) -> None:
    page = {"start": 256, "total": 1000, "focus": 300, "weights": np.ones(256)}
    part = shown(TOKENS, page_of(words(256), **page))
    assert "tokens 256–511 of 1,000" in browser_page.locator(".tools").first.inner_text()
    browser_page.get_by_role("button", name="Next").click()
    browser_page.get_by_role("button", name="Previous").click()
    assert part.events == [("page", 512), ("page", 0)]
    browser_page.locator(".token").first.focus()
    for key in ("PageDown", "ArrowLeft"):
        browser_page.keyboard.press(key)
    assert part.events == [("page", 512), ("page", 0)]
    shown(TOKENS, page_of(words(10)))
    assert browser_page.get_by_role("button", name="Next").is_disabled()
    assert browser_page.get_by_role("button", name="Previous").is_disabled()


def test_the_keyboard_stays_where_it_was_when_the_page_turns(shown: Open, browser_page: Page) -> None:
    first = page_of(words(256), total=300, focus=0, weights=np.ones(256))
    second = page_of(["Ġ" + str(i) for i in range(44)], start=256, total=300, focus=0, weights=np.ones(44))
    part = shown(TOKENS, first)
    part.live(first)
    browser_page.locator(".token").last.focus()
    browser_page.keyboard.press("ArrowRight")
    assert part.events == [("page", 256)]
    part.update(second)
    assert browser_page.locator(".token:focus").get_attribute("aria-label") == "256  0"
    assert "token 0, on another page, attends to" in browser_page.locator(".caption").inner_text()
    browser_page.keyboard.press("ArrowLeft")
    part.update(first)
    assert browser_page.locator(".token:focus").get_attribute("aria-label") == "255  word255"


def test_new_weights_recolour_the_same_elements(shown: Open, browser_page: Page) -> None:
    part = shown(TOKENS, page_of(words(4)))
    part.live(page_of(words(4)))
    browser_page.locator(".token").first.evaluate("(token) => { token.known = true; }")
    before = colours(browser_page)
    part.update(page_of(words(4), weights=[1, 0, 0, 0]))
    assert browser_page.locator(".token").first.evaluate("(token) => token.known")
    assert colours(browser_page) != before


def test_one_token_of_a_hundred_thousand_letters_stays_in_the_page(shown: Open, browser_page: Page) -> None:
    shown(TOKENS, page_of(["x" * 100_000, "b"]))
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= 1280
    browser_page.locator(".token").last.hover()
    assert "“word" not in status(browser_page)
    assert len(status(browser_page)) < 200
