"""From drawn examples in text to ``Pairs`` in tokens of any tokenizer."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.pairs import Pairs

SPLITS = ("train", "test")
_ROUNDS = 60
_GIVE_UP = 200


@dataclass(frozen=True)
class Example:
    """One example in text. ``answer`` and ``wrong`` are continuations, exactly as they follow ``clean`` (with their space).

    ``key`` decides the split: equal keys always fall on one side. ``spans`` are character ranges of ``clean``. ``asked`` is
    the range whose last token is asked, the whole of ``clean`` if ``None``: a task may ask inside a prompt. ``answer`` and
    ``wrong`` are then what could follow ``clean`` up to there, whatever does follow.
    """

    clean: str
    corrupt: str
    answer: tuple[str, ...]
    wrong: tuple[str, ...]
    key: str
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)
    asked: tuple[int, int] | None = None

    @property
    def before(self) -> str:
        """The clean prompt up to the end of what is asked."""
        return self.clean if self.asked is None else self.clean[: self.asked[1]]


@dataclass(frozen=True)
class _Row:
    clean: list[int]
    corrupt: list[int]
    answer: list[int]
    wrong: list[int]
    position: int
    spans: dict[str, tuple[int, int]]
    example: Example


def in_split(key: str, split: str) -> bool:
    """Whether an example belongs to a split: a fifth of all keys, chosen by their hash, are ``test``."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "little") % 5 == 0) == (split == "test")


def one_of(what: str, value: object, known: Sequence[str]) -> None:
    """Raise ``UnknownName`` unless ``value`` is known."""
    if value not in known:
        raise UnknownName(what, value, known)


