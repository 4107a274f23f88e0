"""How fast the app answers, measured in the browser by its own clock, from the click to the picture.

    python tests/benchmarks/app.py [--store DIR] [--tokens 2048 32768] [--times 20] [--interactions 500] [--parts ...] [--json]

Parts:

    paint    from asking for the first page of a server that is up until its first button can be clicked
    head     from choosing another head, or layer, until its map is drawn, from a stored run
    zoom     from letting go of a box drawn on the whole map until the exact weights in it are drawn
    memory   resident memory of the server before and after many changes of head, layer and view

The floor is what Streamlit itself takes: a page with one select box and one line of text, measured in the same way on the same
machine (``empty``). Runs that DIR does not hold yet are captured first (32,768 tokens: minutes).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "apps"))

from playwright.sync_api import Locator, Page
from served import browser, calm, choose, component, opened, served, starts

MODEL = "tiny-softmax"
PARTS = ("paint", "empty", "head", "zoom", "memory")
EMPTY = """import streamlit as st

@st.fragment
def part():
    chosen = st.selectbox("Head", [str(i) for i in range(8)])
    st.html(f"<h4>head {chosen}</h4>")

st.title("empty")
part()
"""
WATCH = """(element) => {
  window.at = {};
  addEventListener("pointerdown", () => (at.down = performance.now()), true);
  addEventListener("pointerup", () => (at.up = performance.now()), true);
  new MutationObserver(() => (at.drawn = performance.now())).observe(
    element, {subtree: true, childList: true, characterData: true});
}"""

SAYS = """(element, text) => new Promise((done) => {
  const look = () => element.textContent.includes(text) && done();
  new MutationObserver(look).observe(element, {subtree: true, childList: true, characterData: true});
  look();
})"""
"""Waits without looking again and again, which would take time from the page."""


def runs(store: Path, lengths: list[int]) -> dict[int, str]:
    """Keys of the captured runs by their tokens; captures what is missing."""
    import workbench as wb
    from workbench.jobs.job import Job

    jobs = {tokens: Job("capture", model=MODEL, args={"filler": tokens - 1}) for tokens in lengths}
    done = wb.run_jobs(list(jobs.values()), store / "app", workers=1, threads=os.cpu_count())
    if done.failed:
        raise SystemExit(f"a capture failed: {wb.JobStore(store / 'app').failure(done.failed[0])['message']}")
    cells = wb.JobStore(store / "app")
    found = {}
    for key in cells.keys():  # noqa: SIM118
        args = cells.job(key).args
        if cells.job(key).probe == "capture" and args.get("filler", 0) + 1 in jobs:
            found[args["filler"] + 1] = key
    return found


@contextlib.contextmanager
def page_of_browser() -> Iterator[Page]:
    with browser() as started:
        page = started.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        yield page


def told(name: str, times: list[float], **more: Any) -> dict[str, Any]:
    return {
        "what": name,
        **more,
        "median_ms": 1000 * median(times),
        "slowest_ms": 1000 * max(times),
        "times": len(times),
    }


def paint(store: Path, times: int) -> dict[str, Any]:
    """Every time a new server and a new browser: nothing is cached, and torch is being imported behind the page."""
    found = []
    for _ in range(times):
        with served(store) as (url, _), page_of_browser() as page:
            began = time.perf_counter()
            page.goto(url)
            page.get_by_text("Show me a sink", exact=True).wait_for()
            found.append(time.perf_counter() - began)
    return told("first paint of a fresh server", found)


def change(page: Page, watched: Locator, label: str, option: str, text: str) -> float:
    """Seconds from the pointer's press on an option until the watched element says ``text``."""
    choose(page, label, option)
    watched.evaluate(SAYS, text)
    at = page.evaluate("at")
    return (at["drawn"] - at["down"]) / 1000


def heads(page: Page, url: str, key: str, tokens: int, times: int) -> Iterator[dict[str, Any]]:
    opened(page, url, "head", run=key, layer="0", head="0")
    title = component(page, "tilemap map").locator("h4")
    title.evaluate(WATCH)
    for label, word in (("Head", "head"), ("Layer", "layer")):
        number = 8 if label == "Head" else 4
        found = []
        for turn in range(times + 2):
            option = str((turn + 1) % number)
            found.append(change(page, title, label, option, f"{word} {option}"))
            calm(page)
        yield told(f"another {word}", found[2:], tokens=tokens)


