"""From finished cells of a store to the sections of a report: figure, numbers, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pandas as pd

from workbench.apps import figures
from workbench.apps.live import amount, span
from workbench.apps.report import Link, Numbers, Part, Picture, Prose, Section
from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.store import SAVED, JobStore

_LONG = 90


def title_of(job: Job) -> str:
    """What a cell is, short enough for a heading."""
    parts = [
        job.probe.rpartition(":")[2].replace("_", " "),
        Path(job.model).name if job.model else "",
        job.task_name or "",
    ]
    args = ", ".join(f"{name} {value}" for name, value in job.args.items() if isinstance(value, str | int | float))
    said = " · ".join(part for part in (*parts, args, f"seed {job.seed}" if job.seed else "") if part)
    said = " ".join(said.split())
    return said if len(said) <= _LONG else f"{said[: _LONG - 1]}…"


def cell_sections(store: JobStore, keys: Sequence[str], link: str = "") -> list[Section]:
    """A section per cell, and one that says where all numbers come from. ``link`` is the address of the app, for links back.

    A cell that cannot be read has a section that says why."""
    found = [_section(store, key, link) for key in keys]
    return [*found, Section("Where the numbers come from", tuple(_provenance(store, keys)))]


def _section(store: JobStore, key: str, link: str) -> Section:
    try:
        job = store.job(key)
        parts = list(_parts(store, key, job, link))
    except WorkbenchError as error:
        return Section(f"cell {key[:12]}", (Prose((f"This cell cannot be read: {error}",), failed=True),))
    return Section(title_of(job), tuple(parts))


def _parts(store: JobStore, key: str, job: Job, link: str) -> Iterator[Part]:
    table = store.table(key).to_pandas()
    saved = store.folder(key) / SAVED
    if (saved / "run.json").is_file():
        yield from _captured(store, key, saved)
    elif (saved / "result.json").is_file() or (saved / "circuit.json").is_file():
        from workbench.apps.sections import parts_of

        found = store.load(key)
        drawn = list(parts_of({title_of(job): found}))
        if not any(isinstance(part, Picture) for part in drawn):
            yield from _heads(table)
        yield from drawn
    else:
        yield from _heads(table)
        yield Numbers(table)
    yield Numbers(_config(job), "The job: with these settings the cell is computed again")
    if link:
        yield Link("Open it in the app", _address(link, key, job))


def _captured(store: JobStore, key: str, saved: Path) -> Iterator[Part]:
    """The wall of a captured run, its heads, and whether capture changed the model."""
    from workbench.probes.atlas import atlas, draw_wall
    from workbench.stored_run import about_run, open_run

    about = about_run(saved)
    wall = atlas(open_run(saved), about["blocks"])
    layers = list(dict.fromkeys(wall.frame()["layer"]))
    figure, (ax,) = figures.panels(1, width=9.5, height=1.25 * len(layers) + 0.6)
    draw_wall(ax, {layer: wall.blocks[layer] for layer in layers})
    yield Picture(
        figure,
        f"Every head's attention over all {about.get('tokens', 0):,} tokens, in blocks of {about['blocks']} (query down, key to "
        "the right, brighter is more, each head on a square-root scale of its own).",
    )
    yield Numbers(
        wall.frame(),
        "Per head: entropy in nats and distance in tokens, averaged over queries; the key with the largest share",
    )


def _heads(table: pd.DataFrame) -> Iterator[Part]:
    """A picture of a table that has one number per head."""
    if {"layer", "head"} <= set(table.columns) and not table.duplicated(["layer", "head"]).any() and len(table):
        numbers = [n for n in table.columns if table[n].dtype.kind == "f" and table[n].notna().any()]
        if numbers and (table[numbers[0]].dropna() >= 0).all():
            yield Picture(
                figures.heads_grid({numbers[0]: table}, numbers[0], numbers[0], top=None),
                f"{numbers[0]} of every head.",
            )


def _config(job: Job) -> pd.DataFrame:
    said = {name: value for name, value in job.dict().items() if value not in (None, {})}
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in said.items()]
    return pd.DataFrame([*rows, ("key", job.key)], columns=["setting", "value"])


def _address(link: str, key: str, job: Job) -> str:
    page = "atlas" if job.probe == "capture" else "jobs"
    asked = {"run": key} if page == "atlas" else {"tab": "Progress", "folder": "app", "cell": key}
    return f"{link.rstrip('/')}/{page}?{urlencode(asked)}"


def _provenance(store: JobStore, keys: Sequence[str]) -> Iterator[Part]:
    versions: dict[str, str] = {}
    rows, parity = [], []
    for key in keys:
        try:
            about, job = store.provenance(key), store.job(key)
        except WorkbenchError:
            continue  # its section says so
        versions |= about.get("versions") or {}
        rows.append(_origin(key, job, about))
        run = store.folder(key) / SAVED / "run.json"
        if run.is_file():
            parity.append(_parity(run.parent, job))
    if parity:
        said = "Largest difference of the last position's logits with capture on and off; 0: looking changed nothing"
        yield Numbers(pd.DataFrame(parity), said, rows=200)
    if rows:
        yield Numbers(pd.DataFrame(rows), "Cells", rows=500)
    if versions:
        yield Numbers(pd.DataFrame({"package": list(versions), "version": list(versions.values())}), "Versions")


def _origin(key: str, job: Job, about: Mapping[str, Any]) -> dict[str, str]:
    model, code, hardware = about.get("model") or {}, about.get("code") or {}, about.get("hardware") or {}
    return {
        "cell": key[:12],
        "what": title_of(job),
        "model": str(model.get("name", "")),
        "revision": str(model.get("revision", "")),
        "dtype": str(model.get("dtype", "")),
        "attention": str(model.get("attention", "")),
        "device": str(model.get("device", "")),
        "seed": str(job.seed),
        "code": " ".join(str(part) for part in code.values() if part),
        "computed": str(about.get("started", "")),
        "time": span(float(about.get("seconds", 0.0))),
        "memory": amount(float(about.get("peak_bytes", 0))),
        "host": str(hardware.get("host", "")),
        "note": str(about.get("note") or ""),
    }


def _parity(run: Path, job: Job) -> dict[str, str]:
    from workbench.stored_run import about_run

    about = about_run(run)
    difference = about.get("logit_difference")
    return {"run": title_of(job), "logit difference": "not measured" if difference is None else f"{difference:g}"}
