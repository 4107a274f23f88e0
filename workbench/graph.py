"""The residual-stream graph of a transformer: who writes, who reads, and every edge between them.

Nodes that write: ``input`` (embeddings with positions), heads ``a{layer}.h{head}``, MLPs ``m{layer}``. Inputs that
read: each head's query, key and value input, each MLP's input, and ``logits``. An edge leads from a writer to every
input computed later. Layers are sequential (attention, then MLP). With fewer key-value heads than query heads, keys
and values are read once per key-value head, and their reader is named ``a{layer}.g{kv head}``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError

CHANNELS = ("q", "k", "v", "in")
_EDGE = re.compile(r"^(?P<source>[^<>\s]+)->(?P<target>[^<>\s]+?)(?:<(?P<channel>[qkv])>)?$")
_PLACE = re.compile(r"^(?P<part>[^@\s]+)(?:@(?P<place>[\w.-]+))?$")


def edge_name(source: str, target: str, channel: str) -> str:
    """The text form of an edge, ``a0.h1->a1.h0<k>`` or ``a1.h0->logits``."""
    if channel not in CHANNELS:
        raise UnknownName("edge channel", channel, CHANNELS)
    return f"{source}->{target}" + ("" if channel == "in" else f"<{channel}>")


def name_place(name: str) -> tuple[str, str]:
    """(part, place) of a node or an edge: ``a1.h2@END`` is node ``a1.h2`` at place ``END``; the place is empty where a
    part stands for all positions."""
    match = _PLACE.match(name)
    if match is None:
        raise WorkbenchError(
            f"a part is written node, source->target or source->target<q|k|v>, then @place; got {name!r}"
        )
    return match["part"], match["place"] or ""


def edge_parts(name: str) -> tuple[str, str, str]:
    """(source, target, channel) of the text form of an edge, without its place."""
    match = _EDGE.match(name_place(name)[0])
    if match is None:
        raise WorkbenchError(f"an edge is written source->target or source->target<q|k|v>; got {name!r}")
    return match["source"], match["target"], match["channel"] or "in"


@dataclass(frozen=True)
class Slot:
    """One input of a node: ``reader`` reads the first ``sources`` writers through ``channel``.

    ``layer`` is the reader's layer (the number of layers for ``logits``), ``index`` its position on the head axis.
    """

    reader: str
    channel: str
    layer: int
    index: int
    sources: int


@dataclass(frozen=True)
class Graph:
    """The graph of a model with the given sizes; build it with ``circuit_graph``.

    ``nodes`` are the writers in the order of computation, then ``logits``; ``slots`` the inputs in the order of
    computation. ``source``, ``target``, ``channel`` are ``[E]``: indices into ``nodes``, ``readers`` and
    ``CHANNELS``; edges are ordered by slot, then by source. ``slot`` ``[E]`` indexes ``slots``.
    """

    layers: int
    heads: int
    kv_heads: int
    mlp: bool

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.kv_heads < 1:
            raise WorkbenchError(
                f"a graph needs at least one layer and head; got {self.layers}, {self.heads}, {self.kv_heads}"
            )
        if self.heads % self.kv_heads:
            raise WorkbenchError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        names = ["input"]
        for layer in range(self.layers):
            names += [f"a{layer}.h{head}" for head in range(self.heads)]
            names += [f"m{layer}"] * self.mlp
        return (*names, "logits")

    @property
    def writers(self) -> tuple[str, ...]:
        """All nodes but ``logits``."""
        return self.nodes[:-1]

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        width = self.heads + self.mlp
        group = "h" if self.kv_heads == self.heads else "g"
        slots = []
        for layer in range(self.layers):
            before = 1 + layer * width
            slots += [Slot(f"a{layer}.h{i}", "q", layer, i, before) for i in range(self.heads)]
            for channel in ("k", "v"):
                slots += [Slot(f"a{layer}.{group}{i}", channel, layer, i, before) for i in range(self.kv_heads)]
            slots += [Slot(f"m{layer}", "in", layer, 0, before + self.heads)] * self.mlp
        return (*slots, Slot("logits", "in", self.layers, 0, len(self.writers)))

    @cached_property
    def readers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(slot.reader for slot in self.slots))

    @cached_property
    def source(self) -> Tensor:
        return torch.cat([torch.arange(slot.sources) for slot in self.slots])

    @cached_property
    def slot(self) -> Tensor:
        counts = torch.tensor([slot.sources for slot in self.slots])
        return torch.arange(len(self.slots)).repeat_interleave(counts)

    @cached_property
    def target(self) -> Tensor:
        index = {name: i for i, name in enumerate(self.readers)}
        return torch.tensor([index[slot.reader] for slot in self.slots])[self.slot]

    @cached_property
    def channel(self) -> Tensor:
        return torch.tensor([CHANNELS.index(slot.channel) for slot in self.slots])[self.slot]

    @property
    def n_edges(self) -> int:
        return sum(slot.sources for slot in self.slots)

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Edge names, ``a0.h1->a1.h0<k>``, in the order of the index tensors."""
        return tuple(
            edge_name(source, slot.reader, slot.channel)
            for slot in self.slots
            for source in self.writers[: slot.sources]
        )

    def matrix(self, values: Tensor) -> Tensor:
        """Values of the edges ``[E]`` as a matrix ``[writers, slots]``, zero (False) where there is no edge."""
        out = values.new_zeros(len(self.writers), len(self.slots))
        out[self.source, self.slot] = values
        return out

    def __repr__(self) -> str:
        return (
            f"Graph(layers={self.layers}, heads={self.heads}, kv_heads={self.kv_heads}, mlp={self.mlp}: "
            f"{len(self.nodes)} nodes, {self.n_edges:,} edges)"
        )


def circuit_graph(layers: int = 12, heads: int = 12, kv_heads: int | None = None, mlp: bool = True) -> Graph:
    """The residual-stream graph of a sequential transformer; the defaults are GPT-2 small, 32,491 edges."""
    return Graph(layers, heads, heads if kv_heads is None else kv_heads, mlp)
