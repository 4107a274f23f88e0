"""What a grid will cost, before it runs: time, bytes and memory, from cells that are finished and from a short calibration."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.jobs.events import Event
from workbench.jobs.job import Job
from workbench.jobs.store import JobStore
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from workbench.jobs.spec import Grid

KindName = tuple[str | None, str, str | None]
"""Model, probe and method."""
BUDGET = 60.0
"""Seconds that a calibration may take in all."""
SOURCES = ("store", "calibration", "same probe", "unknown")
"""Where the cost of a kind of cells comes from: finished cells of the kind, one that was computed for it, the mean of other
kinds of its probe (on the same model, if there are any), or nowhere."""

_LOOKED_AT = 2000
_WEIGHED = 20
"""Finished cells of a kind whose times are read, and whose files are counted."""


@dataclass(frozen=True)
class Kind:
    """Cells of one model, probe and method. ``seconds``, ``bytes`` (of the result's folder) and ``memory`` (peak of the worker,
    bytes) are for one of the missing cells, NaN where unknown; ``measured`` cells stand behind them. ``note`` says why a
    calibration came to nothing."""

    model: str | None
    probe: str
    method: str | None
    cells: int
    done: int
    failed: int
    missing: int
    seconds: float = math.nan
    bytes: float = math.nan
    memory: float = math.nan
    source: str = "unknown"
    measured: int = 0
    note: str = ""


@dataclass(frozen=True)
class Estimate(Result):
    """The cost of what is missing of a grid, with ``workers`` workers.

    ``states`` has ``done``, ``failed`` or ``missing`` per cell in the grid's order; failed cells that are to be tried again are
    missing. ``start`` is the time that a worker needs to start and load a model, seconds; NaN if it was not measured.
    """

    name: str
    workers: int
    kinds: tuple[Kind, ...]
    states: tuple[str, ...]
    start: float = math.nan

    @property
    def cells(self) -> int:
        return sum(k.cells for k in self.kinds)

    @property
    def done(self) -> int:
        return sum(k.done for k in self.kinds)

    @property
    def failed(self) -> int:
        return sum(k.failed for k in self.kinds)

    @property
    def missing(self) -> int:
        return sum(k.missing for k in self.kinds)

    @property
    def unknown(self) -> int:
        """Missing cells about whose time nothing is known; the totals leave them out."""
        return sum(k.missing for k in self.kinds if math.isnan(k.seconds))

    @property
    def seconds(self) -> float:
        """Time of the run: the work shared by the workers, each starting once, and no shorter than one cell."""
        known = [k for k in self.kinds if k.missing and not math.isnan(k.seconds)]
        if not known:
            return math.nan if self.missing else 0.0
        used = min(self.workers, self.missing)
        loads = max(used, len({k.model for k in known}))
        start = 0.0 if math.isnan(self.start) else self.start
        work = sum(k.missing * k.seconds for k in known) + loads * start
        return max(work / used, max(k.seconds for k in known) + start)

    @property
    def bytes(self) -> float:
        """Bytes that the results will take on the disk."""
        known = [k.missing * k.bytes for k in self.kinds if k.missing and not math.isnan(k.bytes)]
        return sum(known) if known or not self.missing else math.nan

    @property
    def memory(self) -> float:
        """The largest peak of one worker, bytes."""
        known = [k.memory for k in self.kinds if k.missing and not math.isnan(k.memory)]
        return max(known, default=math.nan if self.missing else 0.0)

    def frame(self) -> pd.DataFrame:
        """One row per kind of cells, the most costly first."""
        import pandas as pd

        names = list(Kind.__dataclass_fields__)
        rows = sorted(self.kinds, key=lambda k: (-_or_zero(k.missing * k.seconds), -k.missing))
        frame = pd.DataFrame([[getattr(k, name) for name in names] for k in rows], columns=names)
        frame.insert(names.index("seconds") + 1, "total_seconds", frame["missing"] * frame["seconds"])
        return frame

    def plot(self, ax: Axes | None = None) -> Axes:
        """A bar per kind: worker time of its missing cells."""
        frame = self.frame()
        ax = axis(ax, 6.0, 1.2 + 0.35 * max(1, len(frame)))
        parts = zip(frame["probe"], frame["model"], frame["method"], strict=True)
        names = [" ".join(p for p in part if isinstance(p, str)) for part in parts]
        ax.barh(names, frame["total_seconds"].fillna(0.0) / 60)
        ax.invert_yaxis()
        ax.set(xlabel="worker time, minutes", title=f"{self.name}: {self.missing:,} cells to compute")
        return ax


@dataclass(frozen=True)
class Cost:
    """What one finished cell took."""

    job: Job
    seconds: float
    bytes: float
    memory: float


def estimate(
    grid: Grid,
    store: JobStore | str | Path,
    *,
    workers: int = 1,
    retry: bool = False,
    budget: float = BUDGET,
    settings: Mapping[str, Any] | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> Estimate:
    """Estimate what is missing of ``grid`` in ``store``; nothing is written there.

    Finished cells of a kind tell what its other cells take, those that differ in the seed alone before others. For kinds
    without any, one cell each is computed on this machine into a temporary store, within ``budget`` seconds (0: none) and with
    ``settings`` (``threads``, ``device``, ``memory``). ``retry`` counts failed cells as missing. ``tick(done, total)`` is
    called as the calibration goes on.
    """
    place = store if isinstance(store, JobStore) else JobStore(store)
    done, failed = _standing(place)
    if retry:
        failed = set()
    missing = [job for job in grid.jobs if job.key not in done and job.key not in failed]
    costs = _finished(place, {kind_of(job) for job in missing}) if done else []
    known = {kind_of(cost.job) for cost in costs}
    unknown = [job for job in missing if kind_of(job) not in known]
    start = math.nan
    notes: dict[KindName, str] = {}
    calibrated: list[Cost] = []
    if unknown and budget > 0:
        calibrated, start, notes = calibrate(unknown, budget, settings or {}, tick)
    kinds = []
    for kind, jobs in _by(grid.jobs, kind_of).items():
        rest = [j for j in jobs if j.key not in done and j.key not in failed]
        count = Kind(
            kind[0],
            kind[1],
            kind[2],
            cells=len(jobs),
            done=sum(j.key in done for j in jobs),
            failed=sum(j.key in failed for j in jobs),
            missing=len(rest),
            note=notes.get(kind, ""),
        )
        kinds.append(_priced(count, rest, costs, calibrated))
    states = ("done" if j.key in done else "failed" if j.key in failed else "missing" for j in grid.jobs)
    return Estimate(grid.name, workers, tuple(kinds), tuple(states), start)


def kind_of(job: Job) -> KindName:
    """Model, probe and method: cells that agree in these are taken to cost alike."""
    method = job.args.get("method")
    return job.model, job.probe, method if method is None else str(method)


def _twin(job: Job) -> str:
    """What cells share that differ in their seed alone."""
    return json.dumps({**job.dict(), "seed": 0, "revision": None}, sort_keys=True)


def _priced(kind: Kind, jobs: Sequence[Job], finished: Sequence[Cost], calibrated: Sequence[Cost]) -> Kind:
    if not jobs:
        return replace(kind, source="")
    own = (kind.model, kind.probe, kind.method)
    for source, costs in (("store", finished), ("calibration", calibrated)):
        alike = [cost for cost in costs if kind_of(cost.job) == own]
        if alike:
            twins = {name: _mean(group) for name, group in _by(alike, lambda cost: _twin(cost.job)).items()}
            mean = _mean(alike)
            each = [twins.get(_twin(job), mean) for job in jobs]
            seconds, size = (sum(e[i] for e in each) / len(each) for i in (0, 1))
            return replace(
                kind, seconds=seconds, bytes=size, memory=max(e[2] for e in each), source=source, measured=len(alike)
            )
    near = [cost for cost in (*finished, *calibrated) if cost.job.probe == kind.probe]
    near = [cost for cost in near if cost.job.model == kind.model] or near
    if near:
        seconds, size, memory = _mean(near)
        return replace(kind, seconds=seconds, bytes=size, memory=memory, source="same probe", measured=len(near))
    return kind


def _mean(costs: Sequence[Cost]) -> tuple[float, float, float]:
    """Mean seconds, mean bytes, largest memory."""
    n = len(costs)
    return sum(c.seconds for c in costs) / n, sum(c.bytes for c in costs) / n, max(c.memory for c in costs)


class _Enough(Exception):
    """The budget of the calibration is spent."""


def calibrate(
    jobs: Sequence[Job], budget: float, settings: Mapping[str, Any], tick: Callable[[int, int], None] | None = None
) -> tuple[list[Cost], float, dict[KindName, str]]:
    """Compute one cell of each kind with one local worker into a temporary store. No cell gets more than half the budget, and
    none begins after it is half spent, so that the whole takes ``budget`` seconds at most.

    Gives the costs, the seconds a worker needs to start and load a model (NaN if no kind of the model has a second cell to tell
    it apart), and by kind why there is no cost.
    """
    from workbench.jobs.driver import run_jobs
    from workbench.jobs.spec import Grid

    first, picked = _sample(jobs)
    begun: dict[str, float] = {}
    took: dict[str, float] = {}
    notes = {kind_of(job): f"not measured within {budget:g} s" for job in picked}

    def watch(event: Event) -> None:
        job = event.job
        if job is None:
            return
        if event.kind == "started":
            begun[job.key] = event.elapsed
            return
        if event.kind == "done":
            took[job.key] = event.elapsed - begun[job.key]
            notes.pop(kind_of(job), None)
        elif event.kind == "failed":
            notes[kind_of(job)] = event.message
        if tick is not None:
            tick(len(begun), len(picked))
        if event.elapsed > budget / 2:
            raise _Enough

    allowed = {name: settings[name] for name in ("threads", "device", "memory") if settings.get(name) is not None}
    with tempfile.TemporaryDirectory(prefix="workbench-calibration-") as folder:
        store = JobStore(folder)
        grid = Grid("calibration", tuple(picked), {}, {})
        with contextlib.suppress(_Enough):
            run_jobs(grid, store, workers=1, engine="local", attempts=1, timeout=budget / 2, watch=watch, **allowed)
        costs = [_cost(store, job, took[job.key]) for job in picked if job.key in took]
    starts, kept = [], []
    for cost in costs:
        kind = kind_of(cost.job)
        if cost.job.key not in first.values():
            kept.append(cost)
            continue
        warm = [other for other in costs if kind_of(other.job) == kind and other.job.key != cost.job.key]
        starts += [max(0.0, cost.seconds - other.seconds) for other in warm]
        if not warm:  # its only cell: starting included
            kept.append(cost)
    return kept, (sum(starts) / len(starts) if starts else math.nan), notes


def _sample(jobs: Sequence[Job]) -> tuple[dict[Any, str], list[Job]]:
    """The middle cell of each kind, and before the first of each model another one of its kind, which takes the start. Also
    the key of the cell that comes first, by model."""
    first: dict[Any, str] = {}
    picked: list[Job] = []
    for group in _by(jobs, kind_of).values():
        middle = group[len(group) // 2]
        loads = (middle.model, middle.revision, middle.dtype)
        if loads not in first:
            starter = next((j for j in group if j != middle and (j.model, j.revision, j.dtype) == loads), middle)
            first[loads] = starter.key
            picked += [starter] if starter != middle else []
        picked.append(middle)
    return first, picked


def _cost(store: JobStore, job: Job, seconds: float) -> Cost:
    found = store.provenance(job.key)
    return Cost(job, seconds, float(sum(size for size, _ in found["files"].values())), float(found["peak_bytes"]))


def _by(items: Iterable[Any], name: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(name(item), []).append(item)
    return found


def _or_zero(number: float) -> float:
    return 0.0 if math.isnan(number) else number


def _standing(store: JobStore) -> tuple[set[str], set[str]]:
    """Keys of finished and of failed cells."""
    from workbench.jobs.index import done_keys

    if not store.path.is_dir():
        return set(), set()
    done = done_keys(store)
    return done, set(store.failed_keys()) - done


def _finished(store: JobStore, kinds: set[KindName]) -> list[Cost]:
    """What finished cells took: of the kinds asked for the last ``_LOOKED_AT`` each, of their probes' other kinds likewise."""
    from workbench.jobs.index import cells

    frame = cells(store)
    frame = frame[frame["probe"].isin({probe for _, probe, _ in kinds})].sort_values("started", ascending=False)
    found: list[Cost] = []
    counts: dict[KindName, int] = {}
    sizes: dict[KindName, list[float]] = {}
    for row in frame.to_dict("records"):
        args = json.loads(row["args"])
        task = {"name": row["task"], **json.loads(row["task_options"])} if _text(row["task"]) else None
        job = Job(row["probe"], model=_text(row["model"]), task=task, args=args, dtype=_text(row["dtype"]))
        kind = kind_of(job)
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] > _LOOKED_AT or math.isnan(row["seconds"]):
            continue
        known = sizes.setdefault(kind, [])
        if len(known) < _WEIGHED:
            known.append(float(sum(size for size, _ in store.provenance(row["key"])["files"].values())))
        found.append(Cost(job, float(row["seconds"]), sum(known) / len(known), float(row["peak_bytes"])))
    return found


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
