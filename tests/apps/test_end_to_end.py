"""The app in a real browser: every page opens, its main control works, and what is drawn is there.

Anything the pages ask of another machine fails these tests (``browser_page``).
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import expect
from served import calm, choose, component, opened, served

from workbench.apps.screen.pages import titles

_PARTS = ("stDataFrame", "stPageLink", "stMetric", "stVegaLiteChart")
_DRAWN = ", ".join(("img, canvas, svg[role]", *(f'[data-testid="{part}"]' for part in _PARTS)))
_ASKS = '[data-testid="stAlert"], [data-testid="stButton"]'
_WAITING = ("results", "report")
"""Pages that on an empty folder say what to do first, or wait for a press."""


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with served(tmp_path_factory.mktemp("e2e")) as (url, _):
        yield url


def query(page):
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def heading(page):
    return page.locator("h1").first.inner_text()


def pixels(locator):
    """Number of colours that a canvas shows."""
    return locator.evaluate(
        "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
    )


def test_a_newcomer_sees_a_sink_a_retrieval_head_and_a_circuit_without_typing(app, browser_page):
    page = opened(browser_page, app)
    for label, title in (
        ("Show me a sink", "Sinks"),
        ("Show me a retrieval head", "Retrieval"),
        ("Show me a circuit", "Circuit"),
    ):
        page.get_by_text(label, exact=True).click()
        expect(page.locator("h1").first).to_have_text(title)
        calm(page)
        drawn = page.locator('[data-testid="stMain"]').locator("img, canvas, svg[role]").first
        expect(drawn).to_be_attached(timeout=120_000)
        if title == "Circuit":
            expect(component(page, "circuit graph").locator("h4")).to_contain_text("compiled-ioi")
        assert not page.locator('[data-testid="stAlertContentError"]').count()
        page.get_by_role("link", name=re.compile("Home")).first.click()
        expect(page.locator("h1").first).to_have_text("Attention workbench")


@pytest.mark.parametrize("name", list(titles()))
@pytest.mark.parametrize("width", [1280, 1920])
def test_every_page_draws_something_and_fits(app, browser_page, name, width):
    browser_page.set_viewport_size({"width": width, "height": 1000})
    browser_page.emulate_media(color_scheme="dark" if width == 1920 else "light")
    page = opened(browser_page, app, name)
    expected = "Attention workbench" if name == "home" else titles()[name][0]
    assert heading(page) == expected
    main = page.locator('[data-testid="stMain"]')
    assert not page.locator('[data-testid="stAlertContentError"]').count(), main.inner_text()
    expect(main.locator(f"{_DRAWN}, {_ASKS}" if name in _WAITING else _DRAWN).first).to_be_attached(timeout=120_000)
    wide = main.evaluate("m => m.scrollWidth - m.clientWidth")
    assert wide <= 1, f"{wide} pixels stand out to the right"
    cut = main.locator('[data-testid="stMetricValue"] *').evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
    )
    assert not cut, f"numbers that do not fit: {cut}"


def test_a_prompt_is_captured_and_looked_at(app, browser_page):
    page = opened(browser_page, app, "capture")
    area = page.locator("textarea")
    area.fill("The lawyer met the baker near the lake, and then the lawyer met the")
    area.press("Control+Enter")
    calm(page)
    page.get_by_role("button", name="Capture").click()
    page.get_by_text("Logit difference").wait_for(timeout=120_000)
    calm(page)
    metric = page.locator('[data-testid="stMetric"]').filter(has_text="Logit difference")
    assert metric.locator('[data-testid="stMetricValue"]').inner_text().strip() == "0"
    page.get_by_role("link", name="One head").click()
    expect(page.locator("h1").first).to_have_text("Head")
    calm(page)
    text = component(page, "tokens")
    expect(text.get_by_role("option").filter(has_text="lawyer")).to_have_count(2)
    expect(text.get_by_role("option").filter(has_text="baker")).to_have_count(1)


def test_a_head_of_the_wall_opens_and_back_returns(app, browser_page):
    page = opened(browser_page, app, "atlas")
    heads = component(page, "wall").get_by_role("option")
    expect(heads).to_have_count(32)
    assert heads.nth(19).locator(".thumb").evaluate("e => getComputedStyle(e).backgroundImage").startswith("url(")
    heads.nth(19).click()  # layer 2, head 3 of 4 x 8
    expect(page.locator("h1").first).to_have_text("Head")
    calm(page)
    assert (query(page)["layer"], query(page)["head"]) == ("2", "3")
    expect(component(page, "tilemap map").locator("h4")).to_contain_text("layer 2, head 3")
    choose(page, "Head", "5")
    expect(component(page, "tilemap map").locator("h4")).to_contain_text("layer 2, head 5")
    page.go_back()
    expect(component(page, "tilemap map").locator("h4")).to_contain_text("layer 2, head 3")
    page.go_back()
    expect(page.locator("h1").first).to_have_text("Atlas")


def test_back_undoes_one_choice_after_the_other(app, browser_page):
    page = opened(browser_page, app, "head")
    title = component(page, "tilemap map").locator("h4")
    expect(title).to_contain_text("layer 0, head 0")
    assert set(query(page)) == {"run"}
    choose(page, "Layer", "3")
    choose(page, "Head", "4")
    expect(title).to_contain_text("layer 3, head 4")
    for undone in ("layer 3, head 0", "layer 0, head 0"):
        page.go_back()
        expect(title).to_contain_text(undone)
    page.go_forward()
    expect(title).to_contain_text("layer 3, head 0")
    assert query(page)["layer"] == "3"


def test_the_head_page_zooms_selects_and_stands_in_its_address(app, browser_page):
    page = opened(browser_page, app, "head")
    choose(page, "Layer", "1")
    choose(page, "Head", "2")
    shown = component(page, "tilemap map")
    expect(shown.locator("h4")).to_contain_text("layer 1, head 2")
    canvas = shown.locator("canvas.map")
    assert pixels(canvas) > 20
    canvas.hover(position={"x": canvas.bounding_box()["width"] * 0.4, "y": canvas.bounding_box()["height"] * 0.7})
    for _ in range(12):
        page.mouse.wheel(0, -400)
        page.wait_for_timeout(50)
    page.wait_for_function("() => location.search.includes('view=')")
    calm(page)
    q0, q1, k0, k1 = map(int, query(page)["view"].split("-"))
    assert q1 - q0 < 100
    assert k1 - k0 < 100
    canvas.click(position={"x": canvas.bounding_box()["width"] * 0.4, "y": canvas.bounding_box()["height"] * 0.7})
    calm(page)
    assert q0 <= int(query(page)["focus"]) < q1
    link = page.url
    again = opened(page, link.partition("/head")[0], "head", **query(page))
    assert query(again)["view"] == f"{q0}-{q1}-{k0}-{k1}"
    expect(component(again, "tilemap map").locator("h4")).to_contain_text("layer 1, head 2")


def test_two_people_look_at_different_heads(app, chromium):
    pages = [opened(chromium.new_page(), app, "head", layer=layer) for layer in ("1", "3")]
    for page, layer in zip(pages, ("1", "3"), strict=True):
        expect(component(page, "tilemap map").locator("h4")).to_contain_text(f"layer {layer}")
        page.close()
