"""The main job, end to end, on the bundled models: ``python -m workbench.apps.demo [--out results]``.

Capture, attention sinks of a softmax model and its gated twin, known heads and retrieval heads, the circuit of a task by two
methods with its faithfulness, and block maps of one input of 8,192 tokens. Results are written to a temporary folder and take
their place in ``<out>/demo`` together at the end; the report is made from them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps import inputs
from workbench.apps.store import ACCOUNT, FOLDER
from workbench.apps.terminal import complain, guarded, log, progress, quiet, stdout
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.models.protocol import Model

SOFTMAX, GATED = "tiny-softmax", "tiny-gated"
LONG = 8192


@dataclass
class Work:
    """What the steps share: where results go, the models, and what earlier steps found."""

    folder: Path
    tick: Callable[[int, int], None]
    load: Callable[[str], Model]
    models: dict[str, Model] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def keep(self, name: str, result: Any) -> None:
        """Save a result of the current step."""
        result.save(self.folder / name)
        self.kept.append(name)


@dataclass
class Step:
    """One step's account."""

    title: str
    lines: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def demo(out: Path, long: int = LONG, load: Callable[[str], Model] = inputs.load) -> tuple[list[Step], Path]:
    """Run every step, save what they found, write the report; gives the steps and the report's path.

    A step that fails is reported and the others go on. ``long``: tokens of the long input; ``load`` gives the two models.
    """
    from workbench.apps.demo_steps import steps
    from workbench.apps.overview import overview
    from workbench.apps.sections import report_of
    from workbench.run import versions

    if (out / FOLDER).exists() and not (out / FOLDER / ACCOUNT).is_file():
        raise WorkbenchError(f"{out / FOLDER} exists and is not the demo's; choose another --out or remove it")
    inputs.writable(out)
    out.mkdir(parents=True, exist_ok=True)
    started, begin = datetime.now(UTC), time.perf_counter()
    done: list[Step] = []
    with _staging(out) as folder, quiet(), progress() as bar:
        plan = steps(long)
        whole = bar.add_task("demo", total=len(plan))
        part = bar.add_task("", total=None, visible=False)

        def tick(count: int, total: int) -> None:
            bar.update(part, completed=count, total=total, visible=count < total)

        work = Work(folder, tick, load)
        for number, (title, run) in enumerate(plan, 1):
            bar.update(whole, description=title)
            bar.update(part, description=title, visible=False)
            step = _attempt(title, run, work)
            done.append(step)
            bar.advance(whole)
            if not bar.console.is_terminal:
                log(f"[{number}/{len(plan)}] {title}: {'FAILED' if step.error else 'done'} in {step.seconds:.1f} s")
        seconds = time.perf_counter() - begin
        facts = {**work.facts, "run": f"{started:%Y-%m-%d %H:%M} UTC, {seconds:.0f} s on {os.cpu_count()} cores"}
        told = {
            "title": "What attention does in the bundled models",
            "facts": facts,
            "versions": versions(),
            "steps": [vars(step) for step in done],
        }
        (folder / ACCOUNT).write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")

        def draw(_: Work) -> list[str]:
            report_of(folder, folder / "report.html")
            if not any(step.error for step in done):
                overview(folder).savefig(folder / "overview.png", dpi=110)
            return []

        written = _attempt("Report", draw, work)
        if written.error:
            done.append(written)
        _swap(folder, out / FOLDER)
    (out / "report.html").unlink(missing_ok=True)
    if (out / FOLDER / "report.html").is_file():
        os.replace(out / FOLDER / "report.html", out / "report.html")
    return done, out / "report.html"


def _attempt(title: str, run: Callable[[Work], list[str]], work: Work) -> Step:
    begin, step = time.perf_counter(), Step(title)
    work.kept = []
    try:
        step.lines = run(work)
    except WorkbenchError as error:
        step.error = str(error)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        step.error = f"{type(error).__name__}: {error}"
    step.results, step.seconds = work.kept, round(time.perf_counter() - begin, 2)
    return step


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A temporary folder in ``out``, removed on the way out whatever happens; those of dead runs are removed first."""
    for old in out.glob(f".{FOLDER}-*.part"):
        pid = old.name.removeprefix(f".{FOLDER}-").removesuffix(".part")
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = out / f".{FOLDER}-{os.getpid()}.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(new: Path, place: Path) -> None:
    """Put ``new`` in the place of a former run's folder."""
    old = place.with_name(f".{place.name}-{os.getpid()}.old")
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def summary(done: list[Step], report: Path) -> None:
    """What was found, for the terminal."""
    console = stdout()
    for step in done:
        console.print(step.title, style="bold red" if step.error else "bold")
        for line in step.lines:
            console.print(f"  {line}", soft_wrap=True)
        if step.error:
            console.print(f"  FAILED: {step.error}", style="red", soft_wrap=True)
    told = f", report: {report}" if report.is_file() else ""
    console.print(f"results in {report.parent / FOLDER}{told}", soft_wrap=True)


def main(
    out: Annotated[Path, typer.Option("--out", help="Folder of the results and the report.")] = Path("results"),
) -> None:
    """Run the main job on the bundled models and write the report."""
    done, report = demo(out)
    summary(done, report)
    failed = [step.title for step in done if step.error]
    if failed:
        complain(f"{len(failed)} of {len(done)} steps failed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    command.command()(main)
    sys.exit(guarded(lambda: command(standalone_mode=False)))
