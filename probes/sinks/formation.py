"""Which sublayer turns a token into a sink?

Published finding (arXiv 2512.22213): a secondary sink is made by one MLP, whose output at its first block points where the
primary sink points; in front of the MLP the token does not. With d = x_primary / |x_primary| at the output of the block where the
token's level starts:

    cosine_s = cos(s(t), d)         of what a sublayer s of that block writes at the token
    share_s  = s(t) . d / x_t . d   of what a sublayer s of any block up to there has written of the token's component along d

In models whose blocks add (pre-norm) the shares of all sublayers and of the embedding sum to 1; behind the norms of post-norm
blocks they do not, and only the cosines are comparable. The sublayer with the largest share is the writer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.probes.catalogue import Analysis
from workbench.probes.sinks.levels import SinkLevels, block_outputs, cosines, sink_levels
from workbench.probes.sinks.planted import planted_model, planted_texts
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SUBLAYERS = ("attn_out", "mlp_out")
_NAMES = {"attn_out": "attention", "mlp_out": "mlp"}


@dataclass(frozen=True)
class SinkFormation(Result):
    """Of S sinks: ``cosine`` ``[2, S]`` of what attention and MLP of the starting block write with the primary's direction d,
    ``chance`` ``[2, S]`` the mean |cos| of what they write at ordinary tokens of the text. ``share`` ``[2, L, S]`` is the part of
    the sink's component along d that attention and MLP of each block have written, 0 behind the start. ``before`` and ``output``
    ``[S]``: cosine of the token's and the primary's own stream before the MLP of the starting block, and of what that MLP writes
    at both, NaN where it was not read and for the
    primary itself."""

    levels: SinkLevels
    cosine: Tensor
    chance: Tensor
    share: Tensor
    before: Tensor
    output: Tensor
    provenance: Provenance

    @property
    def writers(self) -> tuple[Site, ...]:
        """Of each sink the sublayer that wrote most of its component along the primary direction."""
        flat = self.share.flatten(0, 1).argmax(0).tolist()
        blocks = self.share.shape[1]
        return tuple(Site(SUBLAYERS[i // blocks], i % blocks) for i in flat)

    def frame(self) -> pd.DataFrame:
        """One row per sink: that of ``sink_levels``, then ``mlp_cosine, attention_cosine`` and their chance, ``mlp_share,
        attention_share`` (of the starting block), ``before_cosine, output_cosine``, ``writer`` and its ``writer_share``."""
        table = self.levels.frame()
        start, row = self.levels.start, torch.arange(len(self.levels.start))
        for i, kind in ((1, "mlp"), (0, "attention")):
            table[f"{kind}_cosine"] = self.cosine[i].numpy()
            table[f"{kind}_cosine_null"] = self.chance[i].numpy()
            table[f"{kind}_share"] = self.share[i, start, row].numpy()
        table["before_cosine"], table["output_cosine"] = self.before.numpy(), self.output.numpy()
        table["writer"] = [f"{_NAMES[site.kind]} {site.layer}" for site in self.writers]
        table["writer_share"] = self.share.flatten(0, 1).amax(0).numpy()
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Cosine of the starting block's attention and MLP with the primary direction, a dot per sink; chance as a line."""
        ax = axis(ax, 4.8, 3.2)
        for i, (kind, colour) in enumerate((("attention", "C1"), ("MLP", "C0"))):
            ax.scatter(range(self.cosine.shape[1]), self.cosine[i].numpy(), color=colour, s=18, label=kind)
            ax.axhline(float(self.chance[i].nanmean()), color=colour, linestyle="--", linewidth=1)
        ax.set(
            xlabel="sink",
            ylabel="cosine with the primary direction",
            ylim=(-1.05, 1.05),
            title=f"Who writes the sinks (dashed: ordinary tokens)\n{self.provenance.model}",
        )
        ax.legend()
        return ax


