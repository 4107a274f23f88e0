"""How is a head's attention spread over distance?

The spectrum of a head is the mean weight that its queries give to the keys d tokens away, for every d; summed over
octaves it shows whether a head reads nearby, far away, or at a fixed place. The receptive field is the smallest
distance within which a given part of the weight lies. The sum over d of the spectrum is the mean row sum, and its mean
distance is the head's span.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sources import Source, inner, maps_of, need_shares, provenance_of, tokens_of
from workbench.probes.tables import HeadTable
from workbench.probes.visibility import Visibility, layer_visibility
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_CHUNK = 2**22
PARTS = (0.5, 0.9)


@dataclass(frozen=True)
class Spectra(Result):
    """``weight`` layer -> ``[B, H, N]``: mean weight over the real queries of a sequence at distance 0 .. N - 1, in
    tokens and in either direction; ``even`` layer -> ``[B, N]`` (or ``[1, N]``): the same for evenly spread
    attention."""

    weight: dict[int | str, Tensor]
    even: dict[int | str, Tensor]
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per layer, head and octave: ``layer, head, near, far, weight, low, high, even``; octaves are 0, 1,
        2-3, 4-7 ... and the interval is over sequences."""
        import pandas as pd

        rows = []
        for layer, weight in self.weight.items():
            even = self.even[layer]
            for near, far in octaves(weight.shape[2]):
                each = weight[..., near : far + 1].sum(-1)
                low, high = interval(each)
                mean, null = each.mean(0), even[:, near : far + 1].sum(-1).mean()
                rows += [
                    (layer, h, near, far, float(mean[h]), float(low[h]), float(high[h]), float(null))
                    for h in range(len(mean))
                ]
        return pd.DataFrame(rows, columns=["layer", "head", "near", "far", "weight", "low", "high", "even"])

    def plot(self, ax: Axes | None = None, layer: int | str | None = None) -> Axes:
        """Weight by octave, one line per head of a layer (the first by default), with even attention dashed."""
        chosen = next(iter(self.weight)) if layer is None else layer
        if chosen not in self.weight:
            raise UnknownName("layer", chosen, self.weight)
        table = self.frame()
        table = table[table["layer"] == chosen]
        ax = axis(ax, 5.0, 3.2)
        for head, rows in table.groupby("head"):
            ax.plot(range(len(rows)), rows["weight"], marker=".", label=str(head))
        first = table[table["head"] == 0]
        ax.plot(range(len(first)), first["even"], "--", color="0.4", label="even")
        names = [str(n) if n == f else f"{n}-{f}" for n, f in zip(first["near"], first["far"], strict=True)]
        ax.set_xticks(range(len(first)), names, rotation=45, ha="right")
        ax.set(xlabel="distance, tokens", ylabel="mean weight", title=f"layer {chosen}\n{self.provenance.model}")
        ax.legend(title="head", fontsize=7, ncols=2)
        return ax


def distance_spectra(source: Source, *, raw: bool = False) -> Spectra:
    """The spectra of all heads.

    Rows are walked in chunks and summed by distance, so that memory grows with the text alone. Padding does not count.
    Gated maps count as they act; ``raw=True`` looks inside the gate. Refused for signed and channel maps.
    """
    weight, even = {}, {}
    for name, amap in maps_of(source).items():
        asked = inner(name, amap, raw)
        need_shares(name, asked, "have no spectrum over distance")
        weight[name], even[name] = _spectrum(asked, layer_visibility(name, asked, tokens_of(source)))
    return Spectra(weight, even, provenance_of(source))


def receptive_fields(source: Source, *, parts: tuple[float, ...] = PARTS, raw: bool = False) -> HeadTable:
    """Per head, and per part p of ``parts``, the smallest distance in tokens within which the part p of its weight
    lies.

    Measures ``within_50``, ``within_90`` ...; the null is even attention's. NaN for a head without weight. Means over
    sequences.
    """
    if not parts or not all(0 < part <= 1 for part in parts):
        raise WorkbenchError(f"parts of the weight lie in (0, 1]; got {parts}")
    spectra = distance_spectra(source, raw=raw)
    names = {part: f"within_{100 * part:g}" for part in parts}
    each: dict[str, dict[int | str, Tensor]] = {name: {} for name in names.values()}
    null: dict[str, dict[int | str, Tensor]] = {name: {} for name in names.values()}
    undefined = {}
    for layer, weight in spectra.weight.items():
        if not bool((weight.sum(-1) > 0).all()):
            undefined[str(layer)] = "a head has no weight in some sequence"
        for part, name in names.items():
            each[name][layer] = _quantile(weight, part)
            null[name][layer] = _quantile(spectra.even[layer], part).nanmean().expand(weight.shape[1])
    units = dict.fromkeys(names.values(), "tokens")
    return HeadTable.averaged(
        "Receptive field", each, units, null=null, undefined=undefined, provenance=spectra.provenance
    )


def octaves(length: int) -> list[tuple[int, int]]:
    """Distances below ``length`` in octaves: (0, 0), (1, 1), (2, 3), (4, 7) ..., both ends included."""
    found = [(0, 0)] if length else []
    near = 1
    while near < length:
        found.append((near, min(2 * near - 1, length - 1)))
        near *= 2
    return found


def _quantile(weight: Tensor, part: float) -> Tensor:
    total = weight.sum(-1, keepdim=True)
    reached = weight.cumsum(-1) >= part * total - 1e-9 * total
    return torch.where(total[..., 0] > 0, reached.int().argmax(-1).double(), float("nan"))


def _spectrum(amap: AttentionMap, seen: Visibility) -> tuple[Tensor, Tensor]:
    b, h, queries, keys = amap.shape
    longest = max(keys, queries + amap.offset)
    weight = torch.zeros(b, h, longest, dtype=torch.float64)
    even = torch.zeros(max(len(seen.real), 1), longest, dtype=torch.float64)
    share = seen.real[:, None, :, None] / seen.keys().clamp(min=1)[..., None]
    step = max(1, min(queries, _CHUNK // (b * h * keys)))
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        far = ((torch.arange(lo, hi)[:, None] + amap.offset) - torch.arange(keys)).abs().flatten()
        rows = amap.rows(lo, hi).detach().cpu().double() * seen.real[:, None, lo:hi, None]
        weight.index_add_(2, far, rows.flatten(2))
        spread = (seen.tile(lo, hi) * share[:, :, lo:hi]).mean(1).flatten(1)
        even = (
            even.expand(max(len(even), len(spread)), -1)
            .clone()
            .index_add_(1, far, spread.expand(max(len(even), len(spread)), -1))
        )
    count = seen.real.sum(1, dtype=torch.float64)
    return weight / count[:, None, None], even / count[:, None]


ANALYSES = (
    Analysis(
        name="distance-spectra",
        question="How is a head's attention spread over distance?",
        function=distance_spectra,
        example=lambda: {"source": random_maps(tokens=20)},
        paper="common practice; octaves are ours",
        source="maps",
        null="evenly spread attention over the visible keys",
    ),
    Analysis(
        name="receptive-fields",
        question="Within which distance does most of a head's attention lie?",
        function=receptive_fields,
        example=lambda: {"source": random_maps(tokens=20)},
        paper="common practice",
        source="maps",
        null="evenly spread attention over the visible keys",
    ),
)
