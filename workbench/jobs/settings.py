"""How a grid is run on this machine: workers, threads, memory, device. None of it belongs to what a cell is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.guard import total_memory

if TYPE_CHECKING:
    from workbench.jobs.spec import Grid

ENGINES = ("local", "ray")
DEFAULTS: Mapping[str, Any] = {
    "workers": None,
    "engine": "local",
    "threads": 1,
    "timeout": None,
    "memory": None,
    "device": None,
    "attempts": 3,
    "address": None,
}
_MEMORY_SHARE = 0.9


def settled(settings: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """Settings with their defaults worked out for this machine; wrong ones are refused."""
    from workbench.jobs.spec import read_bytes

    found = dict(settings)
    if found["engine"] not in ENGINES:
        raise UnknownName("engine", found["engine"], ENGINES)
    if found["address"] is not None and found["engine"] != "ray":
        raise WorkbenchError("address names a Ray cluster; it needs engine ray")
    for name in ("workers", "threads", "attempts", "timeout"):
        value = found[name]
        whole = name != "timeout"
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and value > 0
        if value is not None and not right:
            raise WorkbenchError(f"{name} is a {'whole number' if whole else 'number'} above 0; got {value!r}")
    models = any(job.model is not None for job in grid.jobs)
    gpus = _gpus() if models and found["device"] != "cpu" else 0
    if found["device"] is None:
        found["device"] = "cuda" if gpus else "cpu"
    if found["device"] not in ("cpu", "cuda"):
        raise UnknownName("device", found["device"], ("cpu", "cuda"))
    if found["device"] == "cuda" and not gpus and found["address"] is None:
        raise WorkbenchError("device cuda was asked for, and this machine has no GPU that torch sees; use device cpu")
    found["gpus"] = gpus if found["device"] == "cuda" else 0
    if found["workers"] is None:
        found["workers"] = found["gpus"] or max(1, (os.cpu_count() or 1) // found["threads"])
    if isinstance(found["memory"], str):
        found["memory"] = read_bytes(found["memory"])
    if found["memory"] is None and found["engine"] == "local":
        found["memory"] = int(_MEMORY_SHARE * total_memory() / found["workers"])
    return found


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
