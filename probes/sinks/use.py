"""Where does a head put its weight at the queries that have nothing to say, and where at the others?

For named groups of queries: the mean weight on the first token, on the query's own token, on all other keys, and the sum of the
row, which tells what a gate, a learned sink or the missing normalisation takes away. With a task that says which queries need the
head (``datasets/trigger.py``), it tells a sink that is used to do nothing from one that is used for something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.padding import padding
from workbench.probes.sources import Source, maps_of, provenance_of
from workbench.probes.visibility import Visibility, visibility
from workbench.results import Result, axis
from workbench.run import Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_CHUNK = 2**22
_TARGETS = ("first", "itself", "rest", "sum")


@dataclass(frozen=True)
class SinkUse(Result):
    """``weight`` map -> layer -> ``[B, H, places, 4]``: mean weight on the first token, on the query itself, on the rest, and the
    sum of the row; NaN for a sequence without such queries. Maps are ``effective`` and, of gated layers, ``raw``. ``uniform``
    layer -> ``[places]``: the first token's weight under evenly spread attention."""

    places: tuple[str, ...]
    weight: Mapping[str, Mapping[int | str, Tensor]]
    uniform: Mapping[int | str, Tensor]
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per map, layer, head and place: ``map, layer, head, place, first`` (with its 95% interval over sequences and
        the null ``first_uniform``), ``itself, rest, sum``."""
        import pandas as pd

        rows = []
        for kind, layers in self.weight.items():
            for layer, weight in layers.items():
                low, high = interval(weight[..., 0])
                mean = weight.nanmean(0)
                for head in range(weight.shape[1]):
                    for i, place in enumerate(self.places):
                        found = dict(zip(_TARGETS, mean[head, i].tolist(), strict=True))
                        ends = {"first_low": float(low[head, i]), "first_high": float(high[head, i])}
                        null = {"first_uniform": float(self.uniform[layer][i])}
                        first = {"first": found.pop("first"), **ends, **null}
                        rows.append({"map": kind, "layer": layer, "head": head, "place": place, **first, **found})
        return pd.DataFrame(rows)

    def mean(self, place: str, target: str = "first", map: str = "effective") -> float:
        """Mean over sequences, heads and layers."""
        if place not in self.places or target not in _TARGETS or map not in self.weight:
            known = "; ".join(", ".join(names) for names in (self.places, _TARGETS, self.weight))
            raise WorkbenchError(f"no {target!r} at {place!r} of the {map!r} map; places, targets and maps: {known}")
        at = self.places.index(place), _TARGETS.index(target)
        return float(torch.stack([w[:, :, at[0], at[1]].nanmean() for w in self.weight[map].values()]).mean())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars: where the weight of each group of queries goes, mean over heads and layers."""
        ax = axis(ax, 5.0, 3.2)
        bars = [(place, kind) for place in self.places for kind in self.weight]
        names = [place if len(self.weight) == 1 else f"{place}\n{kind}" for place, kind in bars]
        base = [0.0] * len(bars)
        for target, label in (("first", "first token"), ("itself", "itself"), ("rest", "other tokens")):
            height = [self.mean(place, target, kind) for place, kind in bars]
            ax.bar(range(len(bars)), height, bottom=base, label=label)
            base = [b + h for b, h in zip(base, height, strict=True)]
        ax.set_xticks(range(len(bars)), names)
        ax.set(ylabel="mean weight", title=f"Where queries look\n{self.provenance.model}")
        ax.legend()
        return ax


