"""In which areas does a convolutional network have its answer, beyond single pixels?

Salient Relevance (abstract of "Beyond saliency", Li et al. 2017) turns the map of layer-wise relevance propagation into one of
areas by context-aware saliency (Goferman et al. 2012): what is unlike everything else stands out, and so does what is near it.
With p_i the patch around pixel i of the positive relevances, divided by their largest,

    d(i, j) = |p_i - p_j| / (1 + c |x_i - x_j|),     S_i = 1 - exp(-mean of d over the patches j most like i),

|p_i - p_j| per pixel of a patch, |x_i - x_j| in parts of the map's longer side. S is taken at several sizes of the map, with
patches j of the same size, of half and of a quarter of it, and averaged; the mean is divided by its largest value, and
multiplied by 1 - (distance to the next pixel above ``focus``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, unfold

from workbench.errors import Refused, WorkbenchError
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.structure.conv_relevance import PixelMaps, relevance_map, templates
from workbench.probes.tables import LayerTable

_LIMIT = 2**24


@dataclass(frozen=True)
class SalientMaps(PixelMaps):
    """``maps`` ``[N, H, W]`` between 0 and 1; ``relevance`` ``[N, H, W]`` is what they were made of, ``relevance_null`` that of
    the network with permuted weights, and ``null`` its salient map."""

    relevance: Tensor = field(default_factory=lambda: torch.empty(0))
    relevance_null: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def salient_relevance(
    cnn: nn.Sequential,
    images: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    *,
    patch: int = 7,
    scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3),
    share: float = 0.05,
    near: float = 3.0,
    focus: float = 0.8,
    size: int = 64,
    **options: Any,
) -> SalientMaps:
    """The salient map of every image's relevance map.

    ``options`` go to ``relevance_map`` (``rule`` and its numbers), the others to ``context_saliency``.
    """
    found = relevance_map(cnn, images, target, **options)
    maps, null = (
        context_saliency(x, patch=patch, scales=scales, share=share, near=near, focus=focus, size=size)
        for x in (found.maps, found.null)
    )
    return SalientMaps(
        f"Salient {found.title[0].lower()}{found.title[1:]}",
        "saliency",
        maps,
        null,
        found.target,
        found.logit,
        found.conserved,
        found.provenance,
        relevance=found.maps,
        relevance_null=found.null,
    )


@torch.no_grad()
def context_saliency(
    maps: Tensor,
    *,
    patch: int = 7,
    scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3),
    share: float = 0.05,
    near: float = 3.0,
    focus: float = 0.8,
    size: int = 64,
) -> Tensor:
    """Context-aware saliency of the positive part of ``maps`` ``[N, H, W]``, between 0 and 1; 0 where a map is flat.

    ``patch``: side of the patches, odd. ``scales``: sizes of the map as parts of it, those too small for a patch left out.
    ``share``: the part of the patches that counts as most alike, Goferman's 64 for maps of about 1,300 patches. ``near``: c.
    ``focus``: what is above this part of the largest saliency draws in what is near it. ``size``: larger maps are made
    smaller first, to this many pixels on their longer side.
    """
    if maps.ndim != 3 or not maps.is_floating_point() or not maps.numel():
        raise WorkbenchError(f"maps are floating point [N, H, W]; got {maps.dtype} {list(maps.shape)}")
    if patch < 1 or patch % 2 == 0 or not 0 < share <= 1 or not 0 < focus < 1 or not near >= 0 or size < patch:
        raise WorkbenchError(
            "patch is odd, share between 0 and 1, focus inside of 0 to 1, near at least 0, size at least patch; got "
            f"{patch}, {share}, {focus}, {near}, {size}"
        )
    if not scales or not all(0 < scale <= 1 for scale in scales):
        raise WorkbenchError(f"scales are parts of the map, above 0 and up to 1; got {list(scales)}")
    height, width = maps.shape[1:]
    bad = maps.isnan().flatten(1).any(1)
    if bool(bad.any()):
        raise Refused(f"maps {bad.nonzero()[:, 0].tolist()} hold NaN")
    positive = maps.double().clamp(min=0)
    positive = positive / positive.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    longer = max(height, width)
    start = positive[:, None] if longer <= size else _resized(positive[:, None], size / longer)
    found = []
    for scale in scales:
        this = _resized(start, scale)
        if min(this.shape[2:]) < patch:
            continue
        others = [
            x for x in (this, _resized(start, scale / 2), _resized(start, scale / 4)) if min(x.shape[2:]) >= patch
        ]
        saliency = _unlike(this, others, patch, share, near)
        found.append(interpolate(saliency, (height, width), mode="bilinear", align_corners=False)[:, 0])
    if not found:
        raise Refused(
            f"maps of {height} x {width} pixels are too small for patches of {patch} x {patch}; give a smaller patch="
        )
    mean = torch.stack(found).mean(0)
    top = mean.amax((1, 2), keepdim=True)
    # What is left of a flat map is rounding.
    flat = (top < 1e-9) | (positive.amax((1, 2), keepdim=True) == 0)
    mean = torch.where(flat, 0.0, mean / torch.where(flat, 1.0, top))
    return mean * (1 - _to_focus(mean, focus))


@torch.no_grad()
def area_scores(maps: PixelMaps, inside: Tensor) -> LayerTable:
    """How well maps find a known area ``[N, H, W]`` bool, of A pixels in each image.

    Rows ``salient`` and ``relevance``, or ``relevance`` alone for plain maps. Measures: ``inside``, the share of the positive
    mass in the area; ``pointing``, the part of images whose largest pixel lies in it; ``covered``, the part of the area among
    the A largest pixels; and ``area``, the part of the image that it is, which each of them is for pixels in random order.
    Intervals are over images; the null is the map of the network with permuted weights.
    """
    if inside.dtype != torch.bool or inside.shape != maps.maps.shape:
        raise WorkbenchError(f"inside is bool {list(maps.maps.shape)}; got {inside.dtype} {list(inside.shape)}")
    if bool((~inside.flatten(1).any(1)).any()):
        raise Refused("an image's area is empty, so that there is nothing to find")
    rows = {"relevance": (maps.maps, maps.null)}
    if isinstance(maps, SalientMaps):
        rows = {"salient": (maps.maps, maps.null), "relevance": (maps.relevance, maps.relevance_null)}
    found = torch.stack([_scores(values, inside) for values, _ in rows.values()])  # [rows, N, measures]
    null = torch.stack([_scores(values, inside) for _, values in rows.values()])
    low, high = interval(found.transpose(0, 1))

    def columns(values: Tensor) -> dict[str, Tensor]:
        return dict(zip(_MEASURES, values.T, strict=True))

    return LayerTable(
        f"Area found by {next(iter(rows))} maps",
        tuple(rows),
        {**columns(found.nanmean(1)), "area": inside.double().mean().expand(len(rows))},
        {**_MEASURES, "area": "part of the image"},
        columns(low),
        columns(high),
        columns(null.nanmean(1)),
        {"inside": "images without positive mass are left out"} if bool(found.isnan().any()) else {},
        maps.provenance,
    )


_MEASURES = {"inside": "share of positive mass", "pointing": "part of images", "covered": "part of the area"}


def _scores(maps: Tensor, inside: Tensor) -> Tensor:
    """Each image's numbers in the order of ``_MEASURES``, ``[N, 3]``; NaN without positive mass."""
    mass, area = maps.clamp(min=0).flatten(1), inside.flatten(1)
    total = mass.sum(1)
    order = mass.argsort(dim=1, descending=True, stable=True)
    found = area.gather(1, order).double()
    size = area.sum(1)
    covered = (found * (torch.arange(found.shape[1]) < size[:, None])).sum(1) / size
    scores = torch.stack([(mass * area).sum(1) / total, found[:, 0], covered], 1)
    return scores.masked_fill((total == 0)[:, None], float("nan"))


