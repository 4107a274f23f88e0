"""``jobs run --dry-run``: the cells of a grid and what they will take, told before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.apps.live import amount, flat, plural, span
from workbench.apps.terminal import answer, table, working

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.jobs.estimate import Estimate, Kind
    from workbench.jobs.spec import Grid

_CELLS = 20
_KINDS = 40
_FROM = {"store": "{} done", "calibration": "{} tried", "same probe": "probe ({})", "unknown": "unknown", "": ""}


def dry_run(
    grid: Grid, store: Path, settings: Mapping[str, Any], *, retry: bool, calibrate: bool, as_json: bool
) -> None:
    """Tell the cells, the kinds of cells with their costs, and the totals. The store stays as it is."""
    from workbench.jobs.estimate import BUDGET, estimate
    from workbench.jobs.settings import DEFAULTS, settled
    from workbench.jobs.store import JobStore

    with working(f"{grid.name}: estimating") as tick:
        place = JobStore(store)
        place.check_format()
        chosen = settled({**DEFAULTS, **grid.run, **settings}, grid)
        budget = BUDGET if calibrate else 0.0
        found = estimate(grid, place, workers=chosen["workers"], retry=retry, budget=budget, settings=chosen, tick=tick)
    cells: list[dict[str, Any]] = [
        {"key": job.key, "title": job.title, "state": state, "job": job.dict()}
        for job, state in zip(grid.jobs, found.states, strict=True)
    ]
    payload = {
        "command": "jobs run --dry-run",
        "grid": grid.name,
        "store": store,
        "workers": found.workers,
        "engine": chosen["engine"],
        "total": found.cells,
        "done": found.done,
        "failed": found.failed,
        "missing": found.missing,
        "unknown": found.unknown,
        "seconds": found.seconds,
        "bytes": found.bytes,
        "memory": found.memory,
        "start": found.start,
        "kinds": found.frame(),
        "cells": cells,
    }

    def show(console: Console) -> None:
        counts = [(found.done, "done"), (found.failed, "failed"), (found.missing, "to compute")]
        console.print(f"{grid.name}: {plural(found.cells, 'cell')}: " + ", ".join(f"{n:,} {w}" for n, w in counts if n))
        for row in cells[:_CELLS]:
            state = "" if row["state"] == "missing" else f"  [{row['state']}]"
            console.print(f"  {flat(row['title'])}{state}", soft_wrap=True)
        if len(cells) > _CELLS:
            console.print(f"  and {len(cells) - _CELLS:,} more; --json tells all")
        console.print()
        console.print(_kinds(found))
        for line in sentences(found):
            console.print(line, soft_wrap=True)

    answer(as_json, payload, show)


def _kinds(found: Estimate) -> Any:
    kinds = sorted(found.kinds, key=lambda k: (-(0.0 if math.isnan(k.seconds) else k.missing * k.seconds), -k.missing))
    columns = {
        "kind": "left",
        "missing": "right",
        "time": "right",
        "disk": "right",
        "memory": "right",
        "known from": "left",
    }
    rows = [[_name(k), f"{k.missing:,} of {k.cells:,}", *_costs(k)] for k in kinds[:_KINDS]]
    more = f", the {_KINDS} most costly of {len(kinds):,}" if len(kinds) > _KINDS else ""
    return table(f"kinds of cells{more}; time, disk and memory are of one cell", columns, rows)


def _name(kind: Kind) -> str:
    return " ".join(part for part in (kind.probe, kind.model, kind.method) if part)


def _costs(kind: Kind) -> list[str]:
    if not kind.missing:
        return ["", "", "", ""]
    values = [
        "" if math.isnan(value) else form(value)
        for form, value in ((span, kind.seconds), (amount, kind.bytes), (amount, kind.memory))
    ]
    return [*values, _FROM[kind.source].format(f"{kind.measured:,}")]


def sentences(found: Estimate) -> list[str]:
    """The totals in words, and what they leave out."""
    lines = []
    if not found.missing:
        lines.append("nothing to compute")
    elif found.unknown < found.missing:
        least = "at least " if found.unknown else "about "
        lines.append(
            f"in all {least}{span(found.seconds)} with {plural(found.workers, 'worker')}, {amount(found.bytes)} on disk, "
            f"up to {amount(found.memory)} of memory per worker"
        )
    if not math.isnan(found.start):
        lines.append(f"a worker starts and loads a model in {span(found.start)}, which is counted in")
    if any(kind.source == "same probe" for kind in found.kinds):
        lines.append("probe (n): the mean of n cells of the probe, whose kind was never computed")
    if found.unknown:
        lines.append(f"nothing is known about {plural(found.unknown, 'cell')}, left out of the totals")
    for kind in found.kinds:
        if kind.note:
            lines.append(f"{_name(kind)}: {flat(kind.note.splitlines()[0])}")
    return lines
