"""Induction, compiled: a previous-token head and a head that reads it through its keys."""

from __future__ import annotations

import torch

from workbench.datasets.models.compiled.layout import POSITION, Layout, flag, one_hot, positions
from workbench.datasets.models.compiled.parts import GAIN, SCRATCH, Head, Plan, decoys, edges, lead
from workbench.datasets.tokenizer import SPECIAL, base_vocabulary
from workbench.datasets.words import words


def induction(attention: str = "hard", context: int = 512) -> Plan:
    """A previous-token head ``a0.h1`` and an induction head ``a1.h2`` that finds its key through K-composition.

    a0.h1 copies the token before position p into the block ``before``. a1.h2 matches the current token with
    ``before`` of earlier positions and copies the token found there to the output. The words of ``words("symbols")``
    have orthogonal codes; all other tokens have random directions in the same space, so that the model continues any
    repeat. ``rotate`` is the seed of the rotation, none by default.
    """
    sharp, symbols = lead(attention), words("symbols")
    n = len(symbols)
    codes = one_hot(symbols)
    noise = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
    others = (codes.sum(1) == 0) & torch.tensor([token not in SPECIAL for token in base_vocabulary()])
    codes[others] = (noise / noise.norm(dim=1, keepdim=True))[others]
    blocks = Layout(token=n, bos=1, always=1, position=POSITION, before=n, output=n, scratch=SCRATCH)
    table, shift, gap = positions(context)
    place, token = blocks.pick("position"), blocks.pick("token")
    return Plan(
        name="compiled-induction",
        blocks=blocks,
        layers=2,
        width=4,
        heads={
            (0, 1): Head(place @ shift(1) * (sharp / gap), place, token, blocks.pick("before").T),
            (1, 2): Head(token * sharp, blocks.pick("before"), token, blocks.pick("output").T),
            **decoys(blocks, ((0, 0), (1, 0), (1, 3)), ((0, 2, 0), (0, 3, 0), (1, 1, 1)), shift, sharp / gap),
        },
        embed=codes @ token.T + flag(["<bos>"]) @ blocks.pick("bos").T + blocks.pick("always").T,
        table=table @ place.T,
        unembed=blocks.pick("output") @ codes.T * GAIN,
        tasks=[("induction", {})],
        needed=edges("input a0.h1 qkv", "a0.h1 a1.h2 k", "input a1.h2 qv", "a1.h2 logits"),
        active=edges("input a0.h1 v", "a0.h1 a1.h2 k", "input a1.h2 v", "a1.h2 logits"),
    )
