"""How few keys hold most of the attention, and can the model do with them?

The best that any selection of k keys per query can do is to take those with the largest weights: the oracle's recall is
their share of the row,

    recall(k) = mean over queries of (sum of the k largest weights) / (sum of the row).

A selection rule is judged between it and random choice (``selection_curves`` does so for blocks). Recall is mass, not
effect: ``sparsified`` runs the model with every row cut to its k largest keys, and to k random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.ablation import named_metric
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import SENTENCE, bundled, random_maps
from workbench.probes.hidden_keys import without_keys
from workbench.probes.sources import Source, inner, maps_of, need_shares, prompts_of, provenance_of, tokens_of
from workbench.probes.tables import HeadTable
from workbench.probes.visibility import layer_visibility
from workbench.results import Result, axis
from workbench.run import Provenance
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KEYS = (1, 2, 4, 8, 16)


def oracle_recall(source: Source, *, keys: Sequence[int] = KEYS, raw: bool = False) -> HeadTable:
    """Per head the share of the attention that its k largest keys hold, for every k of ``keys``: measures ``top_1``,
    ``top_2`` ...

    Means over real queries with weight, then over sequences, with intervals. The null takes k of the visible keys at
    random. Gated maps count as they act, which changes nothing but rows of weight 0; ``raw=True`` looks inside. Refused
    for signed and channel maps.
    """
    chosen = tuple(keys)
    if not chosen or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in chosen):
        raise WorkbenchError(f"keys are numbers of keys per query, at least 1; got {list(chosen)}")
    each: dict[str, dict[int | str, Tensor]] = {f"top_{k}": {} for k in chosen}
    null: dict[str, dict[int | str, Tensor]] = {f"top_{k}": {} for k in chosen}
    undefined = {}
    for name, amap in maps_of(source).items():
        asked = inner(name, amap, raw)
        need_shares(name, asked, "hold no mass to recall")
        seen = layer_visibility(name, asked, tokens_of(source))
        most = min(max(chosen), asked.shape[3])
        gained = asked.topk(most).values.detach().cpu().double().cumsum(-1)
        total = asked.row_sums().detach().cpu().double()
        counted = (total > 0) & seen.real[:, None]
        if not bool(counted.any(-1).all()):
            undefined[str(name)] = "a head has no query with weight in some sequence"
        visible = seen.keys().clamp(min=1)
        for k in chosen:
            share = torch.where(counted, gained[..., min(k, most) - 1] / total.clamp(min=1e-300), 0.0)
            by_chance = torch.where(counted, (k / visible).clamp(max=1.0).expand_as(share), 0.0)
            each[f"top_{k}"][name] = share.sum(-1) / counted.sum(-1)
            null[f"top_{k}"][name] = by_chance.sum(-1) / counted.sum(-1)
    units = dict.fromkeys(each, "share of the row")
    return HeadTable.averaged(
        "Oracle top-k", each, units, null=null, undefined=undefined, provenance=provenance_of(source)
    )


@dataclass(frozen=True)
class Sparsified(Result):
    """``metric`` of N examples with the k largest (``largest`` ``[K, N]``) or k random visible keys of every row kept
    (``random`` ``[K, R, N]``), and with all (``base`` ``[N]``)."""

    metric: str
    keys: tuple[int, ...]
    largest: Tensor
    random: Tensor
    base: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per number of keys: ``keys, largest, low, high, random, base``."""
        import pandas as pd

        low, high = interval(self.largest.T)
        columns = {"keys": self.keys, "largest": self.largest.mean(1).numpy(), "low": low.numpy(), "high": high.numpy()}
        return pd.DataFrame(columns | {"random": self.random.mean((1, 2)).numpy(), "base": float(self.base.mean())})

    def plot(self, ax: Axes | None = None) -> Axes:
        """The metric over the number of keys."""
        table = self.frame()
        ax = axis(ax, 4.6, 3.2)
        ax.plot(table["keys"], table["largest"], marker="o", label="largest weights")
        ax.plot(table["keys"], table["random"], "--", color="0.5", label="random keys")
        ax.axhline(float(self.base.mean()), color="0.7")
        ax.set_xscale("log", base=2)
        ax.set(xlabel="keys kept per query", ylabel=self.metric, title=self.provenance.model)
        ax.legend()
        return ax


@torch.no_grad()
def sparsified(
    model: Model,
    inputs: Any,
    *,
    keys: Sequence[int] = KEYS,
    metric: str = "kl",
    layers: Sequence[int] | None = None,
    random: int = 3,
    seed: int = 0,
) -> Sparsified:
    """The metric (of ``ablation_curve``) with every row of attention cut to k keys and renormalised.

    Needs a model whose pattern can be edited: native softmax mixers, Hugging Face models in eager attention.
    """
    chosen = tuple(keys)
    if not chosen or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in chosen) or random < 1:
        raise WorkbenchError(f"keys and random are at least 1; got {list(chosen)}, random={random}")
    name, measure = named_metric(metric, inputs)
    tokens = prompts_of(inputs)
    plain = model.run(tokens)
    places = range(model.shape.layers) if layers is None else layers
    generator = torch.Generator().manual_seed(seed)

    def cut(k: int, by_weight: bool) -> Tensor:
        def edit(pattern: Tensor) -> Tensor:
            if k >= pattern.shape[-1]:
                return pattern
            rank = pattern if by_weight else torch.rand(pattern.shape, generator=generator).to(pattern) * (pattern > 0)
            return without_keys(pattern, torch.zeros_like(pattern).scatter_(-1, rank.topk(k, dim=-1).indices, 1.0))

        edits: dict[Site | str, Edit | Tensor] = {Site("pattern", layer): edit for layer in places}
        return measure(model.run(tokens, edit=edits), plain)

    largest = torch.stack([cut(k, True) for k in chosen])
    others = torch.stack([torch.stack([cut(k, False) for _ in range(random)]) for k in chosen])
    return Sparsified(name, chosen, largest, others, measure(plain, plain), plain.provenance)


ANALYSES = (
    Analysis(
        name="oracle-recall",
        question="How few keys hold most of the attention?",
        function=oracle_recall,
        example=lambda: {"source": random_maps()},
        paper="common practice, as in SeerAttention (2024)",
        source="maps",
        null="as many of the visible keys at random",
        cause="workbench.probes.structure.oracle.sparsified",
    ),
    Analysis(
        name="sparsified",
        question="Can the model do with the few largest keys of every row?",
        function=sparsified,
        example=lambda: {"model": bundled(), "inputs": SENTENCE, "keys": (2, 4), "random": 2},
        paper="common practice",
        source="model",
        null="as many random keys",
        cause="is the intervention: all other keys are hidden",
    ),
)
