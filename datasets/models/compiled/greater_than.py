"""Greater-than, compiled: a head that copies the start year, and an MLP of thresholds."""

from __future__ import annotations

import torch

from workbench.datasets.models.compiled.layout import POSITION, Layout, flag, one_hot, positions
from workbench.datasets.models.compiled.parts import SCRATCH, Head, Mlp, Plan, decoys, edges, lead
from workbench.datasets.words import words

HEIGHT = 10.0
"""Logit of a number well above the start year."""
SLOPE = {"hard": 2.0, "soft": 0.2}
"""Steepness of a threshold: it is passed within 1 / slope years."""


def greater_than(attention: str = "hard", context: int = 128) -> Plan:
    """A year head ``a1.h2`` that copies the start year to the end, and an MLP ``m1`` that raises all later numbers.

    a0.h0 marks every token after a two-digit number. a1.h2 attends to the marked token, the year YY after its century, and
    copies two numbers: YY / 100 and how much of a number it sees. Per number v from 00 to 99, two units of m1 are a threshold,
    relu(s (v - YY - 1/4)) - relu(s (v - YY - 1/4) - 1): the logit of every later number rises by up to 10. The slope s is 2 with
    hard attention (all later numbers alike) and 0.2 with soft. m0 is a decoy: it reads tokens and writes to scratch.
    """
    sharp, events = lead(attention), words("events")
    numbers = [f"{i:02d}" for i in range(100)]
    blocks = Layout(
        token=2 + len(events), bos=1, always=1, position=POSITION, marked=1, year=2, output=100, scratch=SCRATCH
    )  # fmt: skip
    table, shift, gap = positions(context)
    pick = blocks.pick
    place, always, number = pick("position"), pick("always"), pick("token", 0, 2)
    v = torch.arange(100.0)
    slope = SLOPE[attention]
    height = (pick("year", 1, 1) @ v[None] - pick("year", 0, 1) * 100) * slope
    noise = torch.randn(2 + len(events), SCRATCH, generator=torch.Generator().manual_seed(1))
    step = pick("output").T
    return Plan(
        name="compiled-greater-than",
        blocks=blocks,
        layers=2,
        width=4,
        heads={
            (0, 0): Head(place @ shift(1) * (sharp / gap), place, pick("token", 1, 1), pick("marked").T),
            (1, 2): Head(always * 3 * sharp, pick("marked"), number, pick("year").T),
            **decoys(blocks, ((0, 1), (1, 0), (1, 3)), ((0, 2, 0), (0, 3, 4), (1, 1, 1)), shift, sharp / gap),
        },
        mlps={
            0: Mlp(pick("token") @ noise, torch.zeros(SCRATCH), pick("scratch").T),
            1: Mlp(
                torch.cat([height, height], 1),
                torch.cat([torch.full((100,), -slope / 4), torch.full((100,), -slope / 4 - 1)]),
                torch.cat([step, -step]),
            ),
        },
        embed=one_hot(numbers) @ v[:, None] / 100 @ pick("token", 0, 1).T
        + flag(numbers) @ pick("token", 1, 1).T
        + one_hot(events) @ pick("token", 2).T
        + flag(["<bos>"]) @ pick("bos").T
        + always.T,
        table=table @ place.T,
        unembed=pick("output") @ one_hot(numbers).T * HEIGHT,
        tasks=[("greater-than", {})],
        needed=edges("input a0.h0 qkv", "a0.h0 a1.h2 k", "input a1.h2 qv", "a1.h2 m1", "m1 logits"),
        active=edges("input a1.h2 v", "a1.h2 m1", "m1 logits"),
    )
