"""Needle: retrieve the value of a key from a fact hidden in filler text.

::

    clean    <bos> filler . The royal box holds honey. filler . The inner box holds rice. filler .
             Question: what did they find in the royal box? Answer:  ->  honey
    corrupt  the same with "The royal box holds soup."               ->  soup     (value)
    corrupt  the fact replaced by as much filler                     ->  nothing  (filler)

The word before the value does not occur in the question, so an induction head, which looks for earlier occurrences of the
current word, does not solve it: the key must be matched (analyses of retrieval against induction heads). ``distractors``
facts about other keys stand elsewhere. Spans: ``NEEDLE``, ``KEY``, ``VALUE``, ``QUESTION``, ``QUERY`` (key in the question),
``END``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.corpus import filler_sentences, hide
from workbench.datasets.pairs import SPLITS, Example, collect, fast, one_of, token_count
from workbench.datasets.words import template, words
from workbench.errors import WorkbenchError
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("value", "filler")


@dataclass(frozen=True)
class Needle:
    """The task. ``length``: tokens per prompt, all counted. ``depth``: where the fact stands, 0 (start) to 1 (end of the
    filler); drawn evenly if ``None``. Splits hold different (key, value) pairs.
    """

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    length: int = 128
    depth: float | None = None
    distractors: int = 1
    corruption: str = "value"
    split: str = "train"
    name: str = field(default="needle", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of needle", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise WorkbenchError(f"depth is between 0 (start) and 1 (end of the filler); got {self.depth}")
        most = min(len(words("keys")), len(words("values"))) - 2
        if not 0 <= self.distractors <= most:
            raise WorkbenchError(f"distractors is 0 to {most}; got {self.distractors}")

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``key``, ``value``, ``depth``."""
        fast(self.name, tokenizer)
        count = token_count(tokenizer)
        return collect(
            self.name,
            lambda rng: self.draw(rng, count, tokenizer.num_special_tokens_to_add()),
            seed=seed,
            split=self.split,
            tokenizer=tokenizer,
            n=n,
            length=self.length,
        )

    def contrast(self) -> Needle:
        """The task whose corrupted prompts do not hold the fact that the question is about."""
        return replace(self, corruption="filler")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the key's value minus logit of the value in the corrupted fact, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random, count: Callable[[str], int], specials: int) -> Example:
        """One example in text; ``count`` gives the tokens of a stretch of text, ``specials`` how many a prompt adds."""
        keys = rng.sample(words("keys"), 1 + self.distractors)
        *values, other = rng.sample(words("values"), 2 + self.distractors)
        depths = [rng.random() if self.depth is None else self.depth, *(rng.random() for _ in values[1:])]
        hidden = hide(rng, self.length - specials, list(zip(keys, values, depths, strict=True)), count)
        fact = hidden.facts[0]
        if self.corruption == "value":
            instead = template("needle")["fact"].format(key=fact.key, value=other)
        else:
            instead = " ".join(filler_sentences(rng, count(fact.text), count))
        value = fact.start + fact.text.rindex(fact.value)
        key = fact.start + fact.text.index(fact.key)
        asked = template("needle")["question"].format(key=fact.key)
        query = hidden.text.rindex(fact.key)
        return Example(
            clean=hidden.text,
            corrupt=hidden.text[: fact.start] + instead + hidden.text[fact.end :],
            answer=(hidden.answer,),
            wrong=(f" {other}",),
            key=f"{fact.key} {fact.value}",
            spans={
                "NEEDLE": (fact.start, fact.end),
                "KEY": (key, key + len(fact.key)),
                "VALUE": (value, value + len(fact.value)),
                "QUESTION": (len(hidden.text) - len(asked), len(hidden.text)),
                "QUERY": (query, query + len(fact.key)),
            },
            labels={"key": fact.key, "value": fact.value, "depth": fact.depth},
        )


TASKS = {"needle": (Needle, "the value of a key hidden in filler text")}