def zooms(page: Page, url: str, key: str, tokens: int, times: int) -> Iterator[dict[str, Any]]:
    """A box on the whole map, about a fiftieth of its side, and one in what is seen then, about 60 tokens a side."""
    first, second = [], []
    for turn in range(times):
        opened(page, url, "head", run=key, layer=str(turn % 4), head=str(turn % 8))
        note = component(page, "tilemap map").locator(".note")
        note.evaluate(WATCH)
        first.append(boxed(page, note, 6, note.inner_text()))
        calm(page)
        second.append(boxed(page, note, 60 if tokens > 4096 else 200, ""))
        note.filter(has_text="exact").wait_for()
    yield told("zoom into the whole map", first, tokens=tokens)
    yield told("zoom to exact weights", second, tokens=tokens)


def boxed(page: Page, note: Locator, side: int, before: str) -> float:
    """Seconds from letting go of a box of ``side`` pixels until the new picture is drawn."""
    box = page.locator("canvas.map").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] * 0.35, box["y"] + box["height"] * 0.45
    page.evaluate("at.drawn = 0")
    page.keyboard.down("Shift")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + side, y + side, steps=3)
    page.mouse.up()
    page.keyboard.up("Shift")
    page.wait_for_function("at.drawn > at.up")
    at = page.evaluate("at")
    return (at["drawn"] - at["up"]) / 1000


def empty(times: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "empty.py"
        script.write_text(EMPTY)
        options = ["--server.address", "127.0.0.1", "--server.headless", "true", "--browser.gatherUsageStats", "false"]
        command = [sys.executable, "-m", "streamlit", "run", str(script), *options]
        with starts(lambda port: [*command, "--server.port", str(port)]) as (url, _), page_of_browser() as page:
            opened(page, url)
            said = page.locator('[data-testid="stMain"]')
            said.evaluate(WATCH)
            found = []
            for turn in range(times + 2):
                found.append(change(page, said, "Head", str((turn + 1) % 8), f"head {(turn + 1) % 8}"))
                calm(page)
    return told("an empty page: another choice", found[2:])


def memory(page: Page, url: str, process: subprocess.Popen[str], key: str, tokens: int, number: int) -> dict[str, Any]:
    import psutil

    server = psutil.Process(process.pid)
    opened(page, url, "head", run=key)
    title = component(page, "tilemap map").locator("h4")
    title.evaluate(WATCH)
    sizes = []
    for turn in range(number):
        option = str((turn + 1) % 8)
        change(page, title, "Head", option, f"head {option}")
        if turn % 8 == 7:
            calm(page)
            choose(page, "Layer", str((turn // 8 + 1) % 4))
            title.filter(has_text=f"layer {(turn // 8 + 1) % 4}").wait_for()
            page.locator("canvas.map").first.press("+")
        if turn % 50 == 49:
            calm(page)
            sizes.append((turn + 1, server.memory_info().rss))
    return {
        "what": "resident memory of the server", "tokens": tokens, "interactions": number,
        "mb": {count: round(size / 1e6) for count, size in sizes},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 32768])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--interactions", type=int, default=500)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parts = options.parts.split(",")
    for part in parts:
        if part not in PARTS:
            raise SystemExit(f"no part {part!r}; there are {', '.join(PARTS)}")
    with contextlib.ExitStack() as stack:
        store = options.store or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = []
        for row in measured(store, parts, options):
            rows.append(row)
            if not options.json:
                print(line(row), flush=True)
    if options.json:
        print(json.dumps({"benchmark": "app", "cores": os.cpu_count(), "load": os.getloadavg()[0], "rows": rows}))


def line(row: dict[str, Any]) -> str:
    where = f" at {row['tokens']:,} tokens" if "tokens" in row else ""
    if "mb" in row:
        return f"{row['what']}{where}: " + ", ".join(f"{mb} MB after {n}" for n, mb in row["mb"].items())
    return (
        f"{row['what']}{where}: median {row['median_ms']:.0f} ms, slowest {row['slowest_ms']:.0f} ms of {row['times']}"
    )


def measured(store: Path, parts: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if "paint" in parts:
        yield paint(store, min(5, options.times))
    if "empty" in parts:
        yield empty(options.times)
    if not {"head", "zoom", "memory"} & set(parts):
        return
    keys = runs(store, options.tokens)
    with served(store) as (url, process), page_of_browser() as page:
        for tokens, key in sorted(keys.items()):
            if "head" in parts:
                yield from heads(page, url, key, tokens, options.times)
            if "zoom" in parts:
                yield from zooms(page, url, key, tokens, min(8, options.times))
        if "memory" in parts:
            tokens = max(keys)
            yield memory(page, url, process, keys[tokens], tokens, options.interactions)


if __name__ == "__main__":
    main()
