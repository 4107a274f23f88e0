"""Which tokens does attention keep coming back to, and what would be lost without the others?

SpAtten's rule (arXiv 2012.09852): the importance of a token is the attention it has received from all queries of all heads,
summed over the layers so far; each layer keeps a share of the tokens that are left, by importance, and dropped ones never
come back. The simulation runs over captured maps: it says which tokens survive and what share of each layer's attention went
to survivors. That is mass, not the model's loss. Importance by received mass always keeps attention sinks, which receive much
and say little: a token is flagged if it is the first, or receives more than half of all attention of some head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import Refused, WorkbenchError
from workbench.results import Result, axis
from workbench.run import Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class TokenImportance(Result):
    """``importance`` ``[L, K]``: mass received up to each layer, from all heads and queries; ``survives`` ``[L, K]``: whether
    the token is still there after the layer; ``recall`` ``[L]``: the share of the layer's attention that goes to tokens that
    were there before it; ``heads`` layer -> ``[H]``: mean absolute output of each head, where the run read ``z``; ``sink``
    ``[K]``."""

    importance: Tensor
    survives: Tensor
    recall: Tensor
    sink: Tensor
    layers: tuple[int | str, ...]
    tokens: tuple[str, ...]
    heads: Mapping[int | str, Tensor] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per layer and token: ``layer, position, token, importance, survives, sink, recall``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": layer, "position": j, "token": self.tokens[j] if self.tokens else "",
                "importance": float(self.importance[i, j]), "survives": bool(self.survives[i, j]),
                "sink": bool(self.sink[j]), "recall": float(self.recall[i]),
            }
            for i, layer in enumerate(self.layers)
            for j in range(self.importance.shape[1])
        )  # fmt: skip

    def plot(self, ax: Axes | None = None) -> Axes:
        """Importance by layer and token, on a logarithmic scale; what is dropped is empty."""
        ax = axis(ax, 1.5 + 0.2 * self.importance.shape[1], 1.4 + 0.35 * len(self.layers))
        shown = self.importance.clamp(min=1e-6).log10().masked_fill(~self.survives, float("nan"))
        image = ax.imshow(shown.numpy(), aspect="auto", cmap="magma", interpolation="nearest")
        ax.set_yticks(range(len(self.layers)), [str(x) for x in self.layers])
        ax.set(xlabel="token", ylabel="layer")
        ax.figure.colorbar(image, ax=ax, label="log10 of mass received so far")
        return ax


def token_importance(run: Run, *, keep: float = 1.0) -> TokenImportance:
    """Importance and cascade pruning over the layers of a run of one sequence.

    After every layer the ``keep`` best of the tokens that are left survive, rounded up; queries that are dropped stop voting.
    Refused for batches, padding, signed and channel maps. Maps are walked by rows: nothing of size Q x K is held.
    """
    if not 0 < keep <= 1:
        raise WorkbenchError(f"keep is a share of the tokens, in (0, 1]; got {keep}")
    if not run.maps:
        raise WorkbenchError("this run captured no attention; run it again with maps=wb.capture()")
    layers = tuple(run.maps)
    keys = {run.maps[layer].shape[2:] for layer in layers}
    first = run.maps[layers[0]]
    n = first.shape[3]
    if first.shape[0] != 1 or (run.tokens.ids.shape[1] and not bool(run.tokens.mask.all())):
        raise Refused(f"importance is that of one sequence without padding; this run has a batch of {first.shape[0]}")
    if len(keys) != 1 or first.shape[2] != n:
        raise Refused(f"pruning cascades over one set of tokens; maps are {sorted(map(list, keys))}")
    alive = torch.ones(n, dtype=torch.bool)
    total = torch.zeros(n, dtype=torch.float64)
    sink = torch.zeros(n, dtype=torch.bool)
    sink[0] = True
    importance, survives, recall = [], [], []
    for layer in layers:
        amap = run.maps[layer]
        if amap.sign == "signed" or amap.domain in ("channel", "frequency"):
            raise Refused(f"layer {layer!r}: tokens receive no mass in a {amap.sign} {amap.domain} map")
        kept = amap.mass(alive.to(torch.float64))[0].double().cpu()
        recall.append(float(kept[:, alive].sum() / amap.row_sums()[0].double().cpu()[:, alive].sum().clamp(min=1e-300)))
        voters = alive.double()[None, None, :, None].expand(1, amap.shape[1], -1, 1)
        received = _columns(amap, voters)
        sink |= (received / voters.sum() * amap.shape[1] > 0.5).any(0)
        total = total + received.sum(0) * alive
        importance.append(total.clone())
        count = math.ceil(int(alive.sum()) * keep - 1e-9)
        order = total.masked_fill(~alive, -1.0).argsort(descending=True, stable=True)[:count]
        alive = torch.zeros_like(alive).index_fill(0, order, True)
        survives.append(alive.clone())
    heads = {
        layer: run.acts[f"blocks.{layer}.attn.hook_z"][0].double().abs().mean((0, 2)).cpu()
        for layer in layers
        if f"blocks.{layer}.attn.hook_z" in {str(site) for site in run.acts}
    }
    labels = run.tokens.labels[0] if run.tokens.labels else ()
    numbers = torch.stack(importance), torch.stack(survives), torch.tensor(recall, dtype=torch.float64), sink
    return TokenImportance(*numbers, layers, labels, heads, run.provenance)


def _columns(amap: AttentionMap, voters: Tensor) -> Tensor:
    """Mass each key receives from the voting queries, ``[H, K]``."""
    total: Tensor | None = None
    for lo, hi, rows in amap._chunks():
        part = (rows.double() * voters[:, :, lo:hi].to(rows.device)).sum(2)[0].cpu()
        total = part if total is None else total + part
    assert total is not None
    return total
