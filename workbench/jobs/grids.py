"""What was asked for: the cells of every grid that ran on a store, so that missing ones can be told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.store import JobStore, put, writing


def put_grid(store: JobStore, name: str, jobs: Sequence[Job]) -> None:
    """Write the cells of grid ``name``; an older grid of that name is replaced, its finished cells stay."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"key": [job.key for job in jobs], "job": [json.dumps(job.dict()) for job in jobs]}
    out = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), out, compression="zstd")
    content = bytes(out.getvalue())
    path = _path(store, name)
    with writing(store.path):
        if not (path.is_file() and path.read_bytes() == content):
            put(path, content)


def grid_names(store: JobStore) -> list[str]:
    folder = store.hidden / "grids"
    return sorted(p.stem for p in folder.glob("*.parquet")) if folder.is_dir() else []


def grid_keys(store: JobStore, name: str | None = None) -> set[str]:
    """Keys of the cells of one grid, of all grids without a name."""
    names = grid_names(store) if name is None else [name]
    return {key for each in names for key in _column(store, each, "key")}


def grid_jobs(store: JobStore, name: str) -> list[Job]:
    """The cells of a grid, in its order."""
    return [Job.of(json.loads(text)) for text in _column(store, name, "job")]


def _column(store: JobStore, name: str, column: str) -> list[str]:
    import pyarrow.parquet as pq

    path = _path(store, name)
    if not path.is_file():
        raise UnknownName("grid", name, grid_names(store))
    try:
        return pq.read_table(path, columns=[column])[column].to_pylist()
    except Exception as error:
        raise WorkbenchError(f"{path} is damaged: {type(error).__name__}: {error}; run the grid again") from error


def _path(store: JobStore, name: str) -> Path:
    return store.hidden / "grids" / f"{name}.parquet"
