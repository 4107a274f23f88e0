"""Do attention maps stay the same from step to step?

Steps are two runs of one model on inputs of one shape, as in denoising (``map_stability``: per head

    change = |A' - A| / |A|,   cosine = <A, A'> / (|A| |A'|)      over the flattened maps),

or the rows of one map, each of which is a step of decoding (``row_stability``: the cosine of every two neighbouring rows).
FlashBlock (arXiv 2602.05305) builds on stability of what attention brings from outside of a block; that of outputs is in
``steps.py``.

The null shuffles the visible keys of the later map, mean over all shuffles: the cosine is then sum_i <A_i, even A'_i> / (|A|
|A'|), and the change sqrt(|A|^2 + |A'|^2 - 2 sum_i <A_i, even A'_i>) / |A|, the root of the mean square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.similarity.aligned import CHUNK, Aligned, aligned_layers, even
from workbench.probes.sources import Source, provenance_of
from workbench.probes.tables import HeadTable


def map_stability(before: Source, after: Source, *, raw: bool = False) -> HeadTable:
    """``cosine`` and ``change`` of every head's map from one step to the next, means over sequences with 95% intervals.

    Both have the same layers with maps of the same shape, and the same padding. ``raw`` looks inside the gate; signed maps are
    compared as they are. Heads without weight before are NaN, and their cosine if they have none after. Rows of both are walked
    in chunks.
    """
    parts: dict[str, dict[int | str, Tensor]] = {"cosine": {}, "change": {}}
    null: dict[str, dict[int | str, Tensor]] = {"cosine": {}, "change": {}}
    undefined = {}
    for name, (one, two) in both_steps(before, after, raw=raw).items():
        b, h, queries, keys = one.shape
        inner, chance, square, other = (torch.zeros(b, h, dtype=torch.float64) for _ in range(4))
        apart = torch.zeros(b, h, dtype=torch.float64)
        step = max(1, min(queries, CHUNK // max(1, 4 * b * h * keys)))
        for lo in range(0, queries, step):
            hi = min(queries, lo + step)
            rows, later = one.rows(lo, hi), two.rows(lo, hi)
            inner += (rows * later).sum((-2, -1))
            chance += (rows * even(later, two.visible(lo, hi))).sum((-2, -1))
            square += rows.square().sum((-2, -1))
            other += later.square().sum((-2, -1))
            apart += (later - rows).square().sum((-2, -1))
        size = (square * other).sqrt()
        empty = square == 0
        parts["cosine"][name] = (inner / size).masked_fill(size == 0, float("nan"))
        parts["change"][name] = (apart / square).sqrt().masked_fill(empty, float("nan"))
        null["cosine"][name] = (chance / size).masked_fill(size == 0, float("nan"))
        mixed = ((square + other - 2 * chance).clamp(min=0) / square).sqrt()
        null["change"][name] = mixed.masked_fill(empty, float("nan"))
        if bool(empty.any()):
            undefined[str(name)] = "a head without weight has nothing to change from"
    units = {"cosine": "cosine of flattened maps", "change": "change over the norm before"}
    return HeadTable.averaged(
        "Stability of maps between steps",
        parts,
        units,
        null=null,
        undefined=undefined,
        provenance=provenance_of(before),
    )


def row_stability(source: Source, *, raw: bool = False) -> HeadTable:
    """``cosine`` of every two neighbouring rows of a head, mean over real queries and sequences with 95% intervals: how little
    attention moves from one decoding step to the next.

    Keys are compared by their positions: a head that keeps its distance to the query changes in every step. Rows without weight
    do not count. NaN with fewer than two queries.
    """
    parts: dict[int | str, Tensor] = {}
    null: dict[int | str, Tensor] = {}
    undefined = {}
    for name, layer in aligned_layers(source, raw=raw).items():
        b, h, _, keys = layer.shape
        total, chance, count = (torch.zeros(b, h, dtype=torch.float64) for _ in range(3))
        last = torch.zeros(b, h, 1, keys, dtype=torch.float64)
        for lo, hi, rows in layer.chunks(copies=3):
            size = rows.norm(dim=-1, keepdim=True)
            rows = rows / size.clamp(min=1e-300)
            earlier = torch.cat([last, rows[:, :, :-1]], 2)
            both = (size[..., 0] > 0) & (earlier.abs().sum(-1) > 0)
            total += (earlier * rows).sum(-1).masked_fill(~both, 0.0).sum(2)
            chance += (earlier * even(rows, layer.visible(lo, hi))).sum(-1).masked_fill(~both, 0.0).sum(2)
            count += both.sum(2)
            last = rows[:, :, -1:]
        parts[name] = total / count
        null[name] = chance / count
        if bool((count == 0).any()):
            undefined[str(name)] = "fewer than two queries with weight are no steps"
    units = {"cosine": "cosine of neighbouring rows"}
    return HeadTable.averaged(
        "Stability from query to query", {"cosine": parts}, units, null={"cosine": null}, undefined=undefined,
        provenance=provenance_of(source),
    )  # fmt: skip


def both_steps(before: Source, after: Source, *, raw: bool = False) -> dict[int | str, tuple[Aligned, Aligned]]:
    """The layers of two steps side by side; refuses steps of other layers, shapes or padding."""
    one, two = (aligned_layers(source, raw=raw) for source in (before, after))
    if list(one) != list(two):
        raise WorkbenchError(f"two steps of the same layers; got {list(one)} and {list(two)}")
    for name, layer in one.items():
        other = two[name]
        if layer.amap.shape != other.amap.shape:
            raise WorkbenchError(
                f"layer {name!r}: two steps with maps of one shape; got {list(layer.amap.shape)} and "
                f"{list(other.amap.shape)}"
            )
        same = torch.equal(layer.query_start, other.query_start) and torch.equal(layer.key_start, other.key_start)
        alike = layer.shape == other.shape and torch.equal(layer.real_queries, other.real_queries)
        if not (same and alike and torch.equal(layer.real_keys, other.real_keys)):
            raise WorkbenchError(f"layer {name!r}: two steps with the same padding; got different real tokens")
    return {name: (layer, two[name]) for name, layer in one.items()}


ANALYSES = (
    Analysis(
        name="map-stability",
        question="Do attention maps stay the same from one step to the next?",
        function=map_stability,
        example=lambda: {"before": random_maps(batch=2), "after": random_maps(batch=2, seed=5)},
        paper="FlashBlock 2026, abstract: redundancy of attention across steps",
        source="maps",
        null="the visible keys of the later map shuffled, mean over all shuffles",
        cause="probes.similarity.steps.reuse_external",
        definition="FlashBlock looks at outputs; norms and cosines of the maps themselves are ours.",
    ),
    Analysis(
        name="row-stability",
        question="Does attention move from one decoding step to the next?",
        function=row_stability,
        example=lambda: {"source": random_maps(batch=2)},
        paper="FlashBlock 2026, abstract: redundancy of attention across steps",
        source="maps",
        null="the visible keys of the later row shuffled, mean over all shuffles",
        definition="Rows as decoding steps are our reading; the paper's steps are those of diffusion.",
    ),
)