def fast(name: str, tokenizer: Any) -> None:
    """Raise ``Refused`` unless a task's tokenizer gives character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise Refused(
            f"task {name!r} needs a fast tokenizer (character offsets); got {type(tokenizer).__name__}. "
            "Load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )


def token_count(tokenizer: Any) -> Callable[[str], int]:
    """Tokens of a text inside another, counted word by word (each with the space before it) and remembered."""
    known: dict[str, int] = {}
    base = len(tokenizer("a", add_special_tokens=False)["input_ids"])

    def count(text: str) -> int:
        parts = text.split()
        missing = [word for word in dict.fromkeys(parts) if word not in known]
        if missing:
            rows = tokenizer([f"a {word}" for word in missing], add_special_tokens=False)["input_ids"]
            known.update((word, len(row) - base) for word, row in zip(missing, rows, strict=True))
        return sum(known[word] for word in parts)

    return count


def source(name: str, split: str, seed: int) -> random.Random:
    """The random numbers of one task, split and seed."""
    return random.Random(f"{name}/{split}/{seed}")


def collect(
    name: str,
    draw: Callable[[random.Random], Example],
    *,
    seed: int,
    split: str,
    tokenizer: Any,
    n: int,
    length: int | None = None,
) -> Pairs:
    """``n`` distinct examples of one token length (``length``, or the first length that ``n`` examples reach).

    Dropped and counted in ``Pairs.dropped``: pairs of unequal length, answers that are not one token, words the tokenizer
    does not know, and examples of another length than the chosen one. Raises ``Refused`` with the counts if too few remain.
    """
    if n < 1:
        raise WorkbenchError(f"a task builds at least one example; got n={n}")
    fast(name, tokenizer)
    rng = source(name, split, seed)
    seen: set[str] = set()
    by_length: dict[int, list[_Row]] = {}
    lost: Counter[str] = Counter()
    idle = 0
    for _ in range(_ROUNDS * (4 if split == "test" else 1)):  # which holds a quarter of what train does
        fresh = []
        for _ in range(n + 16):
            example = draw(rng)
            if example.clean in seen or not in_split(example.key, split):
                continue
            seen.add(example.clean)
            fresh.append(example)
        idle = 0 if fresh else idle + 1
        if idle > 3:
            break
        if not fresh:
            continue
        if not by_length and lost.total() >= _GIVE_UP:
            break
        for row in _tokenize(name, fresh, tokenizer, lost):
            if length is not None and len(row.clean) != length:
                lost[f"a length other than {length} tokens"] += 1
                continue
            rows = by_length.setdefault(len(row.clean), [])
            rows.append(row)
            if len(rows) == n:
                others = sum(map(len, by_length.values())) - n
                return _stack(rows, others + sum(lost.values()))
    best = max(by_length.values(), key=len, default=[])
    reasons = "; ".join(f"{count} with {why}" for why, count in lost.most_common()) or "none dropped"
    raise Refused(
        f"task {name!r} found {len(best)} of {n} examples of one length with this tokenizer, out of {len(seen)} drawn "
        f"({reasons}). Ask for fewer examples, other options, or use a tokenizer in which these words are single tokens"
    )


def _tokenize(name: str, examples: list[Example], tokenizer: Any, lost: Counter[str]) -> list[_Row]:
    encoded = tokenizer([e.clean for e in examples], return_offsets_mapping=True, return_special_tokens_mask=True)
    if encoded["special_tokens_mask"][0][-1]:
        last = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])[-1]
        raise Refused(
            f"task {name!r} asks for the token that follows a prompt, but this tokenizer ends every prompt with {last!r}; "
            "use the tokenizer of a model that predicts the next token"
        )
    corrupt = tokenizer([e.corrupt for e in examples])["input_ids"]
    continued = tokenizer([e.before + end for e in examples for end in (*e.answer, *e.wrong)])["input_ids"]
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, None}
    rows, at = [], 0
    for i, example in enumerate(examples):
        clean = encoded["input_ids"][i]
        ends = continued[at : at + len(example.answer) + len(example.wrong)]
        at += len(ends)
        position = len(clean) - 1
        if example.asked is not None:
            position = _cover(encoded["offset_mapping"][i], *example.asked)[1] - 1
        before = clean[: position + 1]
        ids = [end[-1] if len(end) == len(before) + 1 and end[:-1] == before else -1 for end in ends]
        answer = [t for t in ids[: len(example.answer)] if t >= 0]
        wrong = [t for t in ids[len(example.answer) :] if t >= 0]
        if unknown & {*clean, *corrupt[i], *answer, *wrong}:
            lost["words unknown to the tokenizer"] += 1
        elif not answer or not wrong or min(len(answer) / len(example.answer), len(wrong) / len(example.wrong)) < 0.5:
            lost["an answer that is not one token"] += 1
        elif set(answer) & set(wrong):
            lost["one token that is both right and wrong"] += 1
        elif len(corrupt[i]) != len(clean):
            lost["clean and corrupted prompts of unequal length"] += 1
        else:
            spans = {key: _cover(encoded["offset_mapping"][i], *span) for key, span in example.spans.items()}
            spans["END"] = (position, position + 1)
            rows.append(_Row(clean, corrupt[i], answer, wrong, position, spans, example))
    return rows


def _cover(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Tokens that overlap characters ``start`` to ``end``."""
    hit = [i for i, (lo, hi) in enumerate(offsets) if lo < end and hi > start]
    return (hit[0], hit[-1] + 1) if hit else (-1, -1)


def _stack(rows: list[_Row], dropped: int) -> Pairs:
    names = dict.fromkeys(name for row in rows for name in row.spans)
    labels = dict.fromkeys(name for row in rows for name in row.example.labels)
    return Pairs(
        clean=torch.tensor([row.clean for row in rows]),
        corrupt=torch.tensor([row.corrupt for row in rows]),
        answer=_padded([row.answer for row in rows]),
        wrong=_padded([row.wrong for row in rows]),
        position=torch.tensor([row.position for row in rows]),
        spans={name: torch.tensor([row.spans.get(name, (-1, -1)) for row in rows]) for name in names},
        labels={name: tuple(row.example.labels.get(name) for row in rows) for name in labels},
        texts=tuple(row.example.clean for row in rows),
        dropped=dropped,
    )


def _padded(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])
