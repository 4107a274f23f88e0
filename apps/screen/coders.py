"""Coders that can be looked at: bundled ones, those that were trained here, and those in the folders of models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from workbench.apps.screen import place
from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.store import SAVED

_DEPTH = 2
"""How deep below a folder of models coders are looked for."""


@dataclass(frozen=True)
class Offered:
    """A coder by its key in the address; ``name`` is what code loads, ``model`` what it was trained on, empty where unknown."""

    key: str
    label: str
    name: str
    model: str


def offered() -> dict[str, Offered]:
    """All coders by key: those in the store by the key of their cell."""
    found = [*_bundled(), *_trained(), *_folders()]
    return {one.key: one for one in found}


def _bundled() -> list[Offered]:
    """The bundled coders of single tokens; the heads' come first."""
    from workbench.coders.bundled import bundled_coders

    names = [name for name in bundled_coders() if not name.endswith("/discrete")]
    names.sort(key=lambda name: ("/z-" not in name, name))
    return [Offered(name, name, name, name.partition("/")[0]) for name in names]


def _trained() -> list[Offered]:
    cells = place.cells()
    found = []
    for key in cells.keys():  # noqa: SIM118
        try:
            job = _job(str(cells.path), key)
        except (OSError, WorkbenchError):
            continue  # being written or damaged: opening it by its link says so
        if job.probe == "train_sae":
            said = ", ".join(str(job.args[name]) for name in ("site", "kind", "features") if name in job.args)
            label = f"trained here: {Path(job.model or '').name}, {said}, seed {job.seed}"
            found.append(Offered(key, label, str(cells.folder(key) / SAVED), job.model or ""))
    return found


def _folders() -> list[Offered]:
    found = []
    for root in place.roots():
        for depth in range(_DEPTH + 1):
            for path in sorted(root.glob("*/" * depth + "cfg.json")):
                if any(path.parent.glob("*.safetensors")):
                    found.append(Offered(str(path.parent), str(path.parent), str(path.parent), ""))
    return found


@st.cache_resource(max_entries=256)
def _job(store: str, key: str) -> Job:
    from workbench.jobs.store import JobStore

    return JobStore(store).job(key)
