"""``jobs``: grids of experiments, from a spec to finished cells."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps import inputs
from workbench.apps.commands import jobs_estimate, jobs_store, jobs_tables
from workbench.apps.commands.jobs_store import StoreOption
from workbench.apps.live import JsonLines, flat, plural, span, view
from workbench.apps.terminal import Commands, answer, quiet, working
from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.jobs.driver import GridRun
    from workbench.jobs.spec import Grid
    from workbench.jobs.store import JobStore

INTERRUPTED = 130
BUNDLED = Path(__file__).parents[1] / "jobs"
"""Grids for the bundled models."""
_SHOWN = 5
"""Failures told at the end of a run."""

WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes; by default one per GPU, or cores over --threads.")
]
EngineOption = Annotated[str | None, typer.Option("--engine", help="local or ray; local by default.")]
AddressOption = Annotated[str | None, typer.Option("--address", help="The Ray cluster to use, with --engine ray.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads per worker; 1 by default.")]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", help="Seconds that a cell may take, without loading its model.")
]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Memory of a worker, such as 4GB; a share of the machine by default.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda; cuda by default where there is one.")]
AttemptsOption = Annotated[
    int | None, typer.Option("--attempts", min=1, help="Tries of a cell whose worker dies; 3 by default.")
]
LinesOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per event on stdout, a summary as the last.")
]


def run(
    spec: Annotated[
        Path,
        typer.Argument(metavar="SPEC", help="The grid: a YAML or JSON file, or demo, leaderboard, retrieval, sae."),
    ],
    store: StoreOption,
    workers: WorkersOption = None,
    engine: EngineOption = None,
    address: AddressOption = None,
    threads: ThreadsOption = None,
    timeout: TimeoutOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = None,
    attempts: AttemptsOption = None,
    retry: Annotated[bool, typer.Option("--retry", help="Compute failed cells again.")] = False,
    values: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a value of the spec, as name=value; lists are JSON.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell the cells, and what they will take; the store stays as it is.")
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="With --dry-run: compute one cell of every kind that was never computed, for a minute at most.",
        ),
    ] = True,
    as_json: LinesOption = False,
) -> None:
    """Compute every cell of a grid that has no result yet.

    Whatever stopped a run, the same command continues it. Exit code 1 if cells failed.
    """
    settings = _settings(workers, engine, address, threads, timeout, memory, device, attempts)
    grid = read(spec, values)
    if dry_run:
        jobs_estimate.dry_run(grid, store, settings, retry=retry, calibrate=calibrate, as_json=as_json)
        return
    from workbench.jobs.store import JobStore

    code = compute(grid, JobStore(store), settings, retry=retry, as_json=as_json, again="the same command continues")
    raise typer.Exit(code)


def retry(
    store: StoreOption,
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="Only these failed cells; a key or its beginning.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only failures of this kind: error, timeout, memory or died.")
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Also the grids that have missing cells.")] = False,
    workers: WorkersOption = None,
    engine: EngineOption = None,
    address: AddressOption = None,
    threads: ThreadsOption = None,
    timeout: TimeoutOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = None,
    attempts: AttemptsOption = None,
    as_json: LinesOption = False,
) -> None:
    """Compute failed cells again, without a spec.

    What else is missing of their grids is computed with them. Exit code 1 if cells failed again.
    """
    from workbench.jobs.grids import grid_jobs, grid_names
    from workbench.jobs.spec import Grid
    from workbench.jobs.status import status
    from workbench.jobs.store import JobStore

    settings = _settings(workers, engine, address, threads, timeout, memory, device, attempts)
    place = JobStore(store)
    state = status(place)
    chosen = set(_failures(place, state.failures, keys or [], kind))
    grids = [(name, tuple(grid_jobs(place, name))) for name in grid_names(place)]
    if missing:
        grids = [(n, jobs) for n, jobs in grids if chosen & {j.key for j in jobs} or status(place, n).missing]
    else:
        grids = [(n, jobs) for n, jobs in grids if chosen & {j.key for j in jobs}]
    if not grids:
        _nothing_to_retry(store, state.missing, bool(keys or kind), as_json)
        return
    place.open_for_writing()
    place.forgive(sorted(chosen))
    code = 0
    again = f"to continue: {command('retry', store)} --missing"
    for name, jobs in grids:
        code = compute(Grid(name, jobs), place, settings, retry=False, as_json=as_json, again=again) or code
        if code == INTERRUPTED:
            break
    raise typer.Exit(code)


def _failures(store: JobStore, failed: Sequence[str], keys: Sequence[str], kind: str | None) -> list[str]:
    """Those of the failed cells that are asked for."""
    if kind is not None and kind not in jobs_store.FAILURES:
        raise UnknownName("kind of failure", kind, jobs_store.FAILURES)
    named = [jobs_store.key_of(key, failed, "failed cell", store) for key in keys] or list(failed)
    return [key for key in named if kind is None or store.failure(key).get("kind") == kind]


def _nothing_to_retry(store: Path, missing: int, narrowed: bool, as_json: bool) -> None:
    def show(console: Console) -> None:
        which = "no such failures" if narrowed else "no failures"
        console.print(f"{which} in {store}", soft_wrap=True)
        if missing:
            console.print(
                f"{plural(missing, 'cell')} missing; to compute them: {command('retry', store)} --missing",
                soft_wrap=True,
            )

    answer(as_json, {"command": "jobs retry", "store": store, "failed": 0, "missing": missing}, show)


def _settings(*values: Any) -> dict[str, Any]:
    names = ("workers", "engine", "address", "threads", "timeout", "memory", "device", "attempts")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def read(spec: Path, values: list[str] | None) -> Grid:
    """The grid of a spec, checked and with its revisions filled in; a bundled one by its name where no file has that name."""
    overrides = inputs.assignments(values, "--set")
    bundled = {path.stem: path for path in sorted(BUNDLED.glob("*.yaml"))}
    if not spec.exists() and len(spec.parts) == 1 and not spec.suffix:
        if spec.name not in bundled:
            raise UnknownName("grid", spec.name, [*bundled, "a YAML or JSON file"])
        spec = bundled[spec.name]
    with working(f"reading {spec}"):
        from workbench.jobs.driver import job_grid

        return job_grid(spec, overrides=overrides)


def compute(grid: Grid, store: JobStore, settings: dict[str, Any], *, retry: bool, as_json: bool, again: str) -> int:
    """Run a grid under the view that fits, and tell how it ended; gives the exit code."""
    from workbench.jobs.driver import Stopped, run_jobs

    shown = view(grid.name, as_json)
    out = sys.stdout
    code = 0
    try:
        with quiet(), shown, contextlib.redirect_stdout(sys.stderr):
            ended = run_jobs(grid, store, retry=retry, watch=shown, **settings)
    except Stopped as stop:
        ended, code = stop.run, INTERRUPTED
    except WorkbenchError as error:
        if isinstance(shown, JsonLines) and shown.begun:
            shown.end({"error": str(error)})
        raise
    code = code or (1 if ended.failed else 0)
    payload = summary(ended, store)
    if isinstance(shown, JsonLines):
        shown.end(payload)
    else:
        assert sys.stdout is out
        answer(False, payload, lambda console: _tell(console, ended, payload, again))
    return code


def summary(ended: GridRun, store: JobStore) -> dict[str, Any]:
    """The end of a run as plain data, with its first failures and the commands that come next."""
    failures = [jobs_store.failure_row(store, key) for key in ended.failed[:_SHOWN]]
    place = store.path
    then = {"status": command("status", place), "retry": command("retry", place)} if ended.failed else {}
    then |= {"export": f"{command('export', place)} --to table.parquet"} if ended.done and not ended.stopped else {}
    return {
        "command": "jobs run",
        "grid": ended.name,
        "store": str(place),
        **{k: v for k, v in asdict(ended).items() if k not in ("name", "failed")},
        "done": ended.done,
        "failed": len(ended.failed),
        "left": ended.left,
        "failures": failures,
        "next": then,
    }


def _tell(console: Console, ended: GridRun, told: dict[str, Any], again: str) -> None:
    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    if ended.stopped:
        say(f"stopped after {ended.done + len(ended.failed):,} of {plural(ended.total, 'cell')}; {again}")
    where = [(n, word) for n, word in ((ended.stood, "before"), (ended.elsewhere, "by another run")) if n]
    where = [*where, (ended.computed, "now")] if where else []
    parts = f" ({', '.join(f'{n:,} {word}' for n, word in where)})" if where else ""
    rest = "".join(f", {n:,} {word}" for n, word in ((len(ended.failed), "failed"), (ended.left, "left")) if n)
    say(f"{ended.name}: {ended.done:,} of {plural(ended.total, 'cell')} done{parts}{rest} in {span(ended.seconds)}")
    for row in told["failures"]:
        say(f"  failed: {flat(row['title'])}: {row['line']}")
    if len(ended.failed) > len(told["failures"]):
        say(f"  and {len(ended.failed) - len(told['failures']):,} more")
    for name, words in told["next"].items():
        say(f"{_FOR[name]}: {words}")


_FOR = {"status": "what happened", "retry": "try the failed ones again", "export": "results as one table"}


def command(name: str, store: Path) -> str:
    """The command a person would type next."""
    return f"workbench jobs {name} --store {shlex.quote(str(store))}"


jobs = typer.Typer(
    name="jobs",
    cls=Commands,
    help="Grids of experiments: compute them in parallel, see how far they are, query and export the results.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
jobs.command("run")(run)
jobs.command("status")(jobs_store.status)
jobs.command("show")(jobs_store.show)
jobs.command("retry")(retry)
jobs.command("export")(jobs_tables.export)
jobs.command("compare")(jobs_tables.compare)
jobs.command("sql")(jobs_tables.sql)
jobs.command("gc")(jobs_store.gc)
