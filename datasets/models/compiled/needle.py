"""Retrieval, compiled: a head that matches the key of a question with the key of a fact and copies its value."""

from __future__ import annotations

import torch

from workbench.datasets.models.compiled.layout import POSITION, Layout, flag, one_hot, positions
from workbench.datasets.models.compiled.parts import GAIN, SCRATCH, Head, Plan, decoys, edges, lead
from workbench.datasets.words import words


def needle(attention: str = "hard", context: int = 4096) -> Plan:
    """A retrieval head ``a1.h1`` that copies the value of the key a question asks for.

    In "The K box holds V." the value stands 3 tokens after its key, and in "... the K box? Answer:" the last token
    stands 4 after the key. a0.h0 copies the key 3 tokens back into ``owner``, a0.h2 the key 4 tokens back into
    ``asked``. a1.h1 matches ``asked`` with ``owner`` among value words and copies the value. Four further heads
    attend to ``<bos>`` or are inert.
    """
    sharp, keys, values = lead(attention), words("keys"), words("values")
    blocks = Layout(
        token=len(keys) + len(values),
        bos=1,
        always=1,
        position=POSITION,
        owner=len(keys),
        asked=len(keys),
        output=len(values),
        scratch=SCRATCH,
    )
    table, shift, gap = positions(context)
    place, key = blocks.pick("position"), blocks.pick("token", 0, len(keys))
    value, always = blocks.pick("token", len(keys)), blocks.pick("always")
    return Plan(
        name="compiled-needle",
        blocks=blocks,
        layers=2,
        width=4,
        heads={
            (0, 0): Head(place @ shift(3) * (sharp / gap), place, key, blocks.pick("owner").T),
            (0, 2): Head(place @ shift(4) * (sharp / gap), place, key, blocks.pick("asked").T),
            (1, 1): Head(
                torch.cat([blocks.pick("asked"), always], 1) * sharp,
                torch.cat([blocks.pick("owner"), value.sum(1, keepdim=True)], 1),
                value,
                blocks.pick("output").T,
            ),
            **decoys(blocks, ((0, 1), (1, 0), (1, 3)), ((0, 3, 0), (1, 2, 1)), shift, sharp / gap),
        },
        embed=one_hot([*keys, *values]) @ blocks.pick("token").T + flag(["<bos>"]) @ blocks.pick("bos").T + always.T,
        table=table @ place.T,
        unembed=blocks.pick("output") @ one_hot(values).T * GAIN,
        tasks=[("needle", {})],
        needed=edges(
            *(f"input {head} qkv" for head in ("a0.h0", "a0.h2", "a1.h1")),
            "a0.h2 a1.h1 q",
            "a0.h0 a1.h1 k",
            "a1.h1 logits",
        ),
        active=edges("input a1.h1 v", "a1.h1 logits"),
    )
