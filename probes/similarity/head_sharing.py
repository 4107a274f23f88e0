"""Which heads attend as a head of the layer before does?

EchoAtt (arXiv 2409.14595) shares attention matrices head by head: head h of a layer takes over that of head h below. So every
head is compared with the head of its own number in the layer before, and with the nearest one, which may have another number as
heads have no order. The similarity is the cosine of the two flattened maps, sum_ij A_ij B_ij / (|A| |B|); beside it stands its
mean over all shuffles of the other head's visible keys, row by row, which is sum_i <A_i, even B_i> / (|A| |B|).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.similarity.aligned import CHUNK, Aligned, aligned_layers, even
from workbench.probes.similarity.sharing import check_alike
from workbench.probes.sources import Source, provenance_of
from workbench.probes.tables import HeadTable


def head_sharing(source: Source, *, raw: bool = False) -> HeadTable:
    """``same``: cosine with the head of the same number in the layer before; ``nearest``: the largest cosine with any of its
    heads (by the mean over sequences), and ``partner``, which one that is. Means over sequences with 95% intervals; nulls with
    the keys of the earlier layer shuffled.

    Gated maps count as they act, ``raw=True`` looks inside the gate. Signed maps have cosines between -1 and 1. Heads without
    weight, and ``same`` for a head that the earlier layer does not have, are NaN. The first layer has no layer before it and no
    rows. Raises ``WorkbenchError`` for fewer than two maps or maps of unequal shape.
    """
    layers = list(aligned_layers(source, raw=raw).values())
    check_alike(layers, "head_sharing")
    measures = ("same", "nearest", "partner")
    values: dict[str, dict[int | str, Tensor]] = {name: {} for name in measures}
    low: dict[str, dict[int | str, Tensor]] = {name: {} for name in ("same", "nearest")}
    high, null = ({name: dict(part) for name, part in low.items()} for _ in range(2))
    undefined = {}
    for before, layer in pairwise(layers):
        each, chance = cosines(layer, before)
        heads, others = each.shape[1:]
        own = torch.arange(min(heads, others))
        same, same_null = (torch.full((len(each), heads), float("nan"), dtype=torch.float64) for _ in range(2))
        same[:, own], same_null[:, own] = each[:, own, own], chance[:, own, own]
        best = each.nanmean(0).nan_to_num(-2.0).argmax(1)
        pick = best[None, :, None].expand(len(each), -1, 1)
        dead = each.nanmean(0).isnan().all(1)
        for name, part, by_chance in (
            ("same", same, same_null),
            ("nearest", each.gather(2, pick)[..., 0], chance.gather(2, pick)[..., 0]),
        ):
            values[name][layer.name] = part.nanmean(0)
            low[name][layer.name], high[name][layer.name] = interval(part)
            null[name][layer.name] = by_chance.nanmean(0)
        values["partner"][layer.name] = best.double().masked_fill(dead, float("nan"))
        if bool(each.isnan().all(0).any()):
            undefined[str(layer.name)] = "a head without weight resembles nothing"
        if others < heads:
            undefined[f"{layer.name}, same"] = f"the layer before has {others} heads"
    return HeadTable(
        "Resemblance to the layer before",
        values,
        {"same": "cosine of flattened maps", "nearest": "cosine of flattened maps", "partner": "head"},
        low=low,
        high=high,
        null=null,
        undefined=undefined,
        provenance=provenance_of(source),
    )


def cosines(one: Aligned, two: Aligned) -> tuple[Tensor, Tensor]:
    """Cosines of the flattened maps of all heads of one layer with all of another, and their mean over shuffles of the keys of
    the second, both ``[B, H1, H2]``; NaN where a map is zero. Rows are walked once, in chunks of both."""
    b, h, queries, keys = one.shape
    g = two.shape[1]
    inner, chance = (torch.zeros(b, h, g, dtype=torch.float64) for _ in range(2))
    square, other_square = torch.zeros(b, h, dtype=torch.float64), torch.zeros(b, g, dtype=torch.float64)
    step = max(1, min(queries, CHUNK // max(1, b * keys * (h + 2 * g))))
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        rows = one.rows(lo, hi)
        others = rows if two is one else two.rows(lo, hi)
        flat = rows.flatten(2)
        inner += flat @ others.flatten(2).mT
        chance += flat @ even(others, two.visible(lo, hi)).flatten(2).mT
        square += flat.square().sum(-1)
        other_square += others.square().sum((-2, -1))
    size = square.sqrt()[:, :, None] * other_square.sqrt()[:, None]
    return inner / size, (chance / size).masked_fill(size == 0, float("nan"))


ANALYSES = (
    Analysis(
        name="head-sharing",
        question="Which heads attend as a head of the layer before does?",
        function=head_sharing,
        example=lambda: {"source": random_maps(layers=3, batch=2)},
        paper="EchoAtt 2024 (arXiv 2409.14595), abstract",
        source="maps",
        null="the earlier head's visible keys shuffled, mean over all shuffles",
        definition="Cosine of flattened maps, with the same and the nearest head of the layer before, is our reading.",
    ),
)
