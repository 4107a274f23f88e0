"""Coloured examples in a real browser."""

from __future__ import annotations

import pytest

from workbench.apps.components.examples import EXAMPLES, example_row, examples_data

ROWS = [
    example_row(["The", "<i>cat</i>", "sat"], [0.0, 2.0, -1.0], at=1, note="2"),
    example_row(["Ġthe", "Ġdog", "\n"], [0.5, 0.0, 0.0], note="0.5"),
]


@pytest.fixture
def page(shown, browser_page):
    shown(EXAMPLES, examples_data([("strongest", ROWS[:1]), ("others", ROWS[1:])], title="Feature 3"))
    return browser_page


def colour(piece) -> str:
    return piece.evaluate("e => getComputedStyle(e).backgroundColor")


def test_tokens_are_text_and_coloured_by_their_number(page):
    assert page.locator("i").count() == 0
    pieces = page.locator(".piece")
    assert pieces.nth(1).inner_text() == "<i>cat</i>"
    assert pieces.nth(5).inner_text() == "↵"
    plain, strong, negative = (colour(pieces.nth(i)) for i in range(3))
    assert plain == "rgba(0, 0, 0, 0)"
    assert len({plain, strong, negative, colour(pieces.nth(3))}) == 4
    assert page.locator(".at").inner_text() == "<i>cat</i>"
    assert [one.inner_text() for one in page.locator(".group").all()] == ["strongest", "others"]


def test_spaces_stand_between_tokens_that_do_not_bring_them(page):
    rows = page.locator(".row > div")
    assert rows.nth(0).inner_text() == "The <i>cat</i> sat"
    assert rows.nth(1).text_content() == " the dog↵"


def test_the_number_of_a_token_is_told(page):
    page.locator(".piece").nth(1).hover()
    assert "2 activation" in page.locator(".status").inner_text()
    page.locator(".examples").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator(".here").inner_text() == "<i>cat</i>"
    page.keyboard.press("ArrowRight")
    assert "−1 activation" in page.locator(".status").inner_text()
    page.keyboard.press("ArrowDown")
    assert page.locator(".here").inner_text() == "↵"


def test_colours_follow_the_page(page):
    light = colour(page.locator(".piece").nth(2))
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    assert colour(page.locator(".piece").nth(2)) != light
