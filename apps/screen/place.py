"""Where the app reads and writes: one results folder, and the folders that models may come from."""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

from workbench.errors import WorkbenchError
from workbench.jobs.store import JobStore

CELLS = "app"
"""The folder in the results folder that holds what was computed from the app, one cell per question."""


def _given() -> tuple[Path, tuple[Path, ...]]:
    folder, models = _parsed(tuple(sys.argv[1:]))
    return folder.absolute(), tuple(path.absolute() for path in models)


@cache
def _parsed(words: tuple[str, ...]) -> tuple[Path, list[Path]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path, default=Path("results"))
    parser.add_argument("--models", type=Path, action="append", default=[])
    found, _ = parser.parse_known_args(words)
    return found.store, found.models


def store() -> Path:
    """The results folder given after ``--`` on Streamlit's command line; it need not exist yet."""
    return _given()[0]


def cells() -> JobStore:
    """The store of what was computed from the app."""
    return JobStore(store() / CELLS)


def roots() -> tuple[Path, ...]:
    """The folders that models may come from, as ``--models`` gave them."""
    return _given()[1]


def models() -> list[str]:
    """Models that the app offers: the bundled ones, then every folder with a model in the folders given by ``--models``."""
    from workbench.jobs.revisions import bundled_names

    found = [str(path) for root in _given()[1] for path in _model_folders(root)]
    return [*_first(bundled_names()), *found]


def _first(names: list[str]) -> list[str]:
    """tiny-softmax leads: it is what every page starts with."""
    return sorted(names, key=lambda name: (name != "tiny-softmax", not name.startswith("tiny"), name))


def _model_folders(root: Path) -> list[Path]:
    if (root / "config.json").is_file():
        return [root]
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if (path / "config.json").is_file())


def confined(path: str | Path, *roots: Path) -> Path:
    """``path`` with links and dots resolved, if it lies in the results folder, the models' folders or ``roots``; else refused."""
    try:
        found = Path(path).expanduser().resolve()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a name too long, a zero byte, a home or link that leads nowhere
        raise WorkbenchError(f"{str(path)[:200]!r} names no file: {error}") from None
    allowed = [root.resolve() for root in (store(), *_given()[1], *roots)]
    if not any(found == root or root in found.parents for root in allowed):
        said = ", ".join(map(str, allowed))
        raise WorkbenchError(f"{path} lies outside of the folders of this app ({said}); start it with --models FOLDER")
    return found
