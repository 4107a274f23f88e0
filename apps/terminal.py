"""How every command talks: the answer alone on stdout, progress and complaints on stderr, mistakes in one line.

Exit codes: 0 for an answer, 1 for something of ours that should work and does not, 2 for the user's mistake, 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from workbench.errors import WorkbenchError

_PIPED_WIDTH = 160
_INTERRUPTED = 130
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Commands(TyperGroup):
    """A command group that turns every mistake of the user into one line on stderr and exit code 2."""

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.pop("standalone_mode", True)

        def run() -> Any:
            return super(Commands, self).main(*args, **{**extra, "standalone_mode": False})

        return sys.exit(guarded(run)) if standalone else run()


def guarded(work: Callable[[], Any]) -> int:
    """Run ``work`` and give its exit code: errors a user can cause become one line on stderr; others keep their traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller, as in `workbench ... >&-`
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work()
        sys.stdout.flush()
        if code == _INTERRUPTED:
            complain("interrupted")
        return code if isinstance(code, int) else 0
    except _ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message, file=sys.stderr)
            return 2
        return complain(f"{message.rstrip('.')}{hint}")
    except (typer.Abort, KeyboardInterrupt):
        complain("interrupted")
        return _INTERRUPTED
    except WorkbenchError as error:
        return complain(str(error))
    except BrokenPipeError:
        _hang_up()
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return complain(f"{where}{error.strerror or error}")


def complain(message: str) -> int:
    """One line on stderr; returns exit code 2."""
    print(f"workbench: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def stdout() -> Console:
    """The console for answers: as wide as COLUMNS says or the terminal is; elsewhere wide, so that nothing is cut."""
    width = shutil.get_terminal_size((_PIPED_WIDTH, 24)).columns
    return _Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


def stderr() -> Console:
    return Console(file=sys.stderr, stderr=True, markup=False, highlight=False, emoji=False)


def log(message: str) -> None:
    """A remark for the person, on stderr."""
    stderr().print(message, soft_wrap=True)


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[int, int], None]]:
    """Everything slow happens in here: a spinner on stderr, other packages' chatter silenced, their prints kept off stdout.

    Gives ``tick(done, total)``, which turns the spinner into a bar."""
    with quiet(), contextlib.redirect_stdout(sys.stderr), progress() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress() -> Progress:
    """A progress bar on stderr; nothing is drawn where stderr is not a terminal."""
    console = stderr()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Third-party warnings and log lines are silenced, ours are one line on stderr; ``-W`` and ``PYTHONWARNINGS`` win."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("transformers", "transformer_lens", "huggingface_hub", "matplotlib", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"workbench(\.|$)")
            warnings.showwarning = lambda message, *_: log(f"warning: {message}")
        yield


def answer(as_json: bool, payload: Mapping[str, Any], show: Callable[[Console], None]) -> None:
    """The answer of a command on stdout: ``payload`` as JSON, or ``show`` for people. A reader that has gone (``| head``) has
    what it wanted."""
    try:
        if as_json:
            sys.stdout.write(to_json(payload) + "\n")
        else:
            show(stdout())
        sys.stdout.flush()
    except BrokenPipeError:
        _hang_up()


def _hang_up() -> None:
    """Nobody reads stdout any more: what is still buffered goes nowhere, without complaint at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def to_json(payload: Any) -> str:
    """Valid JSON in ASCII: NaN is null, infinities are texts, tensors are lists, data frames lists of records."""
    return json.dumps(plain(payload), allow_nan=False)


def plain(value: Any) -> Any:
    """``value`` as what JSON knows."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return [plain(row) for row in value.to_dict("records")]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path) or type(value).__module__ == "torch":
        return str(value)
    raise TypeError(f"no JSON form for {type(value).__name__}")


def table(
    title: str, columns: Mapping[str, str] | list[str], rows: list[list[Any]], styles: list[str] | None = None
) -> Group:
    """A title line and a rich table. ``columns`` maps names to ``left`` or ``right``; cells are shown literally, floats with
    three decimals; ``styles`` gives one style per row."""
    aligned = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, "left")
    out = Table(header_style="bold")
    for name, side in aligned.items():
        whole = name == "name"  # names are for copying
        out.add_column(name, justify="right" if side == "right" else "left", overflow="fold", no_wrap=whole)
    for i, row in enumerate(rows):
        out.add_row(*(Text(cell(value)) for value in row), style=styles[i] if styles else None)
    return Group(Text(title, style="bold"), out)


def cell(value: Any) -> str:
    """One number or text for people: NaN and None are ``undefined``."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "undefined"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    """A share in whole percent; below one percent with a digit, so that little does not read as nothing."""
    if math.isnan(share):
        return "undefined"
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{100 * share:.1f}%" if 0 < share < 0.01 else f"{round(100 * share)}%"


def visible(token: str) -> str:
    """A token as a quoted text: white space and control characters are shown escaped."""
    return repr(token.replace("Ġ", " ").replace("Ċ", "\n"))
