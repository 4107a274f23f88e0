"""Filler text from a small grammar, and long filler with facts hidden in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from workbench.datasets.words import template, words
from workbench.errors import WorkbenchError

FRAMES = (
    "The {trait} {person} {walk} to the {route} in the {time}.",
    "A {person} {saw} the {trait} {other} near the {route}.",
    "In the {time} the {person} {act} {manner}.",
    "The {person} {act} {manner} near the {route}.",
    "Then the {other} {walk} to the {trait} {person}.",
)
_SLOTS = {
    "trait": "filler.traits",
    "person": "filler.people",
    "other": "filler.people",
    "walk": "filler.walks",
    "route": "filler.routes",
    "act": "filler.acts",
    "manner": "filler.manners",
    "time": "filler.times",
    "saw": "filler.saws",
}
Count = Callable[[str], int]


@dataclass(frozen=True)
class Fact:
    """One needle: ``text`` stands at characters ``start`` to ``end`` of the whole and says what ``key`` holds."""

    key: str
    value: str
    text: str
    start: int
    end: int
    depth: float


@dataclass(frozen=True)
class NeedleText:
    """Filler with facts, followed by a question about the first of them; ``answer`` continues ``text``."""

    text: str
    facts: tuple[Fact, ...]
    answer: str


def sentence(rng: random.Random) -> str:
    """One filler sentence."""
    frame = rng.choice(FRAMES)
    return frame.format(**{slot: rng.choice(words(kind)) for slot, kind in _SLOTS.items()})


def filler_sentences(rng: random.Random, tokens: int, count: Count) -> list[str]:
    """Sentences that ``count`` to exactly ``tokens`` together; the last one is cut, and closed by a full stop if it can be."""
    out: list[str] = []
    left = tokens
    while left > 0:
        text = sentence(rng)
        size = count(text)
        if size > left:
            text = _cut(text, left, count)
            size = left
        out.append(text)
        left -= size
    return [text for text in out if text]


def filler_text(seed: int, tokens: int) -> str:
    """Filler of exactly ``tokens`` tokens of the bundled models' tokenizer, ``<bos>`` not counted."""
    if tokens < 1:
        raise WorkbenchError(f"a text has at least one token; got tokens={tokens}")
    return " ".join(filler_sentences(random.Random(f"filler/{seed}"), tokens, count_pieces))


def needle_text(seed: int, tokens: int = 8192, needles: int = 3, question: bool = True) -> NeedleText:
    """Filler of exactly ``tokens`` tokens, ``<bos>`` counted, with ``needles`` facts at even depths.

    The question asks for ``facts[0]``; which of the depths that one has is drawn with the seed. With ``question=False``
    the text is filler and facts alone.
    """
    rng = random.Random(f"needle-text/{seed}")
    keys, values = rng.sample(words("keys"), needles), rng.sample(words("values"), needles)
    depths = [(i + 0.5) / needles for i in range(needles)]
    rng.shuffle(depths)
    return hide(rng, tokens - 1, list(zip(keys, values, depths, strict=True)), count_pieces, question=question)


def hide(
    rng: random.Random, tokens: int, facts: list[tuple[str, str, float]], count: Count, *, question: bool = True
) -> NeedleText:
    """Filler with facts ``(key, value, depth)``; depth 0 is before all filler, 1 after it. The question asks for the first."""
    asked = template("needle")["question"].format(key=facts[0][0]) if question else ""
    said = [template("needle")["fact"].format(key=key, value=value) for key, value, _ in facts]
    room = tokens - sum(map(count, said)) - (count(asked) if asked else 0)
    if room < 0:
        raise WorkbenchError(f"{len(facts)} facts and the question need {tokens - room} tokens; got length {tokens}")
    filler = filler_sentences(rng, room, count)
    starts = [0]
    for text in filler:
        starts.append(starts[-1] + count(text))
    slots: dict[int, list[int]] = {}
    for index, (_, _, depth) in enumerate(facts):
        slot = min(range(len(starts)), key=lambda i: abs(starts[i] - depth * room))
        slots.setdefault(slot, []).append(index)
    text, placed = "", {}
    for slot, part in _interleave(filler, slots):
        if isinstance(part, int):
            text += " " * bool(text)
            placed[part] = Fact(
                *facts[part][:2], said[part], len(text), len(text) + len(said[part]), starts[slot] / max(room, 1)
            )
            text += said[part]
        else:
            text += " " * bool(text) + part
    text += f" {asked}" * bool(asked)
    return NeedleText(text, tuple(placed[i] for i in range(len(facts))), f" {facts[0][1]}")


def count_pieces(text: str) -> int:
    """Tokens of the bundled models' tokenizer, ``<bos>`` not counted."""
    from workbench.datasets.tokenizer import pieces

    return len(pieces(text))


def _interleave(filler: list[str], slots: dict[int, list[int]]) -> Iterator[tuple[int, int | str]]:
    for slot in range(len(filler) + 1):
        yield from ((slot, index) for index in slots.get(slot, ()))
        if slot < len(filler):
            yield slot, filler[slot]


def _cut(text: str, tokens: int, count: Count) -> str:
    """The longest beginning of ``text`` in whole words with a full stop that has ``tokens`` tokens; padded with ``so``."""
    parts = text.rstrip(".").split(" ")
    for end in range(len(parts), 0, -1):
        beginning = " ".join(parts[:end]) + "."
        if count(beginning) == tokens:
            return beginning
    return " ".join(["Then"] * tokens)
