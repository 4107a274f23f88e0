"""How many directions does an attention map mix, and do its rows collapse into one?

From the singular values s of a map of Q real queries and K real keys:

    effective rank = exp(-sum p ln p), p = s / sum s        (Roy & Vetterli 2007)
    rank95, rank99 = how many of the largest singular values make 95% and 99% of their sum
    residual       = |A - 1 x^T| / |A|,  x = the mean row   (Frobenius norms; 0: all rows are equal)

A collapsed map sends every query the same mixture (Dong et al., arXiv 2103.03404); iLLaMA (arXiv 2404.06773) reads the rank of
causal and full maps by their singular values. The residual and the Frobenius norm need one walk over the rows. Singular values
need the matrix: up to ``EXACT`` tokens. Longer maps have their block maps (``size``), or bounds from their largest singular
values (``rank``): with s_1 .. s_r and the Frobenius norm known, what is left has the energy T = |A|^2 - sum s_i^2. Packed into as
few values as s_r allows it makes the spectrum that majorises the true one, spread evenly over all N - r it is majorised by it, so
effective ranks and rank95, rank99 of the two enclose the true ones. The s_i come from block power iteration with products of the
map (Halko et al. 2011), which finds them from below.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.similarity.aligned import Aligned, aligned, aligned_layers, even
from workbench.probes.sources import Source, one_map, provenance_of
from workbench.probes.tables import HeadTable

EXACT = 2048
"""The shorter side of a map whose singular values are computed exactly."""
EXTRA = 8
"""Directions beyond those asked for in block power iteration, so that the last ones converge."""
_UNITS = {
    "effective_rank": "directions",
    "rank95": "singular values",
    "rank99": "singular values",
    "residual": "share of the map's norm",
}


def effective_rank(amap: AttentionMap, *, size: int | None = None) -> Tensor:
    """exp of the entropy of the normalised singular values of every head, ``[B, H]``: N for the identity, 1 for equal rows.

    ``size``: of the map of block sums instead, whose rank is at most the number of blocks. NaN for a map without weight. Padding
    that the map's own mask names does not count. Refuses maps of more than 2,048 queries and keys: see ``rank_bounds``.
    """
    layer = aligned("", one_map(amap), None)
    return _measures(_spectrum(layer, size))["effective_rank"]


def rank_bounds(amap: AttentionMap, rank: int = 64, *, iterations: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The least and the most effective rank, ``[B, H]`` each, that the ``rank`` largest singular values and the norm of a map
    leave possible. Takes ``iterations`` + 1 products with the map and with its adjoint, at any length."""
    least, most = _bounding_spectra(aligned("", one_map(amap), None), rank, iterations, seed)
    return _measures(least)["effective_rank"], _measures(most)["effective_rank"]


def rank_collapse(
    source: Source, *, size: int | None = None, rank: int | None = None, raw: bool = False, seed: int = 0
) -> HeadTable:
    """``effective_rank``, ``rank95``, ``rank99`` and ``residual`` of every head, means over sequences with 95% intervals.

    The null is even attention over what each query may see: what the mask alone makes of rank. ``size``: of maps of block sums.
    ``rank``: bounds from so many largest singular values, the upper bound under the measure's own name and the lower one as
    ``<measure>_least``; the residual stays exact. ``raw`` looks inside the gate. Signed maps have singular values too. Maps
    without weight are NaN. Refuses maps of more than 2,048 queries and keys if neither is given.
    """
    if size is not None and rank is not None:
        raise WorkbenchError("size takes block maps, rank bounds the whole ones: give one of them")
    layers = aligned_layers(source, raw=raw)
    parts: dict[str, dict[int | str, Tensor]] = {}
    null: dict[str, dict[int | str, Tensor]] = {}
    undefined = {}
    for name, layer in layers.items():
        if rank is None:
            found = _measures(_spectrum(layer, size))
            chance = _even_measures(layer, size)
        else:
            least, most = _bounding_spectra(layer, rank, 4, seed)
            found = _measures(most) | {f"{key}_least": part for key, part in _measures(least).items()}
            chance = {}
        found["residual"], chance["residual"] = _residuals(layer, size)
        for key, part in found.items():
            parts.setdefault(key, {})[name] = part
        for key, part in chance.items():
            null.setdefault(key, {})[name] = part.expand(layer.shape[:2])
        if bool(found["residual"].isnan().any()):
            undefined[str(name)] = "a map without weight has no rank"
    return HeadTable.averaged(
        "Rank of attention maps",
        parts,
        {key: _UNITS[key.removesuffix("_least")] for key in parts},
        null=null,
        undefined=undefined,
        provenance=provenance_of(source),
    )


def spectrum_measures(values: Tensor) -> dict[str, Tensor]:
    """``effective_rank rank95 rank99`` of singular values ``[..., N]``, in any order; NaN where all are zero."""
    return _measures(values.sort(-1, descending=True).values)


