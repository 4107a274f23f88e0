"""Does the gate close when a head looks at the sink, and how much do learned sinks take?

A gated head may put its weight on the first token and write nothing of it, or keep its gate for other things. With a_i the weight
that query i gives the first token inside the gate and g_i its gate, both over the queries that have a choice (they see more than
the first token):

    raw             mean a_i                      effective        mean g_i a_i
    gate_at_sink    sum g_i a_i / sum a_i         gate_elsewhere   sum g_i (1 - a_i) / sum (1 - a_i)
    correlation     Pearson correlation of g_i and a_i

If the gate knew nothing of the sink (shuffled over the queries), ``effective`` would be mean g_i times mean a_i and both
conditional gates the mean gate; what a correlation reaches by chance is the 95% quantile of its absolute value over shuffled
gates.

A learned sink is a logit z in the denominator that has no key (gpt-oss; softmax plus one has z = 0). It takes exp(z) / (exp(z) +
sum_j exp(s_ij)), one minus the sum of the row, of each query's weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled_run
from workbench.probes.padding import padding
from workbench.probes.sources import Source, maps_of, provenance_of
from workbench.probes.tables import HeadTable
from workbench.probes.visibility import Visibility, visibility
from workbench.run import Run

_MEASURES = {
    "correlation": "correlation of gate and weight on the first token",
    "raw": "mean weight on the first token, inside the gate",
    "effective": "mean weight on the first token, gated",
    "gate": "mean gate",
    "gate_at_sink": "mean gate where the head looks at the first token",
    "gate_elsewhere": "mean gate where the head looks elsewhere",
}
_LEARNED = {"share": "part of a query's weight that the learned sink takes", "logit": "logit of the learned sink"}


def gates(source: Source, *, draws: int = 200, seed: int = 0, mask: Mask | None = None) -> HeadTable:
    """Per head of the gated layers: ``correlation, raw, effective, gate, gate_at_sink, gate_elsewhere``, means over sequences
    with 95% intervals, and their nulls (see the top of this module; ``draws`` shuffled gates).

    A gate per channel counts as its mean over channels. Layers without a gate are left out and named in ``undefined``; a
    correlation is NaN where the gate or the weight does not vary. Only the column of the first token is read. Refuses sources
    without gated layers and signed attention inside a gate.
    """
    if draws < 20:
        raise WorkbenchError(f"draws is how many shuffled gates give the null, at least 20; got {draws}")
    maps = maps_of(source)
    tokens = source.tokens if isinstance(source, Run) else None
    means: dict[str, dict[int | str, Tensor]] = {name: {} for name in _MEASURES}
    nulls: dict[str, dict[int | str, Tensor]] = {name: {} for name in _MEASURES if name not in ("raw", "gate")}
    undefined: dict[str, str] = {}
    for name, amap in maps.items():
        if not isinstance(amap, GatedMap):
            undefined[f"layer {name}"] = f"{amap!r} does not know a gate"
            continue
        if amap.sign == "signed":
            raise Refused(
                f"layer {name!r}: weights or gates of a signed map are no parts of a whole, so no gate can close on them"
            )
        pad = padding(name, amap, tokens)
        seen = visibility(amap, mask=mask, real=pad.queries, keys=pad.keys)
        first = torch.zeros(pad.batch, dtype=torch.long) if pad.keys is None else pad.keys.int().argmax(1)
        found, by_chance = _layer(amap, *_column(amap.raw, first, seen), draws, seed)
        for measure in means:
            means[measure][name] = found[measure]
        for measure in nulls:
            nulls[measure][name] = by_chance[measure]
    if not means["raw"]:
        raise Refused(
            "no layer of this source is gated; gates(run) wants maps of a gated model, e.g. wb.load('tiny-gated'), "
            "captured with keep=True"
        )
    ends = {m: {n: interval(v) for n, v in layers.items()} for m, layers in means.items()}
    return HeadTable(
        title="Gate and sink",
        values={m: {n: v.nanmean(0) for n, v in layers.items()} for m, layers in means.items()},
        units=_MEASURES,
        low={m: {n: e[0] for n, e in layers.items()} for m, layers in ends.items()},
        high={m: {n: e[1] for n, e in layers.items()} for m, layers in ends.items()},
        null=nulls,
        undefined=undefined,
        provenance=provenance_of(source),
    )


def _layer(
    amap: GatedMap, weight: Tensor, on: Tensor, draws: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measures per sequence ``[B, H]`` and their nulls ``[H]``. ``on`` ``[B, H, Q]``: the queries that count."""
    gate = amap.gate.detach().cpu().double()
    count = on.sum(-1)
    g, a = (part.masked_fill(~on, 0.0) for part in (gate, weight))
    rest = (1 - a).clamp(min=0).masked_fill(~on, 0.0)
    mean_g, mean_a = g.sum(-1) / count, a.sum(-1) / count
    found = {
        "correlation": _correlation(g, a, on),
        "raw": mean_a,
        "effective": (g * a).sum(-1) / count,
        "gate": mean_g,
        "gate_at_sink": (g * a).sum(-1) / _some(a.sum(-1)),
        "gate_elsewhere": (g * rest).sum(-1) / _some(rest.sum(-1)),
    }
    generator = torch.Generator().manual_seed(seed)
    place = (~on).int().sort(dim=-1, stable=True).indices
    chance = []
    for _ in range(draws):
        # Random keys put the queries that count in a random order; the others stay at the end.
        order = torch.rand(*on.shape[::2], generator=generator)[:, None].expand_as(g).masked_fill(~on, 2.0).argsort(-1)
        shuffled = torch.empty_like(g).scatter_(-1, place, g.gather(-1, order))
        chance.append(_correlation(shuffled, a, on).nanmean(0).abs())
    nulls = {
        "correlation": torch.stack(chance).nanquantile(0.95, dim=0),
        "effective": (mean_g * mean_a).nanmean(0),
        "gate_at_sink": mean_g.nanmean(0),
        "gate_elsewhere": mean_g.nanmean(0),
    }
    return found, nulls


