"""Which layers look alike enough to share one attention map?

Two layers are compared by the cosine of their head-mean attention rows, averaged over the queries (EchoAtt, arXiv
2409.14595). Long texts are compared by block maps: rows are then means over the queries of a block. Candidates are runs of
neighbouring layers of which each resembles the run's first; the first and the last layers are left alone, as they resemble
nothing or matter too much.

Resemblance is not proof. ``replaced`` runs the model with a layer's pattern exchanged for another's and says how far the output
moves, beside the same with each head's keys shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.models.protocol import Model
from workbench.results import Result, axis
from workbench.run import Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Sharing(Result):
    """``similarity`` ``[L, L]``, cosines; ``groups``: candidate runs of layers, the first of each keeps its map."""

    similarity: Tensor
    layers: tuple[int | str, ...]
    groups: tuple[tuple[int | str, ...], ...]
    threshold: float
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per pair of layers: ``layer, other, similarity, shared`` (whether one may take the other's map)."""
        import pandas as pd

        together = {(a, b) for group in self.groups for a in group for b in group}
        return pd.DataFrame(
            {"layer": a, "other": b, "similarity": float(self.similarity[i, j]), "shared": (a, b) in together}
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
        ax.set(xlabel="layer", ylabel="layer")
        ax.figure.colorbar(image, ax=ax, label="cosine of attention rows")
        return ax


def sharing(run: Run, *, size: int | None = None, threshold: float = 0.9, skip: int = 1) -> Sharing:
    """Similarity of the layers of a run and candidates for sharing.

    ``size`` compares block maps instead of rows; ``skip`` layers at both ends are no candidates. Raises ``WorkbenchError``
    for a run with fewer than two maps, or with maps of unequal shape.
    """
    names = tuple(run.maps)
    if len(names) < 2:
        raise WorkbenchError(f"sharing compares layers; this run captured {len(names)}: run with maps=wb.capture()")
    if not -1 <= threshold <= 1 or skip < 0:
        raise WorkbenchError(f"a cosine is between -1 and 1, skip not negative; got threshold={threshold}, skip={skip}")
    shapes = {run.maps[name].shape[2:] for name in names}
    if len(shapes) != 1:
        raise WorkbenchError(f"layers with maps of one shape; got {sorted(map(list, shapes))}")
    rows = []
    for name in names:
        amap = run.maps[name]
        table = amap.dense() if size is None else amap.blocks(size, "sum")
        mean = table.double().mean(1)
        rows.append(mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-300))
    stacked = torch.stack(rows)
    similarity = torch.einsum("lbij,mbij->lm", stacked, stacked) / (stacked.shape[1] * stacked.shape[2])
    groups: list[list[int]] = []
    group: list[int] = []
    for i in range(skip, len(names) - skip):
        if group and float(similarity[group[0], i]) < threshold:
            groups.append(group)
            group = []
        group.append(i)
    groups = [g for g in [*groups, group] if len(g) > 1]
    return Sharing(similarity, names, tuple(tuple(names[i] for i in g) for g in groups), threshold, run.provenance)


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


def replaced(model: Model, tokens: Any, pairs: Sequence[tuple[int, int]], *, seed: int = 0) -> Replacement:
    """Exchange patterns: ``pairs`` are ``(layer, source)``; in each run the layer attends as the source did in the unchanged
    run.

    Needs a model whose pattern can be edited (native softmax mixers, Hugging Face models in eager attention).
    """
    sites = {layer: f"blocks.{layer}.attn.hook_pattern" for pair in pairs for layer in pair}
    if not pairs:
        raise WorkbenchError("no exchanges asked for: pairs=[(layer, source), ...]")
    with torch.no_grad():
        plain = model.run(tokens, read=list(sites.values()))
        assert plain.logits is not None
        wanted = plain.logits.double().log_softmax(-1)
        real = plain.tokens.mask
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for layer, source in pairs:
            own, other = plain.acts[sites[layer]], plain.acts[sites[source]]
            noise = (
                torch.rand(own.shape, generator=generator).masked_fill((own == 0).cpu(), 2.0).argsort(-1).to(own.device)
            )
            costs = []
            for pattern in (other, own.gather(-1, _within(own, noise))):
                run = model.run(tokens, edit={sites[layer]: pattern})
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
