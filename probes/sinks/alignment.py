"""Do tokens that point where the primary sink points get attention, more of it the longer they are, and at its expense?

Block l attends to what block l - 1 has put out. So for every block from 1 on, and every token, stand beside each other: the
cosine of its incoming stream with that of the primary sink, the L2 norm of that stream, and its sink score in block l, the
attention it receives from the queries that may see it, averaged over these and over heads (arXiv 2512.22213: the norm determines
the score; the primary sink weakens where secondary ones are alive).

Tokens late in a causal text are seen by few queries and get larger shares for that alone. Tokens that fewer than half as many
queries see as the best-seen one are left out, and beside the rank correlation of norm and score stands that of earliness and
score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.sinks.levels import SinkLevels, Streams, block_outputs, cosines, sink_levels
from workbench.probes.sinks.planted import planted_run
from workbench.probes.sinks.shares import columns
from workbench.probes.sources import maps_of
from workbench.probes.tables import LayerTable, TokenTable
from workbench.results import Result, axis
from workbench.run import Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_UNITS = {
    "alignment": "mean |cos| of the sinks with the primary",
    "norm_score": "rank correlation of norm and score",
    "sink_score": "attention received by a secondary sink",
    "token_score": "attention received by an ordinary token",
    "primary_score": "attention received by the primary sink",
    "primary_norm": "norm of the primary sink",
    "token_norm": "median norm of an ordinary token",
    "alive": "secondary sinks per text",
}


@dataclass(frozen=True)
class SinkAlignment(Result):
    """``table``: per block the measures of ``frame``. ``tokens``: per block and token ``norm``, ``score`` and ``cosine``, what a
    scatter plot of norm against received attention is made of. ``levels`` are the sinks that were meant. ``per_layer``
    ``[2, L, B]``: of each text, the primary sink's score and the number of other sinks alive."""

    table: LayerTable
    tokens: TokenTable
    levels: SinkLevels
    per_layer: Tensor

    def frame(self) -> pd.DataFrame:
        """One row per block: ``layer``, then

        - ``alignment`` of the sinks with the primary; null: of ordinary tokens;
        - ``norm_score``: Spearman correlation of norm and score over tokens but the primary; null: of earliness and score;
        - ``sink_score`` of the sinks but the primary, ``token_score`` of ordinary tokens, ``primary_score``;
        - ``primary_norm``, ``token_norm`` (median), and ``alive``, the number of sinks but the primary.

        Means over texts, with intervals over texts; a token is a sink here if it is one at the output of the block before."""
        return self.table.frame()

    def weakening(self) -> pd.DataFrame:
        """One row per text: Spearman correlation over blocks, within the life of the primary sink, of its score with the number
        of others alive (``rho, p, layers``). Negative: it weakens where others live. NaN where one of both never changes."""
        import pandas as pd
        from scipy.stats import spearmanr

        rows = []
        score, alive = self.per_layer
        for s in range(score.shape[1]):
            known = score[:, s].isfinite() & alive[:, s].isfinite()
            a, b = score[known, s], alive[known, s]
            able = len(a) > 2 and len(a.unique()) > 1 and len(b.unique()) > 1
            rho, p = spearmanr(a.numpy(), b.numpy()) if able else (float("nan"), float("nan"))
            rows.append({"sequence": s, "rho": float(rho), "p": float(p), "layers": len(a)})
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Attention received over the norm, a dot per token and block, coloured by |cos| with the primary sink."""
        ax = axis(ax, 5.2, 3.6)
        norm, score, cosine = (self.tokens.values[name].flatten().numpy() for name in ("norm", "score", "cosine"))
        dots = ax.scatter(norm, score, c=abs(cosine), s=14, cmap="viridis", vmin=0, vmax=1)
        ax.figure.colorbar(dots, ax=ax, label="|cos| with the primary sink")
        ax.set(
            xlabel="L2 norm of the stream that the block reads",
            ylabel="attention received, mean over heads",
            title=f"Norm and received attention\n{self.table.provenance.model}",
            xscale="log",
        )
        return ax


@torch.no_grad()
def sink_alignment(run: Run, levels: SinkLevels | None = None, *, raw: bool = False) -> SinkAlignment:
    """Norm, direction and received attention of every token, block by block.

    ``run`` has read ``hook_resid_post`` of all layers and captured maps (``wb.capture(stats=("received",))`` is enough).
    ``levels`` are those of ``sink_levels(run)`` unless others are given. Gated maps count as they act, ``raw=True`` looks inside
    the gate. Shares of maps with negative weights are of absolute weights; maps over channels are refused. Tokens count from the
    first real one of each text.
    """
    if not isinstance(run, Run):
        raise WorkbenchError(f"sink_alignment reads a Run with maps and block outputs; got {type(run).__name__}")
    streams = block_outputs(run)
    found = sink_levels(run) if levels is None else levels
    if found.alive.shape != (len(streams.outputs), *streams.real.shape):
        raise WorkbenchError(
            f"these levels are of {list(found.alive.shape)} streams; the run has {len(streams.outputs)} blocks"
        )
    layers = [layer for layer in maps_of(run) if isinstance(layer, int) and 0 < layer < len(streams.outputs)]
    if not layers:
        raise WorkbenchError("no map of a block from 1 on was captured: what block 0 reads is no block's output")
    rows = [_layer(layer, run.maps[layer], run.tokens, streams, found, raw) for layer in layers]
    return _tables(rows, layers, streams, found)


def received_shares(name: int, amap: AttentionMap, tokens: Tokens, *, raw: bool = False) -> tuple[Tensor, Tensor]:
    """Share of the attention that each token receives, mean over heads, ``[B, K]`` from the first real token on, NaN behind the
    last; and whether it is seen by half as many queries as the best-seen token."""
    found = columns(name, amap, tokens, raw=raw)
    count = found.queries.nan_to_num(0.0).mean(1)
    return found.share.mean(1), (count > 0) & (count >= count.amax(1, keepdim=True) / 2)


def _layer(
    layer: int, amap: AttentionMap, tokens: Tokens, streams: Streams, levels: SinkLevels, raw: bool
) -> dict[str, Tensor]:
    """Numbers of one block, per text ``[B]`` or per token ``[B, T]``."""
    score, seen = received_shares(layer, amap, tokens, raw=raw)
    if score.shape != streams.real.shape:
        raise WorkbenchError(
            f"the map of layer {layer} has {score.shape[1]} keys, its stream {streams.real.shape[1]} tokens: run the text whole"
        )
    x = streams.layer(layer - 1)
    primary, batch = levels.primary, torch.arange(len(levels.primary))
    norm = streams.align(x.norm(dim=-1).double())
    cosine = streams.align(cosines(x, primary + streams.first).double())
    alive = streams.align(levels.alive[layer - 1])
    primary_lives = alive[batch, primary].clone()
    alive[batch, primary] = False
    plain = norm.isfinite() & ~alive
    plain[batch, primary] = False
    usable = seen & norm.isfinite()
    usable[batch, primary] = False
    found = {
        "norm": norm,
        "score": score,
        "cosine": cosine,
        "alignment": _mean(cosine.abs(), alive),
        "alignment_null": _mean(cosine.abs(), plain),
        "sink_score": _mean(score, alive & seen),
        "token_score": _mean(score, plain & seen),
        "primary_score": score[batch, primary],
        "primary_norm": norm[batch, primary],
        "token_norm": norm.masked_fill(~plain, float("nan")).nanmedian(1).values,
        "alive": alive.sum(1).double(),
        "norm_score": _correlations(norm, score, usable),
        "norm_score_null": _correlations(-torch.arange(score.shape[1]).double().expand_as(score), score, usable),
    }
    found["lives"] = torch.where(primary_lives, found["primary_score"], float("nan"))
    return found


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return values.masked_fill(~chosen, float("nan")).nanmean(1)


def _correlations(a: Tensor, b: Tensor, chosen: Tensor) -> Tensor:
    """Spearman correlation of each text, ``[B]``; NaN for fewer than three tokens or a quantity that does not vary."""
    from scipy.stats import spearmanr

    found = torch.full((len(a),), float("nan"), dtype=torch.float64)
    for s in range(len(a)):
        x, y = a[s][chosen[s]], b[s][chosen[s]]
        if len(x) > 2 and len(x.unique()) > 1 and len(y.unique()) > 1:
            found[s] = float(spearmanr(x.numpy(), y.numpy())[0])
    return found


def _tables(rows: list[dict[str, Tensor]], layers: list[int], streams: Streams, levels: SinkLevels) -> SinkAlignment:
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    spread = {name: interval(stacked[name].T) for name in _UNITS}
    reasons = {
        "alignment": "no other sink is alive at any block",
        "sink_score": "no other sink is alive at any block that enough queries see",
        "norm_score": "fewer than three tokens, or norms or scores that do not vary",
    }
    table = LayerTable(
        title="Alignment with the primary sink",
        layers=tuple(layers),
        values={name: stacked[name].nanmean(1) for name in _UNITS},
        units=_UNITS,
        low={name: low for name, (low, _) in spread.items()},
        high={name: high for name, (_, high) in spread.items()},
        null={name: stacked[f"{name}_null"].nanmean(1) for name in ("alignment", "norm_score")},
        undefined={name: why for name, why in reasons.items() if bool(stacked[name].isnan().all())},
        provenance=streams.provenance,
    )
    tokens = TokenTable(
        title="Norm, direction and received attention",
        values={name: stacked[name] for name in ("score", "norm", "cosine")},
        units={"score": "attention received", "norm": "L2 norm", "cosine": "cosine with the primary sink"},
        tokens=tuple(row[first:] for row, first in zip(streams.labels, streams.first.tolist(), strict=False)),
        layers=tuple(layers),
        provenance=streams.provenance,
    )
    return SinkAlignment(table, tokens, levels, torch.stack([stacked["lives"], stacked["alive"]]))


ANALYSES = (
    Analysis(
        name="sink-alignment",
        question="Do norm and direction of a token decide how much attention it receives?",
        function=sink_alignment,
        example=lambda: {"run": planted_run()},
        paper="On the Existence and Behaviour of Secondary Attention Sinks, 2025 (arXiv 2512.22213)",
        source="run",
        null="alignment of ordinary tokens; the rank correlation of earliness with received attention",
        cause="workbench.probes.sinks.removal.sink_removal",
        definition="scores of block l stand beside the stream that block l reads, the output of block l - 1",
        reads=("blocks.{l}.hook_resid_post",),
    ),
)
