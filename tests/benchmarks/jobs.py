"""Grids at scale: what a cell costs beside its own work, and how fast a store of many cells answers.

    workbench bench jobs [--parts workers,capacity,trivial,store,again] [--folder DIR] [--json]

``workers``: a cluster simulated on this machine. Ray is told of as many CPUs as there are workers; every worker is a real actor
process (about 70 MB, and 0.5% of a processor when idle), its cells sleep and write real results. The overhead is the time between
two results of a worker beyond the sleep, once all have started. The sleep is so long that the processors, which are many more on
a cluster, are not the limit.

``capacity``: the driver alone against workers that do nothing: cells per second at most. Here 20 processes stand for all workers,
each with many threads.

``trivial``: cells of no work on warm workers, result file included, one after another on one worker, and on two.

``store``: a store of many cells, made by writing their files; each question is asked in a fresh process, which also loads Python.

``again``: a finished grid is run again.

Limits, told by the exit code: ``trivial`` under 10 ms on one worker, answers of ``store`` under 2 s, ``again`` under 5 s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

PARTS = ("workers", "capacity", "trivial", "store", "again")
PER_SECOND = 10.0
"""Cells per second that simulated workers finish together: two processors write as many results with time to spare."""
HOSTS = 20
"""Processes that stand for all workers where these do nothing."""
LIMITS = {"trivial": 0.010, "store": 2.0, "again": 5.0}
ASKED = {
    "list the keys": "len(store.keys())",
    "status": "status(store).done",
    "cells as a data frame": "len(cells(store))",
    "SQL: count by probe": "len(sql(store, 'SELECT probe, count(*) AS n FROM cells GROUP BY probe'))",
    "SQL: mean of every result row": "len(sql(store, 'SELECT avg(value) AS mean FROM results'))",
    "rows of one seed": "len(frame(store, {'seed': 17}))",
}


def sleepers(number: int, seconds: float) -> list[Any]:
    from workbench.jobs.job import Job

    return [Job("sleep", args={"seconds": seconds, "rows": 2}, seed=seed) for seed in range(number)]


class Gaps:
    """Watches a run: when each of ``workers`` finished its cells. With ``enough``, ends the run once it has seen so many gaps
    between two cells of a worker since all have started."""

    def __init__(self, workers: int, enough: int | None = None) -> None:
        self.workers, self.enough = workers, enough
        self.times: dict[int, list[float]] = {}
        self.warm = math.inf
        self.gaps: list[float] = []

    def __call__(self, event: Any) -> None:
        if event.kind != "done":
            return
        times = self.times.setdefault(event.slot, [])
        if times and times[-1] >= self.warm:
            self.gaps.append(event.elapsed - times[-1])
        times.append(event.elapsed)
        if len(self.times) == self.workers:
            self.warm = min(self.warm, event.elapsed)
        if self.enough is not None and len(self.gaps) >= self.enough:
            raise KeyboardInterrupt

    def warm_rate(self) -> float:
        """Cells per second from when every worker has finished one, without the last tenth, when workers run out of cells."""
        ends = sorted(end for times in self.times.values() for end in times)
        later = [end for end in ends if end >= self.warm]
        later = later[: len(later) - len(ends) // 10]
        if len(later) < 20:
            raise SystemExit("the last worker started when the cells were nearly done: give more cells")
        return (len(later) - 1) / (later[-1] - later[0])


def run_workers(counts: list[int], folder: Path) -> Iterator[dict[str, Any]]:
    from workbench.jobs.driver import Stopped, run_jobs

    for workers in counts:
        sleep = max(0.5, workers / PER_SECOND)
        gaps = Gaps(workers, enough=max(20, 3 * workers))
        with fresh(folder) as store:
            try:
                run_jobs(sleepers(50 * workers + 50, sleep), store, workers=workers, engine="ray", watch=gaps)
            except Stopped:
                pass
            else:
                raise SystemExit(f"{workers} workers did not start before the cells were done")
        over = [gap - sleep for gap in gaps.gaps]
        yield {
            "workers": workers,
            "cells": len(over),
            "sleep": sleep,
            "overhead": median(over),
            "p95": quantiles(over, n=20)[-1],
            "started": gaps.warm - sleep,
            "load": os.getloadavg()[0],
        }


def run_capacity(counts: list[int], folder: Path) -> Iterator[dict[str, Any]]:
    import workbench.jobs.engines.ray as ray_engine
    from workbench.jobs.driver import run_jobs

    engine = ray_engine.RayEngine
    ray_engine.RayEngine = crowd(engine)
    try:
        for workers in counts:
            gaps = Gaps(workers)
            with fresh(folder) as store:
                run_jobs(sleepers(max(3000, 20 * workers), 0.0), store, workers=workers, engine="ray", watch=gaps)
            rate = gaps.warm_rate()
            yield {"workers": workers, "rate": rate, "each": 1 / rate, "load": os.getloadavg()[0]}
    finally:
        ray_engine.RayEngine = engine


def crowd(engine: type) -> type:
    """The Ray engine with many slots in each of ``HOSTS`` processes. Its workers answer that a cell is done and do nothing."""

    class Crowd(engine):
        def __init__(self, slots: int, **options: Any) -> None:
            import ray

            super().__init__(slots, **options)
            host = ray.remote(Host).options(num_cpus=0, max_concurrency=math.ceil(slots / HOSTS))
            self._hosts = [host.remote() for _ in range(min(slots, HOSTS))]
            ray.get([host.place.remote() for host in self._hosts])

        def _start(self, slot: int) -> None:
            at = self._slots[slot]
            at.actor, at.since = self._hosts[slot % len(self._hosts)], time.monotonic()
            self._listen(at.actor.place.remote(), "placed", slot, at.actor)

    return Crowd


class Host:
    def place(self) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def work(self, order: Mapping[str, Any]) -> dict[str, Any]:
        return {"state": "done", "seconds": 0.0}


def run_trivial(number: int, folder: Path) -> Iterator[dict[str, Any]]:
    from workbench.jobs.driver import run_jobs

    for engine in ("local", "ray"):
        for workers in (1, 2):
            gaps = Gaps(workers)
            with fresh(folder) as store:
                run_jobs(sleepers(number, 0.0), store, workers=workers, engine=engine, watch=gaps)
            each = 1 / gaps.warm_rate()
            yield {"engine": engine, "workers": workers, "cells": number, "each": each, "load": os.getloadavg()[0]}


def run_store(number: int, folder: Path) -> Iterator[dict[str, Any]]:
    from workbench.jobs.index import refresh

    with fresh(folder) as path:
        yield {
            "what": "write the files",
            "call": timed(lambda: make_store(path, number)),
        }
        yield {"what": "pack all of it into the index", "call": timed(lambda: refresh(opened(path)))}
        yield {"what": size(path)}
        for what, expression in ASKED.items():
            yield {"what": what, "asked": True, **in_fresh_process(path, expression)}


def run_again(number: int, folder: Path) -> Iterator[dict[str, Any]]:
    from workbench.jobs.index import refresh

    with fresh(folder) as path:
        make_store(path, number)
        refresh(opened(path))
        expression = f"run_jobs(sleepers({number}, 0.0), store, workers=2, engine='ENGINE').stood"
        for engine in ("local", "ray"):
            found = in_fresh_process(path, expression.replace("ENGINE", engine))
            if found["answer"] != number:
                raise SystemExit(f"the finished grid was not recognised: {found}")
            yield {"what": f"{number:,} finished cells again, engine {engine}", **found}


def make_store(path: Path, number: int) -> None:
    """A store of ``number`` finished cells: the files of one that was computed, with the job and the sizes of each."""
    from workbench.jobs.driver import run_jobs
    from workbench.jobs.grids import put_grid
    from workbench.jobs.store import JOB, PROVENANCE, TABLE, encoded

    jobs = sleepers(number, 0.0)
    run_jobs(jobs[:1], path, workers=1)
    store = opened(path)
    table = (store.folder(jobs[0].key) / TABLE).read_bytes()
    provenance = store.provenance(jobs[0].key)
    files = {TABLE: provenance["files"][TABLE]}
    for job in jobs[1:]:
        at = store.folder(job.key)
        at.mkdir()
        told = encoded(job.dict())
        about = {**provenance, "seed": job.seed, "files": files | {JOB: [len(told), hashlib.sha256(told).hexdigest()]}}
        (at / TABLE).write_bytes(table)
        (at / JOB).write_bytes(told)
        (at / PROVENANCE).write_bytes(encoded(about))
    for name in os.listdir(store.hidden / "grids"):
        (store.hidden / "grids" / name).unlink()
    put_grid(store, "grid", jobs)


def in_fresh_process(path: Path, expression: str) -> dict[str, Any]:
    """The answer to an expression about ``store``, the seconds of the call and those of the whole process."""
    code = f"""
