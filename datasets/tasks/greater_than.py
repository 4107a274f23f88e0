"""Greater-than: a span of years ends later than it starts (Hanna et al., arXiv 2305.00586).

::

    clean    <bos> The war lasted from the year 17 43 to the year 17  ->  44 ... 99
    corrupt  <bos> The war lasted from the year 17 01 to the year 17  ->  02 ... 99    (start_01)

Years are two tokens, a century and a year YY from 02 to 98. As in the authors' code, only years that the tokenizer splits this
way are used, and not the first and the last such year of a century, so that an answer and a wrong token exist for each.
Answers: every two-digit number above YY; wrong: the others. Spans: ``EVENT``, ``XX1`` (first century), ``YY``, ``XX2``, ``END``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, fast, one_of
from workbench.datasets.words import template, words
from workbench.errors import Refused
from workbench.pairs import Pairs, probability_difference

CENTURIES = ("11", "12", "13", "14", "15", "16", "17", "18")
CORRUPTIONS = ("start_01",)
_STARTS = range(2, 99)


@dataclass(frozen=True)
class GreaterThan:
    """The task. Splits hold different combinations of event, century and year."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "start_01"
    split: str = "train"
    name: str = field(default="greater-than", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of greater-than", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``event``, ``century``, ``year`` (YY as a number)."""
        fast(self.name, tokenizer)
        years = two_token_years(tokenizer)
        if not years:
            raise Refused(
                "task 'greater-than' needs years of which century and last two digits are single tokens, 1743 as 17 and 43; "
                "this tokenizer has no century with more than two such years. Use another tokenizer"
            )
        return collect(
            self.name,
            lambda rng: self.draw(rng, years),
            seed=seed,
            split=self.split,
            tokenizer=tokenizer,
            n=n,
        )

    def contrast(self) -> GreaterThan:
        """The task itself: from 01 on, no year of the century is ruled out (the negatives of arXiv 2405.12522)."""
        return self

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Probability of all years above YY minus that of the others, ``[B]``."""
        return probability_difference(logits, pairs)

    def draw(self, rng: random.Random, years: Mapping[str, Sequence[int]] | None = None) -> Example:
        """One example in text; ``years`` holds the YY that each century may have (02 to 98 in all of them by default)."""
        years = years or dict.fromkeys(CENTURIES, _STARTS)
        event, century = rng.choice(words("events")), rng.choice(tuple(years))
        year = rng.choice(years[century])
        frame = template("greater-than")
        clean = frame.format(event=event, century=century, start=f"{year:02d}")
        first, at = clean.index(century), clean.index(event)
        return Example(
            clean=clean,
            corrupt=frame.format(event=event, century=century, start="01"),
            answer=tuple(f"{later:02d}" for later in range(year + 1, 100)),
            wrong=tuple(f"{earlier:02d}" for earlier in range(year + 1)),
            key=f"{event} {century}{year:02d}",
            spans={
                "EVENT": (at, at + len(event)),
                "XX1": (first, first + 2),
                "YY": (first + 2, first + 4),
                "XX2": (len(clean) - 2, len(clean)),
            },
            labels={"event": event, "century": century, "year": year},
        )


def two_token_years(tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """By century, those years YY from 02 to 98 that are one token after another one, the century's, inside a text.

    Of all such years from 00 to 99, the first and the last of a century are left out; so are centuries where none remains,
    and those whose year 01, which corrupted prompts have, is split otherwise.
    """
    found = {}
    for century in CENTURIES:
        head, *rows = tokenizer(
            [f"year {century}", *(f"year {century}{year:02d}" for year in range(100))], add_special_tokens=False
        )["input_ids"]
        split = [year for year, row in enumerate(rows) if len(row) == len(head) + 1 and row[:-1] == head]
        kept = tuple(year for year in split[1:-1] if year in _STARTS)
        if kept and 1 in split:
            found[century] = kept
    return found


TASKS = {"greater-than": (GreaterThan, "a span of years ends later than it starts")}