def _measures(spectrum: Tensor) -> dict[str, Tensor]:
    total = spectrum.sum(-1, keepdim=True)
    share = spectrum / total.clamp(min=1e-300)
    empty = total[..., 0] <= 0
    # Singular values that rounding leaves behind must not be needed to reach 100 of 100 equal ones.
    within = share.cumsum(-1) < torch.tensor([0.95, 0.99], dtype=share.dtype).view(2, *[1] * share.ndim) - 1e-9
    found = {
        "effective_rank": torch.special.entr(share).sum(-1).exp(),
        "rank95": within[0].sum(-1).double() + 1,
        "rank99": within[1].sum(-1).double() + 1,
    }
    return {name: part.masked_fill(empty, float("nan")) for name, part in found.items()}


def _spectrum(layer: Aligned, size: int | None) -> Tensor:
    """Singular values in descending order, ``[B, H, min(Q, K)]``; zeros for padding."""
    b, h, queries, keys = layer.shape
    if size is not None:
        return torch.linalg.svdvals(layer.block_sums(size))
    if min(queries, keys) > EXACT:
        raise Refused(
            f"exact singular values of {queries} x {keys} tokens are over the limit of {EXACT}: take rank_bounds(map) or "
            "rank_collapse(..., rank=64) for bounds, or size= for block maps"
        )
    whole = torch.cat([rows for _, _, rows in layer.chunks()], 2) if b * h * queries * keys <= 2**27 else None
    if whole is not None:
        return torch.linalg.svdvals(whole)
    # One head at a time, so that no more than one matrix is held.
    found = torch.zeros(b, h, min(queries, keys), dtype=torch.float64)
    for head in range(h):
        one = _one_head(layer, head)
        for sequence in range(b):
            matrix = torch.cat([rows[sequence, 0] for _, _, rows in one.chunks()])
            found[sequence, head] = torch.linalg.svdvals(matrix)
    return found


def _one_head(layer: Aligned, head: int) -> Aligned:
    """The layer with one head's rows; who may see whom stays that of all heads."""
    return replace(layer, amap=layer.amap.heads([head]))


