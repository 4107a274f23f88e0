"""Direct effects on features and logits: rows of an attribution graph, many targets at a time.

With attention and norms frozen the pre-activation of a target is linear in what is written into the stream:

    pre = sum over sources of weight + bias + b_enc,     weight = activation * (w_dec . J . w_enc)

J, from the source's place to the target's, leads through attention (frozen maps), norms (frozen sizes) and skip terms, and
through no other coder. One pass from the target down to the embeddings gives a whole row, for a batch of targets of one layer;
only the positions that a target can see take part. ``bias`` is all that constants write: biases of attention, of coders (b_dec),
and shifts of norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.probes.features.frozen import FrozenModel
from workbench.probes.features.replacement import Active, Replacement

BUFFER = 2**26
"""Bytes of the gradient of one batch of targets; a batch has about six such buffers."""


@dataclass(frozen=True, eq=False)
class Order:
    """Numbers of nodes: embeddings by position, then by layer the errors by position and the active features, then logits.
    ``first[l]`` is the first node of layer l, ``first[-1]`` the first logit; ``features[l]`` the first feature."""

    first: tuple[int, ...]
    features: tuple[int, ...]

    @classmethod
    def of(cls, frozen: FrozenModel, active: Active) -> Order:
        first, features, count = [], [], frozen.length
        for layer, error in enumerate(active.errors):
            first.append(count)
            features.append(count + (0 if error is None else frozen.length))
            found = active.of(layer)
            count = features[-1] + found.stop - found.start
        return cls((*first, count), tuple(features))

    def layer_of(self, nodes: Tensor) -> Tensor:
        """Layer of features and errors, -1 for embeddings, L for logits."""
        return torch.searchsorted(torch.tensor(self.first), nodes, right=True) - 1


@dataclass(frozen=True, eq=False)
class Targets:
    """N targets of one layer (L for logits): gradients ``inward [N, D]`` at the stream that the target reads, at ``positions``
    ``[N]``; ``pre [N]`` is the model's pre-activation, ``constant [N]`` its value where the stream is 0, ``b_enc`` among it."""

    layer: int
    positions: Tensor
    inward: Tensor
    pre: Tensor
    b_enc: Tensor
    shift: Tensor


def feature_targets(frozen: FrozenModel, coders: Replacement, active: Active, chosen: Tensor) -> Targets:
    """Active features ``chosen`` ``[N]`` (indices into ``active``, all of one layer) as targets."""
    layer = int(active.layer[chosen[0]])
    mlp = frozen.mlps[layer]
    assert mlp is not None
    positions = active.position[chosen].to(frozen.embedded.device)
    rows, b_enc = coders.encoder(layer, active.feature[chosen].to(frozen.embedded.device))
    shift = torch.zeros_like(b_enc)
    if coders.normed[layer]:
        shift = rows @ mlp.norm.fold.shift
        rows = mlp.norm.back(rows, mlp.norm.size[positions, None])
    return Targets(layer, positions, rows, active.pre[chosen].to(rows), b_enc, shift)


def logit_targets(frozen: FrozenModel, directions: Tensor, position: int) -> Targets:
    """Weighted sums of logits, ``directions [N, V]``, at one position as targets."""
    toward = directions @ frozen.unembed.T
    positions = torch.full((len(directions),), position, device=toward.device)
    shift = toward @ frozen.final.fold.shift + directions @ frozen.offset
    inward = frozen.final.back(toward, frozen.final.size[positions, None])
    return Targets(
        frozen.layers, positions, inward, directions @ frozen.logits[position], torch.zeros_like(shift), shift
    )


