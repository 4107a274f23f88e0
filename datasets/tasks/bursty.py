"""Bursty: the label that a class has in this context (Reddy, arXiv 2312.03002; Chan et al., arXiv 2205.05055).

::

    clean    <bos> apple honey stone rice apple honey glass milk stone rice glass milk stone  ->  rice
    corrupt  <bos> apple rice stone milk apple rice glass honey stone milk glass honey stone  ->  milk     (labels)
    corrupt  <bos> apple honey north rice apple honey glass milk north rice glass milk stone  ->  no label (absent)

Items and their labels take turns, and an item without label comes last. A context has ``pairs`` items of pairs / ``burst``
classes, each ``burst`` times, in a drawn order. Which label a class has is drawn for every prompt, so weights cannot hold it and
the context must be read. A class is one word here; items that scatter about their class are vectors, ``bursty_batch``.

``labels`` moves the labels on by as many classes, so that every class has another one (the published label swap); ``absent``
puts another class in the place of the asked one. Wrong: the other labels of the context. Spans: ``MATCH`` (the last item of the
asked class in the context), ``SOURCE`` (its label, the answer), ``END``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, one_of
from workbench.datasets.words import words
from workbench.errors import WorkbenchError
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("labels", "absent")


@dataclass(frozen=True)
class Bursty:
    """The task. ``pairs``: items with a label in the context; ``burst``: how often a class occurs there. Splits hold different
    (class, label) pairs in question."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "labels"
    pairs: int = 8
    burst: int = 2
    split: str = "train"
    name: str = field(default="bursty", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of bursty", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)
        most = len(words("values"))
        if self.burst < 1 or self.pairs % self.burst or not 2 <= self.pairs // self.burst <= most:
            raise WorkbenchError(
                f"a context has 2 to {most} classes, each burst times; got pairs={self.pairs}, burst={self.burst}"
            )

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``item`` (the asked class), ``label``."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> Bursty:
        """The task whose corrupted prompts ask for a class that the context does not have."""
        return replace(self, corruption="absent")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the class's label minus the mean logit of the context's other labels, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        count = self.pairs // self.burst
        *items, fresh = rng.sample(words("symbols"), count + 1)
        labels = rng.sample(words("values"), count)
        order = list(range(count)) * self.burst
        rng.shuffle(order)
        asked, moved = rng.randrange(count), rng.randrange(1, count)

        def render(items: list[str], labels: list[str]) -> str:
            return " ".join(f"{items[c]} {labels[c]}" for c in order)

        context = render(items, labels)
        other = render(items, labels[moved:] + labels[:moved])
        if self.corruption == "absent":
            other = render([*items[:asked], fresh, *items[asked + 1 :]], labels)
        last = len(order) - 1 - order[::-1].index(asked)
        start = sum(len(items[c]) + len(labels[c]) + 2 for c in order[:last])
        end = start + len(items[asked])
        return Example(
            clean=f"{context} {items[asked]}",
            corrupt=f"{other} {items[asked]}",
            answer=(f" {labels[asked]}",),
            wrong=tuple(f" {label}" for label in labels if label != labels[asked]),
            key=f"{items[asked]} {labels[asked]}",
            spans={"MATCH": (start, end), "SOURCE": (end + 1, end + 1 + len(labels[asked]))},
            labels={"item": items[asked], "label": labels[asked]},
        )


TASKS = {"bursty": (Bursty, "the label that a class has in this context, each class several times")}
