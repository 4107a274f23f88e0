"""Pages of the app under Streamlit's own test harness."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from streamlit.testing.v1 import AppTest

import workbench.apps

MAIN = Path(next(iter(workbench.apps.__path__))) / "main.py"
_WAIT = 180.0


def open_page(name: str, store: Any, **query: str) -> AppTest:
    """The page ``name`` on the results folder ``store`` with ``query`` in its address, run until no job is under way."""
    sys.argv = ["main.py", "--store", str(store)]
    page = AppTest.from_file(str(MAIN), default_timeout=120)
    page.run()
    for key, value in query.items():
        page.query_params[key] = value
    page.switch_page(f"views/{name}.py")
    return settled(page.run())


def settled(page: AppTest) -> AppTest:
    """The page run again until no job is under way; a page that raises fails here."""
    ends = time.monotonic() + _WAIT
    while True:
        assert not page.exception, page.exception[0].stack_trace
        if not under_way(page):
            return page
        assert time.monotonic() < ends, f"after {_WAIT:.0f} s: {[one.value for one in page.info]}"
        time.sleep(0.2)
        page.run()


def under_way(page: AppTest) -> bool:
    """Whether the page waits for a job."""
    return any("its link brings you back here" in one.value for one in page.info)


def python_of(page: AppTest) -> list[str]:
    """The code of every "copy as Python" of the page."""
    return [code.value for code in page.code if code.language == "python"]


def drawn(page: AppTest, key: str) -> dict[str, Any]:
    """What the component with that key was given to draw."""
    found = {one.key: one.proto for one in page.get("bidi_component")}
    assert key in found, f"no component {key!r}; the page has {sorted(found)}"
    data: dict[str, Any] = json.loads(found[key].json)["data"]
    return data
