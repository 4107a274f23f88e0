"""Texts or tokens, one after another, as the inputs of forward passes; with a cursor from which reading goes on.

A document longer than the context is cut, and every piece begins as the model's own tokenizer begins a text. Pieces of a
window of documents are sorted by length and shared out over passes, so that little is padding; documents never share a row,
so attention never looks into another document. Only one window is in memory.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model, Tokens

END = object()
WINDOW = 256
"""Documents of a window, if their size allows."""
_PER_TOKEN = 4
"""Characters of a token, roughly: for the size of a window."""
_SAMPLE = "a"
_TOLD = 16


class Documents:
    """Documents from ``data``: a text, a list of texts, token ids ``[T]`` or ``[B, T]``, or any iterable of such items.

    Lists (anything with a length) begin again when they end, ``repeat`` permitting; other iterables are read once and never
    kept. ``told`` describes the documents from their beginning; ``read`` counts those that were taken, ``digest`` says which
    they were: a hash of the documents of the first reading.
    """

    def __init__(self, data: Any, *, repeat: bool = True) -> None:
        self._list: Sequence[Any] | Tensor | None = None
        self._stream: Iterator[Any] | None = None
        if isinstance(data, str | Tokens | Mapping):
            self._list = [data]
        elif isinstance(data, Tensor):
            self._list = data[None] if data.ndim == 1 else data
        elif isinstance(data, Sequence) or (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            self._list = data
        elif isinstance(data, Iterable):
            self._stream = iter(data)
        else:
            raise WorkbenchError(
                f"cannot read texts from a {type(data).__name__}; pass a list of texts, token ids [B, T], or an iterable of them"
            )
        self.size = None if self._list is None else len(self._list)
        self._ahead: list[Any] = []
        if self._stream is not None:
            self._ahead = list(itertools.islice(self._stream, 1))
        if self.size == 0 or (self._stream is not None and not self._ahead):
            raise Refused(f"there are no texts: the {'list' if self._stream is None else 'iterable'} is empty")
        first = self._ahead[0] if self._list is None else self._list[0]
        self.texts = isinstance(first, str)
        """Whether the first document is a text."""
        self.told = self._fingerprint()
        self._repeat = repeat and self._list is not None
        self.read, self.digest = 0, ""

    @property
    def at_beginning(self) -> bool:
        """Whether the next document is the first of a list."""
        return self.size is not None and self.read % self.size == 0

    def take(self) -> Any:
        """The next document, ``END`` when there are no more."""
        if self._list is not None:
            size = len(self._list)
            if self.read >= size and not self._repeat:
                return END
            found = self._list[self.read % size]
        else:
            assert self._stream is not None
            found = self._ahead.pop() if self._ahead else next(self._stream, END)
            if found is END:
                return END
        if self.size is None or self.read < self.size:
            self.digest = _chained(self.digest, found)
        self.read += 1
        return found

    def _fingerprint(self) -> dict[str, Any]:
        """What tells these documents from others without reading them all: JSON."""
        if self._list is None:
            return {"documents": "streamed", "begin": _chained("", self._ahead[0])}
        digest = ""
        for i in range(min(_TOLD, len(self._list))):
            digest = _chained(digest, self._list[i])
        return {"documents": len(self._list), "begin": digest, "end": _chained("", self._list[len(self._list) - 1])}

    def skip(self, read: int, digest: str) -> None:
        """Go to where ``read`` documents have been taken, and make sure that they are the same as then."""
        if self.read:
            raise Refused(
                "reading goes on from a cursor only where no document has been taken yet: pass the texts anew, "
                "from their beginning"
            )
        first = read if self.size is None else min(read, self.size)
        for done in range(first):
            if self.take() is END:
                raise Refused(f"the texts end after {done} documents; {read} had been read before")
        if self.digest != digest:
            raise Refused(
                f"the first {first} documents are not those that were read before; pass the same texts in the same order, "
                "from their beginning"
            )
        self.read = read


def _chained(digest: str, document: Any) -> str:
    found = hashlib.blake2b(digest.encode(), digest_size=16)
    for part in _parts(document):
        found.update(part)
    return found.hexdigest()


def _parts(document: Any) -> Iterator[bytes]:
    if isinstance(document, str):
        yield document.encode("utf-8", "surrogatepass")
    elif isinstance(document, Tensor):
        yield f"{document.dtype}{list(document.shape)}".encode()
        yield document.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(document, Tokens):
        yield from _parts({"ids": document.ids, "mask": document.mask, **document.inputs})
    elif isinstance(document, Mapping):
        for name in sorted(document):
            yield str(name).encode()
            yield from _parts(document[name])
    else:
        yield repr(document).encode()


class Passes:
    """Inputs of forward passes over documents, with a cursor.

    ``next`` gives ``Tokens`` of at most about ``budget`` positions, or an item of the data that is a ready-made batch
    (``Tokens``, a mapping of the model's inputs, pixels) as it is. ``state()`` is where the next pass begins, as JSON.
    """

    def __init__(
        self, model: Model, documents: Documents, *, context: int, budget: int = 8192, prepend_bos: bool | None = None
    ) -> None:
        if isinstance(context, bool) or not isinstance(context, int) or context < 1:
            raise WorkbenchError(f"context is a number of tokens, at least 1; got {context!r}")
        longest = model.shape.context
        if longest is not None and context > longest:
            raise WorkbenchError(f"{model.name} takes at most {longest} tokens; got context={context}")
        self._model, self._documents, self.context, self._budget = model, documents, context, max(budget, context)
        self._asked = prepend_bos
        self._around: tuple[list[int], list[int]] | None = None
        self._begin: dict[str, Any] = {"documents": 0, "digest": "", "pass": 0}
        self._window: list[Any] = []
        self._at = 0
        self.empty = 0
        """Documents without a token, which were left out."""

    @property
    def epochs(self) -> float | None:
        """How often the list has been read; None for data that are not a list."""
        size = self._documents.size
        return None if size is None else self._documents.read / size

    @property
    def prepend_bos(self) -> bool | None:
        """Whether pieces of texts begin with the tokenizer's first token; None for tokens, which are taken as they are."""
        return bool(self._specials()[0]) if self._documents.texts else None

    def state(self) -> dict[str, Any]:
        if self._at >= len(self._window):
            return {"documents": self._documents.read, "digest": self._documents.digest, "pass": 0}
        return {**self._begin, "pass": self._at, "window": self._documents.digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._documents.skip(int(state["documents"]), str(state["digest"]))
        self._window, self._at = [], 0
        if state["pass"]:
            self._fill()
            if self._documents.digest != state["window"] or state["pass"] > len(self._window):
                raise Refused(
                    "the texts that had been read are not those that come now; pass the same ones in the same order"
                )
            self._at = int(state["pass"])

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while self._at >= len(self._window):
            if not self._fill():
                raise StopIteration
        found = self._window[self._at]
        self._window[self._at] = None
        self._at += 1
        return found

    def _fill(self) -> bool:
        """Make the passes of the next window; False when there are no more documents."""
        self._begin = {"documents": self._documents.read, "digest": self._documents.digest, "pass": 0}
        self._window, self._at = [], 0
        texts: list[str] = []
        rows: list[list[int]] = []
        ready: list[Any] = []
        size = taken = 0
        while taken < WINDOW and size < 4 * self._budget:
            if taken and self._documents.at_beginning:
                break  # the next reading of a list begins with a window of its own
            document = self._documents.take()
            if document is END:
                break
            taken += 1
            if isinstance(document, str):
                texts.append(document)
                size += 1 + len(document) // _PER_TOKEN
            elif isinstance(document, Tensor) and not document.is_floating_point():
                for row in document[None] if document.ndim == 1 else document:
                    rows += [part for part in _cut(row.tolist(), self.context) if part]
                size += max(1, document.numel())
            elif isinstance(document, Tensor | Tokens | Mapping):
                ready.append(self._batch(document))
                size += self._budget
            else:
                raise WorkbenchError(
                    f"document {self._documents.read - 1} is a {type(document).__name__}; documents are texts, token ids [T] or "
                    "[B, T], or a batch of the model's inputs"
                )
        if not taken:
            return False
        rows += self._encode(texts)
        rows.sort(key=len)
        self._window = [*self._shared(rows), *ready]
        return True

    @staticmethod
    def _batch(document: Any) -> Any:
        if isinstance(document, Mapping):
            for name, value in document.items():
                if not isinstance(value, Tensor):
                    raise WorkbenchError(
                        f"a document is a mapping whose {name!r} is a {type(value).__name__}; a mapping holds tensors, the "
                        "inputs of one forward pass. For a table of texts pass its column: (row['text'] for row in table)"
                    )
        return document

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        before, after = self._specials()
        room = self.context - len(before) - len(after)
        if room < 1:
            raise WorkbenchError(f"context={self.context} leaves no room beside the tokens that begin and end a text")
        pieces: list[list[int]] = []
        for ids in plain_ids(self._model.tokenizer, texts):
            if not ids:
                self.empty += 1
            pieces += [[*before, *part, *after] for part in _cut(ids, room)]
        return pieces

    def _specials(self) -> tuple[list[int], list[int]]:
        """Token ids before and after a text: those of the model's own tokenizer, with or without BOS as asked."""
        if self._around is None:
            if self._model.tokenizer is None:
                raise WorkbenchError(
                    f"{self._model.name} has no tokenizer: pass token ids (tensors [T] or [B, T]) instead of texts"
                )
            self._around = self._found()
        return self._around

    def _found(self) -> tuple[list[int], list[int]]:
        tokenizer = self._model.tokenizer
        whole = self._model.tokens(_SAMPLE).ids[0].tolist()
        (plain,) = plain_ids(tokenizer, [_SAMPLE])
        starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        if not plain or not starts:
            raise WorkbenchError(
                f"what the tokenizer of {self._model.name} puts around a text could not be told; pass token ids instead of texts"
            )
        before, after = whole[: starts[0]], whole[starts[0] + len(plain) :]
        first = getattr(tokenizer, "bos_token_id", None)
        if self._asked is True and not before:
            if first is None:
                raise WorkbenchError(f"the tokenizer of {self._model.name} has no BOS token; leave prepend_bos out")
            before = [first]
        return ([], after) if self._asked is False else (before, after)

    def _shared(self, rows: list[list[int]]) -> list[Tokens]:
        """Rows, shortest first, in batches whose padded size stays within the budget."""
        batches: list[list[list[int]]] = []
        for row in rows:
            if batches and len(row) * (len(batches[-1]) + 1) <= self._budget:
                batches[-1].append(row)
            else:
                batches.append([row])
        pad = getattr(self._model.tokenizer, "pad_token_id", None) or 0
        return [padded(batch, pad) for batch in batches]


def plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts without anything around them."""
    try:
        return [list(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    except Exception as error:  # the tokenizers package raises plain exceptions
        raise WorkbenchError(f"the model's tokenizer cannot encode the texts: {error}") from error


def padded(rows: Sequence[Sequence[int]], pad: int) -> Tokens:
    """Rows of token ids as one batch, padded on the right."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return Tokens(ids, mask)


def without_first(tokens: Tokens) -> Tokens:
    """The same tokens with the first real position of each row marked as padding; for choosing rows, not for running."""
    first = tokens.mask & (tokens.mask.long().cumsum(1) == 1)
    return replace(tokens, mask=tokens.mask & ~first)


def _cut(ids: list[int], room: int) -> list[list[int]]:
    return [ids[i : i + room] for i in range(0, len(ids), room)]
