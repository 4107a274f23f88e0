"""Which features, at which tokens, make the model say what it says next, and through which other features?

An attribution graph (Ameisen et al. 2025, "Circuit Tracing"; Lindsey et al. 2025, "On the Biology of a Large Language Model"; the
reference implementation is circuit-tracer). MLPs are replaced by transcoders, attention and norms frozen as they are on this
prompt. Nodes are the active features, what the transcoders leave (errors), the embeddings and the logits; an edge is what its
source adds to the pre-activation of its target:

    weight = activation of the source * (w_dec . J . w_enc)              ``direct_effects.py``
    pre    = sum of incoming weights + omitted + bias + b_enc            columns of ``graph.nodes``

``bias`` is what constants write: b_V and b_O of attention, b_dec of the transcoders, shifts of norms (also of the norm before the
target), and for logits the bias of W_U. ``omitted`` is what active features add that are not in the graph, and the weakest edges
of a row where there are too many; ``pruned`` and ``subgraph`` add to it what they take out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.coders.cross_layer import CrossLayer
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.feature_graph import FeatureGraph, FeatureNodes, kind_code
from workbench.models.protocol import Model
from workbench.probes.features.direct_effects import DirectEffects, Targets, feature_targets, logit_targets, split
from workbench.probes.features.frozen import FrozenModel, frozen_model, tolerance
from workbench.probes.features.influence import graph_scores
from workbench.probes.features.replacement import Replacement, active_features, replacement

MAX_EDGES = 2**26
"""Edges that are held while a graph is made: 0.5 GB in float32."""
_UPDATE = 4
"""Batches of features between two rankings, as circuit-tracer has it."""


@torch.no_grad()
def attribution_graph(
    model: Model,
    coders: Any,
    prompt: Any,
    *,
    targets: int | str | Sequence[int | str] | None = None,
    position: int | None = None,
    max_logits: int = 10,
    mass: float = 0.95,
    max_features: int = 7500,
    batch: int = 256,
    max_edges: int = MAX_EDGES,
) -> FeatureGraph:
    """The attribution graph of one prompt.

    ``coders``: ``{layer: transcoder}``, or one cross-layer transcoder; an MLP without a coder is an error as a whole.
    ``prompt``: a text, token ids ``[T]``, or ``Tokens`` of one text. ``targets``: a token (its id or text), or a pair of them for
    a logit difference; by default the most likely tokens, as many as have the share ``mass`` of the probability together, at most
    ``max_logits``. A token's logit is taken relative to the mean logit. ``position``: where it is predicted, by default at the
    last token. ``max_features``: the features that carry most influence, found by following the strongest first. ``batch``:
    targets per pass, fewer where the memory of a pass would exceed its bound.

    Refused: models whose attention or norms cannot be frozen, coders of other sites or widths, codes with NaN.
    """
    for name, value in (("max_logits", max_logits), ("max_features", max_features), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise WorkbenchError(f"{name} is a whole number from 1; got {value!r}")
    if not 0 < mass <= 1:
        raise WorkbenchError(f"mass is a share of the probability, above 0 and at most 1; got {mass!r}")
    frozen = frozen_model(model, prompt)
    coded = replacement(frozen, coders)
    at = frozen.length - 1 if position is None else position
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < frozen.length:
        raise WorkbenchError(f"position is one of the tokens, 0 to {frozen.length - 1}; got {position!r}")
    logits = _logits(frozen, targets, at, max_logits, mass)
    active = active_features(frozen, coded)
    effects = DirectEffects(frozen, coded, active)
    growing = _Growing(effects, min(max_features, len(active)), max_edges, logits.weight, tolerance(frozen.dtype))
    growing.add(
        effects.order.first[-1] + torch.arange(len(logits.tokens)), logit_targets(frozen, logits.directions, at)
    )
    _grow(growing, effects, coded, batch)
    meta = {
        "model": frozen.model.name,
        "provenance": frozen.provenance.dict(),
        "coders": _described(coders),
        "ids": frozen.tokens.ids[0].tolist(),
        "targets": logits.labels,
        "target_ids": logits.ids,
        "difference": logits.second is not None,
        "position": at,
        "max_logits": max_logits,
        "mass": mass,
        "max_features": max_features,
        "active_features": len(active),
        "identity_error": growing.worst,
    }
    return growing.graph(logits, at, meta)


@dataclass(frozen=True, eq=False)
class _Logits:
    """``directions [N, V]`` over the logits, the token and label of each, its probability and its weight. ``second`` is the token
    whose logit is taken off in a difference."""

    directions: Tensor
    tokens: list[int]
    labels: list[str]
    probability: Tensor
    weight: Tensor
    second: int | None = None

    @property
    def ids(self) -> list[int]:
        return self.tokens if self.second is None else [*self.tokens, self.second]


def _logits(frozen: FrozenModel, targets: Any, at: int, most: int, mass: float) -> _Logits:
    probability = frozen.logits[at].double().softmax(-1).to(frozen.embedded)
    vocab = len(probability)
    if not bool(torch.isfinite(probability).all()):
        raise WorkbenchError(f"the logits at position {at} hold NaN or infinity")
    mean = torch.full_like(probability, 1 / vocab)

    def centred(tokens: Sequence[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(tokens), vocab).to(mean) - mean

    if targets is None:
        share, best = probability.topk(min(most, vocab))
        count = min(int((share.cumsum(0) < mass).sum()) + 1, len(best))
        tokens = best[:count].tolist()
        chosen = share[:count]
        return _Logits(centred(tokens), tokens, [frozen.token(i) for i in tokens], chosen, chosen / chosen.sum())
    if isinstance(targets, int | str):
        token = _token(frozen, targets)
        return _Logits(centred([token]), [token], [frozen.token(token)], probability[[token]], mean.new_ones(1))
    pair = list(targets)
    if len(pair) != 2:
        raise WorkbenchError(f"targets are a token, or a pair of tokens for their logit difference; got {targets!r}")
    first, second = (_token(frozen, each) for each in pair)
    if first == second:
        raise WorkbenchError(f"the difference of a logit and itself is 0: {frozen.token(first)!r} is given twice")
    both = centred([first, second])
    return _Logits(
        (both[0] - both[1])[None],
        [first],
        [f"{frozen.token(first)} - {frozen.token(second)}"],
        torch.full((1,), float("nan")),
        mean.new_ones(1),
        second=second,
    )


def _token(frozen: FrozenModel, given: Any) -> int:
    vocab = frozen.logits.shape[1]
    if isinstance(given, int) and not isinstance(given, bool):
        if not 0 <= given < vocab:
            raise WorkbenchError(f"a target is a token of the vocabulary, 0 to {vocab - 1}; got {given}")
        return given
    tokenizer = frozen.model.tokenizer
    if not isinstance(given, str) or tokenizer is None:
        raise WorkbenchError(f"a target is a token id, or a text if the model has a tokenizer; got {given!r}")
    known = tokenizer.get_vocab()
    if given in known:
        return int(known[given])
    ids = tokenizer(given, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        if len(ids) == 1:
            raise UnknownName("token", given, sorted(known)[:50])
        raise WorkbenchError(f"a target is one token; {given!r} is {len(ids)}: {tokenizer.convert_ids_to_tokens(ids)}")
    return int(ids[0])


def _described(coders: Any) -> Any:
    if isinstance(coders, CrossLayer):
        return {"kind": coders.kind, "features": coders.features, "about": dict(coders.about)}
    return {str(layer): {"kind": c.kind, "features": c.features, "about": dict(c.about)} for layer, c in coders.items()}


def _grow(growing: _Growing, effects: DirectEffects, coders: Replacement, batch: int) -> None:
    """Attribute features in batches, those first that carry most of the influence found so far."""
    active = effects.active
    left = growing.most
    done = torch.zeros(len(active), dtype=torch.bool)
    nodes = growing.nodes_of_features()
    while left:
        if left == int((~done).sum()):
            chosen = (~done).nonzero()[:, 0]
        else:
            influence = growing.influence()[nodes].masked_fill(done, -1.0)
            count = min(left, _UPDATE * batch, int((influence > 0).sum()))
            if not count:
                break  # the others carry nothing
            chosen = influence.topk(count).indices
        for index in split(chosen, active.layer, active.position, effects, batch):
            growing.add(nodes[index], feature_targets(effects.frozen, coders, active, index))
        done[chosen] = True
        left -= len(chosen)


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows of some nodes of one layer: the ``counts [n]`` sources of each, ``source`` and ``weight`` one after another; ``total``
    and ``size`` ``[n]`` are the sums of whole rows and of their absolute values, ``whole [n]`` whether nothing is left out."""

    layer: int
    nodes: Tensor
    counts: Tensor
    source: Tensor
    weight: Tensor
    total: Tensor
    size: Tensor
    whole: Tensor


