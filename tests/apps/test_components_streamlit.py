"""Components in a running Streamlit server: events reach their callbacks, in the script and in a fragment of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect
from served import starts

EDGE, TOP = 44, 8
"""Pixels on the canvas beside and above a map whose axes hold positions of two digits."""

SCRIPT = """
import time
import numpy as np
import streamlit as st
from workbench.apps.components.tilemap import TILEMAP, tilemap_data
from workbench.apps.components.tokens import TOKENS, tokens_data

state = st.session_state
state.setdefault("log", [])
state.runs = state.get("runs", 0) + 1
heard = lambda name: (lambda value: state.log.append([name, value]))
data = tilemap_data(np.eye(64), queries=64, keys=64, view=[0, 64, 0, 64], size=1, exact=True, title="map")
TILEMAP.show(data, key="whole", on={"cell": heard("cell"), "view": heard("view")})

@st.fragment
def part():
    state.parts = state.get("parts", 0) + 1
    time.sleep(0.3)  # events come while this is still running
    focus = next((value for name, value in reversed(state.log) if name == "focus"), 0)
    labels = [f" word{i}" for i in range(16)]
    TOKENS.show(tokens_data(labels, start=0, total=64, focus=focus, direction="from", weights=np.arange(16),
                size=16),
                key="part", on={"focus": heard("focus"), "page": heard("page")})
    st.text(f"log {state.log} parts {state.parts}")

part()
st.text(f"runs {state.runs}")
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    script = tmp_path_factory.mktemp("app") / "app.py"
    script.write_text(SCRIPT)
    quiet = ["--server.headless=true", "--browser.gatherUsageStats=false", "--server.address=127.0.0.1"]
    command = [sys.executable, "-m", "streamlit", "run", str(script), *quiet]
    with starts(lambda port: [*command, f"--server.port={port}"]) as (url, _):
        yield url


@pytest.fixture
def app(address: str, browser_page: Page) -> Page:
    browser_page.goto(address)
    expect(browser_page.get_by_text("log [] parts 1")).to_be_visible()
    expect(browser_page.locator(".token").first).to_be_visible()
    return browser_page


def test_an_event_calls_its_callback_once_and_runs_the_script(app: Page) -> None:
    app.locator("canvas").click(position={"x": EDGE + 5, "y": TOP + 5})
    expect(app.get_by_text("log [['cell', [0, 0]]] parts 2")).to_be_visible()
    expect(app.get_by_text("runs 2")).to_be_visible()


def test_an_event_in_a_fragment_runs_the_fragment_alone(app: Page) -> None:
    app.locator(".token").nth(3).click()
    expect(app.get_by_text("log [['focus', 3]] parts 2")).to_be_visible()
    expect(app.get_by_text("runs 1")).to_be_visible()
    expect(app.locator(".token.focus")).to_have_attribute("aria-label", "3  word3")


def test_two_events_at_once_and_quick_ones_in_a_row_all_arrive(app: Page) -> None:
    box = app.get_by_label("Position of a token")
    box.fill("40")
    box.press("Enter")
    expect(app.get_by_text("log [['page', 32], ['focus', 40]] parts 2")).to_be_visible()
    for i in (1, 5, 2):
        app.locator(".token").nth(i).click()
        app.wait_for_timeout(120)  # shorter than a run of the fragment
    expect(
        app.get_by_text("log [['page', 32], ['focus', 40], ['focus', 1], ['focus', 5], ['focus', 2]]")
    ).to_be_visible()


def test_an_event_that_nobody_hears_runs_nothing(app: Page) -> None:
    app.get_by_label("Colour scale").select_option("log")
    app.wait_for_timeout(600)
    expect(app.get_by_text("runs 1")).to_be_visible()


def test_the_keyboard_stays_in_a_component_while_the_script_runs(app: Page) -> None:
    app.locator(".token").nth(3).click()
    expect(app.get_by_text("parts 2")).to_be_visible()
    app.keyboard.press("ArrowRight")
    app.keyboard.press("Enter")
    expect(app.get_by_text("log [['focus', 3], ['focus', 4]] parts 3")).to_be_visible()
    expect(app.locator(".token.focus")).to_have_attribute("aria-label", "4  word4")


def test_two_users_do_not_see_each_others_events(address: str, app: Page) -> None:
    app.locator(".token").nth(3).click()
    other = app.context.browser.new_page() if app.context.browser else pytest.fail("no browser")
    other.goto(address)
    expect(other.get_by_text("log [] parts 1")).to_be_visible()
    other.locator(".token").nth(7).click()
    expect(other.get_by_text("log [['focus', 7]] parts 2")).to_be_visible()
    expect(app.get_by_text("log [['focus', 3]] parts 2")).to_be_visible()
    other.close()
