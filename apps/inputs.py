"""What a person types, checked before anything slow starts: prompts, models, layers, folders, lists of numbers."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps.terminal import log
from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.captures import Capture
    from workbench.models.protocol import Model
    from workbench.run import Run

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A bundled name, a local folder, or a hub id.")]
TextOption = Annotated[str | None, typer.Option("--text", "-t", help="The prompt.")]
FileOption = Annotated[
    str | None,
    typer.Option(
        "--file", "-f", help="A UTF-8 text file with the prompt, or - for stdin; one newline at its end is dropped."
    ),
]
LayerOption = Annotated[list[str] | None, typer.Option("--layer", help="Only this layer; may be given several times.")]
HeadOption = Annotated[
    list[int] | None, typer.Option("--head", help="Show only this head; may be given several times.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Save the result in this new folder.")]
LARGEST_SEED = 2**32 - 1
"""What every random generator of the dependencies takes."""
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


def prompt(text: str | None, file: str | None) -> str:
    """The prompt from ``--text`` or ``--file``; refuses none, both, and what is empty or not text."""
    if (text is None) == (file is None):
        raise WorkbenchError(
            "give the prompt with either --text or --file" + ("; got both" if text is not None else "")
        )
    if text is not None:
        if not text.strip():
            raise WorkbenchError("the prompt is empty: --text holds no words")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise WorkbenchError("--text is not valid UTF-8")
        return text
    assert file is not None
    raw, name = _read(file)
    try:
        decoded = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WorkbenchError(
            f"{name} is not UTF-8 text: byte 0x{raw[error.start]:02x} at position {error.start}"
        ) from None
    if "\0" in decoded:
        raise WorkbenchError(f"{name} is not text: it holds zero bytes")
    decoded = decoded.replace("\r\n", "\n").removesuffix("\n")
    if not decoded.strip():
        raise WorkbenchError(f"the prompt is empty: {name} holds no words")
    return decoded


def _read(file: str) -> tuple[bytes, str]:
    if file == "-":
        if sys.stdin is None:
            raise WorkbenchError("--file - reads stdin, which is closed")
        return sys.stdin.buffer.read(), "stdin"
    path = Path(file)
    if path.is_dir():
        raise WorkbenchError(f"{path} is a folder; --file wants a text file")
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise WorkbenchError(f"cannot read {path}: {error.strerror or error}") from None


def layers(given: Sequence[str] | None) -> list[int | str] | None:
    """Layer names as typed: whole numbers are layer numbers, others names such as ``encoder.0``."""
    return [int(name) if name.isascii() and name.isdigit() else name for name in given] if given else None


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole positive numbers separated by commas."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise WorkbenchError(
            f"{option} wants whole numbers separated by commas, such as 512,2048; got {text!r}"
        ) from None
    if any(number < 1 for number in found):
        raise WorkbenchError(f"{option} wants numbers of at least 1; got {text!r}")
    return found


def assignments(given: list[str] | None, option: str) -> dict[str, Any]:
    """``name=value`` texts as keywords; values are read as JSON where they are JSON, as text otherwise."""
    found: dict[str, Any] = {}
    for text in given or []:
        name, equals, said = text.partition("=")
        if not equals or not name.isidentifier():
            raise WorkbenchError(f"{option} wants name=value; got {text!r}")
        if name in found:
            raise WorkbenchError(f"{option} {name} is given twice")
        try:
            found[name] = json.loads(said)
        except ValueError:
            found[name] = said
    return found


def fresh(folder: Path | None) -> Path | None:
    """An output folder that does not exist yet and can be made; checked by writing beside it, so before the long work."""
    if folder is None:
        return None
    if folder.exists() or folder.is_symlink():
        raise WorkbenchError(f"{folder} exists already; choose another --out or remove it")
    writable(folder.parent)
    return folder


def writable(folder: Path) -> None:
    """Raise unless files can be written in ``folder``, or in the nearest parent that exists if it has yet to be made."""
    at = folder.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    try:
        with tempfile.TemporaryFile(dir=at):
            pass
    except OSError as error:
        raise WorkbenchError(f"cannot write to {folder}: {error.strerror or error}") from None


def load(name: str) -> Model:
    import workbench as wb

    return wb.load(name)


def only(frame: pd.DataFrame, heads: Sequence[int] | None) -> pd.DataFrame:
    """Rows of the heads asked for; all without a wish. Heads that no row has are refused."""
    if not heads:
        return frame
    known = sorted(set(frame["head"].tolist()))
    for head in heads:
        if head not in known:
            raise UnknownName("head", head, known)
    return frame[frame["head"].isin(heads)]


def run(name: str, text: str, request: Capture, read: Sequence[str] = ()) -> tuple[Model, Run]:
    """One forward pass over ``text`` that records what ``request`` and ``read`` ask for, without logits."""
    model = load(name)
    return model, recorded(model, text, request, read)


def recorded(model: Model, text: str | Sequence[str], request: Capture, read: Sequence[str] = ()) -> Run:
    """``run`` of a loaded model, over one text or several."""
    import torch

    with torch.no_grad():
        found = model.run(text, read=read, maps=request, logits=None)
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    lost = 0 if unknown is None else int((found.tokens.ids == unknown).sum())
    if lost:
        log(
            f"{lost} of {found.tokens.ids.numel()} tokens are unknown to the tokenizer of {model.name} "
            "and run as its unknown token"
        )
    return found
