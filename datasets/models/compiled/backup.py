"""A backup, compiled: a second retrieval head that acts only when the first wrote nothing."""

from __future__ import annotations

import torch

from workbench.datasets.models.compiled.layout import POSITION, Layout, flag, one_hot, positions
from workbench.datasets.models.compiled.parts import GAIN, SCRATCH, Head, Plan, decoys, edges, lead
from workbench.datasets.words import words


def backup(attention: str = "hard", context: int = 512) -> Plan:
    """A retrieval head ``a1.h1`` and its backup ``a2.h3``, which acts only when nothing is in the output yet.

    As in `compiled-needle`, a0.h0 copies the key 3 tokens back into ``owner``, a0.h2 the key 4 tokens back into ``asked``, and
    a1.h1 copies the value whose owner is asked; it rests on `<bos>` where there is none. a2.h3 does the same and rests on
    `<bos>` as long as a1.h1 wrote something. The labels are for the corruption in which the fact is missing: to replace a1.h1
    alone changes nothing, nor does to cut what it reads, although both heads together are all there is.
    """
    sharp, keys, values = lead(attention), words("keys"), words("values")
    k, v = len(keys), len(values)
    blocks = Layout(
        token=k + v, bos=1, always=1, position=POSITION, owner=k, asked=k, output=v, scratch=SCRATCH
    )  # fmt: skip
    table, shift, gap = positions(context)
    pick, total = blocks.pick, blocks.total
    place, always, key, value = pick("position"), pick("always"), pick("token", 0, k), pick("token", k)
    query = [pick("asked") * 2 * sharp, always * sharp]
    read = [pick("owner"), value.sum(1, keepdim=True) * 2 + pick("bos") * 3]
    return Plan(
        name="compiled-backup",
        blocks=blocks,
        layers=3,
        width=4,
        heads={
            (0, 0): Head(place @ shift(3) * (sharp / gap), place, key, pick("owner").T),
            (0, 2): Head(place @ shift(4) * (sharp / gap), place, key, pick("asked").T),
            (1, 1): Head(torch.cat(query, 1), torch.cat(read, 1), value, pick("output").T),
            (2, 3): Head(
                torch.cat([*query, total("output") * -4 * sharp], 1),
                torch.cat([*read, value.sum(1, keepdim=True)], 1),
                value,
                pick("output").T,
            ),
            **decoys(
                blocks, ((0, 1), (1, 3), (2, 0)), ((0, 3, 0), (1, 0, 2), (1, 2, 1), (2, 1, 3), (2, 2, 0)), shift, sharp / gap
            ),
        },
        embed=one_hot([*keys, *values]) @ pick("token").T + flag(["<bos>"]) @ pick("bos").T + always.T,
        table=table @ place.T,
        unembed=pick("output") @ one_hot(values).T * GAIN,
        tasks=[("needle", {"corruption": "filler"})],
        needed=edges(
            *(f"input {head} qkv" for head in ("a0.h0", "a0.h2", "a1.h1", "a2.h3")),
            "a0.h2 a1.h1 q", "a0.h0 a1.h1 k", "a1.h1 logits",
            "a0.h2 a2.h3 q", "a0.h0 a2.h3 k", "a1.h1 a2.h3 q", "a2.h3 logits",
        ),
        active=edges("input a0.h0 v", "a1.h1 a2.h3 q", "a1.h1 logits"),
        marks={
            "backup": edges("input a2.h3 qkv", "a0.h2 a2.h3 q", "a0.h0 a2.h3 k", "a1.h1 a2.h3 q", "a2.h3 logits")
        },
    )  # fmt: skip