@dataclass(eq=False)
class _Growing:
    """The rows that are known so far."""

    effects: DirectEffects
    most: int
    max_edges: int
    logit_weight: Tensor
    tolerance: float
    worst: float = 0.0
    blocks: list[_Block] = field(default_factory=list)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = self.effects.order.first[-1] + len(self.logit_weight)
        for name in ("pre", "b_enc", "bias", "omitted"):
            self.columns[name] = torch.full((total,), float("nan"), dtype=self.effects.frozen.embedded.dtype)

    def nodes_of_features(self) -> Tensor:
        """The node of each active feature, ``[n]``."""
        order, active = self.effects.order, self.effects.active
        parts = [torch.zeros(0, dtype=torch.int64)]
        for layer, start in enumerate(order.features):
            of = active.of(layer)
            parts.append(start + torch.arange(of.stop - of.start))
        return torch.cat(parts)

    def add(self, nodes: Tensor, targets: Targets) -> None:
        """Compute and keep the rows of ``nodes``; refuses rows that do not sum to the pre-activation."""
        rows, bias = self.effects.rows(targets)
        total = rows.sum(1)
        goal = targets.pre - targets.b_enc
        # Sums of terms that cancel are as exact as their terms are.
        size = rows.abs().sum(1) + bias.abs() + goal.abs()
        wrong = float(((total + bias - goal).abs() / size.clamp(min=1e-30)).max())
        self.worst = max(self.worst, wrong)
        if not wrong <= self.tolerance:
            raise Refused(
                f"edges into layer {targets.layer} do not add up to the pre-activations of its features (off by {wrong:.2g} of "
                "the sum of their sizes): NaN in the model or a coder, or a model that cannot be frozen"
            )
        rows = rows.cpu()
        room = max(1, self.max_edges // (self.most + len(self.logit_weight)))
        counts, sources, weights, whole = [], [], [], []
        for row in rows:
            index = row.nonzero()[:, 0]
            whole.append(len(index) <= room)
            if not whole[-1]:
                index = index[row[index].abs().topk(room).indices.sort().values]
            counts.append(len(index))
            sources.append(index.int())
            weights.append(row[index])
        block = _Block(
            targets.layer, nodes, torch.tensor(counts), torch.cat(sources), torch.cat(weights), total.cpu(), rows.abs().sum(1),
            torch.tensor(whole),
        )  # fmt: skip
        self.blocks.append(block)
        for name, values in (("pre", targets.pre), ("b_enc", targets.b_enc), ("bias", bias)):
            self.columns[name][nodes] = values.cpu()

    def influence(self) -> Tensor:
        """What each node carries of the logits, through the rows that are known, ``[nodes]``."""
        found = torch.zeros(len(self.columns["pre"]), dtype=torch.float64)
        found[self.effects.order.first[-1] :] = self.logit_weight.double().cpu()
        for block in sorted(self.blocks, key=lambda b: -b.layer):
            each = found[block.nodes] / block.size.double().clamp(min=1e-300)
            found.index_add_(0, block.source, each.repeat_interleave(block.counts) * block.weight.abs())
        return found

    def graph(self, logits: _Logits, at: int, meta: dict[str, Any]) -> FeatureGraph:
        """The graph of the rows; what they hold of nodes that are not in it goes to ``omitted``."""
        effects, order, active = self.effects, self.effects.order, self.effects.active
        length, total = effects.frozen.length, order.first[-1] + len(logits.tokens)
        kept = torch.zeros(total, dtype=torch.bool)
        for block in self.blocks:
            kept[block.nodes] = True
        kept[:length] = True
        for layer, error in enumerate(active.errors):
            kept[order.first[layer] : order.first[layer] + (0 if error is None else length)] = True
        number = (kept.cumsum(0) - 1).int()
        source, target, weight = [], [], []
        while self.blocks:
            block = self.blocks.pop()
            of = kept[block.source.long()]
            rows = torch.arange(len(block.nodes)).repeat_interleave(block.counts)[of]
            source.append(number[block.source[of].long()])
            target.append(number[block.nodes][rows])
            weight.append(block.weight[of])
            sums = weight[-1].new_zeros(len(block.nodes)).index_add_(0, rows, weight[-1])
            left = torch.bincount(rows, minlength=len(block.nodes)) < block.counts
            self.columns["omitted"][block.nodes] = (block.total - sums) * (left | ~block.whole)
        nodes = self._nodes(kept, logits, at)
        found = FeatureGraph(
            nodes, torch.cat(source), torch.cat(target), torch.cat(weight), effects.frozen.labels, meta
        )
        return graph_scores(found)

    def _nodes(self, kept: Tensor, logits: _Logits, at: int) -> FeatureNodes:
        frozen, active, length = self.effects.frozen, self.effects.active, self.effects.frozen.length
        tokens, every = frozen.tokens.ids[0].cpu(), torch.arange(length)
        none = torch.full((length,), -1)
        kinds = [torch.full((length,), kind_code("embedding"))]
        layers, positions, features = [none], [every], [tokens]
        blank = torch.full((length,), float("nan"), dtype=torch.float64)
        values = [blank]
        for layer, error in enumerate(active.errors):
            if error is not None:
                kinds.append(torch.full((length,), kind_code("error")))
                layers.append(torch.full((length,), layer))
                positions.append(every)
                features.append(none)
                values.append(blank)
            of = active.of(layer)
            kinds.append(torch.full((of.stop - of.start,), kind_code("feature")))
            layers.append(active.layer[of])
            positions.append(active.position[of])
            features.append(active.feature[of])
            values.append(active.value[of].double())
        n = len(logits.tokens)
        kinds.append(torch.full((n,), kind_code("logit")))
        layers.append(torch.full((n,), frozen.layers))
        positions.append(torch.full((n,), at))
        features.append(torch.tensor(logits.tokens))
        values.append(torch.full((n,), float("nan"), dtype=torch.float64))
        probability = torch.full((len(kept),), float("nan"), dtype=torch.float64)
        probability[len(kept) - n :] = logits.probability.double().cpu()
        labels = [*frozen.labels, *[""] * (len(kept) - length - n), *logits.labels]
        nodes = FeatureNodes.of(
            torch.cat(kinds),
            torch.cat(layers),
            torch.cat(positions),
            torch.cat(features),
            activation=torch.cat(values),
            probability=probability,
            label=labels,
            columns=self.columns,
        )
        return nodes.take(kept.nonzero()[:, 0])
