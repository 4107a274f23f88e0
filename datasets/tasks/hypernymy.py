"""Hypernymy: the class of the things listed (Hanna et al., arXiv 2403.17806).

::

    clean    <bos> , apples and other  ->  fruit, fruits
    corrupt  <bos> , hammers and other ->  tool, tools     (other_class)
    corrupt  <bos> , reasons and other ->  no class        (unlisted)

The prompt is the published one; its comma lets the word follow a space. ``other_class`` puts a word of another class in the
place of the word, of as many tokens where there is one, as published; ``unlisted``, which is ours, a word that belongs to none
of the classes. Classes and words are ours.
Answers: both numbers of the class; wrong: those of the other word's class. Spans: ``WORD``, ``END``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, fast, one_of, token_count
from workbench.datasets.words import data, fill
from workbench.pairs import Pairs, probability_difference

CORRUPTIONS = ("other_class", "unlisted")


@dataclass(frozen=True)
class Hypernymy:
    """The task. Splits hold different words of the same classes."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "other_class"
    split: str = "train"
    name: str = field(default="hypernymy", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of hypernymy", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``word``, ``hypernym``. One prompt per word, so no more than there are words."""
        fast(self.name, tokenizer)
        size = token_count(tokenizer)
        return collect(
            self.name, lambda rng: self.draw(rng, size), seed=seed, split=self.split, tokenizer=tokenizer, n=n
        )

    def contrast(self) -> Hypernymy:
        """The task whose corrupted prompts list a word of no class."""
        return replace(self, corruption="unlisted")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Summed probability of the class's names minus that of the other class's, ``[B]``."""
        return probability_difference(logits, pairs)

    def draw(self, rng: random.Random, size: Callable[[str], int] = len) -> Example:
        """One example in text; ``size`` is the length that the word and its replacement share."""
        table = data("hypernymy")
        right = rng.choice(list(table["classes"].values()))
        word = rng.choice(right["words"])
        pool = [(kind, other) for kind in table["classes"].values() if kind is not right for other in kind["words"]]
        wrong, other = rng.choice([pair for pair in pool if size(pair[1]) == size(word)] or pool)
        unlisted = rng.choice([w for w in table["unlisted"] if size(w) == size(word)] or table["unlisted"])
        clean, places = fill(table["frame"], word=word)
        return Example(
            clean=clean,
            corrupt=table["frame"].format(word=other if self.corruption == "other_class" else unlisted),
            answer=tuple(f" {name}" for name in right["names"]),
            wrong=tuple(f" {name}" for name in wrong["names"]),
            key=word,
            spans={"WORD": places["word"]},
            labels={"word": word, "hypernym": right["names"][0]},
        )


TASKS = {"hypernymy": (Hypernymy, "the class of the things listed")}