class DirectEffects:
    """Rows of the graph of one prompt."""

    def __init__(self, frozen: FrozenModel, coders: Replacement, active: Active) -> None:
        self.frozen, self.coders, self.active = frozen, coders, active
        self.order = Order.of(frozen, active)
        device = frozen.embedded.device
        self._feature, self._value = active.feature.to(device), active.value.to(device)
        # Where the features of a layer and position begin, [T + 1] per layer, counted from the layer's first feature.
        every = torch.arange(frozen.length + 1)
        self._bounds = [
            torch.searchsorted(active.position[active.of(layer)].contiguous(), every).tolist()
            for layer in range(frozen.layers)
        ]

    def batch(self, positions: int) -> int:
        """How many targets that see this many positions fit into ``BUFFER``."""
        embedded = self.frozen.embedded
        return max(1, BUFFER // (positions * embedded.shape[1] * embedded.itemsize))

    @torch.no_grad()
    def rows(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """Weights ``[N, S]`` of all nodes below the targets' layer, and what biases add ``[N]``."""
        frozen, layer = self.frozen, targets.layer
        n, every = len(targets.positions), torch.arange(len(targets.positions), device=targets.positions.device)
        reach = int(targets.positions.max()) + 1 if frozen.causal else frozen.length
        weights = targets.inward.new_zeros(n, self.order.first[layer])
        bias = targets.shift.clone()
        if layer == frozen.layers:
            grad = targets.inward.new_zeros(reach, n, targets.inward.shape[1])
        else:
            attention = frozen.attention[layer]
            bias += (targets.inward * attention.constant[targets.positions]).sum(1)
            grad = attention.back_from(targets.inward, targets.positions, reach)
        grad[targets.positions, every] += targets.inward
        for below in range(layer - 1, -1, -1):
            attention = frozen.attention[below]
            grad = self._through_mlp(below, grad, weights, bias)
            bias += torch.einsum("pnd,pd->n", grad, attention.constant[:reach])
            grad += attention.back(grad)
        weights[:, :reach] = torch.einsum("pnd,pd->np", grad, frozen.embedded[:reach])
        return weights, bias

    def _through_mlp(self, layer: int, grad: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        """Add what is written into the MLP output of a layer to the row; the gradient at the stream before that MLP."""
        mlp, error, reach = self.frozen.mlps[layer], self.active.errors[layer], len(grad)
        if mlp is None or error is None:
            return grad
        at = self.order.first[layer]
        weights[:, at : at + reach] = torch.einsum("pnd,pd->np", grad, error[:reach])
        for source, decoder in self.coders.writers(layer):
            self._written(source, decoder, grad, weights)
        if layer not in self.coders.layers:
            return grad
        constant, skip = self.coders.bias(layer), self.coders.skip(layer)
        if skip is not None and self.coders.normed[layer]:
            constant = constant + mlp.norm.fold.shift @ skip
        bias += grad.sum(0) @ constant
        if skip is None:
            return grad
        back = grad @ skip.T
        return grad + (mlp.norm.back(back, mlp.norm.size[:reach, None, None]) if self.coders.normed[layer] else back)

    def _written(self, source: int, decoder: Tensor, grad: Tensor, weights: Tensor) -> None:
        """Add what the active features of layer ``source`` write through ``decoder``, position by position."""
        bounds, here, to = self._bounds[source], self.active.of(source), self.order.features[source]
        for position in range(len(grad)):
            lo, hi = bounds[position], bounds[position + 1]
            if hi > lo:
                of = slice(here.start + lo, here.start + hi)
                rows = decoder[self._feature[of]] * self._value[of, None]
                weights[:, to + lo : to + hi] += grad[position] @ rows.T


def split(
    targets: Sequence[int] | Tensor, layers: Tensor, positions: Tensor, effects: DirectEffects, most: int
) -> list[Tensor]:
    """Active features in batches of one layer and similar positions, as large as ``most`` and memory allow."""
    index = torch.as_tensor(targets, dtype=torch.int64)
    order = torch.argsort(layers[index] * (int(positions.max()) + 2) + positions[index], descending=True, stable=True)
    index, batches, start = index[order], [], 0
    while start < len(index):
        reach = int(positions[index[start]]) + 1 if effects.frozen.causal else effects.frozen.length
        stop = start + min(most, effects.batch(reach))
        same = layers[index[start:stop]] == layers[index[start]]
        stop = start + int(same.sum())
        batches.append(index[start:stop])
        start = stop
    return batches
