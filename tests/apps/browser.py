"""Real headless Chromium for tests of what is drawn, driven through Playwright."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect
from served import browser, program

from workbench.apps.components.component import Component

_PATIENCE = 30_000  # milliseconds; machines that run many tests at once are slow
LOCAL = ("127.0.0.1", "localhost", "")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for the tests of a file."""
    if not program():
        pytest.skip("no Chromium: apt-get install chromium, or name its program in the variable CHROMIUM")
    with browser() as started:
        yield started


@pytest.fixture
def browser_page(chromium: Browser) -> Iterator[Page]:
    """A page of 1280 x 900 in the light scheme. The test fails if a script in it raises or asks another machine."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.set_default_timeout(_PATIENCE)
    expect.set_options(timeout=_PATIENCE)
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(f"script: {error.stack or error}"))
    page.on("request", lambda asked: urlsplit(asked.url).hostname in LOCAL or _foreign(asked.url, broken))
    yield page
    page.close()
    assert not broken, broken


def _foreign(url: str, broken: list[str]) -> None:
    if not url.startswith(("data:", "blob:", "file:", "about:")):
        broken.append(f"asked for {url}")


class Shown:
    """A component in a page of its own: what it sent, and new data for it."""

    def __init__(self, page: Page, component: Component, data: Mapping[str, Any], folder: Path) -> None:
        self.page, self.component = page, component
        self.file = folder / f"{component.name}.html"
        self.file.write_text(component.page(data, title="test"), encoding="utf-8")
        page.goto(self.file.as_uri())
        page.evaluate("window.events = []; addEventListener('workbench', (event) => events.push(event.detail))")
        page.locator(".workbench > *").first.wait_for(state="attached")
        page.wait_for_timeout(150)

    @property
    def events(self) -> list[tuple[str, Any]]:
        """What was sent since the last call, once the pause after a movement is over."""
        self.page.wait_for_timeout(250)
        sent = self.page.evaluate("events.splice(0)")
        return [(one["event"], one["value"]) for one in sent]

    def live(self, data: Mapping[str, Any]) -> None:
        """From now on the page shows the widget's script with a model of which :meth:`update` changes the data."""
        script = self.component.widget(data)._esm
        self.page.goto("about:blank")
        self.page.set_content('<div id="widget"></div>')
        self.page.evaluate(
            """async ([script, data]) => {
                window.events = [];
                const heard = [];
                window.model = {
                    data,
                    get: (name) => model[name],
                    set: (name, value) => { model[name] = value; },
                    save_changes: () => events.push(model.event),
                    on: (name, call) => heard.push(call),
                    off: () => heard.splice(0),
                    update: (data) => { model.data = data; heard.forEach((call) => call()); },
                };
                const url = URL.createObjectURL(new Blob([String(script)], {type: "text/javascript"}));
                const {default: widget} = await import(url);
                window.leave = widget.render({model, el: document.querySelector("#widget")});
            }""",
            [str(script), data],
        )
        self.page.wait_for_timeout(150)

    def update(self, data: Mapping[str, Any]) -> None:
        self.page.evaluate("(data) => model.update(data)", data)
        self.page.wait_for_timeout(150)


@pytest.fixture
def shown(browser_page: Page, tmp_path: Path) -> Callable[[Component, Mapping[str, Any]], Shown]:
    """``shown(TILEMAP, data)`` opens a component in ``browser_page``."""
    return lambda component, data: Shown(browser_page, component, data, tmp_path)
