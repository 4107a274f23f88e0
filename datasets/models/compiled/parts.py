"""Parts of a hand-compiled model: heads, MLPs, decoys, and the plan that puts them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.datasets.models.compiled.layout import Layout, Shift
from workbench.datasets.tokenizer import base_vocabulary
from workbench.errors import UnknownName

ATTENTION = {"hard": 20.0, "soft": 5.0}
"""Lead of the right key over every other key, in units of the softmax's argument."""
GAIN = 5.0
"""Logit of a token that is copied with weight 1."""
SCRATCH = 8

Edge = tuple[str, str, str]


@dataclass(frozen=True)
class Head:
    """A head as four maps from block coordinates: ``query key value [D, r]`` and ``out [r, D]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


@dataclass(frozen=True)
class Mlp:
    """``relu(x @ read + bias) @ write``: ``read [D, M]``, ``bias [M]``, ``write [M, D]``."""

    read: Tensor
    bias: Tensor
    write: Tensor


@dataclass(frozen=True)
class Plan:
    """Everything that a compiled model is: weights over named blocks, and what they are there for.

    ``embed`` ``[V, D]`` is what tokens write, ``table`` ``[context, D]`` what positions write, ``unembed`` ``[D, V]`` what
    the logits read. ``tasks``: (name, options) of what the model solves; the labels hold for the first of them.
    ``needed``: the mechanism. ``active``: its edges whose single exact patch has an effect under that task's corruption.
    ``marks``: further sets of edges by name, each a column of the ground truth. ``store``: how the weights are stored.
    """

    name: str
    blocks: Layout
    layers: int
    width: int
    heads: Mapping[tuple[int, int], Head]
    embed: Tensor
    table: Tensor
    unembed: Tensor
    tasks: Sequence[tuple[str, Mapping[str, Any]]]
    needed: Sequence[Edge]
    active: Sequence[Edge]
    mlps: Mapping[int, Mlp] = field(default_factory=dict)
    marks: Mapping[str, Sequence[Edge]] = field(default_factory=dict)
    vocabulary: tuple[str, ...] = field(default_factory=base_vocabulary)
    causal: bool = True
    store: torch.dtype = torch.float16


def lead(attention: str) -> float:
    """The lead of ``"hard"`` or ``"soft"`` attention."""
    if attention not in ATTENTION:
        raise UnknownName("attention", attention, ATTENTION)
    return ATTENTION[attention]


def edges(*lines: str) -> list[Edge]:
    """Edges written ``"input a0.h1 qkv"``: source, target, channels (``in`` for MLPs and ``logits``)."""
    found: list[Edge] = []
    for line in lines:
        source, target, *channels = line.split()
        found += [(source, target, c) for c in (channels[0] if channels else ("in",))]
    return found


def decoys(
    blocks: Layout,
    first: Sequence[tuple[int, int]],
    back: Sequence[tuple[int, int, int]],
    shift: Shift | None,
    sharp: float,
) -> dict[tuple[int, int], Head]:
    """Heads that attend to ``<bos>`` (``first``: layer, head) or some steps back (``back``: layer, head, steps),
    and a random part of what they see written into the scratch block, which nothing reads."""
    tokens = blocks.pick("token")
    out = blocks.pick("scratch").T
    found = {}
    for layer, head in first:
        found[layer, head] = Head(blocks.pick("always") * 30, blocks.pick("bos"), _small(tokens, layer, head, out), out)
    for layer, head, steps in back:
        assert shift is not None
        place = blocks.pick("position")
        found[layer, head] = Head(place @ shift(steps) * sharp, place, _small(tokens, layer, head, out), out)
    return found


def _small(tokens: Tensor, layer: int, head: int, out: Tensor) -> Tensor:
    noise = torch.randn(tokens.shape[1], len(out), generator=torch.Generator().manual_seed(100 * layer + head))
    return tokens @ noise
