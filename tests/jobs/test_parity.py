"""One worker, four workers and Ray give the same tables, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_cells import digests

from workbench.jobs.driver import job_grid, run_jobs
from workbench.jobs.store import JobStore

SPEC = [
    {"probe": "sleep", "seed": list(range(20)), "rows": 5},
    {
        "probe": "find_circuit",
        "model": ["compiled-induction", "tiny-softmax"],
        "task": "induction",
        "method": ["eap", "eap-ig"],
        "examples": 6,
    },
    {
        "probe": "circuit_score",
        "model": "compiled-induction",
        "task": "induction",
        "method": "edge-pruning",
        "steps": 3,
        "examples": 6,
    },
    {"probe": "retrieval_heads", "model": "tiny-softmax", "lengths": [64, 96], "depths": 2, "trials": 1},
    {"probe": "head_scores", "model": ["tiny-softmax", "tiny-gated"], "task": "ioi", "examples": 4},
    {
        "probe": "train_sae",
        "model": "tiny-softmax",
        "site": "blocks.1.attn.hook_z",
        "features": 64,
        "steps": 5,
        "judged": 4,
    },
]


@pytest.mark.slow
def test_tables_do_not_depend_on_workers_or_engine(tmp_path: Path) -> None:
    grid = job_grid(SPEC)
    found = {}
    for name, settings in {
        "one worker": {"workers": 1},
        "four workers": {"workers": 4},
        "ray": {"workers": 2, "engine": "ray"},
    }.items():
        store = JobStore(tmp_path / name)
        run = run_jobs(grid, store, **settings)
        assert not run.failed, [store.failure(key)["message"] for key in run.failed]
        found[name] = digests(store)
        assert len(found[name]) == len(grid.jobs)
    assert found["one worker"] == found["four workers"] == found["ray"]
