"""Histogram: how often the token occurs in the row (Tracr's ``make_hist``, arXiv 2301.05062).

::

    clean    <bos> a c b a a d c b          at place 3, a  ->  3     (the answers of all places: 3 2 2 3 3 1 2 2)
    corrupt  <bos> d b b c a b d a          at place 3, c  ->  1     (resample)
    corrupt  <bos> a c b a d d c b          at place 3, a  ->  2     (one)

The token itself counts, and the whole row does: bidirectional attention. How often the asked token occurs is drawn evenly from
1 to ``length``. Wrong: the other counts. Spans: ``ASKED``, ``END``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from workbench.datasets.tasks.positions import LetterTask


@dataclass(frozen=True)
class Histogram(LetterTask):
    """The task. ``letters``: how many letters rows are made of."""

    shortest: ClassVar[int] = 2
    longest: ClassVar[int] = 9
    letters: int = 4
    name: str = field(default="histogram", init=False)

    @property
    def possible(self) -> tuple[str, ...]:
        return tuple(str(count) for count in range(1, self.length + 1))

    def answers(self, row: Sequence[str]) -> list[str]:
        return [str(list(row).count(token)) for token in row]

    def row(self, rng: random.Random, place: int) -> list[str]:
        token, count = rng.choice(self.alphabet), rng.randint(1, self.length)
        at = {place, *rng.sample([i for i in range(self.length) if i != place], count - 1)}
        rest = [letter for letter in self.alphabet if letter != token]
        return [token if i in at else rng.choice(rest) for i in range(self.length)]


TASKS = {"histogram": (Histogram, "how often the token occurs in the row, at every position")}