import json, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from {Path(__file__).stem} import sleepers
from workbench.jobs.driver import run_jobs
from workbench.jobs.index import cells, frame, sql
from workbench.jobs.status import status
from workbench.jobs.store import JobStore
store = JobStore({str(path)!r})
start = time.perf_counter()
answer = {expression}
print(json.dumps(dict(answer=answer, call=time.perf_counter() - start)))
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {**json.loads(done.stdout), "process": time.perf_counter() - start, "load": os.getloadavg()[0]}


def opened(path: Path) -> Any:
    from workbench.jobs.store import JobStore

    return JobStore(path)


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="jobs-at-scale-", dir=folder))
    try:
        yield path / "store"
    finally:
        shutil.rmtree(path, ignore_errors=True)


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def size(path: Path) -> str:
    """Files, their content and what they take on the disk."""
    found = [os.lstat(os.path.join(at, name)) for at, names, files in os.walk(path) for name in [*names, *files]]
    content, disk = sum(f.st_size for f in found), 512 * sum(f.st_blocks for f in found)
    return f"{len(found):,} files and folders, {content / 2**20:.0f} MiB of content, {disk / 2**20:.0f} MiB on the disk"


def over_limits(part: str, row: Mapping[str, Any]) -> str:
    """What is wrong with a row in words, empty if nothing is."""
    if part == "trivial" and row["workers"] == 1 and row["each"] > LIMITS[part]:
        return f"a trivial cell takes {1e3 * row['each']:.1f} ms on {row['engine']}, over the limit of {1e3 * LIMITS[part]:g} ms"
    if (part == "again" or (part == "store" and row.get("asked"))) and row["process"] > LIMITS[part]:
        return f"{row['what']} takes {row['process']:.1f} s, over the limit of {LIMITS[part]:g} s"
    return ""


