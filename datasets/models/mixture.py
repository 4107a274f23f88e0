"""The training mixture of the bundled models: every task's training split, filler, and rows of several documents.

A document is a text with the character ranges of its answers. The loss counts answers far more than text, because in
generated text most words cannot be predicted at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from workbench.datasets.corpus import count_pieces, filler_sentences, hide
from workbench.datasets.pairs import Example, in_split
from workbench.datasets.tasks.colored_objects import question, scene
from workbench.datasets.tasks.docstring import Docstring
from workbench.datasets.tasks.greater_than import GreaterThan
from workbench.datasets.tasks.ioi import IOI
from workbench.datasets.words import template, words

KINDS = ("ioi", "greater-than", "colored-objects", "docstring", "induction", "needle", "filler", "packed")


@dataclass(frozen=True)
class Document:
    """A text and the character ranges of the words that a reader can know."""

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Batch:
    """Rows of one step: ids ``[B, T]`` padded on the right, and for every target position its kind, -1 for none.

    ``kind[b, t]`` belongs to the prediction of ``ids[b, t + 1]``: an index into ``KINDS`` for answers, ``len(KINDS)`` for
    other text, -1 for padding.
    """

    ids: Tensor
    kind: Tensor


def batches(rng: random.Random, tokenizer: Any, longest: int) -> list[Batch]:
    """One step's rows in three groups of similar length; those of the last group have one random length up to ``longest``."""
    short = [("ioi", 8), ("greater-than", 3)]
    middle = [("docstring", 6), ("colored-objects", 9), ("induction", 9), ("needle", 13)]
    long = [("needle", 6), ("colored-objects+", 1), ("packed", 1)]
    size = longest if rng.random() < 0.4 else rng.randint(56, longest)
    return [
        _batch(
            [
                (kind, document(kind, rng, size if group is long else 45 if kind == "needle" else longest))
                for kind, n in group
                for _ in range(n)
            ],
            tokenizer,
            longest,
        )
        for group in (short, middle, long)
    ]


def document(kind: str, rng: random.Random, longest: int) -> Document:
    """A random training document of one kind."""
    return _KINDS[kind](rng, longest)


def _train(draw: Callable[[random.Random], Example], rng: random.Random) -> Example:
    while True:
        example = draw(rng)
        if in_split(example.key, "train"):
            return example


def _answered(example: Example, rng: random.Random, end: str) -> Document:
    answer = rng.choice(example.answer)
    start = len(example.clean) + answer.startswith(" ")
    return Document(example.clean + answer + end, ((start, len(example.clean) + len(answer)),))


def _ioi(rng: random.Random, longest: int) -> Document:
    return _answered(_train(IOI().draw, rng), rng, ".")


def _greater_than(rng: random.Random, longest: int) -> Document:
    return _answered(_train(GreaterThan().draw, rng), rng, ".")


def _docstring(rng: random.Random, longest: int) -> Document:
    example = _train(Docstring(prefix=rng.randint(1, 3), suffix=rng.randint(0, 2)).draw, rng)
    last = _answered(example, rng, ":")
    return Document(last.text, (example.spans["B_DOC"], *last.answers))


def _colored(rng: random.Random, longest: int) -> Document:
    """A scene, and questions about all its objects that belong to the training split."""
    text = ""
    answers: list[tuple[int, int]] = []
    while not answers:
        said, colors, objects = scene(rng)
        text = f"Q: {said} "
        for color, thing in rng.sample(list(zip(colors, objects, strict=True)), 3):
            if in_split(f"{said} {thing}", "train"):
                text += f"{'Q: ' * bool(answers)}{question(thing)}\nA: "
                answers.append((len(text), len(text) + len(color)))
                text += f"{color}\n"
    return Document(text, tuple(answers))


def _colored_shots(rng: random.Random, longest: int) -> Document:
    first, second = (_colored(rng, longest) for _ in range(2))
    shift = len(first.text)
    return Document(first.text + second.text, (*first.answers, *((a + shift, b + shift) for a, b in second.answers)))


