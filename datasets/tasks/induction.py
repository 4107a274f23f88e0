"""Induction: random words, repeated after a random period.

::

    clean    <bos> tower rope salt | glass comet | tower rope  ->  salt      (period 5, length 7)
    corrupt  <bos> drum moss rope | anchor shell | tower rope  ->  anchor    (first_copy)
    corrupt  <bos> drum moss wolf | anchor shell | tower rope  ->  anything  (no_repeat)

A fixed period could be solved by position alone, so each example draws its own, from half the length up to ``length - 2``.
``first_copy`` draws the first copy anew, keeps the last word in it at another place, and so gives it another successor
(``wrong``); that the word stays is ours. ``no_repeat`` draws the first copy anew and keeps nothing, so that no word occurs
twice. Spans: ``MATCH`` (the last word's earlier occurrence), ``SOURCE`` (its successor, the answer), ``END``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, fast, one_of
from workbench.datasets.words import words
from workbench.errors import Refused, WorkbenchError
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("first_copy", "no_repeat")


@dataclass(frozen=True)
class Induction:
    """The task. ``length``: words per prompt, without ``<bos>``. Splits hold different (match, answer) word pairs."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    length: int = 24
    corruption: str = "first_copy"
    split: str = "train"
    name: str = field(default="induction", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of induction", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)
        most = len(words("symbols")) // 2
        if not 6 <= self.length <= most:
            raise WorkbenchError(
                f"induction prompts have 6 to {most} words, so that no word repeats by chance; got length={self.length}"
            )

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; label ``period``."""
        fast(self.name, tokenizer)
        alphabet = single_tokens(tokenizer, words("symbols"))
        if len(alphabet) < 2 * self.length:
            raise Refused(
                f"induction of length {self.length} needs {2 * self.length} words that are single tokens; this tokenizer "
                f"has {len(alphabet)} of the {len(words('symbols'))} words. Ask for length {len(alphabet) // 2} or less"
            )
        return collect(
            self.name,
            lambda rng: self.draw(rng, alphabet),
            seed=seed,
            split=self.split,
            tokenizer=tokenizer,
            n=n,
        )

    def contrast(self) -> Induction:
        """The task whose corrupted prompts repeat no word, so that nothing can be continued."""
        return replace(self, corruption="no_repeat")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the word that followed last time minus that of the word that follows in the corrupted copy, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random, alphabet: Sequence[str] = ()) -> Example:
        """One example in text, over ``alphabet`` (all stored words if empty)."""
        alphabet = alphabet or words("symbols")
        period = rng.randint((self.length + 1) // 2, self.length - 2)
        chosen = rng.sample(alphabet, 2 * period)
        first, fresh = chosen[:period], chosen[period:]
        again = first[: self.length - period]
        match = len(again) - 1
        place = rng.choice([i for i in range(1, period - 1) if i != match])
        if self.corruption == "first_copy":
            fresh[place] = again[-1]
        answer, wrong = first[match + 1] if match + 1 < period else again[0], fresh[place + 1]
        spots = [sum(len(word) + 1 for word in first[:i]) for i in range(period + 1)]
        return Example(
            clean=" ".join([*first, *again]),
            corrupt=" ".join([*fresh, *again]),
            answer=(f" {answer}",),
            wrong=(f" {wrong}",),
            key=f"{again[-1]} {answer}",
            spans={
                "MATCH": (spots[match], spots[match] + len(first[match])),
                "SOURCE": (spots[match + 1], spots[match + 1] + len(answer)),
            },
            labels={"period": period},
        )


def single_tokens(tokenizer: Any, candidates: Sequence[str]) -> tuple[str, ...]:
    """Those words that are one known token inside a text, with the space before them."""
    unknown = tokenizer.unk_token_id
    bare = [tokenizer("a", add_special_tokens=False)["input_ids"]]
    rows = tokenizer([f"a {word}" for word in candidates], add_special_tokens=False)["input_ids"]
    start = len(bare[0])
    return tuple(w for w, row in zip(candidates, rows, strict=True) if len(row) == start + 1 and row[-1] != unknown)


TASKS = {"induction": (Induction, "random words repeated after a random period")}