def learned_sinks(source: Source, *, mask: Mask | None = None) -> HeadTable:
    """Per head of the layers with a sink logit: ``share`` of a real query's weight that the sink takes, mean over queries and
    sequences with a 95% interval, and the ``logit``.

    The null is what a sink with this logit takes of scores that are all 0. Maps that only know that their rows sum to less than
    1 (of a batch with padding, say) have the share and neither logit nor null. A layer in which the rows sum to 1 has no sink
    and is named in ``undefined``; refused if that is true of all.
    """
    maps = maps_of(source)
    tokens = source.tokens if isinstance(source, Run) else None
    values: dict[str, dict[int | str, Tensor]] = {name: {} for name in _LEARNED}
    low: dict[int | str, Tensor] = {}
    high: dict[int | str, Tensor] = {}
    null: dict[int | str, Tensor] = {}
    undefined: dict[str, str] = {}
    for name, amap in maps.items():
        inner = amap.raw if isinstance(amap, GatedMap) else amap
        logit = getattr(getattr(inner, "scores", None), "sink", None)
        if logit is None and inner.row_sum != "<=1":
            undefined[f"layer {name}"] = f"rows sum to {inner.row_sum!r}: no weight is left for a sink"
            continue
        pad = padding(name, inner, tokens)
        seen = visibility(inner, mask=mask, real=pad.queries, keys=pad.keys)
        visible = seen.keys().expand(inner.shape[0], inner.shape[1], -1)
        real = visible > 0
        taken = _taken(inner, logit).masked_fill(~real, 0.0)
        each = taken.sum(-1) / real.sum(-1)
        low[name], high[name] = interval(each)
        values["share"][name] = each.nanmean(0)
        nothing = torch.full((inner.shape[1],), float("nan"), dtype=torch.float64)
        values["logit"][name] = nothing if logit is None else logit.detach().cpu().double()
        if logit is None:
            undefined[f"logit, layer {name}"] = "the map does not know its sink logits; run texts without padding"
            null[name] = nothing
        else:
            weight = values["logit"][name].exp()[None, :, None]
            even = (weight / (weight + visible)).masked_fill(~real, 0.0)
            null[name] = (even.sum(-1) / real.sum(-1)).nanmean(0)
    if not values["share"]:
        raise Refused("no layer of this source has a learned sink: the rows of all of them sum to 1 or to anything")
    return HeadTable(
        title="Learned sinks",
        values=values,
        units=_LEARNED,
        low={"share": low},
        high={"share": high},
        null={"share": null},
        undefined=undefined,
        provenance=provenance_of(source),
    )


def _taken(amap: AttentionMap, logit: Tensor | None) -> Tensor:
    """The sink's weight in each row, ``[B, H, Q]``; from the denominators alone where the map has them."""
    lse = getattr(amap, "lse", None)
    if logit is not None and isinstance(lse, Tensor):
        return (logit.detach().cpu().double()[None, :, None] - lse.detach().cpu().double()).exp()
    return (1 - amap.row_sums().detach().cpu().double()).clamp(min=0)


def _column(amap: AttentionMap, first: Tensor, seen: Visibility) -> tuple[Tensor, Tensor]:
    """Weight of every query on the first real key of its sequence, ``[B, H, Q]`` in float64, and the real queries that see that
    key and another one."""
    weight = torch.empty(amap.shape[:3], dtype=torch.float64)
    choosing = torch.empty(amap.shape[:3], dtype=torch.bool)
    everywhere = slice(0, amap.shape[2])
    for key in first.unique().tolist():
        rows = first == key
        weight[rows] = amap.tile(everywhere, slice(key, key + 1))[..., 0].detach().cpu().double()[rows]
        allowed = seen.mask.tile(everywhere, slice(key, key + 1))
        sees = torch.ones(1, 1, 1, 1, dtype=torch.bool) if allowed is None else allowed.cpu()
        choosing[rows] = sees[..., 0].expand(amap.shape[:3])[rows]
    return weight, choosing & (seen.keys() > 1)


def _some(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, float("nan"))


def _correlation(x: Tensor, y: Tensor, on: Tensor) -> Tensor:
    """Pearson correlation over the last axis where ``on``, NaN where one does not vary."""
    count = on.sum(-1, keepdim=True)
    x, y = ((part - part.sum(-1, keepdim=True) / count).masked_fill(~on, 0.0) for part in (x, y))
    spread = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return (x * y).sum(-1) / spread.masked_fill(spread < 1e-12, float("nan"))


ANALYSES = (
    Analysis(
        name="gates",
        question="Does the gate close when a head looks at the sink?",
        function=gates,
        example=lambda: {"source": bundled_run("tiny-gated"), "draws": 50},
        paper="Qiu et al. 2025 (arXiv 2505.06708)",
        source="run",
        null="the gate shuffled over the queries",
        definition="the conditional gates and the correlation are ours",
    ),
    Analysis(
        name="learned-sinks",
        question="How much of a query's weight does a learned sink take?",
        function=learned_sinks,
        example=lambda: {"source": [_with_sinks()]},
        paper="gpt-oss model card (2025); Miller 2023, Attention Is Off By One",
        source="run",
        null="the same logit against scores of 0",
    ),
)


def _with_sinks() -> AttentionMap:
    from workbench.patterns.softmax import SoftmaxMap

    q, k = (torch.randn(2, 3, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    return SoftmaxMap(q, k, mask=Mask(causal=True), sink=torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64))