def _induction(rng: random.Random, longest: int) -> Document:
    period = rng.randint(3, 14) if longest < 96 or rng.random() < 0.4 else rng.randint(8, 26)
    length = min(3 * period, 42 if longest < 96 else 56)
    follows = _followers()
    row = [rng.choice(words("symbols"))]
    while len(row) < period:
        used = set(row)
        row.append(rng.choice([word for word in follows[row[-1]] if word not in used]))
    if row[0] not in follows[row[-1]]:
        length = min(length, 2 * period)
    full = [row[i % period] for i in range(length)]
    starts = [0]
    for word in full:
        starts.append(starts[-1] + len(word) + 1)
    return Document(
        " ".join(full),
        tuple((starts[i], starts[i] + len(full[i])) for i in range(period + 1, length) if i % period),
    )


@cache
def _followers() -> dict[str, tuple[str, ...]]:
    """For each word those that may follow it in training: no held-out (match, answer) pair is ever seen."""
    alphabet = words("symbols")
    return {a: tuple(b for b in alphabet if a != b and in_split(f"{a} {b}", "train")) for a in alphabet}


def _needle(rng: random.Random, longest: int) -> Document:
    question = template("needle")["question"]
    number = rng.choice((2, 2, 3, 3, 4))
    each = count_pieces(question.format(key="royal")) + 2
    room = longest - 1
    number = min(number, max(2, room // 40))
    asked = min(rng.randint(2, 4), number, max(1, (room - 8 * number) // each))
    facts: list[tuple[str, str, float]] = []
    while len(facts) < number:
        key, value = rng.choice(words("keys")), rng.choice(words("values"))
        if in_split(f"{key} {value}", "train") and all(key != k and value != v for k, v, _ in facts):
            facts.append((key, value, rng.random()))
    text = hide(rng, room - asked * each, facts, count_pieces, question=False).text
    answers = []
    for key, value, _ in rng.sample(facts, asked):
        text += f" {question.format(key=key)} "
        answers.append((len(text), len(text) + len(value)))
        text += f"{value}."
    return Document(text, tuple(answers))


def _filler(rng: random.Random, longest: int) -> Document:
    return Document(" ".join(filler_sentences(rng, longest - 1, count_pieces)), ())


def _packed(rng: random.Random, longest: int) -> Document:
    text = ""
    answers: list[tuple[int, int]] = []
    while True:
        kind = rng.choice(("ioi", "ioi", "greater-than", "colored-objects", "docstring", "story"))
        part = (
            Document(" ".join(filler_sentences(rng, 12, count_pieces)), ())
            if kind == "story"
            else document(kind, rng, 99)
        )
        if count_pieces(text) + count_pieces(part.text) + 2 > longest:
            return Document(text, tuple(answers))
        text += "\n" * bool(text)
        answers += [(a + len(text), b + len(text)) for a, b in part.answers]
        text += part.text


_KINDS: dict[str, Callable[[random.Random, int], Document]] = {
    "ioi": _ioi,
    "greater-than": _greater_than,
    "colored-objects": _colored,
    "colored-objects+": _colored_shots,
    "docstring": _docstring,
    "induction": _induction,
    "needle": _needle,
    "filler": _filler,
    "packed": _packed,
}


def _batch(documents: list[tuple[str, Document]], tokenizer: Any, longest: int) -> Batch:
    encoded = tokenizer.encode_batch([doc.text for _, doc in documents])
    width = min(max(len(row.ids) for row in encoded), longest)
    ids = torch.full((len(documents), width), tokenizer.token_to_id("<pad>"))
    kinds = torch.full((len(documents), width), -1)
    for b, ((kind, doc), row) in enumerate(zip(documents, encoded, strict=True)):
        size = min(len(row.ids), width)
        ids[b, :size] = torch.tensor(row.ids[:size])
        kinds[b, : size - 1] = len(KINDS)
        starts = {start for start, _ in doc.answers}
        number = KINDS.index(kind.rstrip("+"))
        for t, (start, _) in enumerate(row.offsets[:size]):
            if t and start in starts:
                kinds[b, t - 1] = number
    return Batch(ids, kinds)
