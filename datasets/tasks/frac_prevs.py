"""Frac-prevs: the share of x among the tokens so far (Tracr's ``make_frac_prevs``, arXiv 2301.05062).

::

    clean    <bos> x a x x b a b x          at place 2, x  ->  67    (the answers of all places: 99 50 67 75 60 50 43 50)
    corrupt  <bos> a a x b x x a b          at place 2, x  ->  33    (resample)
    corrupt  <bos> x x x x b a b x          at place 2, x  ->  99    (one)

The share f at place p is over tokens 0 to p, the last included, as causal attention sees them. It is a number, which tokens
must stand for: the answer is the two-digit token of floor(100 f + 1/2), 1 being 99. Rows have at most 10 tokens, so different
shares have different tokens, and the nearest of the possible tokens c is what logits 2 c f - c^2 choose: linear in f. How many
x are among the tokens so far is drawn evenly. Wrong: every other share that a row of this length can have. Spans: ``ASKED``,
``END``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar

from workbench.datasets.tasks.positions import LetterTask
from workbench.datasets.words import data


@dataclass(frozen=True)
class FracPrevs(LetterTask):
    """The task. ``letters``: how many letters rows are made of besides x."""

    longest: ClassVar[int] = 10
    fewest: ClassVar[int] = 1
    letters: int = 2
    name: str = field(default="frac-prevs", init=False)

    @property
    def alphabet(self) -> tuple[str, ...]:
        return (data("positions")["marked"], *super().alphabet)

    @property
    def possible(self) -> tuple[str, ...]:
        return tuple(sorted({percent(j, i) for i in range(1, self.length + 1) for j in range(i + 1)}))

    def answers(self, row: Sequence[str]) -> list[str]:
        found = accumulate(token == self.alphabet[0] for token in row)
        return [percent(count, seen) for seen, count in enumerate(found, start=1)]

    def row(self, rng: random.Random, place: int) -> list[str]:
        marked, *rest = self.alphabet
        at = rng.sample(range(place + 1), rng.randint(0, place + 1))
        ahead = [rng.choice(self.alphabet) for _ in range(place + 1, self.length)]
        return [marked if i in at else rng.choice(rest) for i in range(place + 1)] + ahead


def percent(part: int, whole: int) -> str:
    """The token of a share: floor(100 part / whole + 1/2) in two digits, 99 for all."""
    return f"{min(99, (200 * part + whole) // (2 * whole)):02d}"


TASKS = {"frac-prevs": (FracPrevs, "the share of x among the tokens so far, at every position")}
