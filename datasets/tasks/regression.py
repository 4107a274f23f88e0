"""Regression: the next point of a line through the points so far (a text version of in-context linear regression).

::

    clean    <bos> 03 : 11 , 14 : 33 , 08 : 21 , 05 : 15 , 11 :  ->  27       y = 2 x + 5
    corrupt  <bos> 03 : 42 , 14 : 31 , 08 : 37 , 05 : 40 , 11 :  ->  34       y = 45 - x          (coefficients)
    corrupt  <bos> 03 : 70 , 14 : 02 , 08 : 55 , 05 : 28 , 11 :  ->  no line                      (scatter)

Whole numbers in two digits, one token each: x from 00 to 19, none twice, slope a from -4 to 4 without 0, and b such that y is 00
to 99 for every x. Two points tell the line, the others confirm it. ``coefficients`` draws a and b anew and keeps the x;
``scatter`` draws every y anew, until no line goes through the points. Wrong: the y of the other line. Vectors instead of words,
as the theory has them, are ``regression_batch``. Spans: ``X0``, ``Y0``, ``X1`` ... (of the points), ``QUERY`` (the last x),
``END``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, in_split, one_of
from workbench.errors import WorkbenchError
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("coefficients", "scatter")
_XS = range(20)
_SLOPES = (-4, -3, -2, -1, 1, 2, 3, 4)


@dataclass(frozen=True)
class Regression:
    """The task. ``examples``: points in the context. Splits hold different lines, those of corrupted prompts included."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "coefficients"
    examples: int = 4
    split: str = "train"
    name: str = field(default="regression", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of regression", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)
        least = 3 if self.corruption == "scatter" else 2
        if not least <= self.examples < len(_XS):
            why = ", as a line goes through any two" if least == 3 else ""
            raise WorkbenchError(
                f"regression with corruption {self.corruption!r} has {least} to {len(_XS) - 1} points{why}; got {self.examples}"
            )

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``slope``, ``intercept``, ``x`` (the last one, a number), ``query`` (its token)."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> Regression:
        """The task whose corrupted prompts show points that are on no line."""
        return replace(self, corruption="scatter")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of y on the line minus logit of y on the other line, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        *xs, query = rng.sample(_XS, self.examples + 1)
        a, b = _line(rng)
        right = wrong = a * query + b
        while wrong == right:
            other = _line(rng)
            wrong = other[0] * query + other[1] if in_split(f"{other[0]} {other[1]}", self.split) else right
        ys, others = ([slope * x + start for x in xs] for slope, start in ((a, b), other))
        while self.corruption == "scatter" and _on_a_line(xs, others):
            others = [rng.randrange(100) for _ in xs]
        clean = _written(xs, ys, query)
        spans = {f"{'XY'[i % 2]}{i // 2}": (5 * i, 5 * i + 2) for i in range(2 * self.examples)}
        return Example(
            clean=clean,
            corrupt=_written(xs, others, query),
            answer=(f" {right:02d}",),
            wrong=(f" {wrong:02d}",),
            key=f"{a} {b}",
            spans={**spans, "QUERY": (len(clean) - 4, len(clean) - 2)},
            labels={"slope": a, "intercept": b, "x": query, "query": f"{query:02d}"},
        )


def _line(rng: random.Random) -> tuple[int, int]:
    """Slope and intercept of a line that stays between 0 and 99."""
    a = rng.choice(_SLOPES)
    reach = a * _XS[-1]
    return a, rng.randint(max(0, -reach), 99 - max(0, reach))


def _on_a_line(xs: list[int], ys: list[int]) -> bool:
    return all((y - ys[0]) * (xs[1] - xs[0]) == (ys[1] - ys[0]) * (x - xs[0]) for x, y in zip(xs, ys, strict=True))


def _written(xs: list[int], ys: list[int], query: int) -> str:
    points = [f"{x:02d} : {y:02d} ," for x, y in zip(xs, ys, strict=True)]
    return " ".join([*points, f"{query:02d} :"])


TASKS = {"regression": (Regression, "the next point of a line through the points so far")}
