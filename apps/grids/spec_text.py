"""A grid as the text of a spec: written from the choices of a form, and read with the line of every mistake."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.jobs.spec_files import read

if TYPE_CHECKING:
    from workbench.jobs.spec import Grid

BUNDLED = Path(__file__).resolve().parents[1] / "jobs"
"""The grids that come with the package, a file each."""
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*", re.ASCII)
_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "inf", "infinity", "nan")
_FILE = "spec.yaml"
Confined = Callable[[str], object]
"""Gives the path or raises ``WorkbenchError`` for one that lies outside of what may be read."""


def bundled() -> dict[str, str]:
    """The text of every grid that comes with the package, by its name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(BUNDLED.glob("*.yaml"))}


def spec_text(
    name: str,
    probe: str,
    *,
    models: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: int = 1,
    arguments: Mapping[str, str] | None = None,
) -> str:
    """The spec of one probe on all ``models`` and ``tasks``, with the seeds from 0. ``arguments`` hold text as it is written in
    YAML, a value or a list of values; what is more than one line is refused."""
    lines = [f"name: {_word(name)}", f"probe: {_word(probe)}"]
    for key, values in (("model", models), ("task", tasks)):
        if values:
            lines.append(f"{key}: {_several([_word(value) for value in values])}")
    if seeds > 1:
        lines.append(f"seed: {_several([str(seed) for seed in range(seeds)])}")
    for key, text in (arguments or {}).items():
        if "\n" in text or "\r" in text:
            raise WorkbenchError(f"{key} has more than one line; write it into the YAML text itself")
        if text.strip():
            lines.append(f"{key}: {text.strip()}")
    return "\n".join(lines) + "\n"


def read_text(text: str, confined: Confined) -> Grid:
    """The grid of a spec's text, checked as ``workbench jobs run`` checks it, with the models' revisions.

    Mistakes begin with ``spec.yaml`` and their line. Every model, and every argument that names a file, goes through
    ``confined``; functions of one's own (``module:function``) are refused, since they may do anything."""
    from workbench.jobs.driver import job_grid

    with tempfile.TemporaryDirectory(prefix="workbench-spec-") as folder:
        path = Path(folder) / _FILE
        try:
            path.write_text(text, encoding="utf-8")
            extends = read(path).value.get("extends")
            if extends is not None and isinstance(extends.value, str):
                _refused(f"{extends.at}: extends", extends.value, lambda given: confined(str(Path(folder, given))))
            _refuse_outside(path, confined)
            return job_grid(path)
        except UnicodeEncodeError:
            raise WorkbenchError(f"{_FILE} holds half of a character; a spec is UTF-8 text") from None
        except WorkbenchError as error:
            raise WorkbenchError(str(error).replace(f"{folder}{os.sep}", "")) from None


def _refuse_outside(path: Path, confined: Confined) -> None:
    from workbench.jobs.spec import read_grid

    grid = read_grid(path)
    seen: set[str] = set(_bundled_models())
    for job in grid.jobs:
        if ":" in job.probe and not job.probe.startswith("workbench."):
            raise WorkbenchError(
                f"{grid.place(job, 'probe')}: {job.probe} is a function of your own, which the app does not run; "
                "`workbench jobs run SPEC --store FOLDER` does"
            )
        for name, value in (("model", job.model), *job.args.items()):
            for said in _texts(value) if name != "text" else ():
                if said not in seen and (said.startswith(("/", "~", ".")) or os.path.exists(said)):
                    _refused(f"{grid.place(job, name)}: {name}", said, confined)
                seen.add(said)


def _refused(where: str, given: str, confined: Confined) -> None:
    try:
        confined(given)
    except WorkbenchError as error:
        raise WorkbenchError(f"{where}: {error}") from None


def _bundled_models() -> Sequence[str]:
    from workbench.jobs.revisions import bundled_names

    return bundled_names()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _word(text: str) -> str:
    """A text in YAML, in quotes where it could be read as something else."""
    return text if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else json.dumps(text, ensure_ascii=False)


def _several(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"[{', '.join(values)}]"
