"""Where in the image does the class token look?

The class token's row over patches is the picture that DINO shows of each head (Caron et al., arXiv 2104.14294, figure 1). A model
without a class token has no such row; there the mean of all patches' rows stands in for it, which is the attention that a patch
receives, and for an image inside of a text any text token can be asked. ``map_overlap`` compares such maps with a known object:
the smallest set of patches that holds 60% of the mass (as in the paper's segmentations), the mass inside of the object, and
whether the largest patch lies in it (pointing game); each beside the same map with shuffled patches. ``erasure_curve`` tests
whether the model needs those patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sources import Source, provenance_of
from workbench.probes.tables import HeadTable
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.on_patches import patch_maps, patch_sums
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

EMPTY = "no mass on patches"


@dataclass(frozen=True)
class ClassMaps(Result):
    """``weight`` layer -> ``[B, H, N]``: attention of the query to each patch, as it is (a row may keep mass for other tokens).

    ``query`` says whose row it is. ``undefined`` names heads that give patches nothing.
    """

    weight: Mapping[int | str, Tensor]
    query: str
    grid: Grid
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def entropy(self, layer: int | str) -> Tensor:
        """Entropy of the row over patches, normalised to sum to 1: ``[B, H]`` in nats; NaN where it is empty."""
        share = _normal(self._of(layer))
        return torch.special.entr(share).sum(-1)

    def image(self, layer: int | str, head: int | None = None, *, image: int = 0) -> Tensor:
        """One head's map, or the mean of all heads, where patches lie: ``[rows, cols]``."""
        weight = self._of(layer)
        if not 0 <= image < len(weight):
            raise UnknownName("image", image, range(len(weight)))
        if head is not None and not 0 <= head < weight.shape[1]:
            raise UnknownName("head", head, range(weight.shape[1]))
        return self.grid.image(weight[image].mean(0) if head is None else weight[image, head])

    def pixels(self, layer: int | str, head: int | None = None, *, image: int = 0) -> Tensor:
        """The same in pixels, ``[height, width]``: linear between the middles of patches, constant outside of them."""
        small = self.image(layer, head, image=image)[None, None]
        return torch.nn.functional.interpolate(small, self.grid.size, mode="bilinear", align_corners=False)[0, 0]

    def frame(self) -> pd.DataFrame:
        """One row per layer and head: ``layer, head, mass`` on patches and ``entropy`` (nats) with 95% intervals over images,
        ``entropy_even`` (the logarithm of the number of patches), ``largest`` (mean largest weight) and ``query``."""
        import pandas as pd

        parts = []
        for layer, weight in self.weight.items():
            mass, spread = weight.sum(-1), self.entropy(layer)
            (mass_low, mass_high), (low, high) = interval(mass), interval(spread)
            parts.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "head": range(weight.shape[1]),
                        "query": self.query,
                        "mass": mass.mean(0).numpy(),
                        "mass_low": mass_low.numpy(),
                        "mass_high": mass_high.numpy(),
                        "entropy": spread.nanmean(0).numpy(),
                        "entropy_low": low.numpy(),
                        "entropy_high": high.numpy(),
                        "entropy_even": math.log(weight.shape[2]),
                        "largest": weight.amax(-1).mean(0).numpy(),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def plot(
        self, ax: Axes | None = None, layer: int | str | None = None, head: int | None = None, image: int = 0
    ) -> Axes:
        """One map (by default the mean of the last layer's heads) over the image's pixels."""
        name = list(self.weight)[-1] if layer is None else layer
        ax = axis(ax, 4.2, 4.0)
        height, width = self.grid.size
        values = self.image(name, head, image=image).numpy()
        shown = ax.imshow(values, extent=(0, width, height, 0), vmin=0, interpolation="nearest")
        ax.figure.colorbar(shown, ax=ax, label="attention")
        who = "mean of heads" if head is None else f"head {head}"
        ax.set(xlabel="pixels", ylabel="pixels", title=f"{self.query}, layer {name}, {who}\n{self.provenance.model}")
        return ax

    def _of(self, layer: int | str) -> Tensor:
        if layer not in self.weight:
            raise UnknownName("layer", layer, self.weight)
        return self.weight[layer]


@torch.no_grad()
def class_maps(source: Source, grid: Grid, *, query: int | None = None, raw: bool = False) -> ClassMaps:
    """Rows over patches, of every head and image.

    ``query`` is the token whose row is read; by default the class token, and the mean over patches where there is none. Gated
    maps count as they act, ``raw=True`` inside the gate; signed maps are refused.
    """
    maps = patch_maps(source, grid, raw=raw)
    token = grid.cls if query is None else query
    weight = {}
    for layer, amap in maps.items():
        if token is None:
            weight[layer] = _received(amap, grid)
            continue
        if not 0 <= token < amap.shape[2]:
            raise UnknownName("query token", token, range(amap.shape[2]))
        row = amap.rows(token, token + 1).detach().cpu().double()[:, :, 0]
        weight[layer] = grid.of_tokens(row)
    who = "mean over patches" if token is None else "class token" if token == grid.cls else f"token {token}"
    undefined = {
        f"entropy, layer {layer}, image {image}, head {head}": EMPTY
        for layer, values in weight.items()
        for image, head in (values.sum(-1) == 0).nonzero().tolist()
    }
    return ClassMaps(weight, who, grid, undefined, provenance_of(source))


