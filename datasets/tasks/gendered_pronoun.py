"""Gendered pronoun: a tag question takes the pronoun of the person named (Mathwin et al. 2023; in ACDC, arXiv 2304.14997).

::

    clean    <bos> So Evan is a really great friend, isn't  ->  he
    corrupt  <bos> So Mary is a really great friend, isn't  ->  she     (other_gender)
    corrupt  <bos> That person is a really great friend, isn't -> nobody  (that_person)

``other_gender`` puts a name of the other gender in the place of the name. ``that_person`` names nobody; in ACDC's code it is
one sentence for the whole batch, here the rest of the prompt stays. The words, the published sentence aside, are ours.
Answer: the pronoun; wrong: the other one. Spans: ``NAME``, ``ROLE``, ``END``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, one_of
from workbench.datasets.words import data, fill
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("other_gender", "that_person")


@dataclass(frozen=True)
class GenderedPronoun:
    """The task. Splits hold different names."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "other_gender"
    split: str = "train"
    name: str = field(default="gendered-pronoun", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of gendered-pronoun", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``name``, ``pronoun`` (drawn evenly), ``role``."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> GenderedPronoun:
        """The task whose corrupted prompts name nobody, so that no pronoun is called for."""
        return replace(self, corruption="that_person")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the pronoun minus logit of the other one, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        table = data("gendered-pronoun")
        right, wrong = rng.sample(table["pronouns"], 2)
        name, other = rng.choice(table[right]), rng.choice(table[wrong])
        rest = {
            "how": rng.choice(table["how"]),
            "trait": rng.choice(table["traits"]),
            "role": rng.choice(table["roles"]),
        }
        clean, places = fill(table["frame"], name=name, **rest)
        if self.corruption == "other_gender":
            corrupt = table["frame"].format(name=other, **rest)
        else:
            corrupt = table["unnamed"].format(**rest)
        return Example(
            clean=clean,
            corrupt=corrupt,
            answer=(f" {right}",),
            wrong=(f" {wrong}",),
            key=name,
            spans={"NAME": places["name"], "ROLE": places["role"]},
            labels={"name": name, "pronoun": right, "role": rest["role"]},
        )


TASKS = {"gendered-pronoun": (GenderedPronoun, "the pronoun of the person named")}
