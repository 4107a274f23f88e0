"""Colored objects: read off the color of one of three objects (Merullo et al., arXiv 2310.08744).

::

    clean    <bos> Q: On the desk, you see a red mug, a blue pen, and a green book. What color is the pen?
             A: blue
             Q: On the floor, there is a white cup, a black hat, and a red ball. What color is the hat?  A:  ->  black
    corrupt  ...                                            What color is the ball?  A:  ->  red      (query)
    corrupt  ...                                            What color is the lamp?  A:  ->  nothing  (absent)

``shots`` worked examples come first (1 in the paper). ``query`` asks about another object of the last scene, as published;
``absent``, which is ours, about an object that occurs nowhere in the prompt, so that there is no color to read off.
Spans: ``OBJECT`` and ``COLOR`` of the asked object in its scene, ``OTHER1`` and ``OTHER2`` (the colors of the other two objects
there), ``QUERY`` (the object in the question), ``END``.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, one_of
from workbench.datasets.words import template, words
from workbench.errors import WorkbenchError
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("query", "absent")


@dataclass(frozen=True)
class ColoredObjects:
    """The task. Splits hold different last scenes with their question."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    shots: int = 1
    corruption: str = "query"
    split: str = "train"
    name: str = field(default="colored-objects", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of colored-objects", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)
        if self.shots < 0:
            raise WorkbenchError(f"shots is a number of worked examples, 0 or more; got {self.shots}")
        most = (len(words("objects")) - 1) // 3 - 1
        if self.corruption == "absent" and self.shots > most:
            raise WorkbenchError(
                f"with more than {most} shots every object may occur, and none be absent; got {self.shots}"
            )

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``object``, ``slot`` (0 to 2, which object of the scene is asked for)."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> ColoredObjects:
        """The task whose corrupted prompts ask about an object that was not seen."""
        return replace(self, corruption="absent")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the asked object's color minus that of the object the corrupted prompt asks for, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        before = ""
        for _ in range(self.shots):
            text, colors, objects = scene(rng)
            slot = rng.randrange(3)
            before += f"Q: {text} {question(objects[slot])}\nA: {colors[slot]}\n"
        text, colors, objects = scene(rng)
        slot, other = rng.sample(range(3), 2)
        told = f"{before}Q: {text} "
        clean = f"{told}{question(objects[slot])}\nA:"
        asked = objects[other] if self.corruption == "query" else unseen(told)
        pair = f"{colors[slot]} {objects[slot]}"
        at = clean.index(pair, len(before))
        query = clean.rindex(objects[slot])
        others = [clean.index(f"{colors[i]} {objects[i]}", len(before)) for i in range(3) if i != slot]
        return Example(
            clean=clean,
            corrupt=f"{told}{question(asked)}\nA:",
            answer=(f" {colors[slot]}",),
            wrong=(f" {colors[other]}",),
            key=f"{text} {objects[slot]}",
            spans={
                "COLOR": (at, at + len(colors[slot])),
                "OBJECT": (at + len(colors[slot]) + 1, at + len(pair)),
                **{f"OTHER{i}": (at, clean.index(" ", at)) for i, at in enumerate(others, 1)},
                "QUERY": (query, query + len(objects[slot])),
            },
            labels={"object": objects[slot], "slot": slot},
        )


def scene(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """A sentence with three objects, their colors and the objects."""
    frames = template("colored-objects")
    colors, objects = rng.sample(words("colors"), 3), rng.sample(words("objects"), 3)
    named = {f"c{i}": c for i, c in enumerate(colors, 1)} | {f"o{i}": o for i, o in enumerate(objects, 1)}
    opening, surface = rng.choice(frames["openings"]), rng.choice(words("surfaces"))
    return frames["scene"].format(opening=opening, surface=surface, **named), colors, objects


def question(thing: str) -> str:
    """The question about one object."""
    return template("colored-objects")["question"].format(o=thing)


def unseen(told: str) -> str:
    """An object that does not occur in a text; always the same for one text, so that no random numbers are used up."""
    return random.Random(told).choice([thing for thing in words("objects") if not re.search(rf"\b{thing}\b", told)])


TASKS = {"colored-objects": (ColoredObjects, "the color of one of three objects")}
