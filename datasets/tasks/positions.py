"""What the tasks that a model answers at every position have in common.

A prompt is a row of single-character tokens after ``<bos>``; an example asks one of its places. The answer is no continuation
of the text but what the model says at that token, as compiled models do (Tracr, arXiv 2301.05062), so ``Pairs.position`` is the
asked token, ``END`` covers it, and a model with causal attention sees nothing behind it.
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

CORRUPTIONS = ("resample", "one")
_TRIES = 2000


@dataclass(frozen=True)
class PositionTask(ABC):
    """``length``: tokens of a row without ``<bos>``. ``place``: the asked one, from 0; drawn evenly if ``None``.

    ``resample`` draws another row, ``one`` replaces a single token; both until the asked answer is another. Splits hold
    different rows, corrupted ones included.
    """

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    shortest: ClassVar[int] = 1
    longest: ClassVar[int] = 64
    corruption: str = "resample"
    length: int = 8
    place: int | None = None
    split: str = "train"
    name: str = field(init=False)

    def __post_init__(self) -> None:
        one_of(f"corruption of {self.name}", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)
        if not self.shortest <= self.length <= self.longest:
            raise WorkbenchError(
                f"rows of {self.name} have {self.shortest} to {self.longest} tokens; got length={self.length}"
            )
        if self.place is not None and not 0 <= self.place < self.length:
            raise WorkbenchError(f"place is 0 to {self.length - 1} in rows of {self.length} tokens; got {self.place}")

    @property
    @abstractmethod
    def alphabet(self) -> tuple[str, ...]:
        """The tokens of a row."""

    @property
    @abstractmethod
    def possible(self) -> tuple[str, ...]:
        """Every token that can be an answer."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """All tokens of the task, each once: with the special ones in front, the vocabulary of a model that does nothing else."""
        return tuple(dict.fromkeys((*self.alphabet, *self.possible)))

    @abstractmethod
    def answers(self, row: Sequence[str]) -> list[str]:
        """The right answer at every place of a row."""

    def row(self, rng: random.Random, place: int) -> list[str]:
        """A row drawn for a question about ``place``: each token evenly, unless a task evens out its answers."""
        return [rng.choice(self.alphabet) for _ in range(self.length)]

    def sources(self, row: Sequence[str], place: int) -> Mapping[str, int]:
        """Places that the answer is read from, by the name of their span."""
        return {}

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``place`` (from 0, without ``<bos>``), ``asked`` (its token), ``answer``."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> Self:
        """The task with resampled rows. The model answers every row: none fails to call for the behaviour, so negatives differ
        in what it says only."""
        return replace(self, corruption="resample")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the right answer minus the mean logit of the other possible ones, at the asked token, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        for _ in range(_TRIES):
            place = rng.randrange(self.length) if self.place is None else self.place
            row = self.row(rng, place)
            answer = self.answers(row)[place]
            others = [other for other in self._others(rng, row, place) if self.answers(other)[place] != answer]
            others = [other for other in others if in_split(" ".join(other), self.split)]
            if others:
                break
        else:
            raise Refused(
                f"{self!r} drew {_TRIES} rows and no other row of its split with another answer at the asked place. "
                "Ask for longer rows, or let the place be drawn"
            )
        return Example(
            clean=" ".join(row),
            corrupt=" ".join(rng.choice(others)),
            answer=(f" {answer}",),
            wrong=tuple(f" {other}" for other in self.possible if other != answer),
            key=" ".join(row),
            spans={name: (2 * at, 2 * at + 1) for name, at in {"ASKED": place, **self.sources(row, place)}.items()},
            labels={"place": place, "asked": row[place], "answer": answer},
            asked=(2 * place, 2 * place + 1),
        )

    def _others(self, rng: random.Random, row: list[str], place: int) -> list[list[str]]:
        """Rows that may stand against ``row``."""
        if self.corruption == "resample":
            return [self.row(rng, place) for _ in range(16)]
        return [[*row[:i], new, *row[i + 1 :]] for i in range(self.length) for new in self.alphabet if new != row[i]]


@dataclass(frozen=True)
class LetterTask(PositionTask):
    """A task whose rows are made of the first ``letters`` letters."""

    fewest: ClassVar[int] = 2
    letters: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        known = len(data("positions")["letters"])
        if not self.fewest <= self.letters <= known:
            raise WorkbenchError(
                f"rows of {self.name} are made of {self.fewest} to {known} letters; got letters={self.letters}"
            )

    @property
    def alphabet(self) -> tuple[str, ...]:
        return tuple(data("positions")["letters"][: self.letters])

    @property
    def possible(self) -> tuple[str, ...]:
        return self.alphabet
