"""Five programs after Tracr, compiled: reverse, sort, histogram, frac-prevs and Dyck (arXiv 2301.05062).

Each has a small vocabulary of its own and answers at every token. A count is read off attention as in Tracr: a head attends
evenly to ``<bos>`` and to all tokens that are counted, so that the weight of ``<bos>`` is 1 / (1 + count).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.datasets.catalogue import task
from workbench.datasets.models.compiled.counting import pairs_table, steps
from workbench.datasets.models.compiled.layout import Layout, flag, one_hot
from workbench.datasets.models.compiled.parts import GAIN, Head, Mlp, Plan, decoys, edges, lead
from workbench.datasets.tokenizer import SPECIAL

SCALE = 5000.0
"""Steepness s of the logits 2 s f v - s v^2 of a number f."""


def _vocabulary(name: str, **options: Any) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """All tokens of a model, those of a row, and the answers."""
    asked: Any = task(name, **options)
    return (*SPECIAL, *asked.tokens), asked.alphabet, asked.possible


def _embed(blocks: Layout, alphabet: tuple[str, ...], vocabulary: tuple[str, ...]) -> Tensor:
    return (
        one_hot(alphabet, vocabulary) @ blocks.pick("token").T
        + flag(["<bos>"], vocabulary) @ blocks.pick("bos").T
        + blocks.pick("always").T
    )


def _common(name: str, blocks: Layout, vocabulary: tuple[str, ...], alphabet: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": f"compiled-{name}",
        "blocks": blocks,
        "width": 3,
        "vocabulary": vocabulary,
        "embed": _embed(blocks, alphabet, vocabulary),
        "tasks": [(name, {})],
        "store": torch.float32,
    }


def reverse(attention: str = "hard", longest: int = 16) -> Plan:
    """The row read backwards: length, then the opposite place, then a copy from there.

    a0.h0 attends evenly to the whole row: the weight of `<bos>` is 1 / (1 + length). m0 turns it into a category, m1 looks up the
    opposite place in a table of length and place, and a2.h1 attends to it and copies its token. Attention is bidirectional; rows
    have up to 16 letters.
    """
    sharp, (vocabulary, alphabet, possible) = lead(attention), _vocabulary("reverse", letters=8)
    n = longest + 1
    blocks = Layout(
        token=len(alphabet), bos=1, always=1, position=n, share=1, length=n, target=n, output=len(possible), scratch=4
    )  # fmt: skip
    pick = blocks.pick
    table = {(size, at): pick("target")[:, size + 1 - at] for size in range(1, n) for at in range(1, size + 1)}
    return Plan(
        **_common("reverse", blocks, vocabulary, alphabet),
        layers=3,
        heads={
            (0, 0): Head(pick("always"), torch.zeros(blocks.width, 1), pick("bos"), pick("share").T),
            (2, 1): Head(pick("target") * sharp, pick("position"), pick("token"), pick("output").T),
            **decoys(blocks, ((0, 1), (1, 0), (2, 2)), (), None, sharp),
        },
        mlps={
            0: steps(pick("share"), [1 / (1 + size) for size in range(n)], pick("length").T),
            1: pairs_table(pick("length"), pick("position"), table),
        },
        table=pick("position").T,
        unembed=pick("output") @ one_hot(possible, vocabulary).T * GAIN,
        causal=False,
        needed=edges("input a0.h0 v", "a0.h0 m0", "m0 m1", "input m1", "m1 a2.h1 q", "input a2.h1 kv", "a2.h1 logits"),
        active=edges("input a2.h1 v", "a2.h1 logits"),
    )


def sort(attention: str = "hard", longest: int = 7) -> Plan:
    """The row in alphabetical order: count the smaller letters, then copy the letter whose count is the place.

    a0.h1 attends to `<bos>` and to all smaller letters: the weight of `<bos>` is 1 / (1 + rank). m0 turns it into a category, and
    a1.h0 attends at place p to the letter of rank p, never to `<bos>`, and copies it. Attention is bidirectional; no letter may
    stand twice.
    """
    sharp, (vocabulary, alphabet, possible) = lead(attention), _vocabulary("sort", letters=8)
    blocks = Layout(
        token=len(alphabet), bos=1, always=1, position=longest + 1, share=1, rank=longest, output=len(possible), scratch=4
    )  # fmt: skip
    pick = blocks.pick
    token = pick("token")
    smaller = torch.tril(torch.ones(len(alphabet), len(alphabet)), -1)
    return Plan(
        **_common("sort", blocks, vocabulary, alphabet),
        layers=2,
        heads={
            (0, 1): Head(
                torch.cat([token @ smaller, pick("always")], 1) * 2 * sharp,
                torch.cat([token, pick("bos")], 1),
                pick("bos"),
                pick("share").T,
            ),
            (1, 0): Head(
                torch.cat([pick("position", 1), pick("always")], 1) * sharp,
                torch.cat([pick("rank"), -pick("bos")], 1),
                token,
                pick("output").T,
            ),
            **decoys(blocks, ((0, 0), (1, 1), (1, 2)), (), None, sharp),
        },
        mlps={0: steps(pick("share"), [1 / (1 + rank) for rank in range(longest)], pick("rank").T)},
        table=pick("position").T,
        unembed=pick("output") @ one_hot(possible, vocabulary).T * GAIN,
        causal=False,
        needed=edges("input a0.h1 qkv", "a0.h1 m0", "input a1.h0 qkv", "m0 a1.h0 k", "a1.h0 logits"),
        active=edges("input a0.h1 qk", "a0.h1 m0", "m0 a1.h0 k", "input a1.h0 v", "a1.h0 logits"),
    )


def histogram(attention: str = "hard", longest: int = 9) -> Plan:
    """How often the letter occurs in the row: one head and one MLP.

    a0.h0 attends to `<bos>` and to all equal letters: the weight of `<bos>` is 1 / (1 + count). m0 turns it into the token of the
    count. Attention is bidirectional.
    """
    sharp, (vocabulary, alphabet, possible) = lead(attention), _vocabulary("histogram", letters=8, length=longest)
    blocks = Layout(token=len(alphabet), bos=1, always=1, share=1, output=longest + 1, scratch=4)
    pick = blocks.pick
    return Plan(
        **_common("histogram", blocks, vocabulary, alphabet),
        layers=1,
        heads={
            (0, 0): Head(
                torch.cat([pick("token"), pick("always")], 1) * 2 * sharp,
                torch.cat([pick("token"), pick("bos")], 1),
                pick("bos"),
                pick("share").T,
            ),
            **decoys(blocks, ((0, 1), (0, 2)), (), None, sharp),
        },
        mlps={0: steps(pick("share"), [1 / (1 + count) for count in range(longest + 1)], pick("output").T)},
        table=torch.zeros(longest + 1, blocks.width),
        unembed=pick("output", 1) @ one_hot(possible, vocabulary).T * GAIN,
        causal=False,
        needed=edges("input a0.h0 qkv", "a0.h0 m0", "m0 logits"),
        active=edges("input a0.h0 qk", "a0.h0 m0", "m0 logits"),
    )


def frac_prevs(attention: str = "hard", longest: int = 10) -> Plan:
    """The share of x among the tokens so far: one head, read linearly.

    a0.h1 attends evenly to the tokens so far without `<bos>` and averages 1 for x and 0 for all else: the share f. The logit of
    the token of the number v is 2 s f v - s v^2 + 1, largest for the nearest v; s is 5000. There is no MLP.
    """
    sharp, (vocabulary, alphabet, possible) = lead(attention), _vocabulary("frac-prevs", length=longest)
    blocks = Layout(token=len(alphabet), bos=1, always=1, share=1, scratch=4)
    pick = blocks.pick
    v = torch.tensor([[int(token) / 100 for token in possible]])
    read = pick("share") @ v * 2 * SCALE + pick("always") @ (1 - SCALE * v**2)
    return Plan(
        **_common("frac-prevs", blocks, vocabulary, alphabet),
        layers=1,
        heads={
            (0, 1): Head(pick("always") * -2 * sharp, pick("bos"), pick("token", 0, 1), pick("share").T),
            **decoys(blocks, ((0, 0), (0, 2)), (), None, sharp),
        },
        table=torch.zeros(longest + 1, blocks.width),
        unembed=read @ one_hot(possible, vocabulary).T,
        needed=edges("input a0.h1 qkv", "a0.h1 logits", "input logits"),
        active=edges("input a0.h1 v", "a0.h1 logits"),
    )


def dyck(attention: str = "hard", longest: int = 16) -> Plan:
    """Whether brackets are balanced, legal or broken: two means, thresholds, and a head that remembers.

    a0.h0 and a0.h1 average +1 for opened and -1 for closed brackets of their kind over all tokens so far, and `<bos>`. m0 marks
    places where a kind is below zero and counts the kinds that are not at zero. a1.h2 attends to marked places, if there are any
    so far, and passes the mark on. m1 says "broken" if it did, else "legal" if a kind is not at zero; "balanced" needs neither.
    """
    sharp, (vocabulary, alphabet, possible) = lead(attention), _vocabulary("dyck")
    blocks = Layout(
        token=4, bos=1, always=1, level=2, below=1, open=1, broken=1, output=3, scratch=4
    )  # fmt: skip
    pick = blocks.pick
    sign = torch.tensor([[1.0], [-1.0]])
    balanced, legal, broken = pick("output").T.unbind()
    units, biases, writes = [], [], []
    for kind in range(2):
        mean = pick("level", kind, 1) * (longest + 1)  # at most -1 or at least 1 unless zero
        below, apart = pick("below").T, pick("open").T
        units += [-mean, -mean, mean, mean]
        biases += [0.0, -1.0, 0.0, -1.0]
        writes += [below + apart, -below - apart, apart, -apart]
    verdict = Mlp(
        torch.cat([pick("broken") * 4, pick("broken") * 4, pick("open") * 2, pick("open") * 2], 1),
        torch.tensor([-1.0, -2.0, -0.5, -1.5]),
        torch.stack([2 * broken, -2 * broken, legal, -legal]),
    )
    even = torch.zeros(blocks.width, 1)
    common = _common("dyck", blocks, vocabulary, alphabet)
    common["embed"] = common["embed"] + torch.ones(len(vocabulary), 1) * balanced / 2
    return Plan(
        **common,
        layers=2,
        heads={
            (0, 0): Head(even, even, pick("token", 0, 2) @ sign, pick("level", 0, 1).T),
            (0, 1): Head(even, even, pick("token", 2, 2) @ sign, pick("level", 1, 1).T),
            (1, 2): Head(pick("always") * 2 * sharp, pick("below"), pick("below"), pick("broken").T),
            **decoys(blocks, ((0, 2), (1, 0), (1, 1)), (), None, sharp),
        },
        mlps={0: Mlp(torch.cat(units, 1), torch.tensor(biases), torch.cat(writes)), 1: verdict},
        table=torch.zeros(longest + 1, blocks.width),
        unembed=pick("output") @ one_hot(possible, vocabulary).T * GAIN,
        needed=edges(
            "input a0.h0 v", "input a0.h1 v", "a0.h0 m0", "a0.h1 m0", "m0 a1.h2 kv", "input a1.h2 q", "a1.h2 m1", "m0 m1",
            "m1 logits", "input logits",
        ),
        active=edges(
            "input a0.h0 v", "input a0.h1 v", "a0.h0 m0", "a0.h1 m0", "m0 a1.h2 kv", "a1.h2 m1", "m0 m1", "m1 logits",
        ),
    )  # fmt: skip