def sink_use(source: Source, places: Mapping[str, Tensor] | None = None, *, mask: Mask | None = None) -> SinkUse:
    """Where groups of queries put their weight.

    ``places``: name -> bool ``[B, Q]`` or ``[Q]``, the queries of a group; by default all. Queries of padding, and those that see
    no other key than the first, never count. Weights are as they act, and inside the gate of gated layers beside. Rows are
    walked in chunks. Signed maps and maps whose queries are not among their keys are refused.
    """
    maps = maps_of(source)
    tokens = source.tokens if isinstance(source, Run) else None
    found: dict[str, dict[int | str, Tensor]] = {"effective": {}}
    uniform: dict[int | str, Tensor] = {}
    names: tuple[str, ...] = ()
    for name, amap in maps.items():
        b, _, queries, keys = amap.shape
        if amap.sign == "signed":
            raise Refused(f"layer {name!r}: signed weights do not go anywhere; sinks() tells their absolute shares")
        if amap.domain != "token":
            raise Refused(f"layer {name!r}: rows of a {amap.domain} map are no tokens, so there is no first one")
        if amap.offset + queries > keys or (isinstance(name, str) and name.startswith("cross")):
            raise Refused(f"layer {name!r}: its queries are not among its keys, so none can look at itself")
        groups = {"all": torch.ones(b, queries, dtype=torch.bool)} if places is None else dict(places)
        names = tuple(groups)
        for place, group in groups.items():
            if group.dtype != torch.bool or group.shape not in ((queries,), (b, queries)):
                raise WorkbenchError(
                    f"place {place!r} is bool [B, Q] = {[b, queries]} or [Q]; got {group.dtype} {list(group.shape)}"
                )
        pad = padding(name, amap, tokens)
        seen = visibility(amap, mask=mask, real=pad.queries, keys=pad.keys)
        first = torch.zeros(b, dtype=torch.long) if pad.keys is None else pad.keys.int().argmax(1)
        count = seen.keys().amax(1).expand(b, -1)
        chosen = torch.stack([group.cpu().expand(b, queries) & (count > 1) for group in groups.values()], 1)
        found["effective"][name] = _weights(amap, first, chosen)
        if isinstance(amap, GatedMap):
            found.setdefault("raw", {})[name] = _weights(amap.raw, first, chosen)
        uniform[name] = _even(seen, first, chosen, count)
    return SinkUse(names, found, uniform, provenance_of(source))


def _weights(amap: AttentionMap, first: Tensor, chosen: Tensor) -> Tensor:
    """Means over the ``chosen`` queries ``[B, places, Q]``: ``[B, H, places, 4]`` in float64."""
    b, h, queries, keys = amap.shape
    total = torch.zeros(b, h, chosen.shape[1], 4, dtype=torch.float64)
    step = max(1, _CHUNK // max(1, b * h * keys))
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        rows = amap.rows(lo, hi).detach().cpu().double()
        own = (torch.arange(lo, hi) + amap.offset).view(1, 1, -1, 1).expand(b, h, -1, 1)
        on_first = rows.gather(-1, first.view(b, 1, 1, 1).expand(b, h, hi - lo, 1))[..., 0]
        itself, whole = rows.gather(-1, own)[..., 0], rows.sum(-1)
        parts = torch.stack([on_first, itself, whole - on_first - itself, whole], -1)
        total += torch.einsum("bhqt,bpq->bhpt", parts, chosen[..., lo:hi].double())
    return total / chosen.sum(-1)[:, None, :, None]


def _even(seen: Visibility, first: Tensor, chosen: Tensor, count: Tensor) -> Tensor:
    """Weight of the first token if each query spread 1 over the ``count`` ``[B, Q]`` keys that it sees, ``[places]``."""
    sees = torch.zeros_like(chosen[:, 0])
    for key in first.unique().tolist():
        allowed = seen.mask.tile(slice(0, seen.shape[0]), slice(key, key + 1))
        column = torch.ones(1, seen.shape[0], dtype=torch.bool) if allowed is None else allowed[..., 0].any(1).cpu()
        sees[first == key] = column.expand(len(first), -1)[first == key]
    even = torch.where(sees, 1 / count.clamp(min=1), 0.0)
    return ((even[:, None] * chosen).sum(-1) / chosen.sum(-1)).nanmean(0)


ANALYSES = (
    Analysis(
        name="sink-use",
        question="Do queries that have nothing to say put their weight on the first token?",
        function=sink_use,
        example=lambda: {"source": random_maps(batch=2)},
        paper="trigger-conditional task: arXiv 2603.11487",
        source="maps",
        null="evenly spread attention; an untrained model (train_trigger(steps=0))",
        definition="the groups of queries are the caller's",
    ),
)
