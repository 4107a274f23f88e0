"""Files that people bring along, through the browser's file dialog: they are shown, and bad ones get a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from served import calm, component, opened, served

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with served(tmp_path_factory.mktemp("uploads")) as (url, _):
        yield url


def give(page, path):
    page.locator('input[type="file"]').set_input_files(str(path))
    return calm(page)


def test_a_text_file_is_captured_with_the_words_it_holds(app, browser_page, tmp_path):
    page = opened(browser_page, app, "capture", source="file")
    (tmp_path / "notes.txt").write_text("Ruth gave a snack to Adam. <b>שלום</b> 🦊\n" * 3, encoding="utf-8")
    give(page, tmp_path / "notes.txt")
    page.get_by_role("button", name="Capture").click()
    expect(page.get_by_text("Logit difference")).to_be_visible(timeout=60_000)
    calm(page).get_by_role("link", name="One head").click()
    expect(page.locator("h1").first).to_have_text("Head")
    tokens = component(calm(page), "tokens").get_by_role("option")
    expect(tokens.filter(has_text="snack")).to_have_count(3)
    assert page.locator("b", has_text="שלום").count() == 0


def test_a_file_that_is_no_text_gets_a_line(app, browser_page, tmp_path):
    page = opened(browser_page, app, "capture", source="file")
    (tmp_path / "notes.txt").write_bytes(b"\xff\xfe\x00snack")
    give(page, tmp_path / "notes.txt")
    expect(page.get_by_text("notes.txt is not UTF-8 text: byte 0xff at 0")).to_be_visible()


def test_a_picture_is_looked_at_and_stays_in_the_link(app, browser_page, tmp_path):
    page = opened(browser_page, app, "vision", source="upload")
    pixels = np.zeros((90, 120, 3), np.uint8)
    pixels[20:60, 30:90] = (220, 40, 40)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    give(page, tmp_path / "mine.png")
    canvas = component(page, "patches").locator("canvas").first
    expect(canvas).to_be_visible(timeout=60_000)
    assert "picture=" in page.url
    before = canvas.evaluate("c => c.toDataURL()")
    again = opened(browser_page, app, page.url.removeprefix(f"{app}/"))
    canvas = component(again, "patches").locator("canvas").first
    expect(canvas).to_be_visible(timeout=60_000)
    assert canvas.evaluate("c => c.toDataURL()") == before


def test_a_graph_file_is_drawn_and_a_wrong_one_gets_a_line(app, browser_page, tmp_path):
    page = opened(browser_page, app, "attribution", **{"from": "file"})
    give(page, GOLDEN / "feature_graph.json")
    expect(component(page, "attribution graph").locator("svg.graph")).to_be_visible(timeout=60_000)
    (tmp_path / "other.json").write_text('{"nodes": 3}')
    give(page, tmp_path / "other.json")
    expect(page.locator('[data-testid="stAlert"]').first).to_contain_text("other.json is not shown")
    expect(component(page, "attribution graph").locator("svg.graph")).to_be_visible()
    expect(page.locator('[data-testid="stException"]')).to_have_count(0)