@torch.no_grad()
def map_overlap(maps: ClassMaps, truth: Tensor, *, mass: float = 0.6, draws: int = 64, seed: int = 0) -> HeadTable:
    """How well the maps find a known object: per head ``inside`` (share of the mass on patches of the object), ``pointing`` (part
    of images whose largest patch lies in it) and ``iou`` of the smallest set of patches that holds ``mass`` of the map.

    ``truth`` ``[B, ...]`` is of patches or of pixels; a patch belongs to the object if half of it is covered. Intervals are over
    images; the null is the mean over ``draws`` shufflings of the patches (for ``inside`` and ``pointing`` the object's share).
    """
    if not 0 < mass < 1:
        raise WorkbenchError(f"mass is a share of the map, between 0 and 1; got {mass!r}")
    inside = maps.grid.covered(truth) >= 0.5
    batch = {len(weight) for weight in maps.weight.values()}
    if inside.ndim != 2 or batch != {len(inside)}:
        raise WorkbenchError(f"truth holds a mask for each of {sorted(batch)} images; got {list(truth.shape)}")
    if bool((~inside.any(1)).any()):
        raise Refused("an image's object covers half of no patch, so that there is nothing to find")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(maps.grid.patches, generator=generator) for _ in range(draws)]
    units = {"inside": "share of mass", "pointing": "part of images", "iou": "intersection over union"}
    each: dict[str, dict[int | str, Tensor]] = {name: {} for name in units}
    null: dict[str, dict[int | str, Tensor]] = {name: {} for name in units}
    undefined: dict[str, str] = {}
    area = inside.double().mean(1)
    for layer, weight in maps.weight.items():
        share = _normal(weight)
        empty = share.isnan().any(-1)
        top = smallest_set(share.nan_to_num(), mass)
        chance = torch.stack([_iou(top[..., order], inside[:, None]) for order in orders]).mean(0)
        found = {
            "inside": ((share * inside[:, None]).sum(-1), area[:, None].expand_as(empty)),
            "pointing": (inside.gather(1, weight.argmax(-1)).double(), area[:, None].expand_as(empty)),
            "iou": (_iou(top, inside[:, None]), chance),
        }
        for name, (number, by_chance) in found.items():
            each[name][layer], null[name][layer] = number.masked_fill(empty, float("nan")), by_chance.mean(0)
        undefined |= {f"layer {layer}, head {head}": EMPTY for head in empty.all(0).nonzero()[:, 0].tolist()}
    return HeadTable.averaged(
        "Overlap with the object", each, units, null=null, undefined=undefined, provenance=maps.provenance
    )


def smallest_set(share: Tensor, mass: float) -> Tensor:
    """The fewest entries of the last axis that hold ``mass``, as bool; among equals the first."""
    ordered, place = share.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(share, dtype=torch.bool).scatter_(-1, place, before < mass)


def _received(amap: AttentionMap, grid: Grid) -> Tensor:
    """Mean over patches of their rows, ``[B, H, N]``."""
    if grid.patches == amap.shape[2]:
        return amap.received().detach().cpu().double()[..., grid.index] / grid.patches
    return patch_sums(amap, grid)[0] / grid.patches


def _normal(weight: Tensor) -> Tensor:
    total = weight.sum(-1, keepdim=True)
    return torch.where(total > 0, weight / total, float("nan"))


def _iou(top: Tensor, inside: Tensor) -> Tensor:
    return (top & inside).sum(-1) / (top | inside).sum(-1).double()


def _overlap_example() -> dict[str, object]:
    grid = Grid(3, 4, (8, 8), start=1, cls=0, tokens=13)
    truth = torch.zeros(1, 3, 4, dtype=torch.bool)
    truth[:, :2, :2] = True
    return {"maps": class_maps(random_maps(tokens=13, causal=False), grid), "truth": truth, "draws": 16}


ANALYSES = (
    Analysis(
        name="class-maps",
        question="Where in the image does the class token look?",
        function=class_maps,
        example=lambda: {
            "source": random_maps(tokens=13, causal=False),
            "grid": Grid(3, 4, (8, 8), start=1, cls=0, tokens=13),
        },
        paper="Caron et al. 2021 (arXiv 2104.14294), figure 1",
        source="maps",
        null="the entropy of even attention",
        cause="erasure_curve: the patches that it looks at are erased",
    ),
    Analysis(
        name="map-overlap",
        question="Do the maps find a known object?",
        function=map_overlap,
        example=_overlap_example,
        paper="Caron et al. 2021 (arXiv 2104.14294), section 4.2.2; pointing game of Zhang et al. 2016 (arXiv 1608.00507)",
        source="tensors",
        null="the same map on shuffled patches",
        cause="erasure_curve: the patches that it looks at are erased",
    ),
)
