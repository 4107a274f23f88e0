"""What the kernel benchmarks measure with: rounds of calls in turn, peak memory, and the rates of this machine.

No rate is taken from a datasheet: the physical limit of a call is its least arithmetic at the measured rate of matrix products,
or its least traffic at the measured rate of copies, whichever takes longer.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHORTEST = 0.02
"""A measurement calls often enough to last this many seconds, so that queueing hides what a launch costs the host."""


@dataclass(frozen=True)
class Way:
    """One way to answer a question, a row of its table.

    ``call`` answers once; None if it cannot run here, and ``remark`` says why. ``flops`` and ``moved`` (bytes) are the least work
    any implementation has. ``base`` names the row whose time this one is also divided by. ``read`` turns what ``call`` returns
    into named numbers, for the comparison with the reference; None if there is nothing to compare.
    """

    name: str
    call: Callable[[], Any] | None
    flops: float = 0.0
    moved: float = 0.0
    base: str = ""
    remark: str = ""
    read: Callable[[Any], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Machine:
    """``matmul`` FLOP/s of a product in ``dtype``, two for each multiply-add; ``copy`` bytes/s, read and written both counted;
    ``load``, how many processes wanted to run in the last minute: well above 0, the numbers are those of a busy machine.
    """

    name: str
    device: str
    dtype: str
    torch: str
    matmul: float
    copy: float
    load: float = 0.0

    def limit(self, way: Way) -> float:
        """Seconds below which no implementation can get; 0 where the work was not counted."""
        return max(way.flops / self.matmul, way.moved / self.copy)


def examine(device: str, dtype: torch.dtype) -> Machine:
    """Names the machine and measures its two rates."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        side, length = 8192, 2**28
    else:
        name, side, length = processor(), 1024, 2**25
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.ones(length, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: a @ b, device)
    copied = _best(lambda: target.copy_(source), device)
    return Machine(
        name=name,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__,
        matmul=2 * side**3 / product,
        copy=2 * source.nbytes / copied,
        load=os.getloadavg()[0],
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


def _best(call: Callable[[], Any], device: str) -> float:
    """The fastest of the calls that fit into half a second: a rate is what the machine can do."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.5:
        times.append(seconds(call, device))
    return min(times)


def seconds(call: Callable[[], Any], device: str, times: int = 1) -> float:
    """Seconds per call of ``times`` calls in a row, with everything that they queued."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000 / times
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def peak_bytes(call: Callable[[], Any], device: str) -> float | None:
    """Memory that one call needs beside what is held before it; None where the system does not say."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: float = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the process still holds would be used unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def high_water() -> float:
    """Largest resident memory of this program so far, in bytes.

    On Linux ``ru_maxrss`` is not it: a process that was started by a larger one begins with the larger one's figure.
    """
    if Path("/proc/self/status").exists():
        return _memory("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _memory(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def free_bytes(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def measure(ways: list[Way], machine: Machine, repeat: int, budget: float) -> list[dict[str, Any]]:
    """A row for each way: medians of ``repeat`` rounds, in each of which every way has its turn.

    The first way is the one that ratios refer to. A ratio is the median of the ratios within rounds, so that a slow minute of
    the machine hits both sides. A way gets fewer rounds, one at least, once it has taken ``budget`` seconds.
    """
    said: dict[str, str] = {way.name: way.remark for way in ways}
    turns: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    for way in ways:
        if way.call is None:
            continue
        try:
            form = getattr(way.call(), "impl", "")  # compiles what has to be compiled
            turns[way.name] = max(1, min(50, math.ceil(SHORTEST / max(seconds(way.call, machine.device), 1e-9))))
            times[way.name] = []
            said[way.name] = "; ".join(filter(None, (f"form {form}" if form else "", way.remark)))
        except Exception as error:  # a baseline that breaks is a remark in its row; the others still run
            said[way.name] = f"failed: {type(error).__name__}: {first_line(error)}"
        if way.name not in times and machine.device == "cuda":
            torch.cuda.empty_cache()
    for _ in range(repeat):
        for way in ways:
            done = times.get(way.name)
            if done is None or way.call is None or (done and turns[way.name] * sum(done) > budget):
                continue
            done.append(seconds(way.call, machine.device, turns[way.name]))
    rows: list[dict[str, Any]] = []
    for way in ways:
        done = times.get(way.name)
        if not done or way.call is None:
            rows.append({"way": way.name, "remark": said[way.name]})
            continue
        peak = peak_bytes(way.call, machine.device)
        rows.append(
            {
                "way": way.name,
                "seconds": median(done),
                "spread": (max(done) - min(done)) / median(done),
                "rounds": len(done),
                "ratio": ratio(done, times.get(ways[0].name)),
                "base": way.base,
                "base_ratio": ratio(done, times.get(way.base)),
                "peak_mb": None if peak is None else peak / 2**20,
                "limit_seconds": machine.limit(way),
                "of_limit": machine.limit(way) / median(done),
                "remark": said[way.name],
            }
        )
    return rows


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:120]


def ratio(done: list[float], base: list[float] | None) -> float | None:
    """The median over the rounds that both had."""
    return median([a / b for a, b in zip(done, base, strict=False)]) if base else None


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def differences(ways: list[Way], truth: dict[str, Tensor]) -> dict[str, float]:
    """For each way that can say, its largest distance from ``truth`` over truth's largest number.

    The output, rounded to the type of the tensors, counts only where a way answers nothing else.
    """
    found: dict[str, float] = {}
    for way in ways:
        if way.call is None or way.read is None:
            continue
        try:
            answer = way.read(way.call())
            if len(answer) > 1:
                answer = {name: value for name, value in answer.items() if not name.startswith("output")}
            errors = [
                float((value.double() - truth[name]).abs().max() / truth[name].abs().max())
                for name, value in answer.items()
            ]
        except Exception:  # what went wrong is said in the row of the measurement
            continue
        found[way.name] = float(torch.tensor(errors).max())  # NaN stays NaN
    return found


HEAD = ("way", "seconds", "spread", "x first", "x its base", "peak MB", "of limit", "error", "remark")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a way."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "-|" * len(HEAD)]
    for row in rows:
        if "seconds" not in row:
            cells = [row["way"], *[""] * (len(HEAD) - 2), row["remark"]]
        else:
            base = f"{row['base_ratio']:.2f} ({row['base']})" if row["base_ratio"] is not None else ""
            cells = [
                row["way"],
                f"{row['seconds']:.4g}",
                f"{row['spread']:.0%}",
                "" if row["ratio"] is None else f"{row['ratio']:.2f}",
                base,
                "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
                f"{row['of_limit']:.0%}" if row["limit_seconds"] else "",
                "" if row.get("error") is None else f"{row['error']:.0e}",
                row["remark"],
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
