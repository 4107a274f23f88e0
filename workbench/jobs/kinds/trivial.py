"""``sleep`` and ``fail``: cells that cost nothing and cells that break, for tests of whoever runs them."""

from __future__ import annotations

import itertools
import os
import signal
import time
from array import array
from pathlib import Path
from typing import Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.kinds.checks import check_arguments, whole
from workbench.jobs.probes import Cell, Outcome, Probe

_BLOCK, _PAGE = 64 * 2**20, 4096
_MASK = 2**64 - 1
_SLEEP = {"seconds": 0.0, "rows": 1}
_FAIL = {"how": "error", "marker": None}
HOWS = {
    "error": "raises RuntimeError",
    "exit": "leaves the process with code 3",
    "kill": "sends its process SIGKILL",
    "memory": "takes memory without end, 64 MB at a time, and writes to it",
    "loop": "loops for ever in Python",
    "hold": "loops for ever in C, so that no thread of the process runs Python again",
    "once": "dies if the file `marker` is not there, which it makes first; works after that",
}


def check_sleep(job: Job) -> None:
    check_arguments(job, _SLEEP, {})
    seconds = job.args.get("seconds", 0.0)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0:
        raise WorkbenchError(f"argument seconds of {job.probe} is a number from 0; got {seconds!r}")
    whole(job, "rows", 1, least=0)


def sleep(cell: Cell) -> Outcome:
    """Wait; the table has ``rows`` rows ``row, value``, where ``value``, from 0 to 1, depends on the seed and the row alone."""
    time.sleep(cell.job.args.get("seconds", 0.0))
    return Outcome(_rows(cell.job.seed, whole(cell.job, "rows", 1, least=0)))


def check_fail(job: Job) -> None:
    check_arguments(job, _FAIL, {"marker": str})
    how = job.args.get("how", "error")
    if how not in HOWS:
        raise UnknownName("way to fail", how, HOWS)
    if (how == "once") != ("marker" in job.args):
        raise WorkbenchError("fail with how: once wants marker, the path of a file that says whether it has failed yet; "
                             f"got how: {how} and marker: {job.args.get('marker')!r}")  # fmt: skip


def fail(cell: Cell) -> Outcome:
    """Break in the way that ``how`` names."""
    how = cell.job.args.get("how", "error")
    if how == "error":
        raise RuntimeError(f"this cell fails on purpose (seed {cell.job.seed})")
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":
        _fill()
    if how == "hold":
        sum(itertools.repeat(0))
    if how == "once":
        _die_once(Path(cell.job.args["marker"]))
        return Outcome(_rows(cell.job.seed, 1))
    while True:
        pass


def _fill() -> None:
    held = []
    while True:
        block = bytearray(_BLOCK)
        block[::_PAGE] = b"\1" * (_BLOCK // _PAGE)
        held.append(block)


def _die_once(marker: Path) -> None:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _rows(seed: int, rows: int) -> Any:
    import pyarrow as pa

    # from buffers: pa.array looks whether it was given something of pandas, and imports pandas for it
    columns = {
        "row": (pa.int64(), array("q", range(rows))),
        "value": (pa.float64(), array("d", (_number(seed, row) for row in range(rows)))),
    }
    made = [pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(values)]) for kind, values in columns.values()]
    return pa.Table.from_arrays(made, names=list(columns))


def _number(seed: int, row: int) -> float:
    """splitmix64 of seed and row, its upper 53 bits as a fraction."""
    z = (seed * 0x9E3779B97F4A7C15 + (row + 1) * 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / 2**53


PROBES = (
    Probe("sleep", "waits `seconds` and gives `rows` rows", "optional", "optional", _SLEEP, sleep, check_sleep),
    Probe("fail", f"breaks; how: {', '.join(HOWS)}", "optional", "optional", _FAIL, fail, check_fail),
)
