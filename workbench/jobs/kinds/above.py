"""Modules that lie above the core, looked up when a cell needs them, as the facade does it for public names."""

from __future__ import annotations

import importlib
from typing import Any


def above(name: str) -> Any:
    """The module ``workbench.<name>`` of the probes or the data."""
    return importlib.import_module(f"workbench.{name}")
