"""Country and capital: the country that a city is the capital of (Hanna et al., arXiv 2403.17806).

::

    clean    <bos> Paris, the capital of  ->  France
    corrupt  <bos> Oslo, the capital of   ->  Norway       (other_city)
    corrupt  <bos> Susan, the capital of  ->  no country   (no_city)

The first frame is the published one, space in front included, so that the city is one word inside a text; the second, ``...,
capital city of``, is ours, as are the lists: countries and capitals of one word, without those whose names share a stem.
``other_city`` puts another capital in the place of the city, of as many tokens where there is one, as published; ``no_city``,
which is ours, a person's name. Answer: the country; wrong: the country of the other capital. Spans: ``CITY``, ``END``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, fast, one_of, token_count
from workbench.datasets.words import data, fill
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("other_city", "no_city")


@dataclass(frozen=True)
class CountryCapital:
    """The task. Splits hold different countries."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "other_city"
    split: str = "train"
    name: str = field(default="country-capital", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of country-capital", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``city``, ``country``. At most two prompts per country."""
        fast(self.name, tokenizer)
        size = token_count(tokenizer)
        return collect(
            self.name, lambda rng: self.draw(rng, size), seed=seed, split=self.split, tokenizer=tokenizer, n=n
        )

    def contrast(self) -> CountryCapital:
        """The task whose corrupted prompts name no city."""
        return replace(self, corruption="no_city")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the country minus logit of the country of the other capital, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random, size: Callable[[str], int] = len) -> Example:
        """One example in text; ``size`` is the length that the city and its replacement share."""
        table = data("country-capital")
        country, city = rng.choice(table["capitals"])
        pool = [pair for pair in table["capitals"] if pair[1] != city]
        elsewhere, other = rng.choice([pair for pair in pool if size(pair[1]) == size(city)] or pool)
        frame = rng.choice(table["frames"])
        person = rng.choice([name for name in table["no_cities"] if size(name) == size(city)] or table["no_cities"])
        clean, places = fill(frame, city=city)
        return Example(
            clean=clean,
            corrupt=frame.format(city=other if self.corruption == "other_city" else person),
            answer=(f" {country}",),
            wrong=(f" {elsewhere}",),
            key=country,
            spans={"CITY": places["city"]},
            labels={"city": city, "country": country},
        )


TASKS = {"country-capital": (CountryCapital, "the country of a capital")}