@torch.no_grad()
def sink_formation(run: Run, levels: SinkLevels | None = None) -> SinkFormation:
    """What attention and MLPs contribute to every sink.

    ``run`` has read ``hook_resid_post``, ``hook_attn_out`` and ``hook_mlp_out`` of all layers, and for ``before_cosine``
    ``hook_resid_mid``. ``levels`` are those of ``sink_levels(run)`` unless others are given.
    """
    if not isinstance(run, Run):
        raise WorkbenchError(f"sink_formation reads a Run with what the sublayers write; got {type(run).__name__}")
    streams = block_outputs(run)
    found = sink_levels(run) if levels is None else levels
    blocks, sinks = len(streams.outputs), len(found.start)
    if found.alive.shape != (blocks, *streams.real.shape):
        raise WorkbenchError(f"these levels are of {list(found.alive.shape)} streams; the run has {blocks} blocks")
    cosine, chance = (torch.full((2, sinks), float("nan"), dtype=torch.float64) for _ in range(2))
    share = torch.zeros(2, blocks, sinks, dtype=torch.float64)
    before, output = (torch.full((sinks,), float("nan"), dtype=torch.float64) for _ in range(2))
    plain = streams.real & ~found.alive.any(0)
    column, primary = found.position + streams.first[found.sequence], found.primary + streams.first
    known = set(run.acts)
    written = {layer: [_read(run, Site(kind, layer)) for kind in SUBLAYERS] for layer in range(blocks)}
    for start in found.start.unique().tolist():
        here = (found.start == start).nonzero()[:, 0]
        s, t = found.sequence[here], column[here]
        x = streams.layer(start).double()
        direction = torch.nn.functional.normalize(x[s, primary[s]], dim=-1)
        total = (x[s, t] * direction).sum(-1)
        for i in range(len(SUBLAYERS)):
            for layer in range(start + 1):
                share[i, layer, here] = (written[layer][i][s, t].double() * direction).sum(-1) / total
            every = torch.nn.functional.normalize(written[start][i].double(), dim=-1)[s] @ direction[..., None]
            cosine[i, here] = every[torch.arange(len(here)), t, 0]
            chance[i, here] = every[..., 0].abs().masked_fill(~plain[s], float("nan")).nanmean(1)
        middle = Site("resid_mid", start)
        if middle in known:
            before[here] = cosines(_read(run, middle).double(), primary)[s, t]
        output[here] = cosines(written[start][1].double(), primary)[s, t]
    itself = column == primary[found.sequence]
    before[itself] = output[itself] = float("nan")
    return SinkFormation(found, cosine, chance, share, before, output, streams.provenance)


def _read(run: Run, site: Site) -> Tensor:
    if site not in set(run.acts):
        raise WorkbenchError(
            f"{site} was not read; read hook_resid_post, hook_attn_out and hook_mlp_out of all layers: "
            "model.run(text, read=[f'blocks.{l}.{name}' for l in range(model.shape.layers) for name in (...)])"
        )
    return run.acts[site].detach().cpu()


def _example() -> dict[str, Run]:
    model = planted_model()
    names = ("hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
    reads = [f"blocks.{layer}.{name}" for layer in range(model.shape.layers) for name in names]
    return {"run": model.run(planted_texts(), read=reads, logits=None)}


ANALYSES = (
    Analysis(
        name="sink-formation",
        question="Which sublayer turns a token into a sink?",
        function=sink_formation,
        example=_example,
        paper="On the Existence and Behaviour of Secondary Attention Sinks, 2025 (arXiv 2512.22213)",
        source="run",
        null="|cos| of what the same sublayer writes at ordinary tokens",
        cause="workbench.probes.sinks.removal.sink_removal",
        definition="shares of the component along the primary direction, and the writer as the largest, are ours",
        reads=("blocks.{l}.hook_resid_post", "blocks.{l}.hook_attn_out", "blocks.{l}.hook_mlp_out"),
    ),
)