def _resized(maps: Tensor, scale: float) -> Tensor:
    """``[N, 1, H, W]`` at a part of its size; each pixel the mean of those it covers."""
    height, width = (max(1, round(side * scale)) for side in maps.shape[2:])
    sides = (height, width)
    return maps if sides == tuple(maps.shape[2:]) else torch.nn.functional.adaptive_avg_pool2d(maps, sides)


def _patches(maps: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Patches ``[N, P, patch^2]`` around every pixel, edges repeated, and their places ``[P, 2]`` in parts of the longer side."""
    rows, columns = maps.shape[2:]
    around = pad(maps, [patch // 2] * 4, mode="replicate")
    grid = torch.cartesian_prod(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5).double()
    return unfold(around, patch).transpose(1, 2), grid / max(rows, columns)


def _unlike(maps: Tensor, others: Sequence[Tensor], patch: int, share: float, near: float) -> Tensor:
    """``1 - exp(-d)`` ``[N, 1, H, W]`` with d the mean distance of each patch to the most alike of ``others``."""
    mine, here = _patches(maps, patch)
    found = [_patches(x, patch) for x in others]
    theirs, there = torch.cat([x for x, _ in found], 1), torch.cat([x for _, x in found])
    nearest = max(1, round(share * len(there)))
    step = max(1, _LIMIT // (len(mine) * len(there)))
    distances = []
    for part, at in zip(mine.split(step, 1), here.split(step), strict=True):
        away = torch.cdist(part, theirs) / patch / (1 + near * torch.cdist(at, there))
        distances.append(away.topk(nearest, dim=2, largest=False).values.mean(2))
    return (1 - (-torch.cat(distances, 1)).exp()).view(maps.shape)


def _to_focus(saliency: Tensor, focus: float) -> Tensor:
    """Distance of each pixel to the next one above ``focus``, in parts of the longer side; 0 where there is none."""
    from scipy.ndimage import distance_transform_edt

    longer = max(saliency.shape[1:])
    found = [
        torch.from_numpy(distance_transform_edt(~(one > focus).numpy()))
        if bool((one > focus).any())
        else torch.zeros_like(one)
        for one in saliency
    ]
    return (torch.stack(found) / longer).clamp(max=1)


def _example() -> dict[str, Any]:
    cnn, images, _ = templates()
    return {"cnn": cnn, "images": images, "patch": 3}


ANALYSES = (
    Analysis(
        name="salient-relevance",
        question="In which areas does a convolutional network have its answer, beyond single pixels?",
        function=salient_relevance,
        example=_example,
        paper='"Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise relevance '
        'propagation" (arXiv 1712.08268), abstract; Goferman et al. 2012 (TPAMI 34(10))',
        source="tensors",
        null="the network with each layer's weights permuted",
        cause="workbench.probes.structure.conv_relevance.pixel_deletion",
        definition="from the abstract and Goferman's formula: positive relevances alone, a share of the patches as nearest, "
        "distances per pixel of a patch, saliency divided by its largest value before foci are taken",
    ),
)
