"""What in the image does the whole stack of layers attend to, and which points would name it?

VL-SAM (Lin et al., arXiv 2410.05963) turns the attention of a vision-language model into points for a segmenter. With A[l, h] the
map of a head, over all tokens:

    W[l, h] = mean over queries of the largest weight of the query's row       (sharp heads count more)
    A'_l    = mean over heads of W[l, h] A[l, h]
    S_l     = (I + A'_l)(S_(l-1) + I),  S_(-1) = 0                             (attention flow)

The heat over the image is the row of S of the queries that are asked: the last token by default, which is what a generated token
would see. In a causal map early keys are seen by more queries and collect more flow ("collapse"); the remedy multiplies each
column of A'_l by 1 - (L0 - 1) / L, L0 being how many of the L queries may see the key. That formula is from memory, and applying
it in each layer is our reading; a map that hides nothing is left alone. Only rows of S are made, as

    s = u_0 + ... + u_L,  u_L = e (I + A'_L),  u_(l-1) = u_l (I + A'_(l-1))

which is linear in the query e, so that nothing of size Q x K is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sources import Source, provenance_of
from workbench.probes.tables import LayerTable
from workbench.probes.visibility import Visibility
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.on_patches import patch_maps, seen_by
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FlowHeat(Result):
    """``heat`` ``[B, N]``: flow from the queries to each patch. ``even`` ``[B, N]``: what it would be if every query spread its
    mass evenly over the keys that it may see. ``weight`` layer -> ``[B, H]``: W, the mean largest weight of a head's rows."""

    heat: Tensor
    even: Tensor
    weight: Mapping[int | str, Tensor]
    grid: Grid
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per image and patch: ``image, patch, row, column, heat, heat_null``."""
        return self.grid.table({"heat": self.heat, "heat_null": self.even})

    def plot(self, ax: Axes | None = None, image: int = 0) -> Axes:
        """The heat of one image over its pixels."""
        if not 0 <= image < len(self.heat):
            raise UnknownName("image", image, range(len(self.heat)))
        ax = axis(ax, 4.4, 4.0)
        height, width = self.grid.size
        shown = ax.imshow(self.grid.image(self.heat[image]).numpy(), extent=(0, width, height, 0), vmin=0)
        ax.figure.colorbar(shown, ax=ax, label="attention flow")
        ax.set(xlabel="pixels", ylabel="pixels", title=f"Attention flow\n{self.provenance.model}")
        return ax


@torch.no_grad()
def flow_heat(
    source: Source,
    grid: Grid,
    *,
    queries: Sequence[int] | None = None,
    regularise: bool = True,
    raw: bool = False,
) -> FlowHeat:
    """Attention flow from some tokens to the image's patches, through all layers.

    ``queries`` are tokens, their rows averaged: by default the class token, the last real token of a map over a text (one whose
    grid does not end it), or else all patches. ``regularise`` undoes the pull of early keys in causal maps. Gated maps count as
    they act, ``raw=True`` inside the gate; signed maps are refused.
    """
    maps = patch_maps(source, grid, raw=raw)
    shapes = {(amap.shape[0], amap.shape[2]) for amap in maps.values()}
    if len(shapes) > 1:
        raise WorkbenchError(f"flow runs through layers of one batch and length; got {sorted(shapes)}")
    seen = {name: seen_by(amap) for name, amap in maps.items()}
    (batch, length) = shapes.pop()
    start = _start(grid, queries, batch, length, seen[list(maps)[-1]].real)
    at, even_at = start, start.clone()
    total, even_total = torch.zeros_like(start), torch.zeros_like(start)
    weight: dict[int | str, Tensor] = {}
    for name, amap in reversed(maps.items()):
        weight[name] = head_weights(amap, seen[name])
        damp = _damping(seen[name]) if regularise else torch.ones(1, length, dtype=torch.float64)
        at = at + _step(amap, weight[name], at) * damp
        even_at = even_at + _even_step(seen[name], even_at) * damp
        total, even_total = total + at, even_total + even_at
    rows = {name: weight[name] for name in maps}
    return FlowHeat(total[:, grid.index], even_total[:, grid.index], rows, grid, {}, provenance_of(source))


def head_weights(amap: AttentionMap, seen: Visibility) -> Tensor:
    """W: mean over real queries of the largest weight of their rows, ``[B, H]`` in float64."""
    largest = amap.topk(1).values[..., 0].detach().cpu().double()
    real = seen.real[:, None].double()
    return (largest * real).sum(-1) / real.sum(-1)


def _step(amap: AttentionMap, weight: Tensor, at: Tensor) -> Tensor:
    """u A', ``[B, T]``."""
    heads = amap.shape[1]
    share = (weight / heads)[:, :, None] * at[:, None]
    values = amap.rmatvec(share[..., None])
    return values.detach().cpu().double().sum(1)[..., 0]


