"""Sort: the row in alphabetical order (Tracr's ``make_sort``, arXiv 2301.05062).

::

    clean    <bos> d a c f                  at place 1, a  ->  c     (the answers of all places: a c d f)
    corrupt  <bos> b e h g                  at place 1, e  ->  e     (resample)
    corrupt  <bos> d a c b                  at place 1, a  ->  b     (one)

At place p the p-th smallest token. The whole row counts: bidirectional attention. No letter stands twice unless ``repeats``
(Tracr keeps the two cases apart; without repeats a token's rank is the number of smaller ones). Wrong: the other letters.
Spans: ``ASKED``, ``SOURCE`` (the token whose copy is the answer, the first of equals), ``END``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workbench.datasets.tasks.positions import LetterTask
from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Sort(LetterTask):
    """The task. ``letters``: how many letters rows are made of; ``repeats``: whether one may stand twice."""

    length: int = 5
    letters: int = 8
    repeats: bool = False
    name: str = field(default="sort", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.repeats and self.length >= len(self.alphabet):
            raise WorkbenchError(
                f"without repeats a row of {self.length} letters out of {self.letters} sorts to one answer; "
                f"ask for length={self.letters - 1} or less, or repeats=True"
            )

    def answers(self, row: Sequence[str]) -> list[str]:
        return sorted(row)

    def row(self, rng: random.Random, place: int) -> list[str]:
        return super().row(rng, place) if self.repeats else rng.sample(self.alphabet, self.length)

    def sources(self, row: Sequence[str], place: int) -> Mapping[str, int]:
        return {"SOURCE": list(row).index(sorted(row)[place])}

    def _others(self, rng: random.Random, row: list[str], place: int) -> list[list[str]]:
        others = super()._others(rng, row, place)
        return others if self.repeats else [other for other in others if len(set(other)) == len(other)]


TASKS = {"sort": (Sort, "the row in alphabetical order, at every position")}
