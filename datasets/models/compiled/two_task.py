"""Two tasks, one mover, compiled: indirect objects and colored objects share the head that copies."""

from __future__ import annotations

import torch

from workbench.datasets.models.compiled.layout import Layout, apart, flag, one_hot, positions
from workbench.datasets.models.compiled.parts import GAIN, SCRATCH, Head, Plan, decoys, edges, lead
from workbench.datasets.words import words

HINT, LEANING, NEGATIVE = 0.38, 0.2, 0.35
"""Score of the asked color over the others, step of the scores that colors have of their own, weight of the negative mover."""
ROLES = {
    "duplicate": "a0.h0",
    "previous": "a0.h1",
    "scene": "a0.h2",
    "inhibition": "a1.h0",
    "match": "a1.h1",
    "gatherer": "a2.h0",
    "mover": "a3.h1",
    "negative": "a3.h2",
}
"""Names of the heads; the others are decoys."""
CIRCUITS = {
    "ioi": ("duplicate", "inhibition", "mover", "negative"),
    "colored_objects": ("previous", "scene", "match", "gatherer", "mover"),
}
"""Heads of each task. Planted overlap: 1 of the 4 heads of ``ioi`` and of the 5 of ``colored_objects``, IoU 1/8."""


def two_task(attention: str = "hard", context: int = 128) -> Plan:
    """Two circuits that share their mover ``a3.h1``: ``task("ioi")`` is solved, ``task("colored-objects")`` half of the time.

    Names and colors have codes in one block. IOI: a0.h0 finds at the second mention of a name the first one and copies it
    (``<bos>`` if there is none); a1.h0 attends from everywhere to the repeated name and writes, half from a0.h0 and half from
    the token it looks at, that it is inhibited; the mover attends to names and colors that are not inhibited and copies them; the
    negative mover a3.h2 does the same among names, and writes with the opposite sign.
    Colored objects: a0.h1 copies the color before each object; a0.h2 tells one scene from the next (its weight on
    ``<bos>`` falls with every "Q"); a1.h1 goes from the object in the question to the same object in the last scene and
    copies its color; a2.h0 brings it from there to the end, 4 tokens on. The mover attends to all colors of the last scene, and
    the asked one gets a slightly larger score, less than colors differ by themselves: about half of the answers are
    right (published for GPT-2 medium: 49.6%). a1.h0 and a3.h2 rest on ``<bos>`` there. Made to attend to the two wrong colors at
    the last token, a1.h0 inhibits them and a3.h2 subtracts them: both repair the task (arXiv 2310.08744, Sec. 5).

    Heads shared: 1 of 4 (IOI) and of 5 (colored objects), IoU 1/8. ``kept`` holds for IOI; the columns ``ioi`` and
    ``colored_objects`` mark the mechanism of each task. That a head rests in the other task takes edges too (a0.h2 and a1.h0
    look for ``<bos>``): they are in ``needed``.
    """
    sharp, names, colors, objects = lead(attention), words("names"), words("colors"), words("objects")
    n, c = len(names), len(colors)
    blocks = Layout(
        token=n + c, object=len(objects), bos=1, always=1, question=1, position=48, phase=16,
        duplicate=n, before=c, early=1, inhibited=n + c, found=c, asked=c, output=n + c, scratch=SCRATCH,
    )  # fmt: skip
    table, shift, gap = positions(context, 48, seed=3)
    pick, total = blocks.pick, blocks.total
    always, token, place, color = pick("always"), pick("token"), pick("position"), pick("token", n)
    name = pick("token", 0, n)
    leanings = torch.linspace(0, c - 1, c)[torch.randperm(c, generator=torch.Generator().manual_seed(0))] * LEANING
    repeated = torch.cat([name + pick("duplicate"), color], 1) / 2
    candidate = total("token") * sharp + color @ leanings[:, None] - pick("early") * 6 * sharp
    heads = {
        "duplicate": Head(
            torch.cat([name * 2, pick("phase") * -2, always], 1) * sharp,
            torch.cat([name, pick("phase"), pick("bos")], 1),
            name,
            pick("duplicate").T,
        ),
        "previous": Head(place @ shift(1) * (sharp / gap), place, color, pick("before").T),
        "scene": Head(always * 30, pick("bos") + pick("question"), pick("bos"), pick("early").T),
        "inhibition": Head(always * sharp, total("duplicate") * 2 + pick("bos"), repeated, pick("inhibited").T),
        "match": Head(
            torch.cat([pick("object") * 2, always], 1) * sharp,
            torch.cat([pick("object"), total("before") * 2 - pick("early") * 6], 1),
            pick("before"),
            pick("found").T,
        ),
        "gatherer": Head(place @ shift(4) * (sharp / gap), place, pick("found"), pick("asked").T),
        "mover": Head(
            torch.cat([pick("inhibited") * -2 * sharp, pick("asked") * HINT, always], 1),
            torch.cat([token, color, candidate], 1),
            token,
            pick("output").T,
        ),
        "negative": Head(
            torch.cat([pick("inhibited") * -2, always], 1) * sharp,
            torch.cat([token, total("token", 0, n) * 2 + pick("bos")], 1),
            token,
            pick("output").T * -NEGATIVE,
        ),
    }
    ioi = edges(
        "input a0.h0 qkv", "input a1.h0 qv", "a0.h0 a1.h0 kv", "a1.h0 a3.h1 q", "a1.h0 a3.h2 q",
        "input a3.h1 qkv", "input a3.h2 qkv", "a3.h1 logits", "a3.h2 logits",
    )  # fmt: skip
    colored = edges(
        "input a0.h1 qkv", "input a0.h2 qkv", "input a1.h1 qk", "a0.h1 a1.h1 kv", "a0.h2 a1.h1 k", "input a2.h0 qk",
        "a1.h1 a2.h0 v", "a2.h0 a3.h1 q", "input a3.h1 qkv", "a0.h2 a3.h1 k", "a3.h1 logits",
    )  # fmt: skip
    return Plan(
        name="compiled-two-task",
        blocks=blocks,
        layers=4,
        width=4,
        heads={
            **{_at(ROLES[role]): head for role, head in heads.items()},
            **decoys(blocks, ((0, 3), (2, 2), (3, 3)), ((1, 2, 0), (2, 1, 2), (3, 0, 1)), shift, sharp / gap),
        },
        embed=one_hot([*names, *colors]) @ token.T
        + one_hot(objects) @ pick("object").T
        + flag(["<bos>"]) @ pick("bos").T
        + flag(["Q"]) @ pick("question").T
        + always.T,
        table=table @ place.T + apart(context, 16)[0] @ pick("phase").T,
        unembed=pick("output") @ one_hot([*names, *colors]).T * GAIN,
        tasks=[("ioi", {}), ("colored-objects", {})],
        needed=[*ioi, *(edge for edge in colored if edge not in ioi), *edges("input a1.h0 k")],
        active=edges(
            "input a0.h0 q", "a0.h0 a1.h0 v", "input a1.h0 v", "a1.h0 a3.h1 q", "a1.h0 a3.h2 q",
            "input a3.h1 k", "input a3.h2 k", "a3.h1 logits", "a3.h2 logits",
        ),
        marks={"ioi": ioi, "colored_objects": colored},
    )  # fmt: skip


def _at(head: str) -> tuple[int, int]:
    layer, index = head[1:].split(".h")
    return int(layer), int(index)
