"""Indirect object identification: who received the gift (Wang et al., arXiv 2211.00593).

::

    clean    <bos> When Mary and John went to the store, John gave a ring to  ->  Mary
    corrupt  <bos> When Mary and John went to the store, Mary gave a ring to  ->  John    (s2_io_flip)
    corrupt  <bos> When Rose and Mary went to the store, John gave a ring to  ->  nobody  (abc)
    corrupt  <bos> When Mary and Rose went to the store, John gave a ring to  ->  nobody  (s1_random)
    corrupt  <bos> When Mary and John went to the store, Rose gave a ring to  ->  nobody  (s2_random)
    corrupt  <bos> When Rose and John went to the store, John gave a ring to  ->  Rose    (io_random)

15 templates, each with the indirect object (IO) first (ABBA) or the subject (S1) first (BABA). Answer: the IO; wrong: the
subject. ``abc`` replaces the first subject by the IO's name and the IO by a third one, so that no name occurs twice; those
prompts are the negatives of the discrete-autoencoder method (arXiv 2405.12522). ``s1_random``, ``s2_random`` and
``io_random`` replace one name by a third; after the last, the answer is that third name, which the metric does not look at.
Spans: ``IO``, ``S1``, ``S2``, ``END``.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, one_of
from workbench.datasets.words import template, words
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("s2_io_flip", "abc", "s1_random", "s2_random", "io_random")


@dataclass(frozen=True)
class IOI:
    """The task. ``order``: ``ABBA``, ``BABA`` or ``both``. Splits hold different pairs of names."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "s2_io_flip"
    order: str = "both"
    split: str = "train"
    name: str = field(default="ioi", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of ioi", self.corruption, CORRUPTIONS)
        one_of("order of ioi", self.order, ("ABBA", "BABA", "both"))
        one_of("split", self.split, SPLITS)

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``template``, ``order``, ``io``, ``subject``."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> IOI:
        """The task whose corrupted prompts name three people once each, so that nobody is the answer."""
        return replace(self, corruption="abc")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the indirect object minus logit of the subject, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        frames = template("ioi")
        index = rng.randrange(len(frames))
        order = self.order if self.order != "both" else rng.choice(("ABBA", "BABA"))
        io, subject, third = rng.sample(words("names"), 3)
        place, gift = rng.choice(words("places")), rng.choice(words("gifts"))

        def fill(a: str, b: str, s: str) -> str:
            a, b = (a, b) if order == "ABBA" else (b, a)
            return frames[index].format(a=a, b=b, s=s, place=place, gift=gift)

        clean = fill(io, subject, subject)
        corrupt = {
            "s2_io_flip": fill(io, subject, io),
            "abc": fill(third, io, subject),
            "s1_random": fill(io, third, subject),
            "s2_random": fill(io, subject, third),
            "io_random": fill(third, subject, subject),
        }[self.corruption]
        # Whole words: one name may begin with another (Dan, Daniel).
        first, second = (found.span() for found in re.finditer(rf"\b{subject}\b", clean))
        (at,) = (found.span() for found in re.finditer(rf"\b{io}\b", clean))
        return Example(
            clean=clean,
            corrupt=corrupt,
            answer=(f" {io}",),
            wrong=(f" {subject}",),
            key="+".join(sorted((io, subject))),
            spans={"IO": at, "S1": first, "S2": second},
            labels={"template": index, "order": order, "io": io, "subject": subject},
        )


TASKS = {"ioi": (IOI, "indirect object identification: who received the gift")}
