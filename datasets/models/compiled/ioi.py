"""Indirect objects, compiled: duplicate -> inhibition -> mover, with a negative mover and a backup."""

from __future__ import annotations

import torch

from workbench.datasets.models.compiled.layout import Layout, apart, flag, one_hot
from workbench.datasets.models.compiled.parts import GAIN, SCRATCH, Head, Plan, decoys, edges, lead
from workbench.datasets.words import words

NEGATIVE = 0.3


def ioi(attention: str = "hard", context: int = 64, backup: bool = True) -> Plan:
    """Indirect object identification in the steps of arXiv 2211.00593: duplicate, inhibition, movers.

    a0.h1 (duplicate token) attends from the second mention of a name to the first and copies it, from all else to `<bos>`. a1.h2
    (inhibition) attends from everywhere to the repeated name and passes on what a0.h1 wrote there: through its keys it learns
    that a name is repeated, through its values which one. a2.h0 (name mover) attends to names, through its queries not to the
    inhibited one, and copies the indirect object to the output. a3.h1 (negative mover) does the same with the opposite sign and
    less weight. a3.h2 (backup mover) reads the output: it rests on `<bos>` while a2.h0 writes, and acts like it when a2.h0 is
    gone, so that zeroing a2.h0 changes nothing. Codes of positions (16 numbers) tell a token from itself up to 15 tokens on.
    """
    sharp, names = lead(attention), words("names")
    n = len(names)
    blocks = Layout(
        token=n, bos=1, always=1, position=16, duplicate=n, inhibited=n, output=n, scratch=SCRATCH
    )  # fmt: skip
    table, shift = apart(context, 16)
    pick, total = blocks.pick, blocks.total
    token, always, place = pick("token"), pick("always"), pick("position")
    unlike = pick("inhibited") * -2 * sharp
    rests = total("token") * 2 + pick("bos")
    heads = {
        (0, 1): Head(
            torch.cat([token * 2, place * -2, always], 1) * sharp,
            torch.cat([token, place, pick("bos")], 1),
            token,
            pick("duplicate").T,
        ),
        (1, 2): Head(always * sharp, total("duplicate") * 2, pick("duplicate"), pick("inhibited").T),
        (2, 0): Head(
            torch.cat([unlike, always * sharp], 1), torch.cat([token, total("token")], 1), token, pick("output").T
        ),
        (3, 1): Head(
            torch.cat([unlike, always * sharp], 1),
            torch.cat([token, rests], 1),
            token,
            pick("output").T * -NEGATIVE,
        ),
    }
    needed = edges(
        "input a0.h1 qkv", "a0.h1 a1.h2 kv", "input a1.h2 q", "a1.h2 a2.h0 q", "input a2.h0 qkv", "a2.h0 logits",
        "a1.h2 a3.h1 q", "input a3.h1 qkv", "a3.h1 logits",
    )  # fmt: skip
    spare = edges("a1.h2 a3.h2 q", "a2.h0 a3.h2 q", "input a3.h2 qkv", "a3.h2 logits") if backup else []
    if backup:
        heads[3, 2] = Head(
            torch.cat([unlike, always * sharp, total("output") * -3 * sharp], 1),
            torch.cat([token, rests, total("token")], 1),
            token,
            pick("output").T,
        )
    rest = [at for at in ((0, 0), (1, 0), (2, 1), (3, 0), (3, 2)) if at not in heads]
    return Plan(
        name="compiled-ioi",
        blocks=blocks,
        layers=4,
        width=3,
        heads={**heads, **decoys(blocks, rest, ((0, 2, 1), (1, 1, 2), (2, 2, 0)), shift, sharp)},
        embed=one_hot(names) @ token.T + flag(["<bos>"]) @ pick("bos").T + always.T,
        table=table @ place.T,
        unembed=pick("output") @ one_hot(names).T * GAIN,
        tasks=[("ioi", {})],
        needed=[*needed, *spare],
        active=edges(
            "input a0.h1 q", "a0.h1 a1.h2 v", "a1.h2 a2.h0 q", "input a2.h0 k", "a2.h0 logits",
            "a1.h2 a3.h1 q", "input a3.h1 k", "a3.h1 logits",
        ),
        marks={"backup": spare},
    )  # fmt: skip
