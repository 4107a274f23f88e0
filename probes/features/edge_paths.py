"""Signals of sources and gradients of targets through one frozen prompt, and what each head passes on between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.feature_graph import NODE_KINDS, FeatureGraph
from workbench.probes.features.direct_effects import logit_targets
from workbench.probes.features.frozen import FrozenAttention, FrozenModel, tolerance
from workbench.probes.features.replacement import Replacement, active_features

_SOURCES = ("embedding", "feature", "error")
_TARGETS = ("feature", "logit")


class Split(NamedTuple):
    """One edge, as in ``HeadLoadings``: scalars, ``[L, H]``, ``[L, H, T]``, ``[L, H, 2]`` and ``[L, H]``."""

    direct: Tensor
    loading: Tensor
    last: Tensor
    cell: Tensor
    carried: Tensor


class _Up(NamedTuple):
    """A source's signal: its ``values`` ``[G, T, E]`` in every attention layer, and the vectors ``[D]`` that it ``wrote`` at its
    position, by the layer whose MLP writes there (-1: the embedding)."""

    values: list[Tensor]
    wrote: dict[int, Tensor]


class _Down(NamedTuple):
    """A target's gradient behind every attention layer in front of it: ``through`` all paths ``[T, D]``, and ``alone`` ``[D]`` at
    its own position along those that cross no head. ``written[l]`` ``[D]`` is the latter behind the MLP of layer l (-1: at the
    embedding)."""

    through: list[Tensor]
    alone: list[Tensor]
    written: dict[int, Tensor]


class EdgePaths:
    """Edges of one graph. What is found of a source or target is kept, since edges share them."""

    def __init__(self, graph: FeatureGraph, frozen: FrozenModel, coders: Replacement) -> None:
        self.graph, self.frozen, self.coders = graph, frozen, coders
        self._errors: tuple[Tensor | None, ...] | None = None
        self._up: dict[int, _Up] = {}
        self._down: dict[int, _Down] = {}

    def split(self, edge: int) -> Split:
        """The edge by heads; refused where its weight is not what model and coders say."""
        graph, frozen = self.graph, self.frozen
        source, target = int(graph.source[edge]), int(graph.target[edge])
        s, t = int(graph.nodes.position[source]), int(graph.nodes.position[target])
        up, down = self._source(source), self._target(target)
        like = frozen.embedded
        direct = like.new_zeros(())
        if s == t:
            for layer, vector in up.wrote.items():
                if layer in down.written:
                    direct = direct + vector @ down.written[layer]
        shape = (frozen.layers, max(len(attention.o) for attention in frozen.attention))
        loading, carried = like.new_zeros(shape), like.new_zeros(shape)
        last, cell = like.new_zeros(*shape, frozen.length), torch.full((*shape, 2), -1)
        for layer, (through, alone) in enumerate(zip(down.through, down.alone, strict=True)):
            attention = frozen.attention[layer]
            if not bool(up.values[layer].any()):
                continue
            count = len(attention.o)
            v = up.values[layer].repeat_interleave(count // len(attention.v), 0)
            cells = attention.pattern * (torch.einsum("td,hed->hte", through, attention.o) @ v.transpose(1, 2))
            loading[layer, :count] = cells.sum((1, 2))
            best = cells.abs().flatten(1).argmax(1)
            carried[layer, :count] = cells.flatten(1).gather(1, best[:, None])[:, 0]
            found = torch.stack([best // frozen.length, best % frozen.length], 1).cpu()
            cell[layer, :count] = torch.where((carried[layer, :count] != 0).cpu()[:, None], found, -1)
            end = torch.einsum("d,hed->he", alone, attention.o)
            last[layer, :count] = attention.pattern[:, t] * torch.einsum("he,hke->hk", end, v)
        weight = direct + last.sum()
        own, size = float(graph.weight[edge]), float(direct.abs() + last.abs().sum())
        if not abs(float(weight) - own) <= tolerance(graph.weight.dtype) * max(size, abs(own), 1e-12):
            raise Refused(
                f"edge {edge}, {graph.name(source)} to {graph.name(target)}, has the weight {own:.6g}; this model and these "
                f"coders make {float(weight):.6g} of it: they, or the prompt, are not those of the graph"
            )
        return Split(direct, loading, last, cell, carried)

    def _source(self, node: int) -> _Up:
        if node in self._up:
            return self._up[node]
        s, wrote = int(self.graph.nodes.position[node]), self._wrote(node)
        x = torch.zeros_like(self.frozen.embedded)
        if -1 in wrote:
            x[s] += wrote[-1]
        values = []
        for layer, attention in enumerate(self.frozen.attention):
            read = torch.einsum("td,gde->gte", x / attention.norm.size[:, None], attention.v)
            values.append(read)
            x = _through_attention(attention, read) + x if bool(read.any()) else x
            skip = self._skip(layer)
            if skip is not None:
                mlp = self.frozen.mlps[layer]
                assert mlp is not None
                x = x + (mlp.norm.fold.linear(x) / mlp.norm.size[:, None] if self.coders.normed[layer] else x) @ skip
            if layer in wrote:
                x = x.clone()
                x[s] += wrote[layer]
        self._up[node] = _Up(values, wrote)
        return self._up[node]

    def _wrote(self, node: int) -> dict[int, Tensor]:
        """Vectors ``[D]`` that a source writes, by layer."""
        nodes, frozen, name = self.graph.nodes, self.frozen, self.graph.name(node)
        kind, layer = NODE_KINDS[int(nodes.kind[node])], int(nodes.layer[node])
        s, feature = int(nodes.position[node]), int(nodes.feature[node])
        if kind not in _SOURCES:
            raise Refused(f"{name}: paths begin at {', '.join(_SOURCES)} nodes")
        if s >= frozen.length or layer >= frozen.layers:
            raise WorkbenchError(f"{name} is not in this prompt of {frozen.length} tokens and {frozen.layers} layers")
        if kind == "embedding":
            return {-1: frozen.embedded[s]}
        if kind == "error":
            if self._errors is None:
                self._errors = active_features(frozen, self.coders).errors
            error = self._errors[layer]
            if error is None:
                raise WorkbenchError(f"{name}: the layer has no MLP and leaves no error")
            return {layer: error[s]}
        mlp = frozen.mlps[layer]
        if layer not in self.coders.layers or mlp is None:
            raise WorkbenchError(f"{name}: the layer has no coder; coders are of {list(self.coders.layers)}")
        code = self.coders.code(layer, self.coders.input(layer, mlp)[s : s + 1])[1][0]
        if not 0 <= feature < len(code):
            raise UnknownName(f"feature of layer {layer}", feature, [f"0 to {len(code) - 1}"])
        return {
            later: code[feature] * decoder[feature]
            for later in self.coders.layers
            for origin, decoder in self.coders.writers(later)
            if origin == layer
        }

    def _target(self, node: int) -> _Down:
        if node in self._down:
            return self._down[node]
        frozen, nodes, name = self.frozen, self.graph.nodes, self.graph.name(node)
        kind, layer = NODE_KINDS[int(nodes.kind[node])], int(nodes.layer[node])
        t, feature = int(nodes.position[node]), int(nodes.feature[node])
        if kind not in _TARGETS:
            raise Refused(f"{name}: paths end at {', '.join(_TARGETS)} nodes")
        if t >= frozen.length:
            raise WorkbenchError(f"{name} is not in this prompt of {frozen.length} tokens")
        written: dict[int, Tensor] = {}
        if kind == "logit":
            reach = frozen.layers
            end = logit_targets(frozen, self._logit(node, feature)[None], t).inward[0]
            written[reach - 1] = end
            alone = self._skip_back(reach - 1, end, frozen_at=t)
        else:
            mlp = frozen.mlps[layer] if 0 <= layer < frozen.layers else None
            if mlp is None or layer not in self.coders.layers:
                raise WorkbenchError(f"{name}: the layer has no coder; coders are of {list(self.coders.layers)}")
            reach = layer + 1
            alone = self.coders.encoder(layer, torch.tensor([feature], device=frozen.embedded.device))[0][0]
            alone = mlp.norm.back(alone, mlp.norm.size[t]) if self.coders.normed[layer] else alone
        through = torch.zeros_like(frozen.embedded)
        through[t] = alone
        all_paths, no_heads = [], []
        for index in range(reach - 1, -1, -1):
            all_paths.append(through)
            no_heads.append(alone)
            through = through + frozen.attention[index].back(through[:, None])[:, 0]
            written[index - 1] = alone
            if index:
                through = self._skip_back(index - 1, through)
                alone = self._skip_back(index - 1, alone, frozen_at=t)
        self._down[node] = _Down(all_paths[::-1], no_heads[::-1], written)
        return self._down[node]

    def _logit(self, node: int, token: int) -> Tensor:
        """A logit relative to the mean logit, or the difference of two, as weights ``[V]``."""
        frozen = self.frozen
        vocab = frozen.logits.shape[1]
        if not 0 <= token < vocab:
            raise UnknownName("token of a logit", token, [f"0 to {vocab - 1}"])
        found = torch.zeros(vocab).to(frozen.embedded)
        found[token] = 1.0
        if not self.graph.meta.get("difference"):
            return found - 1 / vocab
        first, label, tokenizer = frozen.token(token), self.graph.nodes.label[node], frozen.model.tokenizer
        if not label.startswith(f"{first} - "):
            raise WorkbenchError(f"{self.graph.name(node)} is a difference of logits, and {label!r} does not name them")
        second = label[len(first) + 3 :]
        found[int(second) if tokenizer is None else int(tokenizer.convert_tokens_to_ids(second))] -= 1.0
        return found

    def _skip(self, layer: int) -> Tensor | None:
        """The linear path beside the features of a layer's coder, ``[D, D]``."""
        return self.coders.skip(layer) if layer in self.coders.layers else None

    def _skip_back(self, layer: int, grad: Tensor, frozen_at: int | None = None) -> Tensor:
        """A gradient behind the MLP of a layer, ``[T, D]`` or ``[D]`` at a position, as one in front of it."""
        skip = self._skip(layer)
        if skip is None:
            return grad
        mlp = self.frozen.mlps[layer]
        assert mlp is not None
        size = mlp.norm.size[:, None] if frozen_at is None else mlp.norm.size[frozen_at]
        back = grad @ skip.T
        return grad + (mlp.norm.back(back, size) if self.coders.normed[layer] else back)


def _through_attention(attention: FrozenAttention, values: Tensor) -> Tensor:
    """What values ``[G, T, E]`` become in the stream, ``[T, D]``."""
    z = attention.pattern @ values.repeat_interleave(len(attention.o) // len(attention.v), 0)
    return torch.einsum("hte,hed->td", z, attention.o)
