"""Greater-than: a span of years ends later than it starts (Hanna et al., arXiv 2305.00586).

::

    clean    <bos> The war lasted from the year 17 43 to the year 17  ->  44 ... 99
    corrupt  <bos> The war lasted from the year 17 01 to the year 17  ->  02 ... 99

Years are two tokens, a century and a year YY from 02 to 98. Answers: every two-digit number above YY; wrong: the others. Spans:
``EVENT``, ``XX1`` (first century), ``YY``, ``XX2``, ``END``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, one_of
from workbench.datasets.words import template, words
from workbench.pairs import Pairs, probability_difference

CENTURIES = ("11", "12", "13", "14", "15", "16", "17", "18")


@dataclass(frozen=True)
class GreaterThan:
    """The task. Splits hold different combinations of event, century and year."""

    split: str = "train"
    name: str = field(default="greater-than", init=False)

    def __post_init__(self) -> None:
        one_of("split", self.split, SPLITS)

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``event``, ``century``, ``year`` (YY as a number)."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Probability of all years above YY minus that of the others, ``[B]``."""
        return probability_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        event, century, year = rng.choice(words("events")), rng.choice(CENTURIES), rng.randint(2, 98)
        frame = template("greater-than")
        clean = frame.format(event=event, century=century, start=f"{year:02d}")
        first, at = clean.index(century), clean.index(event)
        return Example(
            clean=clean,
            corrupt=frame.format(event=event, century=century, start="01"),
            answer=tuple(f"{later:02d}" for later in range(year + 1, 100)),
            wrong=tuple(f"{earlier:02d}" for earlier in range(year + 1)),
            key=f"{event} {century}{year:02d}",
            spans={
                "EVENT": (at, at + len(event)),
                "XX1": (first, first + 2),
                "YY": (first + 2, first + 4),
                "XX2": (len(clean) - 2, len(clean)),
            },
            labels={"event": event, "century": century, "year": year},
        )


TASKS = {"greater-than": (GreaterThan, "a span of years ends later than it starts")}
