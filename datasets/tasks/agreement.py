"""Agreement: the verb has the number of its subject (Marks et al., arXiv 2403.19647; Finlayson et al., arXiv 2106.06087).

::

    simple     clean    <bos> The parents                             ->  are, have, ...
               corrupt  <bos> The parent                              ->  is, has, ...    (number)
               corrupt  <bos> The sheep                               ->  either          (unmarked)
    rc         clean    <bos> The athlete that the managers like      ->  is, has, ...
               corrupt  <bos> The athletes that the managers like     ->  are, have, ...
    within_rc  clean    <bos> The athlete that the managers           ->  are, have, ...
               corrupt  <bos> The athlete that the manager            ->  is, has, ...
    nounpp     clean    <bos> The secretaries near the car            ->  are, have, ...
               corrupt  <bos> The secretary near the car              ->  is, has, ...

Only the subject changes its number; the other noun keeps its own, drawn independently. ``unmarked``, which is ours, replaces
the subject by a noun with one form for both numbers. Answers: the stored verbs in the number of the subject; wrong: in the
other. The published files hold one pair of verbs per prompt; sets of verbs as here are those of Hanna et al. (arXiv
2403.17806), and ``workbench.pairs.logit_difference`` as metric gives their logits instead of probabilities. Words are ours.
Spans: ``SUBJECT``, ``OTHER`` (the other noun; absent in ``simple``), ``END``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, one_of
from workbench.datasets.words import data, fill
from workbench.pairs import Pairs, probability_difference

CORRUPTIONS = ("number", "unmarked")
STRUCTURES = ("simple", "rc", "within_rc", "nounpp")
NUMBERS = ("singular", "plural")


@dataclass(frozen=True)
class Agreement:
    """The task. ``structure``: ``simple``, ``rc``, ``within_rc`` or ``nounpp``. Splits hold different subjects."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "number"
    structure: str = "rc"
    split: str = "train"
    name: str = field(default="agreement", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of agreement", self.corruption, CORRUPTIONS)
        one_of("structure of agreement", self.structure, STRUCTURES)
        one_of("split", self.split, SPLITS)

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``number`` (of the subject, drawn evenly), ``subject``, ``other`` and ``other_number`` (``None``
        in ``simple``)."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> Agreement:
        """The task whose corrupted prompts have a subject of no visible number, so that no number is called for."""
        return replace(self, corruption="unmarked")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Summed probability of verbs in the subject's number minus that of verbs in the other number, ``[B]``."""
        return probability_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        table = data("agreement")
        alone = self.structure == "simple"
        subject, other = rng.sample(table["people"] + (table["things"] if alone else []), 2)
        if self.structure == "nounpp":
            other = rng.choice(table["things"])
        number, other_number = rng.randrange(2), rng.randrange(2)
        where, clause, unmarked = (rng.choice(table[kind]) for kind in ("where", "clause", "unmarked"))
        rest = {"other": other[other_number], "where": where, "clause": clause[other_number]}
        frame = table["frames"][self.structure]
        clean, places = fill(frame, subject=subject[number], **rest)
        instead = subject[1 - number] if self.corruption == "number" else unmarked
        return Example(
            clean=clean,
            corrupt=frame.format(subject=instead, **rest),
            answer=tuple(f" {verb[number]}" for verb in table["verbs"]),
            wrong=tuple(f" {verb[1 - number]}" for verb in table["verbs"]),
            key=subject[0],
            spans={"SUBJECT": places["subject"]} | ({} if alone else {"OTHER": places["other"]}),
            labels={
                "number": NUMBERS[number],
                "subject": subject[number],
                "other": None if alone else rest["other"],
                "other_number": None if alone else NUMBERS[other_number],
            },
        )


TASKS = {"agreement": (Agreement, "the verb in the number of its subject")}
