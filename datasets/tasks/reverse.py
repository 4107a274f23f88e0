"""Reverse: the row read backwards (Tracr's ``make_reverse``, arXiv 2301.05062).

::

    clean    <bos> a d b e c f a a          at place 1, d  ->  a     (the answers of all places: a a f c e b d a)
    corrupt  <bos> c f b b a e d c          at place 1, f  ->  d     (resample)
    corrupt  <bos> a d b e c f b a          at place 1, d  ->  b     (one)

At place p of T stands the answer of place T - 1 - p. In the first half it lies ahead, so the whole row is answered with
bidirectional attention only; ``place`` in the second half asks for what causal attention can do. Wrong: the other letters.
Spans: ``ASKED``, ``SOURCE`` (the token whose copy is the answer), ``END``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workbench.datasets.tasks.positions import LetterTask


@dataclass(frozen=True)
class Reverse(LetterTask):
    """The task. ``letters``: how many letters rows are made of."""

    name: str = field(default="reverse", init=False)

    def answers(self, row: Sequence[str]) -> list[str]:
        return list(row[::-1])

    def sources(self, row: Sequence[str], place: int) -> Mapping[str, int]:
        return {"SOURCE": len(row) - 1 - place}


TASKS = {"reverse": (Reverse, "the row read backwards, at every position")}
