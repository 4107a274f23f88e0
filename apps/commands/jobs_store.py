"""``jobs`` commands that look at a store: how far its grids are, what a cell holds, tables of everything."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps.inputs import JsonOption
from workbench.apps.live import amount, flat, plural, span
from workbench.apps.terminal import answer, table, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.jobs.store import JobStore

StoreOption = Annotated[Path, typer.Option("--store", help="The folder of the results.")]
FAILURES = ("error", "timeout", "memory", "died")
_FAILED = 20
_CANDIDATES = 8


def opened(path: Path) -> JobStore:
    """The store of jobs at ``path``; a folder that is none is refused."""
    from workbench.jobs.status import status as state_of
    from workbench.jobs.store import HIDDEN, JobStore

    store = JobStore(path)
    if not (path / HIDDEN).is_dir():
        state_of(store)  # refuses it with the next call to make
    store.check_format()
    return store


def status(
    store: StoreOption,
    grid: Annotated[str | None, typer.Option("--grid", help="Only this grid.")] = None,
    traceback: Annotated[
        str | None, typer.Option("--traceback", help="The traceback of this failed cell; a key or its beginning.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All failures, with their tracebacks.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How far the grids of a store are, and what failed."""
    from workbench.jobs.status import status as state_of
    from workbench.jobs.status import status_by_grid
    from workbench.jobs.store import JobStore

    place = JobStore(store)
    state = state_of(place, grid)
    if traceback is not None:
        _traceback(place, key_of(traceback, state.failures, "failed cell", place), as_json)
        return
    grids = {grid: state} if grid is not None else status_by_grid(place)
    shown = state.failures if full or as_json else state.failures[:_FAILED]
    failures = [failure_row(place, key, full) for key in shown]
    payload = {
        "done": state.done,
        "failed": state.failed,
        "running": state.running,
        "missing": state.missing,
        "other": state.other,
        "grids": {name: {k: v for k, v in one.dict().items() if k != "other"} for name, one in grids.items()},
        "computing": list(state.computing),
        "failures": failures,
    }

    def show(console: Console) -> None:
        names = ("done", "failed", "running", "missing")
        columns = {"grid": "left", **dict.fromkeys(("cells", *names), "right")}
        rows = []
        for name, one in grids.items():
            counts = [getattr(one, n) for n in names]
            rows.append([name, *(f"{n:,}" for n in (sum(counts), *counts))])
        if len(grids) != 1:
            counts = [getattr(state, n) for n in names]
            rows.append(["all together", *(f"{n:,}" for n in (sum(counts), *counts))])
        console.print(table(str(store), columns, rows))
        if state.other:
            console.print(f"{plural(state.other, 'finished cell')} of no grid", soft_wrap=True)
        for row in failures:
            times = f" ({row['attempts']} tries)" if row["attempts"] and row["attempts"] > 1 else ""
            console.print(
                f"{row['key'][:12]} {row['kind']}{times}: {flat(row['title'])}: {row['line']}", soft_wrap=True
            )
            if full and row["traceback"]:
                console.print(row["traceback"].rstrip(), soft_wrap=True)
        if len(state.failures) > len(failures):
            console.print(f"and {len(state.failures) - len(failures):,} more; --full tells all")
        if failures and not full:
            console.print("--traceback KEY tells where a cell failed", soft_wrap=True)

    answer(as_json, payload, show)


def _traceback(store: JobStore, key: str, as_json: bool) -> None:
    row = failure_row(store, key, full=True)

    def show(console: Console) -> None:
        console.print(f"{row['key']} {row['kind']}: {flat(row['title'])}", soft_wrap=True)
        console.print(row["traceback"].rstrip() or f"no traceback: {row['message']}", soft_wrap=True)
        if row["log"]:
            console.print(f"what the cell printed:\n{row['log'].rstrip()}", soft_wrap=True)

    answer(as_json, row, show)


