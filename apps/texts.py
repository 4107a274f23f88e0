"""Texts for commands that read a model: the bundled models' own training data, filler, prompts of a task, or a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.models.protocol import Model, Tokens

MIXTURE, FILLER, TASK = "mixture", "filler", "task:"
_LONGEST, _PAIRS = 128, 64


def texts_of(model: Model, name: str | None, seed: int, tokens: int = _LONGEST) -> tuple[Any, str]:
    """The texts called ``name`` and what they are in words.

    ``mixture``: documents like those that the bundled language models were trained on; ``filler``: filler alone; ``task:NAME``:
    prompts of a task; else a file: a document per line, or of ``.jsonl`` the field ``text`` of every line. None chooses for
    bundled models. All but files go on for ever.
    """
    name = _default(model) if name is None else name
    if name == MIXTURE:
        return _mixture(seed, tokens), f"training mixture of the bundled models, seed {seed}"
    if name == FILLER:
        return _filler(seed, tokens), f"filler, seed {seed}"
    if name.startswith(TASK):
        return _prompts(model, name.removeprefix(TASK), seed), f"prompts of {name.removeprefix(TASK)}, from seed {seed}"
    check_name(name)
    return Lines(Path(name)), name


def check_name(name: str) -> None:
    """Refuse a name that is neither of texts that are made nor of a file."""
    import workbench as wb

    if name.startswith(TASK):
        wb.task(name.removeprefix(TASK))
    elif name not in (MIXTURE, FILLER) and not Path(name).is_file():
        raise WorkbenchError(
            f"no data {name!r}: it is {MIXTURE}, {FILLER}, {TASK}NAME of a task, or a text file; there is no such file"
        )


def first_pieces(model: Model, data: Iterable[Any], number: int, *, context: int | None, bos: bool | None) -> Tokens:
    """The first ``number`` pieces of ``data`` as tokens: documents are cut after ``context`` tokens, 128 if None and at most as
    many as the model takes, and begin as a training with ``prepend_bos=bos`` begins them."""
    from workbench.coders.documents import Documents, Passes, padded
    from workbench.models.protocol import Tokens

    longest = min(_LONGEST if context is None else context, model.shape.context or 2**31)
    rows: list[list[int]] = []
    for item in data:
        found: Iterable[Any] = [item]
        if not isinstance(item, Tokens):
            found = Passes(model, Documents([item], repeat=False), context=longest, prepend_bos=bos)
        for batch in found:
            rows += [ids[real].tolist() for ids, real in zip(batch.ids, batch.mask, strict=True)]
        if len(rows) >= number:
            break
    kept = padded(rows[:number], getattr(model.tokenizer, "pad_token_id", None) or 0)
    labels = tuple(tuple(map(str, model.tokenizer.convert_ids_to_tokens(row))) for row in kept.ids.tolist())
    return Tokens(kept.ids, kept.mask, labels)


def _default(model: Model) -> str:
    """What a bundled model was trained on or made for."""
    import workbench as wb
    from workbench.datasets.tokenizer import base_vocabulary

    said = f"give --data: {MIXTURE}, {FILLER}, {TASK}NAME of a task, or a text file"
    if model.tokenizer is None:
        raise WorkbenchError(f"{model.name} reads no text; train on its inputs from Python with wb.train_sae")
    if model.name not in wb.bundled():
        raise WorkbenchError(f"{model.name} is no bundled model, so what to read is yours to say; {said}")
    tasks = [task for task in wb.tasks() if task in model.name]
    if tasks:
        return TASK + max(tasks, key=len)
    if model.shape.vocab == len(base_vocabulary()):
        return MIXTURE
    raise WorkbenchError(f"no data go with {model.name} by themselves; {said}")


def _mixture(seed: int, tokens: int) -> Iterator[str]:
    from workbench.datasets.models.mixture import KINDS, document

    number = 0
    while True:
        rng = random.Random(f"coders/{seed}/{number}")
        yield document(rng.choice(KINDS), rng, tokens).text
        number += 1


def _filler(seed: int, tokens: int) -> Iterator[str]:
    from workbench.datasets.corpus import count_pieces, filler_sentences

    number = 0
    while True:
        yield " ".join(filler_sentences(random.Random(f"coders/filler/{seed}/{number}"), tokens - 1, count_pieces))
        number += 1


def _prompts(model: Model, task: str, seed: int) -> Iterator[Any]:
    import workbench as wb

    built = wb.task(task)
    while True:
        yield built.build(seed=seed, tokenizer=model.tokenizer, n=_PAIRS).clean
        seed += 1


class Lines(Sequence[str]):
    """The documents of a text file, one per line, read when they are asked for: only where lines begin is kept."""

    def __init__(self, path: Path) -> None:
        self._path, self._json = path, path.suffix == ".jsonl"
        self._starts: list[int] = []
        at = 0
        try:
            with path.open("rb") as file:
                for line in file:
                    if line.strip():
                        self._starts.append(at)
                    at += len(line)
        except OSError as error:
            raise WorkbenchError(f"cannot read {path}: {error.strerror or error}") from None
        if not self._starts:
            raise WorkbenchError(f"{path} holds no text")
        self._file = path.open("rb")

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self._file.seek(self._starts[index])
        raw = self._file.readline()
        where = f"line {index} of the documents in {self._path}"
        try:
            line = raw.decode("utf-8-sig" if self._starts[index] == 0 else "utf-8").rstrip("\r\n")
            text = json.loads(line)["text"] if self._json else line
        except UnicodeDecodeError as error:
            raise WorkbenchError(f"{where} is not UTF-8 text: byte 0x{raw[error.start]:02x}") from None
        except (ValueError, KeyError, TypeError):
            raise WorkbenchError(f'{where} is not JSON with a field "text"') from None
        if not isinstance(text, str) or "\0" in text:
            raise WorkbenchError(f"{where} is not text")
        return text
