"""The settings of a run: how it is carried out, which no result depends on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.spec_files import Marked, mistake

ENGINES = ("local", "ray")
DEVICES = ("cpu", "cuda")
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)", re.ASCII)


def read_run(settings: Mapping[str, Marked]) -> dict[str, Any]:
    """The settings checked, ``memory`` in bytes; those that are null are left out. Mistakes are raised with their line."""
    found = {}
    for name, given in settings.items():
        if name not in SETTINGS:
            raise mistake(given.at, UnknownName("setting of a run", name, SETTINGS))
        value = given.plain()
        if value is None:
            continue
        try:
            found[name] = SETTINGS[name](name, value)
        except WorkbenchError as error:
            raise mistake(given.at, error) from None
    return found


def read_bytes(text: str) -> int:
    """An amount of memory in bytes: ``512MB``, ``1.5 GB`` (powers of 1000), ``4GiB`` (powers of 1024), ``100B``."""
    found = _BYTES.fullmatch(text.strip()) if isinstance(text, str) else None
    if not found or found[2].upper() not in _UNITS:
        raise WorkbenchError(f"an amount of memory is a number and a unit, such as 4GB, 512MB or 2GiB; got {text!r}")
    amount = int(float(found[1]) * _UNITS[found[2].upper()]) if len(found[1]) < 20 else 0
    if amount < 1:
        raise WorkbenchError(f"an amount of memory is at least one byte; got {text!r}")
    return amount


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WorkbenchError(f"{name} of a run is a whole number from 1; got {value!r}")
    return value


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
        raise WorkbenchError(f"{name} of a run is a number of seconds above 0; got {value!r}")
    return value


def _memory(name: str, value: Any) -> int:
    return read_bytes(value)


def _device(name: str, value: Any) -> str:
    if value not in DEVICES:
        raise UnknownName("device", value, DEVICES)
    return str(value)


def _engine(name: str, value: Any) -> str:
    if value not in ENGINES:
        raise UnknownName("engine", value, ENGINES)
    return str(value)


def _address(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise WorkbenchError(f"{name} of a run is a text, the address of a Ray cluster; got {value!r}")
    return value


SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "workers": _count,
    "engine": _engine,
    "threads": _count,
    "timeout": _seconds,
    "memory": _memory,
    "device": _device,
    "attempts": _count,
    "address": _address,
}