def _even_step(seen: Visibility, at: Tensor) -> Tensor:
    """The same for heads that spread every row evenly over the keys that it may see, ``[B, T]``."""
    keys = seen.keys()
    share = torch.where(keys > 0, 1 / keys.clamp(min=1), 0.0)
    real = seen.real[:, None].double()
    weight = (share * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
    return seen.spread(weight * share * at[:, None]).mean(1)


def _damping(seen: Visibility) -> Tensor:
    """1 - (L0 - 1) / L of every key, ``[B|1, T]``; 1 for all if all are seen by the same number of queries."""
    count = seen.queries().mean(1)
    known = count > 0
    least = torch.where(known, count, float("inf")).amin(1, keepdim=True)
    uneven = count.amax(1, keepdim=True) > least
    length = seen.real.sum(-1, keepdim=True).double()
    return torch.where(uneven, 1 - (count - 1).clamp(min=0) / length, 1.0)


def _start(grid: Grid, queries: Sequence[int] | None, batch: int, length: int, real: Tensor) -> Tensor:
    """The mean of the queries' unit vectors, ``[B, T]`` in float64."""
    start = torch.zeros(batch, length, dtype=torch.float64)
    if queries is not None:
        chosen = sorted(set(queries))
        if not chosen or chosen[0] < 0 or chosen[-1] >= length:
            raise UnknownName("query token", list(queries), range(length))
        start[:, chosen] = 1 / len(chosen)
    elif grid.cls is not None and grid.tokens is not None:
        start[:, grid.cls] = 1.0
    elif grid.tokens is None and int(grid.index[-1]) < length - 1:
        last = length - 1 - real.expand(batch, -1).flip(1).long().argmax(1)
        start[torch.arange(batch), last] = 1.0
    else:
        start[:, grid.index] = 1 / grid.patches
    return start


@dataclass(frozen=True)
class PointPrompts(Result):
    """Points of images for a segmenter, M in all: ``image`` and ``patch`` ``[M]``, ``positive`` ``[M]`` bool, ``place``
    ``[M, 2]`` (pixels down and right, the middle of the patch), ``value`` ``[M]`` the heat there."""

    image: Tensor
    patch: Tensor
    positive: Tensor
    place: Tensor
    value: Tensor
    images: int
    grid: Grid
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def hits(self, truth: Tensor) -> LayerTable:
        """How often points are right about an object: ``positive`` (share of an image's positive points in it) and ``negative``
        (share of its negative points outside), means over images with intervals; by chance the object's share of all patches, and
        the rest. ``truth`` ``[B, ...]`` is of patches or of pixels."""
        inside = self.grid.covered(truth) >= 0.5
        if inside.shape != (self.images, self.grid.patches):
            raise WorkbenchError(f"truth holds a mask for each of {self.images} images; got {list(truth.shape)}")
        hit = inside[self.image, self.patch] == self.positive
        values, low, high = {}, {}, {}
        for name, side in (("positive", self.positive), ("negative", ~self.positive)):
            total = torch.zeros(self.images, dtype=torch.float64).index_add_(0, self.image, side.double())
            right = torch.zeros_like(total).index_add_(0, self.image, (side & hit).double())
            share = torch.where(total > 0, right / total, float("nan"))
            values[name] = share.nanmean(0, keepdim=True)
            low[name], high[name] = (bound[None] for bound in interval(share))
        area = inside.double().mean()[None]
        null = {"positive": area, "negative": 1 - area}
        units = {"positive": "share of points", "negative": "share of points"}
        return LayerTable(
            "Points on the object", ("all layers",), values, units, low, high, null, self.undefined, self.provenance
        )

    def frame(self) -> pd.DataFrame:
        """One row per point: ``image, kind, patch, down, right`` (pixels) and ``value``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "image": self.image.numpy(),
                "kind": ["positive" if each else "negative" for each in self.positive.tolist()],
                "patch": self.patch.numpy(),
                "down": self.place[:, 0].numpy(),
                "right": self.place[:, 1].numpy(),
                "value": self.value.numpy(),
            }
        )

    def plot(self, ax: Axes | None = None, image: int = 0) -> Axes:
        """The points of one image: positive as crosses, negative as circles."""
        if not 0 <= image < self.images:
            raise UnknownName("image", image, range(self.images))
        ax = axis(ax, 4.2, 4.0)
        for name, side, marker in (("positive", self.positive, "x"), ("negative", ~self.positive, "o")):
            down, right = self.place[side & (self.image == image)].T.numpy()
            ax.scatter(right, down, marker=marker, label=name)
        height, width = self.grid.size
        ax.set(
            xlim=(0, width),
            ylim=(height, 0),
            xlabel="pixels",
            ylabel="pixels",
            title=f"Points\n{self.provenance.model}",
        )
        ax.legend(fontsize=7)
        return ax


def point_prompts(
    found: FlowHeat, *, positive: int = 3, negative: int = 3, high: float = 0.5, low: float = 0.2
) -> PointPrompts:
    """Points where heat peaks and where it is lowest, up to ``positive`` and ``negative`` of each image.

    Heat is scaled to 0 ... 1 over the image. Positive points are patches that no neighbour (of eight) exceeds and that lie above
    ``high``, highest first; negative ones lie below ``low``, none of their neighbours above ``high``, lowest first. The paper
    samples points and iterates with its segmenter; these rules and thresholds are ours, and there is no segmenter.
    """
    from scipy.ndimage import maximum_filter

    if not 0 <= low <= high <= 1 or min(positive, negative) < 0:
        raise WorkbenchError(f"thresholds are 0 <= low <= high <= 1 and counts 0 or more; got {low}, {high}")
    if bool(found.heat.isnan().any()):
        raise Refused("heat is undefined (NaN) somewhere, so that it has no peaks")
    image, patch, sign, undefined = [], [], [], {}
    for i, heat in enumerate(found.heat):
        spread = float(heat.max() - heat.min())
        if spread <= 1e-12 * max(1.0, float(heat.abs().max())):
            undefined[f"image {i}"] = "heat is the same everywhere: no peaks"
            continue
        scaled = found.grid.image((heat - heat.min()) / spread).numpy()
        around = maximum_filter(scaled, size=3, mode="nearest")
        flat, near = (torch.from_numpy(x).flatten() for x in (scaled, around))
        peaks = ((flat == near) & (flat >= high)).nonzero()[:, 0]
        lows = ((flat <= low) & (near < high)).nonzero()[:, 0]
        up = peaks[flat[peaks].argsort(dim=0, descending=True, stable=True)][:positive]
        down = lows[flat[lows].argsort(dim=0, stable=True)][:negative]
        patch += [*up.tolist(), *down.tolist()]
        sign += [True] * len(up) + [False] * len(down)
        image += [i] * (len(up) + len(down))
    images, patches = torch.tensor(image, dtype=torch.long), torch.tensor(patch, dtype=torch.long)
    return PointPrompts(
        images, patches, torch.tensor(sign, dtype=torch.bool), found.grid.centres[patches], found.heat[images, patches],
        len(found.heat), found.grid, undefined, found.provenance,
    )  # fmt: skip


def _example() -> dict[str, Any]:
    return {"source": random_maps(tokens=13), "grid": Grid(3, 3, (8, 8), start=2)}


ANALYSES = (
    Analysis(
        name="attention-flow-heat",
        question="What in the image do all layers together attend to?",
        function=flow_heat,
        example=_example,
        paper="Lin et al. 2024 (arXiv 2410.05963), attention map generation",
        source="maps",
        null="every query's mass spread evenly over the keys that it may see",
        cause="erasure_curve: patches are erased in the order of their heat",
        definition="read from reviews: the flow starts empty, and columns are damped in each layer of a causal map",
    ),
    Analysis(
        name="point-prompts",
        question="Which points of the image would name what the model attends to?",
        function=point_prompts,
        example=lambda: {"found": flow_heat(**_example())},
        paper="Lin et al. 2024 (arXiv 2410.05963), prompt generation",
        source="tensors",
        null="random patches: the object's share of the image",
        definition="peaks above one threshold and the lowest patches below another; no segmenter, no iteration",
    ),
)
