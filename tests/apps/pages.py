"""Pages of the app under Streamlit's own test harness."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamlit.testing.v1 import AppTest

import workbench.apps
from workbench.jobs.job import Job

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


def plotted(page: AppTest, key: str) -> Any:
    """The table behind the Vega-Lite chart with that key."""
    from streamlit.dataframe_util import convert_arrow_bytes_to_pandas_df

    found = {one.proto.id.split("-", 2)[-1]: one.proto for one in page.get("vega_lite_chart")}
    assert key in found, f"no chart {key!r}; the page has {sorted(found)}"
    return convert_arrow_bytes_to_pandas_df(found[key].data.data)


def links(page: AppTest) -> dict[str, str]:
    """The query of every link to a page, by its label."""
    return {one.proto.label: one.proto.query_string for one in page.get("page_link")}


def computed(store: Any, wanted: Callable[[], Job]) -> str:
    """The key of a job of the app on this store, once a worker has computed it."""
    from workbench.apps.screen.need import work

    sys.argv = ["main.py", "--store", str(store)]
    job = wanted()
    work().submit(job)
    ends = time.monotonic() + _WAIT
    while (state := work().state(job.key)).kind != "done":
        assert state.kind != "failed", state.message
        assert time.monotonic() < ends, f"{job.probe} took more than {_WAIT:.0f} s"
        time.sleep(0.1)
    return job.key
