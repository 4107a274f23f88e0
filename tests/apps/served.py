"""The app as its users run it: `workbench app` in a process of its own, and a browser's page on it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_START = 60.0
_WAIT = 240_000
_QUIET = 3
"""Looks in a row at which nothing runs: between two runs of a script there is a moment without one."""


def program() -> str:
    """Where a Chromium is: the variable CHROMIUM, else the first one on the path; empty if there is none."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _PROGRAMS)), None)
    return found or ""


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium that asks nothing of anybody by itself."""
    if not program():
        raise RuntimeError("no Chromium: apt-get install chromium, or name its program in the variable CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program(), headless=True, args=list(QUIET))
        yield started
        started.close()


@contextlib.contextmanager
def served(store: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of the app on the results folder ``store``, and its process, which ends with the block."""
    command = [sys.executable, "-m", "workbench", "app", "--store", str(store), *options]
    with starts(lambda port: [*command, "--port", str(port)]) as found:
        yield found


@contextlib.contextmanager
def starts(command: Callable[[int], list[str]]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address and the process of a Streamlit server that ``command`` starts on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(command(port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _answers(url, process)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def _answers(url: str, process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + _START
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise RuntimeError(f"the app ended: {process.stdout.read() if process.stdout else ''}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{url}/_stcore/health", timeout=1)
            return
        time.sleep(0.05)
    raise RuntimeError(f"the app did not answer within {_START:.0f} s")


def opened(page: Page, url: str, name: str = "", **query: str) -> Page:
    """Open a page of the app and wait until it is drawn and no job is under way."""
    asked = "&".join(f"{key}={value}" for key, value in query.items())
    page.goto(f"{url}/{'' if name == 'home' else name}{'?' + asked if asked else ''}")
    page.locator("h1").wait_for(timeout=60_000)
    return calm(page)


def calm(page: Page) -> Page:
    """Wait until the script has run to its end, jobs included. Raises where the page shows a traceback."""
    state = page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]')
    waiting = page.get_by_text("its link brings you back here")
    ends, quiet = time.monotonic() + _WAIT / 1000, 0
    while quiet < _QUIET:
        state.wait_for(state="attached", timeout=_WAIT)
        page.wait_for_timeout(150)
        quiet = quiet + 1 if state.count() and not waiting.count() else 0
        assert time.monotonic() < ends, f"still under way: {waiting.all_inner_texts()}"
    expect(page.locator('[data-testid="stException"]')).to_have_count(0)
    return page


def choose(page: Page, label: str, option: str) -> None:
    """Choose an option of a select box by its text."""
    box = page.locator('[data-testid="stSelectbox"]').filter(has=page.get_by_text(label, exact=True)).first
    box.locator("input").click()
    page.get_by_role("option", name=re.compile(rf"^{re.escape(option)}$")).first.click()


def component(page: Page, name: str) -> Locator:
    """An element within an interactive part: its host has the key of the part as a class."""
    return page.locator(f".st-key-{re.sub('[^a-zA-Z0-9_-]', '-', name)}")
