"""Is a token still a sink without what its writer puts out?

The output of the sublayer that wrote most of a sink (``sink_formation``) is taken away at that token alone. Measured are how long
the token is a sink, by the direction of the primary sink in the unchanged run, and how much attention it receives; beside it the
same with another layer's sublayer taken away at the token, and with the writer's at tokens that are no sinks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.catalogue import Analysis
from workbench.probes.sinks.alignment import received_shares
from workbench.probes.sinks.formation import SUBLAYERS, SinkFormation, sink_formation
from workbench.probes.sinks.levels import SinkLevels, Streams, block_outputs, sink_levels
from workbench.probes.sinks.planted import planted_model, planted_texts
from workbench.probes.sources import prompts_of
from workbench.results import Result, axis
from workbench.run import Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

REMOVALS = ("zero", "mean")
_RECEIVED = capture(stats=("received",))


@dataclass(frozen=True)
class SinkRemoval(Result):
    """Of R sinks, ``rows[r]`` of ``formation``: ``lifetime`` and ``score`` ``[4, R]`` with nothing removed, with the writer's
    output removed at the token, with another layer's (mean of ``random`` ones), and with the writer's at another token.

    Lifetime counts block outputs of the primary's layers at which |cos| with the primary sink of the unchanged run passes. Score
    is the attention received, mean over heads, over the blocks that read the token while it is a sink, NaN if none does."""

    formation: SinkFormation
    rows: Tensor
    lifetime: Tensor
    score: Tensor
    removal: str
    random: int

    def frame(self) -> pd.DataFrame:
        """One row per sink: its level, ``removed`` (the writer), then ``lifetime`` and ``score`` with ``_removed`` (the writer at
        this token), ``_other_layer`` and ``_other_token``."""
        table = self.formation.levels.frame().iloc[self.rows.numpy()].reset_index(drop=True)
        writers = self.formation.writers
        table = table.rename(columns={"lifetime": "level"})
        table["removed"] = [str(writers[r]) for r in self.rows.tolist()]
        for name, values in (("lifetime", self.lifetime), ("score", self.score)):
            for i, suffix in enumerate(("", "_removed", "_other_layer", "_other_token")):
                table[name + suffix] = values[i].numpy()
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Lifetime of each sink: as it is, and with the outputs removed."""
        ax = axis(ax, 5.2, 3.2)
        labels = ("nothing removed", "its writer", "other layers", "other tokens")
        for i, label in enumerate(labels):
            places = torch.arange(len(self.rows)) + 0.2 * (i - 1.5)
            ax.bar(places.numpy(), self.lifetime[i].numpy(), width=0.2, label=label)
        ax.set(
            xlabel="sink",
            ylabel="block outputs as a sink",
            title=f"Removed at one token ({self.removal})\n{self.formation.provenance.model}",
        )
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        return ax


@torch.no_grad()
def sink_removal(
    model: Model, inputs: Any, *, removal: str = "zero", random: int = 4, most: int = 8, seed: int = 0, **levels: Any
) -> SinkRemoval:
    """Whether sinks vanish without what their writers put out.

    ``inputs``: what ``model.run`` takes. ``removal``: ``zero``, or ``mean`` (of the sublayer's output over the real tokens of the
    text). ``random``: how many other layers, and how many other tokens, the writer is compared with. ``most``: of how many sinks,
    the longest lived first. ``levels`` are options of ``sink_levels``. One forward pass per removal.
    """
    if removal not in REMOVALS:
        raise UnknownName("removal", removal, REMOVALS)
    if random < 1 or most < 1:
        raise WorkbenchError(f"random and most count removals and sinks, at least 1 each; got {random} and {most}")
    served = set(model.manifest().sites)
    sites = [Site(kind, layer) for layer in range(model.shape.layers) for kind in ("resid_post", *SUBLAYERS)]
    absent = [str(site) for site in sites if str(site) not in served]
    if absent:
        raise WorkbenchError(f"{model.name} has no {absent[0]}, which is read to find the writers of sinks")
    plain = model.run(prompts_of(inputs), read=sites, maps=_RECEIVED, logits=None)
    found = sink_levels(plain, **levels)
    if not len(found.start):
        raise WorkbenchError(f"there is no sink to remove: {'; '.join(found.undefined.values())}")
    formation, streams = sink_formation(plain, found), block_outputs(plain)
    rows = found.lifetime.argsort(descending=True, stable=True)[:most]
    generator = torch.Generator().manual_seed(seed)
    outcome = torch.full((2, 4, len(rows)), float("nan"), dtype=torch.float64)
    for i, row in enumerate(rows.tolist()):
        sink = _Sink.of(found, streams, row)
        writer = formation.writers[row]
        layers = [Site(writer.kind, layer) for layer in range(found.blocks) if layer != writer.layer]
        ordinary = (streams.real[sink.text] & ~found.alive[:, sink.text].any(0)).nonzero()[:, 0].tolist()
        removed = {
            1: [(writer, sink.column)],
            2: [(site, sink.column) for site in _drawn(layers, random, generator)],
            3: [(writer, token) for token in _drawn(ordinary, random, generator)],
        }
        outcome[:, 0, i] = sink.measured(plain)
        for place, pairs in removed.items():
            runs = [_run_without(model, inputs, streams, sink.text, *pair, removal) for pair in pairs]
            if runs:
                outcome[:, place, i] = torch.stack([sink.measured(run) for run in runs]).mean(0)
    return SinkRemoval(formation, rows, outcome[0], outcome[1], removal, random)


