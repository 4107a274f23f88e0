"""Country and capital: the country that a city is the capital of (Hanna et al., arXiv 2403.17806).

::

    clean    <bos> Paris, the capital of  ->  France
    corrupt  <bos> Oslo, the capital of   ->  Norway       (other_city)
    corrupt  <bos> Susan, the capital of  ->  no country   (no_city)

The first frame is the published one, space in front included, so that the city is one word inside a text; the second, ``...,
capital city of``, is ours, as are the lists: countries and capitals of one word, without those whose names share a stem.
``other_city`` puts another capital in the place of the city; ``no_city``, which is ours, a person's name. Answer: the country;
wrong: the country of the other capital. Spans: ``CITY``, ``END``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, one_of
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
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> CountryCapital:
        """The task whose corrupted prompts name no city."""
        return replace(self, corruption="no_city")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of the country minus logit of the country of the other capital, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        table = data("country-capital")
        (country, city), (elsewhere, other) = rng.sample(table["capitals"], 2)
        frame, person = rng.choice(table["frames"]), rng.choice(table["no_cities"])
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
