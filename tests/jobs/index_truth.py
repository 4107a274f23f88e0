"""What an index must answer, read from the folders of the cells without any index."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pyarrow as pa
from job_cells import sleepers, write_cell

from workbench.jobs.job import Job
from workbench.jobs.store import JobStore

FORMS = {
    "whole": pa.table({"value": [1, 2, 3], "label": ["a", "b", "c"]}),
    "fraction": pa.table({"value": [0.1, -2.5]}),
    "text": pa.table({"value": ["x", None], "seed": [7, 8]}),
    "null": pa.table({"value": pa.nulls(2), "truth": [True, False]}),
    "none": pa.table({"value": pa.array([], pa.float64())}),
    "wide": pa.table({"other": [1.5], "label": pa.array(["q"]).dictionary_encode()}),
}


def job(i: int, probe: str = "sleep") -> Job:
    return Job(probe, "m", args={"form": i % 3, "deep": i} if i % 2 else {"form": "text"}, task="ioi", seed=i)


def one_by_one(store: JobStore) -> list[dict[str, Any]]:
    """The rows of ``frame`` from the folders themselves, without any index."""
    keys = [key for key in sorted(store.keys()) if store.is_done(key)]
    tables = {key: store.table(key) for key in keys}
    kinds: dict[str, set[str]] = {}
    for table in tables.values():
        for field in table.schema:
            kinds.setdefault(field.name, set()).add(str(field.type))
    for found in kinds.values():
        if "dictionary<values=string, indices=int32, ordered=0>" in found:
            found.remove("dictionary<values=string, indices=int32, ordered=0>")
            found.add("string")
    args = [dict(store.job(key).args) for key in keys]
    mixed = {
        name
        for name in {name for found in args for name in found}
        if len({type(a[name]) for a in args if name in a}) > 1
    }
    rows = []
    for key in keys:
        told = store.job(key)
        own = {"key": key, "model": told.model, "task": told.task_name, "probe": told.probe, "seed": told.seed}
        own |= {name: str(value) if name in mixed else value for name, value in told.args.items()}
        for row in tables[key].to_pylist():
            values = {name: _united(row.get(name), found - {"null"}) for name, found in kinds.items()}
            rows.append(own | {"result.seed" if name == "seed" else name: value for name, value in values.items()})
    return rows


def _united(value: Any, kinds: set[str]) -> Any:
    if value is None or len(kinds) < 2:
        return value
    return str(value) if "string" in kinds else float(value)


def plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows = [{str(k): _none(v) for k, v in row.items()} for row in frame.to_dict("records")]
    return [{k: v for k, v in row.items() if k not in ("revision", "dtype")} for row in rows]


def _none(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if hasattr(value, "item") else value


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """Equal rows in equal order; columns that are nowhere there count as null."""
    names = {name for row in (*found, *wanted) for name in row}
    return [[r.get(n) for n in sorted(names)] for r in found] == [[r.get(n) for n in sorted(names)] for r in wanted]


def filled(store: JobStore, n: int = 6) -> list[Job]:
    jobs = sleepers(n)
    for i, each in enumerate(jobs):
        write_cell(store, each, pa.table({"value": [i + 0.1, i + 0.2], "i": [i, i]}))
    return jobs
