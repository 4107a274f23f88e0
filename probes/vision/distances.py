"""How far, in pixels, does each head look?

The attention distance of a head is sum_q A[p, q] |p - q| over patches q, with the distance between the middles of patches in
pixels, averaged over the patches p of an image (Dosovitskiy et al., arXiv 2010.11929, figure 7 and appendix D.7). Mass on tokens
that are no patches (class, registers, text) has no place, so it adds nothing: ``distance_on_patches`` divides it out. The null
is what each number would be if every patch spread its mass evenly over the tokens that it may see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.maps import AttentionMap
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sources import Source, provenance_of
from workbench.probes.tables import HeadTable
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.on_patches import (
    even_sums,
    is_summary,
    named_masses,
    patch_maps,
    patch_rows,
    pixel_distance,
)

MEASURES = ("distance", "distance_on_patches")
NOWHERE = "its patches give no mass to any patch"


@torch.no_grad()
def attention_distance(source: Source, grid: Grid, *, raw: bool = False) -> HeadTable:
    """Mean attention distance of every head in pixels, with its 95% interval over images and its null.

    ``distance`` as published, ``distance_on_patches`` the mean over the mass on patches alone; NaN for a head that gives patches
    nothing. Gated maps count as they act, ``raw=True`` inside the gate; signed maps are refused. Rows are read in chunks; a map
    captured with ``keep=False`` answers if ``image_mods(grid)`` were among its masses.
    """
    each, null = _empty(), _empty()
    undefined = {}
    for layer, amap in patch_maps(source, grid, raw=raw).items():
        total, mass, even, even_mass = _sums(amap, grid)
        found = {"distance": (total, even), "distance_on_patches": (total / mass, even / even_mass)}
        for name, (number, chance) in found.items():
            each[name][layer], null[name][layer] = number, chance
        for head in each["distance_on_patches"][layer].nanmean(0).isnan().nonzero()[:, 0].tolist():
            undefined[f"distance_on_patches, layer {layer}, head {head}"] = NOWHERE
    units = dict.fromkeys(MEASURES, "pixels")
    return HeadTable.averaged(
        "Attention distance", each, units, null=null, undefined=undefined, provenance=provenance_of(source)
    )


def _empty() -> dict[str, dict[int | str, Tensor]]:
    return {name: {} for name in MEASURES}


def _sums(amap: AttentionMap, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means over patches of mass times distance, and of mass, as they are and spread evenly; each ``[B, H]``."""
    b, h, _, _ = amap.shape
    total, mass, even, even_mass = (torch.zeros(b, h, dtype=torch.float64) for _ in range(4))
    if is_summary(amap):
        rings = range(max(grid.rows, grid.cols))
        far, *parts = named_masses(amap, grid, ("pixels", *(f"hop {k}" for k in rings), "class", "others"))
        sums = torch.stack(parts).sum(0)
        total, mass = far.sum(-1), torch.stack(parts[:-2]).sum((0, -1))
        for patches, row in even_sums(amap, grid):
            row = row[..., grid.index]
            even += ((row * pixel_distance(grid, patches)).sum(-1) * sums[..., patches]).sum(-1)
            even_mass += (row.sum(-1) * sums[..., patches]).sum(-1)
    else:
        for patches, rows, spread in patch_rows(amap, grid):
            far = pixel_distance(grid, patches)
            rows, spread = rows[..., grid.index], spread[..., grid.index]
            total += (rows * far).sum((-2, -1))
            mass += rows.sum((-2, -1))
            even += (spread * far).sum((-2, -1))
            even_mass += spread.sum((-2, -1))
    return total / grid.patches, mass / grid.patches, even / grid.patches, even_mass / grid.patches


ANALYSES = (
    Analysis(
        name="attention-distance",
        question="How far, in pixels, does each head look?",
        function=attention_distance,
        example=lambda: {
            "source": random_maps(tokens=13, causal=False),
            "grid": Grid(3, 4, (8, 8), start=1, cls=0, tokens=13),
        },
        paper="Dosovitskiy et al. 2020 (arXiv 2010.11929), appendix D.7",
        source="maps",
        null="each patch's mass spread evenly over the tokens that it may see",
    ),
)
