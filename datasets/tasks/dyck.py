"""Dyck: whether the brackets so far are balanced, can still be, or are broken (after Tracr's ``make_shuffle_dyck``).

::

    clean    <bos> ( { ) } { ) ( }          at place 3, }  ->  balanced   (all: legal legal legal balanced legal broken ...)
    corrupt  <bos> ( ( ) { } { ( )          at place 3, {  ->  legal      (resample)
    corrupt  <bos> ( { ) ) { ) ( }          at place 3, )  ->  broken     (one)

Two kinds of brackets, shuffled: each kind is counted by itself and ``( { ) }`` is fine. With b_k = opened - closed of kind k over
tokens 0 to p, the prefix is ``broken`` if some b_k was below zero at any place up to p, ``balanced`` if all are zero at p, and
``legal`` otherwise. Tracr judges a whole row, balanced or not (arXiv 2301.05062); here every prefix is judged, as causal
attention can, and the verdict at the last place tells the same. Verdicts are drawn evenly from those that a place can have
(balanced only after an even number). Wrong: the other two verdicts. Spans: ``ASKED``, ``END``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from workbench.datasets.tasks.positions import PositionTask
from workbench.datasets.words import data


@dataclass(frozen=True)
class Dyck(PositionTask):
    """The task."""

    name: str = field(default="dyck", init=False)

    @property
    def alphabet(self) -> tuple[str, ...]:
        return tuple("".join(data("positions")["brackets"]))

    @property
    def possible(self) -> tuple[str, ...]:
        return tuple(data("positions")["verdicts"])

    def answers(self, row: Sequence[str]) -> list[str]:
        balanced, legal, broken = self.possible
        kinds = data("positions")["brackets"]
        open_, verdicts, lost = dict.fromkeys(kinds, 0), [], False
        for token in row:
            kind = next(kind for kind in kinds if token in kind)
            open_[kind] += 1 if token == kind[0] else -1
            lost = lost or open_[kind] < 0
            verdicts.append(broken if lost else legal if any(open_.values()) else balanced)
        return verdicts

    def row(self, rng: random.Random, place: int) -> list[str]:
        balanced, legal, broken = self.possible
        verdict = rng.choice(self.possible if place % 2 else (legal, broken))
        while True:
            row = self._any(rng) if verdict == broken else self._walk(rng, place, home=verdict == balanced)
            if self.answers(row)[place] == verdict:
                return row

    def _any(self, rng: random.Random) -> list[str]:
        return [rng.choice(self.alphabet) for _ in range(self.length)]

    def _walk(self, rng: random.Random, place: int, home: bool) -> list[str]:
        """Brackets that are legal up to ``place``, all closed there if ``home``, and any behind it."""
        row: list[str] = []
        closers: list[str] = []
        for at in range(place + 1):
            must = home and len(closers) == place + 1 - at
            if closers and (must or rng.random() < 0.5):
                row.append(closers.pop(rng.randrange(len(closers))))
            else:
                kind = rng.choice(data("positions")["brackets"])
                row.append(kind[0])
                closers.append(kind[1])
        return row + self._any(rng)[place + 1 :]


TASKS = {"dyck": (Dyck, "whether the brackets so far are balanced, legal or broken, at every position")}
