"""Which layers look alike enough to share one attention map?

Two layers are compared by their head-mean attention rows, averaged over the queries (EchoAtt, arXiv 2409.14595): the cosine, or
1 - JS, the Jensen-Shannon divergence in bits, of rows scaled to sum 1. Both are 1 for equal rows. Long texts may be compared by
block maps: rows are then sums over the queries of a block. Candidates are runs of neighbouring layers of which each resembles the
run's first; the first and the last layers are left alone, as they resemble nothing or matter too much.

Two rows over the same few keys resemble each other whatever they hold. Beside every similarity stands that with the other layer's
visible keys shuffled: for cosines of rows the mean over all shuffles, which is the product with the row spread evenly; for JS and
for block maps one shuffle.

Resemblance is not proof. ``replaced`` runs the model with a layer's pattern exchanged for another's and says how far the output
moves, beside the same with each head's keys shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import SENTENCE, bundled, random_maps
from workbench.probes.similarity.aligned import (
    CHUNK,
    Aligned,
    aligned_layers,
    entropy_bits,
    even,
    need_distributions,
    shuffled,
)
from workbench.probes.sources import Source, prompts_of, provenance_of
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MEASURES = ("cosine", "js")


@dataclass(frozen=True)
class Sharing(Result):
    """``similarity`` ``[L, L]``, mean over sequences, with a 95% interval over them (``low high``, NaN for one); ``null``
    ``[L, L]``: with the keys of the second layer shuffled. ``groups``: candidate runs of layers, the first of each keeps its
    map."""

    similarity: Tensor
    low: Tensor
    high: Tensor
    null: Tensor
    layers: tuple[int | str, ...]
    groups: tuple[tuple[int | str, ...], ...]
    threshold: float
    measure: str
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per pair of layers: ``layer, other, similarity, low, high, null, shared`` (whether one may take the other's
        map)."""
        import pandas as pd

        together = {(a, b) for group in self.groups for a in group for b in group}
        return pd.DataFrame(
            {
                "layer": a,
                "other": b,
                **{name: float(getattr(self, name)[i, j]) for name in ("similarity", "low", "high", "null")},
                "shared": (a, b) in together,
            }
            for i, a in enumerate(self.layers)
            for j, b in enumerate(self.layers)
            if i < j
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The similarity of every two layers."""
        ax = axis(ax, 4.2, 3.6)
        image = ax.imshow(self.similarity.numpy(), vmin=0, vmax=1, cmap="viridis")
        ticks = range(len(self.layers))
        ax.set_xticks(ticks, [str(x) for x in self.layers])
        ax.set_yticks(ticks, [str(x) for x in self.layers])
        ax.set(xlabel="layer", ylabel="layer", title=self.provenance.model)
        label = "cosine of attention rows" if self.measure == "cosine" else "1 - JS divergence of attention rows, bits"
        ax.figure.colorbar(image, ax=ax, label=label)
        return ax


def sharing(
    source: Source,
    *,
    measure: str = "cosine",
    size: int | None = None,
    threshold: float = 0.9,
    skip: int = 1,
    raw: bool = False,
) -> Sharing:
    """Similarity of the layers of a run, or of maps, and candidates for sharing.

    ``measure``: ``cosine`` or ``js`` (1 - JS in bits). ``size`` compares block maps instead of rows; ``skip`` layers at both ends
    are no candidates; ``raw`` looks inside of gates. Queries without weight in either layer do not count. Rows are walked in
    chunks of all layers. Raises ``WorkbenchError`` for fewer than two maps, or maps of unequal shape; ``js`` refuses signed maps.
    """
    if measure not in MEASURES:
        raise UnknownName("measure of similarity", measure, MEASURES)
    if not -1 <= threshold <= 1 or skip < 0:
        raise WorkbenchError(f"a similarity is at most 1, skip not negative; got threshold={threshold}, skip={skip}")
    layers = list(aligned_layers(source, raw=raw).values())
    check_alike(layers, "sharing")
    if measure == "js":
        need_distributions(layers, "JS", "ask with measure='cosine'")
    pair = _cosines if measure == "cosine" else _overlaps
    batch, n = layers[0].shape[0], len(layers)
    total, null, count = (torch.zeros(batch, n, n, dtype=torch.float64) for _ in range(3))
    for rows, other in _head_means(layers, size, measure):
        alive = rows.abs().sum(-1) > 0
        both = alive[:, None] & alive[None]
        count += both.sum(-1).permute(2, 0, 1)
        total += pair(rows, rows).masked_fill(~both, 0.0).sum(-1).permute(2, 0, 1)
        null += pair(rows, other).masked_fill(~both, 0.0).sum(-1).permute(2, 0, 1)
    each, chance = total / count, null / count
    low, high = interval(each)
    similarity = each.nanmean(0)
    groups = _groups(similarity, threshold, skip)
    names = tuple(layer.name for layer in layers)
    return Sharing(
        similarity=similarity,
        low=low,
        high=high,
        null=chance.nanmean(0),
        layers=names,
        groups=tuple(tuple(names[i] for i in g) for g in groups),
        threshold=threshold,
        measure=measure,
        provenance=provenance_of(source),
    )


def check_alike(layers: Sequence[Aligned], what: str) -> None:
    """Refuse fewer than two layers and layers of unequal batch, queries or keys."""
    if len(layers) < 2:
        raise WorkbenchError(
            f"{what} compares layers; this run captured {len(layers)}: run with maps=wb.capture(), all layers"
        )
    shapes = {(layer.shape[0], *layer.shape[2:]) for layer in layers}
    if len(shapes) != 1:
        raise WorkbenchError(f"{what} wants layers with maps of one shape; got {sorted(map(list, shapes))}")


def _head_means(layers: Sequence[Aligned], size: int | None, measure: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Head-mean rows of all layers, and what shuffled keys make of them, both ``[L, B, c, K]``, some rows at a time. For cosines
    rows have length 1 and the second is the mean over shuffles (of block maps: one shuffle)."""
    if size is not None:
        blocks = torch.stack([layer.block_sums(size).mean(1) for layer in layers])
        chance = torch.stack([_shuffled_sums(layer, size) for layer in layers])
        yield (blocks, chance) if measure == "js" else (_unit(blocks), _unit(chance))
        return
    batch, _, queries, keys = layers[0].shape
    wide = max(layer.shape[1] for layer in layers) + len(layers) * (3 if measure == "cosine" else len(layers))
    step = max(1, min(queries, CHUNK // max(1, batch * keys * wide)))
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        rows = torch.stack([layer.rows(lo, hi).mean(1) for layer in layers])
        seen = torch.stack([layer.visible(lo, hi).any(1) for layer in layers])
        if measure == "js":
            yield rows, shuffled(rows.transpose(0, 1), seen.transpose(0, 1), lo).transpose(0, 1)
        else:
            yield _unit(rows), even(_unit(rows), seen)


def _shuffled_sums(layer: Aligned, size: int) -> Tensor:
    """Block sums of the shuffled head-mean rows, ``[B, ceil(Q/size), ceil(K/size)]``."""
    b, _, queries, keys = layer.shape
    out = torch.zeros(b, -(-queries // size), -(-keys // size), dtype=torch.float64)
    column = torch.nn.functional.one_hot(torch.arange(keys) // size).double()
    for lo, hi, rows in layer.chunks(copies=3):
        mixed = shuffled(rows.mean(1, keepdim=True), layer.visible(lo, hi).any(1, keepdim=True), lo)
        out.index_add_(1, torch.arange(lo, hi) // size, mixed[:, 0] @ column)
    return out


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300)


def _cosines(one: Tensor, two: Tensor) -> Tensor:
    """Products of rows, ``[L, L, B, c]``."""
    return torch.einsum("lbij,mbij->lmbi", one, two)


def _overlaps(one: Tensor, two: Tensor) -> Tensor:
    """1 - JS of rows, ``[L, L, B, c]``."""
    one, two = (part / part.sum(-1, keepdim=True).clamp(min=1e-300) for part in (one, two))
    mixed = torch.stack([entropy_bits((row[None] + two) / 2) for row in one])
    return (1 - (mixed - (entropy_bits(one)[:, None] + entropy_bits(two)[None]) / 2)).clamp(0, 1)


def _groups(similarity: Tensor, threshold: float, skip: int) -> list[list[int]]:
    groups: list[list[int]] = []
    group: list[int] = []
    for i in range(skip, len(similarity) - skip):
        if group and not float(similarity[group[0], i]) >= threshold:
            groups.append(group)
            group = []
        group.append(i)
    return [g for g in [*groups, group] if len(g) > 1]


@dataclass(frozen=True)
class Replacement(Result):
    """Mean KL divergence in nats of the next-token distribution from the model's own, per layer and source of its pattern:
    another layer's, or its own with the keys of each head shuffled."""

    rows: tuple[tuple[int, int, float, float], ...]
    provenance: Provenance = field(default_factory=lambda: Provenance("model"))

    def frame(self) -> pd.DataFrame:
        """One row per exchange: ``layer, source, kl, shuffled``."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["layer", "source", "kl", "shuffled"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars: what the exchange costs, beside the shuffled control."""
        ax = axis(ax, 4.6, 3.0)
        places = torch.arange(len(self.rows)).double()
        for shift, (name, column) in zip((-0.2, 0.2), (("other layer's", 2), ("shuffled", 3)), strict=True):
            ax.bar((places + shift).tolist(), [row[column] for row in self.rows], 0.4, label=name)
        ax.set_xticks(range(len(self.rows)), [f"{row[1]} in {row[0]}" for row in self.rows])
        ax.set(ylabel="KL from the model, nats")
        ax.legend()
        return ax


def replaced(model: Model, inputs: Any, exchanges: Sequence[tuple[int, int]], *, seed: int = 0) -> Replacement:
    """Exchange patterns: ``exchanges`` are ``(layer, source)``; in each run the layer attends as the source did in the unchanged
    run.

    Needs a model whose pattern can be edited (native softmax mixers, Hugging Face models in eager attention).
    """
    sites = {layer: f"blocks.{layer}.attn.hook_pattern" for pair in exchanges for layer in pair}
    if not exchanges:
        raise WorkbenchError("no exchanges asked for: exchanges=[(layer, source), ...]")
    with torch.no_grad():
        plain = model.run(prompts_of(inputs), read=list(sites.values()))
        assert plain.logits is not None
        wanted = plain.logits.double().log_softmax(-1)
        real = plain.tokens.mask
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for layer, source in exchanges:
            own, other = plain.acts[sites[layer]], plain.acts[sites[source]]
            noise = (
                torch.rand(own.shape, generator=generator).masked_fill((own == 0).cpu(), 2.0).argsort(-1).to(own.device)
            )
            costs = []
            for pattern in (other, own.gather(-1, _within(own, noise))):
                run = model.run(plain.tokens, edit={sites[layer]: pattern})
                assert run.logits is not None
                got = run.logits.double().log_softmax(-1)
                costs.append(float((wanted.exp() * (wanted - got)).sum(-1)[real].mean()))
            rows.append((layer, source, costs[0], costs[1]))
    return Replacement(tuple(rows), plain.provenance)


def _within(own: Tensor, order: Tensor) -> Tensor:
    """A shuffle of the visible keys of every row: the n keys with weight change places, the others stay."""
    seen = own > 0
    place = seen.cumsum(-1) - 1
    return torch.where(seen, order.gather(-1, place.clamp(min=0)), torch.arange(own.shape[-1], device=own.device))


ANALYSES = (
    Analysis(
        name="layer-sharing",
        question="Which layers look alike enough to share one attention map?",
        function=sharing,
        example=lambda: {"source": random_maps(layers=3)},
        paper="EchoAtt 2024 (arXiv 2409.14595), abstract",
        source="maps",
        null="the other layer's visible keys shuffled",
        cause="probes.similarity.sharing.replaced",
        definition="Only the idea of comparing attention matrices was read; row cosine of head means, its mean over queries, "
        "the JS form in bits and the grouping of neighbours are ours.",
    ),
    Analysis(
        name="layer-sharing-replaced",
        question="What does it cost if a layer attends as another one does?",
        function=replaced,
        example=lambda: {"model": bundled(), "inputs": SENTENCE, "exchanges": [(1, 0)]},
        paper="EchoAtt 2024 (arXiv 2409.14595), abstract",
        source="model",
        null="its own pattern with the keys of each row shuffled",
        cause="itself an intervention",
        definition="The published model is trained to share; this exchanges patterns without training.",
    ),
)