def table(part: str, rows: list[dict[str, Any]]) -> str:
    """The rows of one part as Markdown."""
    ms = lambda seconds: f"{1e3 * seconds:.1f}"  # noqa: E731
    if part == "workers":
        head = [
            "workers",
            "cells",
            "sleep, s",
            "overhead per cell, ms",
            "95% below, ms",
            "all started after, s",
            "load",
        ]
        lines = [
            [
                r["workers"],
                r["cells"],
                f"{r['sleep']:g}",
                ms(r["overhead"]),
                ms(r["p95"]),
                f"{r['started']:.0f}",
                r["load"],
            ]
            for r in rows
        ]
    elif part == "capacity":
        head = ["workers", "cells per second", "ms per cell", "load"]
        lines = [[r["workers"], f"{r['rate']:.0f}", f"{1e3 * r['each']:.2f}", r["load"]] for r in rows]
    elif part == "trivial":
        head = ["engine", "workers", "cells", "ms per cell", "load"]
        lines = [[r["engine"], r["workers"], r["cells"], ms(r["each"]), r["load"]] for r in rows]
    else:
        head = ["question" if part == "store" else "run", "answer", "call, s", "whole process, s", "load"]
        lines = [
            [
                r["what"],
                r.get("answer", ""),
                *(f"{r[n]:.2f}" if n in r else "" for n in ("call", "process")),
                r.get("load", ""),
            ]
            for r in rows
        ]
    shown = [[f"{cell:,}" if isinstance(cell, int) else f"{cell:.1f}" if isinstance(cell, float) else cell for cell in line]
             for line in lines]  # fmt: skip
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in [head, ["-"] * len(head), *shown])
        .replace("| - ", "|-")
        .replace("- |", "-|")
    )


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas between them")
    parser.add_argument("--workers", type=whole_numbers, default=[1, 10, 50, 100, 200], help="of the simulated cluster")
    parser.add_argument("--crowd", type=whole_numbers, default=[1, 10, 100, 200, 1000], help="workers that do nothing")
    parser.add_argument("--trivial", type=int, default=2000, help="cells without work")
    parser.add_argument("--cells", type=int, default=100_000, help="of the large store")
    parser.add_argument("--finished", type=int, default=10_000, help="cells of the grid that is run again")
    parser.add_argument("--folder", type=Path, help="where the stores are made; a temporary folder by default")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    parts = [name.strip() for name in args.parts.split(",")]
    for name in parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}; known: {', '.join(PARTS)}")
    folder = args.folder or Path(tempfile.gettempdir())
    calls: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "workers": lambda: run_workers(args.workers, folder),
        "capacity": lambda: run_capacity(args.crowd, folder),
        "trivial": lambda: run_trivial(args.trivial, folder),
        "store": lambda: run_store(args.cells, folder),
        "again": lambda: run_again(args.finished, folder),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    broken = []
    for part in parts:
        found[part] = []
        for row in calls[part]():
            found[part].append(row)
            print(f"{part}: {row}", file=sys.stderr)
            broken += [said] if (said := over_limits(part, row)) else []
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    if args.json:
        print(json.dumps({"machine": machine, "parts": found, "broken": broken}))
    else:
        print(machine)
        for part, rows in found.items():
            print(f"\n{part}\n\n{table(part, rows)}")
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
