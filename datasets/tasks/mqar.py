"""MQAR: multi-query associative recall, the value that stood behind a key (Zoology, arXiv 2312.04927).

::

    clean    <bos> apple bread stone honey glass lemon  tower wine stone rice apple milk glass  ->  lemon
    corrupt  <bos> apple honey stone lemon glass bread  tower wine stone rice apple milk glass  ->  bread    (values)
    corrupt  <bos> north bread south honey east  lemon  tower wine stone rice apple milk glass  ->  nobody's (keys)

``pairs`` keys with their values come first. Then every key is asked once more, among other words: the asked key is the last
word, and the others stand in the s slots of two words before it, slot i with weight p(i) ~ i^(exponent - 1), none twice, as the
published generator places its queries. It draws words for the empty places from the whole vocabulary; here they are neither
keys nor values of the row. A row has one question; ``mqar_batch`` makes dense rows, in which every key is one.

``values`` moves the values on by as many places, so that every key has another one; ``keys`` puts other keys into the context,
and nothing answers. Wrong: the other values of the row. Spans: ``KEY``, ``VALUE`` (of the asked key), ``CONTEXT``, ``END``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, fast, one_of
from workbench.datasets.tasks.induction import single_tokens
from workbench.datasets.words import words
from workbench.errors import Refused, WorkbenchError
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("values", "keys")


@dataclass(frozen=True)
class MQAR:
    """The task. ``pairs``: keys with values; ``length``: words of a row without ``<bos>``; ``exponent``: of the gaps, 1 for even
    ones. Splits hold different (asked key, value) pairs."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "values"
    pairs: int = 4
    length: int = 24
    exponent: float = 0.01
    split: str = "train"
    name: str = field(default="mqar", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of mqar", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)
        most = len(words("symbols")) // 4
        if not 2 <= self.pairs <= most:
            raise WorkbenchError(f"mqar has 2 to {most} pairs; got pairs={self.pairs}")
        if self.length < 4 * self.pairs - 1:
            raise WorkbenchError(
                f"{self.pairs} pairs, each asked again in a slot of two words, need length={4 * self.pairs - 1} or more; "
                f"got {self.length}"
            )
        if not self.exponent > 0:
            raise WorkbenchError(f"the exponent of the gaps is above 0; got {self.exponent}")

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``key``, ``value``, ``pair`` (which of the pairs is asked, from 0)."""
        fast(self.name, tokenizer)
        alphabet = single_tokens(tokenizer, words("symbols"))
        if len(alphabet) < 4 * self.pairs + 2:
            raise Refused(
                f"mqar with {self.pairs} pairs needs {4 * self.pairs + 2} words that are single tokens; this tokenizer has "
                f"{len(alphabet)} of the {len(words('symbols'))} words"
            )
        return collect(
            self.name, lambda rng: self.draw(rng, alphabet), seed=seed, split=self.split, tokenizer=tokenizer, n=n
        )

    def contrast(self) -> MQAR:
        """The task whose corrupted prompts ask for a key that the context does not have."""
        return replace(self, corruption="keys")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the asked key's value minus the mean logit of the row's other values, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random, alphabet: Sequence[str] = ()) -> Example:
        """One example in text, over ``alphabet`` (all stored words if empty): keys and values are drawn from two halves of it."""
        alphabet = alphabet or words("symbols")
        chosen = rng.sample(alphabet[::2], 2 * self.pairs)
        keys, fresh = chosen[: self.pairs], chosen[self.pairs :]
        values = rng.sample(alphabet[1::2], self.pairs)
        asked, moved = rng.randrange(self.pairs), rng.randrange(1, self.pairs)
        context = _interleave(keys, values)
        rest = [word for word in alphabet if word not in (*chosen, *values)]
        tail = [rng.choice(rest) for _ in range(self.length - 2 * self.pairs - 1)]
        others = [key for key in keys if key != keys[asked]]
        for slot, key in zip(self._slots(rng, len(tail) // 2), others, strict=True):
            tail[2 * slot] = key
        tail.append(keys[asked])
        other = _interleave(keys, values[moved:] + values[:moved])
        if self.corruption == "keys":
            other = _interleave(fresh, values)
        start = sum(len(word) + 1 for word in context[: 2 * asked])
        middle, end = start + len(keys[asked]), start + len(keys[asked]) + 1 + len(values[asked])
        return Example(
            clean=" ".join([*context, *tail]),
            corrupt=" ".join([*other, *tail]),
            answer=(f" {values[asked]}",),
            wrong=tuple(f" {value}" for value in values if value != values[asked]),
            key=f"{keys[asked]} {values[asked]}",
            spans={
                "KEY": (start, middle),
                "VALUE": (middle + 1, end),
                "CONTEXT": (0, len(" ".join(context))),
            },
            labels={"key": keys[asked], "value": values[asked], "pair": asked},
        )

    def _slots(self, rng: random.Random, space: int) -> list[int]:
        """Slots of the keys that are not asked, drawn one after another without putting any back."""
        free, slots = list(range(space)), []
        for _ in range(self.pairs - 1):
            slot = rng.choices(free, [(i + 1) ** (self.exponent - 1) for i in free])[0]
            free.remove(slot)
            slots.append(slot)
        return slots


def _interleave(keys: Sequence[str], values: Sequence[str]) -> list[str]:
    return [word for pair in zip(keys, values, strict=True) for word in pair]


TASKS = {"mqar": (MQAR, "the value behind a key, among several keys asked again")}
