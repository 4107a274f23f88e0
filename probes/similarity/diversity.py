"""How different are the heads of a layer, and the queries of a head?

    heads    mean over real queries and pairs of heads of d(A_h[i], A_g[i])
    queries  mean over heads of the distance between the rows of a head

``cosine``: d = 1 - cos of two rows; between queries the mean over all pairs, which needs only the sum of the rows of length 1:
mean cos = (|sum r|^2 - n) / (n (n - 1)). ``js``: d is the Jensen-Shannon divergence in bits of rows scaled to sum 1; between
queries it is the divergence of all n rows from their mean, H(mean row) - mean H(row), the information in bits that the query
tells about the key. Low numbers among heads are the redundancy that EfficientViT reports; low numbers among queries are
attention that looks at the same keys whoever asks (collapse, sinks).

The null shuffles the visible keys of every row and head: the mean over all shuffles for cosines, one shuffle for JS. A causal map
has some of either distance whatever its heads do, as queries see different keys.

``diversity_loss`` is the penalty that pushes heads apart in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.similarity.aligned import (
    Aligned,
    aligned_layers,
    entropy_bits,
    even,
    need_distributions,
    shuffled,
)
from workbench.probes.sources import Source, provenance_of
from workbench.probes.tables import LayerTable

UNITS = {"cosine": "1 - cosine of rows", "js": "JS divergence of rows, bits"}


def attention_diversity(source: Source, *, measure: str = "js", raw: bool = False) -> LayerTable:
    """``heads`` and ``queries``, mean distances by layer over sequences with 95% intervals, beside shuffled keys.

    ``measure``: ``js`` (bits; refuses signed maps) or ``cosine``. ``raw`` looks inside the gate. Rows without weight do not
    count. NaN for the heads of a layer with one head, and for the queries of a single query. Rows are walked in chunks.
    """
    if measure not in UNITS:
        raise UnknownName("measure of distance", measure, UNITS)
    layers = aligned_layers(source, raw=raw)
    if measure == "js":
        need_distributions(list(layers.values()), "JS", "ask with measure='cosine'")
    answer = _by_cosine if measure == "cosine" else _by_js
    found = {name: answer(layer) for name, layer in layers.items()}
    undefined = {f"{name}, heads": "one head has no others" for name, layer in layers.items() if layer.shape[1] < 2}
    undefined |= {
        f"{name}, queries": "one query has no others"
        for name, layer in layers.items()
        if bool((layer.real_queries.sum(1) < 2).any())
    }
    undefined |= {
        f"{name}, weight": "a sequence has no two rows with weight to compare"
        for name, layer in layers.items()
        if layer.shape[1] > 1 and any(bool(part.isnan().any()) for part in found[name][0])
    }
    names = ("heads", "queries")
    each, null = (
        {name: {layer: part[side][i] for layer, part in found.items()} for i, name in enumerate(names)}
        for side in (0, 1)
    )
    return LayerTable.averaged(
        "Diversity of attention",
        each,
        dict.fromkeys(names, UNITS[measure]),
        null=null,
        undefined=undefined,
        provenance=provenance_of(source),
    )


def diversity_loss(weights: Tensor) -> Tensor:
    """Mean squared cosine between the rows of two heads, over queries and pairs of heads of ``weights`` ``[B, H, Q, K]``: 0 where
    heads look at different keys, 1 where they agree. Differentiable, a scalar; 0 for one head.

    It is the penalty |R R^T - 1|^2 of Lin et al. (arXiv 1703.03130) on rows of length 1, over the number of pairs."""
    if weights.ndim != 4:
        raise WorkbenchError(f"weights are [B, H, Q, K]; got {list(weights.shape)}")
    heads = weights.shape[1]
    rows = torch.nn.functional.normalize(weights, dim=-1).transpose(1, 2)
    products = (rows @ rows.mT).square()
    return (products.sum((-2, -1)) - products.diagonal(dim1=-2, dim2=-1).sum(-1)).mean() / max(1, heads * (heads - 1))


Distances = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Between heads and between queries ``[B]``, and their nulls."""