def _bounding_spectra(layer: Aligned, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """The spectra that majorise the true one and that it majorises, ``[B, H, N]``."""
    b, h, queries, keys = layer.shape
    if rank < 1 or iterations < 0:
        raise WorkbenchError(f"rank is at least 1, iterations not negative; got rank={rank}, iterations={iterations}")
    if layer.amap.channelwise:
        raise Refused(f"layer {layer.name!r}: products with {layer.amap!r} use each channel's own weights; take size=")
    length = torch.minimum(layer.real_queries.sum(1), layer.real_keys.sum(1))[:, None, None]
    top = _largest(layer, min(rank, queries, keys), iterations, seed)
    known = top.shape[-1]
    energy = torch.zeros(b, h, dtype=torch.float64)
    for _, _, rows in layer.chunks():
        energy += rows.square().sum((-2, -1))
    width = min(queries, keys)
    place = torch.arange(width)
    head = torch.nn.functional.pad(top, (0, width - known)) * (place < length)
    # Energy below rounding is none: a map of lower rank than was asked for is known completely.
    left = (energy - top.square().sum(-1)).clamp(min=0)[..., None]
    left = torch.where(left > 1e-12 * energy[..., None], left, 0.0)
    tail = (place >= known) & (place < length)
    evenly = (left / tail.sum(-1, keepdim=True).clamp(min=1)).sqrt()
    last = top[..., -1:].square().clamp(min=1e-300)
    packed = (left - (place - known) * last).clamp(min=0).minimum(last).sqrt()
    return torch.where(tail, packed, head), torch.where(tail, evenly.minimum(last.sqrt()), head)


def _largest(layer: Aligned, rank: int, iterations: int, seed: int) -> Tensor:
    """The largest singular values by block power iteration, ``[B, H, rank]``, at most the true ones."""
    b, h = layer.amap.shape[:2]
    each = layer.amap.heads(list(range(h)))  # a value head per head: every head has vectors of its own
    queries, keys = _original(layer)
    width = min(rank + EXTRA, layer.shape[2], layer.shape[3])
    start = torch.randn(1, h, keys.shape[1], width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    at = (torch.arange(keys.shape[1]) - layer.key_start[:, None]) % keys.shape[1]
    vectors = start.expand(b, -1, -1, -1).gather(2, at[:, None, :, None].expand(b, h, -1, width))

    def product(v: Tensor) -> Tensor:
        return each.matvec((v * keys[:, None, :, None]).to(_device(layer))).cpu() * queries[:, None, :, None]

    def adjoint(y: Tensor) -> Tensor:
        return each.rmatvec((y * queries[:, None, :, None]).to(_device(layer))).cpu() * keys[:, None, :, None]

    basis = torch.linalg.qr(product(vectors)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(product(torch.linalg.qr(adjoint(basis)).Q)).Q
    return torch.linalg.svdvals(adjoint(basis))[..., :rank]


def _device(layer: Aligned) -> torch.device:
    return layer.amap.rows(0, 1).device


def _original(layer: Aligned) -> tuple[Tensor, Tensor]:
    """Real queries and keys at their own places, ``[B, Q]`` and ``[B, K]``."""
    found = []
    for real, start, width in (
        (layer.real_queries, layer.query_start, layer.amap.shape[2]),
        (layer.real_keys, layer.key_start, layer.amap.shape[3]),
    ):
        at = torch.arange(width) - start[:, None]
        inside = (at >= 0) & (at < real.shape[1])
        found.append(inside & real.gather(1, at.clamp(0, real.shape[1] - 1)))
    return found[0], found[1]


def _residuals(layer: Aligned, size: int | None) -> tuple[Tensor, Tensor]:
    """The residual of the map and of even attention, ``[B, H]``."""
    count = layer.real_queries.sum(1, keepdim=True).double()
    if size is not None:
        count = (count / size).ceil()
        own, even = (
            _distance(part.square().sum((-2, -1)), part.sum(2), count)
            for part in (layer.block_sums(size), _even_sums(layer, size))
        )
        return own, even
    b, h, _, keys = layer.shape
    energy, even_energy = (torch.zeros(b, h, dtype=torch.float64) for _ in range(2))
    total, even_total = (torch.zeros(b, h, keys, dtype=torch.float64) for _ in range(2))
    for lo, hi, rows in layer.chunks(copies=2):
        by_chance = _even(layer, rows, layer.visible(lo, hi))
        energy += rows.square().sum((-2, -1))
        total += rows.sum(2)
        even_energy += by_chance.square().sum((-2, -1))
        even_total += by_chance.sum(2)
    return _distance(energy, total, count), _distance(even_energy, even_total, count)


def _distance(energy: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """|A - 1 x^T| / |A| from |A|^2 ``[B, H]``, the sum of its rows and their number: |A|^2 = |A - 1 x^T|^2 + n |x|^2."""
    left = (energy - total.square().sum(-1) / count.clamp(min=1)).clamp(min=0)
    return (left / energy).sqrt()


def _even(layer: Aligned, rows: Tensor, seen: Tensor) -> Tensor:
    """Rows of even attention with the weight that the rows have, so a gate or a sink counts; with weight 1 in signed maps, whose
    sums say nothing."""
    if layer.amap.sign == "signed":
        return (seen / seen.sum(-1, keepdim=True, dtype=torch.float64).clamp(min=1)).expand(rows.shape)
    return even(rows, seen)


def _even_sums(layer: Aligned, size: int) -> Tensor:
    """Block sums of even attention, ``[B, H, ceil(Q/size), ceil(K/size)]``."""
    b, h, queries, keys = layer.shape
    out = torch.zeros(b, h, -(-queries // size), -(-keys // size), dtype=torch.float64)
    column = torch.nn.functional.one_hot(torch.arange(keys) // size).double()
    for lo, hi, rows in layer.chunks(copies=2):
        out.index_add_(2, torch.arange(lo, hi) // size, _even(layer, rows, layer.visible(lo, hi)) @ column)
    return out


def _even_measures(layer: Aligned, size: int | None) -> dict[str, Tensor]:
    if size is not None:
        return _measures(torch.linalg.svdvals(_even_sums(layer, size)))
    if layer.amap.row_sum != "1":
        parts = []
        for head in range(layer.shape[1]):
            one, chunks = _one_head(layer, head), []
            for lo, hi, rows in one.chunks(copies=2):
                seen = layer.visible(lo, hi)
                chunks.append(_even(one, rows, seen if seen.shape[1] == 1 else seen[:, head : head + 1])[:, 0])
            whole = torch.cat(chunks, 1)
            parts.append(torch.linalg.svdvals(whole))
        return _measures(torch.stack(parts, 1))
    seen = layer.visible(0, layer.shape[2])  # rows of sum 1: heads differ only if the mask does
    return _measures(torch.linalg.svdvals(seen / seen.sum(-1, keepdim=True, dtype=torch.float64).clamp(min=1)))


ANALYSES = (
    Analysis(
        name="effective-rank",
        question="How many directions does an attention map mix?",
        function=effective_rank,
        example=lambda: {"amap": random_maps(layers=1, batch=2)[0]},
        paper="Roy & Vetterli 2007, effective rank; iLLaMA 2024 (arXiv 2404.06773), abstract",
        source="maps",
        null="1 for equal rows, the number of tokens for the identity; even attention in rank-collapse",
        definition="iLLaMA reads ranks of maps by their singular values; the exponential of their entropy is our choice.",
    ),
    Analysis(
        name="rank-collapse",
        question="Do the rows of attention maps collapse into few directions?",
        function=rank_collapse,
        example=lambda: {"source": random_maps(batch=2)},
        paper="iLLaMA 2024 (arXiv 2404.06773), abstract; Dong et al. 2021 (arXiv 2103.03404), residual",
        source="maps",
        null="even attention over what each query may see",
        definition="Shares are of the sum of singular values; the residual is in Frobenius norm, from the mean row.",
    ),
)
