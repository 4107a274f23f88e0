"""Questions to a store of jobs: what can be compared in it, and SQL in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.jobs.store import JobStore

if TYPE_CHECKING:
    import pandas as pd

PATIENCE = 60.0
"""Seconds that a query may take."""
_PREFERRED = ("method", "kind", "model", "task", "probe")


@dataclass(frozen=True)
class Choices:
    """What can be compared of one probe: ``values``, numbers of the results; ``fields`` of the jobs in which cells differ, those
    first that are compared most; ``labels``, other columns of the results that tell rows apart."""

    values: tuple[str, ...]
    fields: tuple[str, ...]
    labels: tuple[str, ...]


def probes_of(store: JobStore) -> list[str]:
    """The probes with finished cells."""
    from workbench.jobs.index import answered

    return answered(store, lambda views: list(views.probes["results"]))


def choices(store: JobStore, probe: str) -> Choices:
    """What the finished cells of ``probe`` can be compared by."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    from workbench.jobs.compare import MEASURES
    from workbench.jobs.index import answered, ask, selected
    from workbench.jobs.index_views import Views, quoted

    def look(views: Views) -> tuple[pd.DataFrame, tuple[str, ...]]:
        view = views.view(views.of_probe(probe))
        names = ", ".join(map(quoted, view.names))
        return ask(views, f"SELECT {names} FROM {view.rows} LIMIT 1000"), view.job

    rows, job = answered(store, look)
    own = [name for name in rows.columns if name not in job]
    numbers = [n for n in own if is_numeric_dtype(rows[n]) and not is_bool_dtype(rows[n])]
    cells = selected(store, probe=probe)
    differing = [n for n in job if n not in ("key", "revision") and cells[n].nunique(dropna=False) > 1]
    fields = sorted(differing, key=lambda n: _PREFERRED.index(n) if n in _PREFERRED else len(_PREFERRED))
    floats = [n for n in numbers if rows[n].dtype.kind == "f"]
    floats.sort(key=lambda n: rows[n].nunique() < 2)  # what varies comes first
    labels = [n for n in own if n not in floats]
    return Choices((*floats, *(n for n in numbers if n not in floats), *MEASURES), tuple(fields), tuple(labels))


def asked(store: Path, query: str, patience: float = PATIENCE) -> pd.DataFrame:
    """The answer to a reading SQL query (``JobStore.sql``), worked out in a process that is ended after ``patience`` seconds.

    Raises what the library says of the query, in a line."""
    import pandas as pd

    words = [sys.executable, "-m", "workbench", "jobs", "sql", "--json", "--store", str(store), "--", query]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=patience, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise WorkbenchError(f"the query took longer than {patience:g} s and was ended; ask for less") from None
    except (OSError, ValueError) as error:  # a query longer than a command may be, or with a zero byte
        raise WorkbenchError(f"the query cannot be asked: {error}") from None
    if done.returncode:
        told = done.stderr.strip() or f"the process of the query ended with code {done.returncode}"
        raise WorkbenchError(told.removeprefix("workbench: "))
    answer: Mapping[str, Any] = json.loads(done.stdout)
    return pd.DataFrame(answer["rows"], columns=answer["columns"])


def exported(store: JobStore, form: str, where: str, probe: str | None) -> tuple[str, bytes]:
    """A file's name and content: the table of all result rows (``parquet``, ``csv``), or the circuits as a zip file."""
    from workbench.jobs.export import TABLES, export

    name = store.path.name
    with tempfile.TemporaryDirectory(prefix="workbench-export-") as folder:
        to = Path(folder) / (f"{name}.{form}" if form in TABLES else name)
        written = export(store, to, form=form, where=where or None, probe=probe)
        if form not in TABLES:
            written = Path(shutil.make_archive(str(Path(folder) / f"{name}-{form}"), "zip", written))
        return written.name, written.read_bytes()