def failure_row(store: JobStore, key: str, full: bool = False) -> dict[str, Any]:
    """A recorded failure as plain data; a failure that was forgiven meanwhile, or is damaged, says so."""
    from workbench.jobs.job import Job

    try:
        record = store.failure(key)
        title = Job.of(record["job"]).title
    except WorkbenchError as error:
        record, title = {"kind": "unknown", "message": str(error)}, key
    message = str(record.get("message", ""))
    row = {
        "key": key,
        "title": title,
        "kind": record.get("kind", "error"),
        "message": message,
        "line": flat((message.splitlines() or [""])[0]),
        "attempts": record.get("attempts"),
    }
    return row | ({"traceback": record.get("traceback") or "", "log": record.get("log") or ""} if full else {})


def key_of(said: str, keys: Collection[str], what: str, store: JobStore) -> str:
    """The one key that begins with ``said``; none and several are refused."""
    found = sorted(key for key in keys if key.startswith(said.lower())) if said else []
    if len(found) == 1:
        return found[0]
    if not found:
        raise WorkbenchError(f"no {what} {said!r} in {store.path}; it has {len(keys):,}")
    more = f" and {len(found) - _CANDIDATES:,} more" if len(found) > _CANDIDATES else ""
    raise WorkbenchError(f"{said!r} is the beginning of {len(found):,} keys: {', '.join(found[:_CANDIDATES])}{more}")


def show(
    store: StoreOption,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key of a cell, or its beginning.")],
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the table that are shown.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """One cell: what was computed, how it came about, and its table."""
    from workbench.apps.commands.jobs_tables import print_frame
    from workbench.jobs.status import status as state_of
    from workbench.jobs.store import JobStore

    place = JobStore(store)
    failed = state_of(place).failures
    found = key_of(key, {*place.keys(), *failed}, "cell", place)
    if found in failed:
        _traceback(place, found, as_json)
        return
    job, about, frame = place.job(found), place.provenance(found), place.table(found).to_pandas()
    payload = {"key": found, "title": job.title, "job": job.dict(), "provenance": about, "rows": frame.head(rows)}

    def shown(console: Console) -> None:
        console.print(f"{found}: {flat(job.title)}", soft_wrap=True)
        for name, value in _told(about):
            console.print(f"  {name}: {value}", soft_wrap=True)
        print_frame(console, frame, rows)
        console.print(f"files: {place.folder(found)}", soft_wrap=True)

    answer(as_json, payload, shown)


def _told(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Provenance for people, short; what is not there is left out."""
    code, model, hardware = about.get("code") or {}, about.get("model") or {}, about.get("hardware") or {}
    size = sum(size for size, _ in about.get("files", {}).values())
    parts = {
        "computed": about.get("started", "")
        and f"{about['started']} on {hardware.get('host', '?')} in {span(about.get('seconds', 0.0))}",
        "memory": about.get("peak_bytes") and f"{amount(about['peak_bytes'])} at its peak",
        "code": " ".join(str(v) for v in code.values() if v),
        "versions": ", ".join(f"{name} {v}" for name, v in (about.get("versions") or {}).items()),
        "model": ", ".join(f"{name} {v}" for name, v in model.items() if v),
        "data": (about.get("data") or {}).get("digest", ""),
        "hardware": ", ".join(str(hardware[n]) for n in ("cpu", "gpu") if hardware.get(n)),
        "size": f"{amount(size)} in {plural(len(about.get('files', {})), 'file')}",
        "note": flat(str(about.get("note") or "")),
    }
    return [(name, str(value)) for name, value in parts.items() if value]


def gc(
    store: StoreOption,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Remove finished cells, too, that no grid of the store names.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what killed processes left behind.

    Damaged cells are moved away, so that the next run computes them again.
    """
    from workbench.jobs.gc import KINDS
    from workbench.jobs.gc import gc as clean

    place = opened(store)
    with working("cleaning"):
        found = clean(place, orphans=orphans, dry=dry_run)
    payload = {
        "command": "jobs gc",
        "store": store,
        "dry_run": dry_run,
        "count": found.count,
        "bytes": found.bytes,
        "removed": found.removed,
    }

    def show(console: Console) -> None:
        for kind, names in found.removed.items():
            console.print(f"{len(names):,} {kind}: {KINDS.get(kind, '')}", soft_wrap=True)
        would = "would free" if dry_run else "freed"
        console.print(f"{would} {amount(found.bytes)}" if found.count else "nothing to remove")

    answer(as_json, payload, show)
