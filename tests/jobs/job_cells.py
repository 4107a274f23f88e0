"""Trivial grids and cells written by hand, for the tests of jobs."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workbench.jobs.job import Job
from workbench.jobs.store import TABLE, JobStore


def sleepers(n: int, seconds: float = 0.0) -> list[Job]:
    return [Job("sleep", args={"seconds": seconds, "rows": 2}, seed=i) for i in range(n)]


def parquet(table: pa.Table) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    return bytes(out.getvalue())


def write_cell(store: JobStore, job: Job, table: pa.Table | None = None, **provenance: Any) -> bool:
    """A finished cell, written as a worker writes it."""
    table = pa.table({"value": [1.5, 2.5]}) if table is None else table
    store.open_for_writing()
    with store.new_cell(job) as part:
        return store.finish(job, part, parquet(table), {"seconds": 0.1, "rows": table.num_rows, **provenance})


def digests(store: JobStore) -> dict[str, str]:
    """The SHA-256 of every result table, from the files themselves."""
    return {key: hashlib.sha256((store.folder(key) / TABLE).read_bytes()).hexdigest() for key in sorted(store.keys())}
