"""Gender bias: the pronoun that a profession's stereotype suggests (Vig et al., arXiv 2004.12265; Hanna et al., 2403.17806).

::

    clean    <bos> The nurse said that     ->  she
    corrupt  <bos> The man said that       ->  he       (opposite_person)
    corrupt  <bos> The mechanic said that  ->  he       (opposite_profession)
    corrupt  <bos> The person said that    ->  neither  (neutral)

The answer is not what is true of nurses, but what a model that follows the stereotype says: the metric measures the bias.
``opposite_person``, a man or a woman, is published; ``opposite_profession`` and ``neutral`` are ours, as are the lists of
professions and of verbs. Answer: the pronoun of the stereotype; wrong: the other one. Spans: ``WHO``, ``END``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, one_of
from workbench.datasets.words import data, fill
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("opposite_person", "opposite_profession", "neutral")


@dataclass(frozen=True)
class GenderBias:
    """The task. Splits hold different professions."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "opposite_person"
    split: str = "train"
    name: str = field(default="gender-bias", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of gender-bias", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``profession``, ``pronoun`` (drawn evenly)."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> GenderBias:
        """The task whose corrupted prompts name a person of no stereotype."""
        return replace(self, corruption="neutral")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the stereotype's pronoun minus logit of the other one, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        table = data("gender-bias")
        right, wrong = rng.sample(table["pronouns"], 2)
        who, other, did = rng.choice(table[right]), rng.choice(table[wrong]), rng.choice(table["did"])
        instead = {
            "opposite_person": table["persons"][table["pronouns"].index(wrong)],
            "opposite_profession": other,
            "neutral": rng.choice(table["neutral"]),
        }[self.corruption]
        clean, places = fill(table["frame"], who=who, did=did)
        return Example(
            clean=clean,
            corrupt=table["frame"].format(who=instead, did=did),
            answer=(f" {right}",),
            wrong=(f" {wrong}",),
            key=who,
            spans={"WHO": places["who"]},
            labels={"profession": who, "pronoun": right},
        )


TASKS = {"gender-bias": (GenderBias, "the pronoun that a profession's stereotype suggests")}
