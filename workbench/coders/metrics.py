"""Numbers of every step: a line of JSON each, and loggers of other people's if they are installed."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from workbench.errors import Refused, UnknownName, WorkbenchError

METRICS = "metrics.jsonl"
LOGGERS = ("jsonl", "wandb", "trackio")
_PROJECT = "attention-workbench"


class Logger(Protocol):
    """Takes the metrics of a step; ``close`` when the training ends."""

    def log(self, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """``metrics.jsonl``: what stands behind ``size`` bytes is cut off, and lines are appended from there on.

    Going on from a checkpoint with the size that the file had then, no step is there twice and none is missing.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        there = path.stat().st_size if path.is_file() else 0
        if there < size:
            raise WorkbenchError(f"{path} has {there} bytes; it had {size} when the checkpoint was written")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._file.truncate(size)

    def log(self, metrics: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({name: _finite(value) for name, value in metrics.items()}, allow_nan=False) + "\n")

    def settled(self) -> int:
        """Bytes of the file, once all lines are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


class Elsewhere:
    """wandb or trackio, which are called alike."""

    def __init__(self, name: str, recipe: Mapping[str, Any], folder: Path | None) -> None:
        self._module = installed(name)
        options: dict[str, Any] = {"project": _PROJECT, "config": dict(recipe), "name": folder.name if folder else None}
        if name == "wandb" and folder is not None:
            options["dir"] = str(folder)
        self._module.init(**{key: value for key, value in options.items() if value is not None})

    def log(self, metrics: Mapping[str, Any]) -> None:
        coder = metrics["coder"]
        rest = {f"{coder}/{name}": value for name, value in metrics.items() if name not in ("step", "coder")}
        self._module.log(rest, step=metrics["step"])

    def close(self) -> None:
        self._module.finish()


def wanted(log: str | Iterable[str] | None, folder: Path | None) -> tuple[str, ...]:
    """The loggers asked for; the file alone by default, where there is a folder. Refuses what is not installed."""
    if log is None:
        return ("jsonl",) if folder is not None else ()
    names = (log,) if isinstance(log, str) else tuple(log)
    for name in names:
        if name not in LOGGERS:
            raise UnknownName("logger", name, LOGGERS)
        if name == "jsonl" and folder is None:
            raise WorkbenchError(f"the logger jsonl writes {METRICS} into the folder of the training; give out=")
        if name != "jsonl":
            installed(name)
    return names


def installed(name: str) -> Any:
    """The package of a logger."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Refused(f"the logger {name} needs the package {name}: pip install {name}") from None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
