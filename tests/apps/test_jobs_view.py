"""The app on a store of jobs: counts, failures and cells, also while it changes and when parts of it are harmed."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_cells import sleepers, write_cell
from streamlit.testing.v1 import AppTest

from workbench.apps.jobs_view import job_stores
from workbench.apps.store import stored
from workbench.jobs.grids import put_grid
from workbench.jobs.job import Job
from workbench.jobs.store import JobStore

PAGE = Path(__file__).parents[2] / "apps" / "main.py"
POISON = Job("fail", args={"how": "<b>error</b>"})


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    """Three cells of which one is done and one has failed, two folders deep."""
    store = JobStore(tmp_path / "results" / "grid one")
    done, missing = sleepers(2)
    write_cell(store, done)
    put_grid(store, "night", [done, missing, POISON])
    store.fail(POISON, {"kind": "error", "message": "<script>no</script>", "traceback": "line 1", "attempts": 1})
    return store


@pytest.fixture
def page(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setattr("sys.argv", ["main.py", "--store", str(jobs.path.parent)])
    return AppTest.from_file(str(PAGE), default_timeout=60)


def texts(page: AppTest) -> str:
    return "\n".join(str(part.value) for part in page.text)


def test_jobs_are_found_and_their_cells_are_no_results(jobs: JobStore) -> None:
    assert [store.path for store in job_stores(jobs.path.parent)] == [jobs.path]
    assert [store.path for store in job_stores(jobs.path)] == [jobs.path]
    assert stored(jobs.path.parent) == []


def test_page_tells_counts_failures_and_cells(page: AppTest) -> None:
    page.run()
    assert not page.exception
    assert "1 failed, 0 running, 1 missing" in texts(page)
    assert "error: <script>no</script>" in texts(page)
    assert "line 1" in page.code[0].value
    assert page.dataframe[0].value["title"].tolist() == [sleepers(1)[0].title]
    assert "<b>" not in page.expander[0].label.replace("\\<b\\>", "")


def test_page_follows_the_store(page: AppTest, jobs: JobStore) -> None:
    page.run()
    write_cell(jobs, sleepers(2)[1])
    page.run()
    assert "1 failed, 0 running, 0 missing" in texts(page)
    assert len(page.dataframe[0].value) == 2


def test_page_of_a_harmed_cell_and_a_damaged_store(page: AppTest, jobs: JobStore) -> None:
    (jobs.folder(sleepers(1)[0].key) / "result.parquet").write_bytes(b"PAR1")
    page.run()
    assert not page.exception
    assert "0 running, 2 missing" in texts(page)
    (jobs.hidden / "format.json").write_text("{")
    page.run()
    assert not page.exception
    assert any("damaged" in part.value for part in page.error)
