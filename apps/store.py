"""What stands in a results folder: saved results, circuits, and the demo's account of what it did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.jobs.job import is_key
from workbench.jobs.store import HIDDEN

if TYPE_CHECKING:
    from workbench.circuits import Circuit
    from workbench.results import SavedResult

ACCOUNT = "demo.json"
FOLDER = "demo"
_RESULT = ("result.json", "table.parquet", "tensors.safetensors")
_CIRCUIT = ("circuit.json", "circuit.parquet")
DEPTH = 3
"""How many folders deep results are looked for."""


@dataclass(frozen=True)
class Stored:
    """One saved thing: its path relative to the store (the store's own name if it is the result), where it is, and
    ``result`` or ``circuit``."""

    name: str
    path: Path
    kind: str

    def load(self) -> SavedResult | Circuit:
        """Read it; half-written or damaged files raise and are named."""
        if self.kind == "circuit":
            from workbench.circuits import Circuit

            return Circuit.load(self.path)
        from workbench.results import load_result

        return load_result(self.path)


def stored(folder: str | Path) -> list[Stored]:
    """Everything saved in ``folder``, by name. A folder that holds any file of a result counts as one, so that a
    half-written result is found and refused when it is loaded, not passed over. Temporary names are passed over, and so are the
    cells of batch jobs (``grids.folders``)."""
    root = Path(folder)
    if not root.is_dir():
        raise WorkbenchError(f"no results folder {root}; `make demo` makes one, or give --out to a command")
    found = []
    pending = [(root, 0)]
    while pending:
        at, depth = pending.pop()
        kinds = [
            k for k, files in (("circuit", _CIRCUIT), ("result", _RESULT)) if any((at / f).exists() for f in files)
        ]
        if kinds:
            name = root.resolve().name if at == root else str(at.relative_to(root))
            found.append(Stored(name, at, kinds[0]))
        elif depth < DEPTH:
            jobs = (at / HIDDEN).is_dir()
            inside = [p for p in at.iterdir() if not (_temporary(p) or (jobs and is_key(p.name)))]
            pending += [(sub, depth + 1) for sub in inside if sub.is_dir()]
    return sorted(found, key=lambda s: s.name)


def account(folder: str | Path) -> Mapping[str, Any] | None:
    """The demo's account in ``folder``, its results named as ``stored`` names them; None if there is none. A damaged one, or
    one whose results are gone, is refused."""
    root = Path(folder)
    path = next((p for p in (root / ACCOUNT, root / FOLDER / ACCOUNT) if p.is_file()), None)
    if path is None:
        return None
    inside = path.parent.relative_to(root)
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        for step in written["steps"]:
            step["results"] = [str(inside / name) for name in step["results"]]
            step["lines"], step["title"] = list(step["lines"]), str(step["title"])
            step["seconds"] = float(step["seconds"])
        written["title"], written["facts"] = str(written["title"]), dict(written["facts"])
        written["versions"] = dict(written["versions"])
        listed = [name for step in written["steps"] for name in step["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise WorkbenchError(f"{path} is damaged: {type(error).__name__}: {error}; run the demo again") from error
    known = {thing.name for thing in stored(root)}
    for name in listed:
        if name not in known:
            raise WorkbenchError(
                f"{path} lists {name}, which is not there: the results are incomplete; run the demo again"
            )
    return written


def _temporary(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith(".part")
