"""Make the pictures of the app that the README and the documentation show.

    python docs/screenshots.py [--store DIR] [--out docs/figures/app] [--only head atlas]

Opens every page listed here in a headless Chromium on the app with the bundled models, works it as a reader would, and saves what
is on the screen. Everything that a page needs is computed by the app itself, so an empty folder will do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "apps"))

from PIL import Image
from playwright.sync_api import Page
from served import browser, calm, choose, component, opened, served

_SIZE = {"width": 1280, "height": 860}
_QUALITY = 88


def nothing(page: Page) -> None:
    """The page as it opens."""


def induction(page: Page) -> None:
    """The wall by the induction score."""
    choose(page, "Sorted by", "induction")
    calm(page)


def zoomed(page: Page) -> None:
    """A head that looks back to the sink, with a token of the text in focus."""
    component(page, "tokens").get_by_role("option").nth(120).click()
    calm(page)


PAGES: dict[str, tuple[str, dict[str, str], str, Callable[[Page], None]]] = {
    "home": ("home", {}, "light", nothing),
    "atlas": ("atlas", {}, "light", induction),
    "head": ("head", {"layer": "3", "head": "1"}, "light", zoomed),
    "head-dark": ("head", {"layer": "2", "head": "3", "sink": "renormalise"}, "dark", nothing),
    "sinks": ("sinks", {}, "light", nothing),
    "retrieval": ("retrieval", {}, "light", nothing),
    "circuit": ("circuit", {}, "light", nothing),
    "features": ("features", {}, "light", nothing),
    "vision": ("vision", {}, "light", nothing),
    "state": ("state", {}, "dark", nothing),
}
"""File name: page, its address, colour scheme, and what is done on it before the picture is taken."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures" / "app")
    parser.add_argument("--only", nargs="+", choices=list(PAGES), default=list(PAGES))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        store = options.store or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, _ = stack.enter_context(served(store))
        chromium = stack.enter_context(browser())
        for name in options.only:
            page_name, query, scheme, work = PAGES[name]
            page = chromium.new_page(viewport=_SIZE, color_scheme=scheme, reduced_motion="reduce")
            opened(page, url, page_name, **query)
            work(page)
            page.locator("h1").scroll_into_view_if_needed()
            page.mouse.move(1, 1)
            page.wait_for_timeout(800)
            path = options.out / f"{name}.webp"
            Image.open(BytesIO(page.screenshot())).convert("RGB").save(path, quality=_QUALITY, method=6)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
            page.close()


if __name__ == "__main__":
    main()