def _by_cosine(layer: Aligned) -> Distances:
    b, h, _, keys = layer.shape
    pairs, pairs_null, pair_count = (torch.zeros(b, dtype=torch.float64) for _ in range(3))
    total, total_null = (torch.zeros(b, h, keys, dtype=torch.float64) for _ in range(2))
    square_null, count = (torch.zeros(b, h, dtype=torch.float64) for _ in range(2))
    for lo, hi, rows in layer.chunks(copies=2):
        size = rows.norm(dim=-1, keepdim=True)
        rows = rows / size.clamp(min=1e-300)
        spread = even(rows, layer.visible(lo, hi))
        alive = (size[..., 0] > 0).double()
        # Sums over ordered pairs of different heads, from the sum over heads.
        pairs += (rows.sum(1).square().sum(-1) - rows.square().sum((1, -1))).sum(1)
        pairs_null += (spread.sum(1).square().sum(-1) - spread.square().sum((1, -1))).sum(1)
        pair_count += (alive.sum(1).square() - alive.sum(1)).sum(1)
        total += rows.sum(2)
        total_null += spread.sum(2)
        square_null += spread.square().sum((-2, -1))
        count += alive.sum(2)
    ways = count * (count - 1)
    queries, queries_null = (
        _or_nan(1 - (part.square().sum(-1) - own) / ways, ways).nanmean(1)
        for part, own in ((total, count), (total_null, square_null))
    )
    heads, heads_null = (_or_nan(1 - part / pair_count, pair_count) for part in (pairs, pairs_null))
    return (heads, queries), (heads_null, queries_null)


def _by_js(layer: Aligned) -> Distances:
    b, h, _, keys = layer.shape
    one, two = torch.triu_indices(h, h, 1)
    pairs, pairs_null, pair_count = (torch.zeros(b, dtype=torch.float64) for _ in range(3))
    total, total_null = (torch.zeros(b, h, keys, dtype=torch.float64) for _ in range(2))
    entropy, count = (torch.zeros(b, h, dtype=torch.float64) for _ in range(2))
    for lo, hi, rows in layer.chunks(copies=2 + h):
        rows = rows / rows.sum(-1, keepdim=True).clamp(min=1e-300)
        mixed = shuffled(rows, layer.visible(lo, hi), lo)
        own = entropy_bits(rows)
        between = (own[:, one] + own[:, two]) / 2
        known = ~between.isnan()
        pair_count += known.sum((1, 2))
        for part, into in ((rows, pairs), (mixed, pairs_null)):
            into += (entropy_bits((part[:, one] + part[:, two]) / 2) - between).masked_fill(~known, 0.0).sum((1, 2))
        total += rows.sum(2)
        total_null += mixed.sum(2)
        entropy += own.nan_to_num(0.0).sum(2)
        count += (~own.isnan()).sum(2)
    queries, queries_null = (
        _or_nan(entropy_bits(part) - entropy / count, count * (count - 1)).nanmean(1) for part in (total, total_null)
    )
    heads, heads_null = (_or_nan(part / pair_count, pair_count) for part in (pairs, pairs_null))
    return (heads, queries), (heads_null, queries_null)


def _or_nan(values: Tensor, count: Tensor) -> Tensor:
    return values.masked_fill(count == 0, float("nan"))


ANALYSES = (
    Analysis(
        name="attention-diversity",
        question="How different are the heads of a layer, and the queries of a head?",
        function=attention_diversity,
        example=lambda: {"source": random_maps(batch=2, heads=3)},
        paper="EfficientViT 2023 (arXiv 2305.07027), abstract: attention diversity",
        source="maps",
        null="the visible keys of every row and head shuffled",
        definition="The published word has no formula in what was read: pairwise distances of rows are ours.",
    ),
)
