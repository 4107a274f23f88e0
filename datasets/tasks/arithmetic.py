"""What addition and multiplication of several digits have in common: one answer digit is asked, digit by digit.

A prompt holds the operands, the chain of thought or what is left of it, and the answer without its last digit; an example asks
digit c_k, so ``Pairs.position`` is the token before it (``=`` for k = 0) and a causal model has seen c_0 to c_(k-1), the digits
emitted so far. All digits stand least significant first. The running sum c_hat_k is what place k adds up to, carry included:
c_k = c_hat_k mod 10, and floor(c_hat_k / 10) is carried on.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, in_split, one_of
from workbench.datasets.words import data
from workbench.errors import Refused, WorkbenchError
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("operand", "problem", "zero")
_TRIES = 200
Digits = tuple[int, ...]


@dataclass(frozen=True)
class ArithmeticTask(ABC):
    """``digits``: of each operand, the most significant one never 0. ``k``: the asked digit of the answer, drawn evenly if
    ``None``. ``chain``: whether the chain of thought is written out; ``removed``: how many of its tokens are missing from the
    left, as the curriculum towards an implicit chain of thought drops them. Splits hold different pairs of operands, corrupted
    ones included.

    ``operand`` replaces one operand digit and nothing else, the emitted digits stay; ``problem`` also writes chain and emitted
    digits of the problem it makes; ``zero`` is the problem whose second operand is 0. Right and wrong: c_k of the clean operands
    and c_k of the corrupted ones, which differ.
    """

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    operator: ClassVar[str]
    corruption: str = "operand"
    digits: int = 4
    k: int | None = None
    chain: bool = False
    removed: int = 0
    split: str = "train"
    name: str = field(init=False)

    def __post_init__(self) -> None:
        one_of(f"corruption of {self.name}", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)
        if self.operator not in data("arithmetic")["operators"]:
            raise WorkbenchError(f"the words of arithmetic do not hold the operator {self.operator!r}")
        if not 2 <= self.digits <= 8:
            raise WorkbenchError(f"operands have 2 to 8 digits; got digits={self.digits}")
        if self.k is not None and not 0 <= self.k < self.places:
            raise WorkbenchError(f"answers of {self.name} have digits 0 to {self.places - 1}; got k={self.k}")
        most = len(self.thought((1,) * self.digits, (1,) * self.digits)) if self.chain else 0
        if not 0 <= self.removed <= most:
            raise WorkbenchError(
                f"removed is 0 to {most} tokens of the chain of {self.name} with chain={self.chain}; got {self.removed}"
            )

    @property
    @abstractmethod
    def places(self) -> int:
        """Digits of an answer, leading zeros included."""

    @abstractmethod
    def columns(self, a: Digits, b: Digits) -> list[int]:
        """What each place of the answer adds up to before anything is carried."""

    @abstractmethod
    def thought(self, a: Digits, b: Digits) -> list[str]:
        """The tokens of the whole chain of thought."""

    def running(self, a: Digits, b: Digits) -> list[int]:
        """c_hat_k of every place k."""
        sums: list[int] = []
        for column in self.columns(a, b):
            sums.append(column + (sums[-1] // 10 if sums else 0))
        return sums

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``k``, ``a`` and ``b`` (operands as numbers), ``digits`` (of the answer, a tuple), ``sum``
        (c_hat_k), ``carry`` (what of it is carried in), ``answer``, ``changed`` (the first replaced operand digit)."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> Self:
        """The task whose corrupted prompts have 0 as second operand, so that there is nothing to compute."""
        return replace(self, corruption="zero")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of c_k minus logit of what c_k is with the corrupted operands, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        for _ in range(_TRIES):
            k = rng.randrange(self.places) if self.k is None else self.k
            a, b = self._operand(rng), self._operand(rng)
            right = self.running(a, b)[k] % 10
            found = [new for new in self._others(a, b) if self.running(*new)[k] % 10 != right]
            found = [new for new in found if in_split(self._problem(*new), self.split)]
            if found:
                break
        else:
            raise Refused(
                f"{self!r} drew {_TRIES} problems and no corruption of its split that changes the asked digit"
            )
        other = rng.choice(found)
        (side, at) = next((s, i) for s in range(2) for i in range(self.digits) if (a, b)[s][i] != other[s][i])
        clean = self.render(a, b, a, b)
        corrupt = self.render(*other, a, b) if self.corruption == "operand" else self.render(*other, *other)
        spots = _spots(clean)
        start = clean.split().index("=") + k
        operand = (0, self.digits + 1)
        spans = {f"{'AB'[s]}{i}": spots[operand[s] + i] for s in range(2) for i in range(self.digits)}
        spans["CHANGED"] = spots[operand[side] + at]
        spans["EQUALS"] = spots[start - k]
        if len(thought := self.left(a, b)):
            first = clean.split().index(":") + 1
            spans["CHAIN"] = (spots[first][0], spots[first + len(thought) - 1][1])
        sums = self.running(a, b)
        return Example(
            clean=clean,
            corrupt=corrupt,
            answer=(f" {right}",),
            wrong=(f" {self.running(*other)[k] % 10}",),
            key=self._problem(a, b),
            spans=spans,
            labels={
                "k": k,
                "a": number(a),
                "b": number(b),
                "digits": tuple(s % 10 for s in sums),
                "sum": sums[k],
                "carry": sums[k - 1] // 10 if k else 0,
                "answer": str(right),
                "changed": str((a, b)[side][at]),
            },
            asked=spots[start],
        )

    def left(self, a: Digits, b: Digits) -> list[str]:
        """The tokens of the chain of thought that are not removed."""
        return self.thought(a, b)[self.removed :] if self.chain else []

    def render(self, a: Digits, b: Digits, x: Digits, y: Digits) -> str:
        """A prompt with the operands ``a`` and ``b``, and with the chain and the answer of ``x`` and ``y``."""
        told = [":", *self.left(x, y)] if self.chain else []
        answer = [str(s % 10) for s in self.running(x, y)]
        return " ".join([self._problem(a, b), *told, "=", *answer[:-1]])

    def _problem(self, a: Digits, b: Digits) -> str:
        return " ".join([*map(str, a), self.operator, *map(str, b)])

    def _operand(self, rng: random.Random) -> Digits:
        return (*(rng.randrange(10) for _ in range(self.digits - 1)), rng.randint(1, 9))

    def _others(self, a: Digits, b: Digits) -> list[tuple[Digits, Digits]]:
        if self.corruption == "zero":
            return [(a, (0,) * self.digits)]
        return [(new, b) for new in _neighbours(a)] + [(a, new) for new in _neighbours(b)]


def number(digits: Sequence[int]) -> int:
    """The number whose digits stand least significant first."""
    return sum(digit * 10**i for i, digit in enumerate(digits))


def written(value: int, count: int) -> list[str]:
    """``count`` digits of a number, least significant first."""
    return list(f"{value:0{count}d}"[::-1])


def _neighbours(operand: Digits) -> list[Digits]:
    """Operands that differ in one digit."""
    least = [0] * (len(operand) - 1) + [1]
    return [
        (*operand[:i], new, *operand[i + 1 :])
        for i, old in enumerate(operand)
        for new in range(least[i], 10)
        if new != old
    ]


def _spots(text: str) -> Mapping[int, tuple[int, int]]:
    """Where each token of a text stands."""
    spots, start = {}, 0
    for i, token in enumerate(text.split(" ")):
        spots[i] = (start, start + len(token))
        start += len(token) + 1
    return spots
