"""``bench``: the benchmarks of a checkout, run by name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.apps.inputs import JsonOption
from workbench.apps.terminal import answer, table
from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

NAMES = (
    "kernels",
    "capture",
    "decode",
    "maps",
    "retrieval",
    "circuits",
    "codes",
    "circuit-speed",
    "sae-formats",
    "sae-training",
    "jobs",
    "app",
)
FOLDER = Path(__file__).resolve().parents[2] / "tests" / "benchmarks"
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[BENCHMARK]", help="Which; without it, what there is.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure on this machine.

    Runs a benchmark of the checkout and passes its other options on; `workbench bench kernels -- --help` lists them.
    """
    scripts = {key: FOLDER / f"{key.replace('-', '_')}.py" for key in NAMES}
    if not all(path.is_file() for path in scripts.values()):
        raise WorkbenchError(
            f"the benchmarks are part of the repository, not of an installed package: there is no {FOLDER}; run this in a "
            "checkout (make bench)"
        )
    if name is None:
        rows = [{"name": key, "measures": _measures(path)} for key, path in scripts.items()]
        shown = [list(row.values()) for row in rows]

        def show(console: Console) -> None:
            console.print(table("benchmarks", ["name", "measures"], shown))

        answer(as_json, {"command": "bench", "rows": rows}, show)
        return
    if name not in scripts:
        raise UnknownName("benchmark", name, NAMES)
    sys.stdout.flush()
    command = [sys.executable, str(scripts[name]), *["--json"] * as_json, *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _measures(script: Path) -> str:
    """The first sentence of a script's docstring, without running it."""
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")