@dataclass(frozen=True)
class _Sink:
    """One sink: its text, its column in the batch and its position in the text, the layers ``span`` of the primary, the primary's
    stream at these ``[layers, D]``, and the blocks ``readers`` that read the token while it is a sink."""

    text: int
    column: int
    position: int
    span: range
    reference: Tensor
    readers: tuple[int, ...]
    threshold: float

    @classmethod
    def of(cls, levels: SinkLevels, streams: Streams, row: int) -> _Sink:
        text = int(levels.sequence[row])
        first = int(streams.first[text])
        column, primary = int(levels.position[row]) + first, int(levels.primary[text]) + first
        span = range(*levels.span[text].tolist())
        reference = torch.stack([streams.layer(i)[text, primary] for i in span])
        readers = tuple(i + 1 for i in levels.alive[:, text, column].nonzero()[:, 0].tolist())
        return cls(text, column, column - first, span, reference, readers, levels.threshold)

    def measured(self, run: Run) -> Tensor:
        """Lifetime and mean score in a run, ``[2]``."""
        after = block_outputs(run)
        x = torch.stack([after.layer(i)[self.text, self.column] for i in self.span])
        lifetime = (torch.cosine_similarity(x, self.reference, dim=-1).abs() > self.threshold).sum().double()
        maps = [(i, amap) for i, amap in run.maps.items() if i in self.readers]
        scores = [received_shares(i, amap, run.tokens)[0][self.text, self.position] for i, amap in maps]
        return torch.stack([lifetime, torch.stack(scores).mean() if scores else torch.tensor(float("nan")).double()])


def _run_without(model: Model, inputs: Any, streams: Streams, text: int, site: Site, column: int, removal: str) -> Run:
    def edit(output: Tensor) -> Tensor:
        new = output.clone()
        real = streams.real[text].to(output.device)
        new[text, column] = 0 if removal == "zero" else output[text][real].mean(0)
        return new

    edits: Mapping[Site | str, Edit | Tensor] = {site: edit}
    reads = [Site("resid_post", layer) for layer in range(len(streams.outputs))]
    return model.run(prompts_of(inputs), read=reads, edit=edits, maps=_RECEIVED, logits=None)


def _drawn(pool: list[Any], count: int, generator: torch.Generator) -> list[Any]:
    return [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist()]


ANALYSES = (
    Analysis(
        name="sink-removal",
        question="Is a token still a sink without what its writer puts out?",
        function=sink_removal,
        example=lambda: {"model": planted_model(), "inputs": planted_texts(), "random": 2},
        paper="On the Existence and Behaviour of Secondary Attention Sinks, 2025 (arXiv 2512.22213)",
        source="model",
        null="the same sublayer taken away at other tokens, and those of other layers at the same token",
        cause="it is an intervention: outputs edited at one token",
        definition="the intervention is ours; the paper reports where sinks are written",
    ),
)
