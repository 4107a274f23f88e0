"""The main control of every page, worked in a real browser: what is drawn changes, and nothing goes wrong."""

from __future__ import annotations

import hashlib

import pytest
from playwright.sync_api import Page, expect
from served import calm, choose, component, opened, served

import workbench as wb


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with served(tmp_path_factory.mktemp("controls")) as (url, _):
        yield url


def press(page: Page, text: str) -> None:
    """One part of a segmented control, or a button."""
    page.locator('[data-testid="stMain"]').get_by_text(text, exact=True).first.click()


def said(page: Page) -> str:
    """All that is shown: words, pictures, drawings."""
    main = page.locator('[data-testid="stMain"]')
    drawn = main.evaluate(
        """main => {
          const found = [];
          const walk = (node) => {
            if (node.shadowRoot) walk(node.shadowRoot);
            if (node.tagName === "CANVAS") found.push(node.toDataURL());
            if (node.tagName === "IMG") found.push(node.src);
            if (node.tagName === "svg") found.push(node.outerHTML);
            for (const child of node.children ?? []) walk(child);
          };
          walk(main);
          return found.join(" ");
        }"""
    )
    return main.inner_text() + hashlib.sha256(drawn.encode()).hexdigest()


def fill(page: Page, label: str, text: str) -> None:
    field = page.get_by_label(label, exact=True).first
    field.fill(text)
    field.press("Control+Enter" if field.evaluate("e => e.tagName") == "TEXTAREA" else "Enter")


def click_patch(page: Page) -> None:
    canvas = component(page, "patches").locator("canvas").first
    box = canvas.bounding_box()
    assert box is not None
    canvas.click(position={"x": box["width"] * 0.1, "y": box["height"] * 0.9})


def click_node(page: Page) -> None:
    component(page, "circuit graph").locator("svg.graph").get_by_text("a2.h0", exact=True).first.click(force=True)
    expect(component(page, "circuit map").locator("canvas.map")).to_be_visible(timeout=60_000)


def small_grid(page: Page) -> None:
    fill(page, "The grid", "name: naps\nprobe: sleep\nseconds: 0.05\nseed: [0, 1, 2]\n")
    calm(page)
    page.get_by_role("button", name="Start", exact=True).click()
    calm(page)
    press(page, "Progress")
    page.get_by_text("3 of 3").first.wait_for(timeout=90_000)


def report(page: Page) -> None:
    page.get_by_role("button", name="Make the report").click()
    page.locator("iframe").first.wait_for(timeout=90_000)


CONTROLS = {
    "model": lambda page: choose(page, "Model", "tiny-gated"),
    "capture": lambda page: choose(page, "Input", "made-up text"),
    "atlas": lambda page: choose(page, "Sorted by", "sink"),
    "head": lambda page: choose(page, "First token", "rest renormalised"),
    "sinks": lambda page: press(page, "Over several texts"),
    "retrieval": lambda page: press(page, "Without the heads"),
    "heads": lambda page: press(page, "Roles"),
    "rhythm": lambda page: press(page, "FAI"),
    "circuit": click_node,
    "features": lambda page: choose(page, "Writes through", "head 1"),
    "attribution": lambda page: fill(page, "Explain this token", "Mary"),
    "vision": click_patch,
    "state": lambda page: choose(page, "Tokens", "64"),
    "variants": lambda page: choose(page, "Tokens", "16"),
    "jobs": small_grid,
    "report": report,
}


@pytest.mark.parametrize("name", list(CONTROLS))
def test_the_main_control_changes_what_is_drawn(app, browser_page, name):
    page = opened(browser_page, app, name)
    before = said(page)
    CONTROLS[name](page)
    calm(page)
    page.wait_for_timeout(500)
    assert said(page) != before
    errors = page.locator('[data-testid="stAlertContentError"]')
    assert not errors.count(), errors.all_inner_texts()


def test_a_result_that_was_saved_by_a_command_is_shown_and_another_one_chosen(browser_page, tmp_path):
    import torch

    with torch.no_grad():
        run = wb.load("tiny-softmax").run("When Mary and John went", maps=wb.capture())
    wb.sinks(run).save(tmp_path / "first")
    wb.sinks(run, epsilon=0.5).save(tmp_path / "second")
    with served(tmp_path) as (url, _):
        page = opened(browser_page, url, "results")
        expect(page.locator('[data-testid="stMain"]')).to_contain_text("first")
        choose(page, "Result", "second")
        calm(page)
        assert "result=second" in page.url
        assert page.locator('[data-testid="stMain"]').locator("img").count()
