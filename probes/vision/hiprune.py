"""Which image tokens does HiPrune keep, and why?

HiPrune (Liu et al., arXiv 2508.00553, and the authors' code) reads two layers of the image encoder. With a_j the attention that
patch j receives, averaged over heads and over all queries (class token included):

    anchors    the round(keep * alpha / 5) patches with the largest a in an object layer, at least one
    buffers    their up to four neighbours in the grid: one column or one row away
    registers  the patches with the largest a in a deep layer among the rest, until ``keep`` are kept

Published: object layer 9 of CLIP's 24, deep layer the last but one, alpha 0.1, keep 192, 128 or 64 of 576. Layers are taken here
at the same share of the depth. The code finds neighbours by token number, so that the first column borders on the last one of the
row above; here rows do not wrap. If buffers do not all fit, those of the strongest anchors come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sources import Source, provenance_of
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.on_patches import patch_maps, seen_by
from workbench.probes.vision.pruning import random_patches, top_patches
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

OBJECT, DEEP = 9 / 24, 22 / 24
WHY = ("pruned", "anchor", "buffer", "register")
PRUNED, ANCHOR, BUFFER, REGISTER = range(4)


@dataclass(frozen=True)
class KeptTokens(Result):
    """``why`` ``[B, N]``: 0 pruned, 1 anchor, 2 buffer, 3 register. ``object_mass`` and ``deep_mass`` ``[B, N]``: mean attention
    that a patch receives in the two layers; ``even`` ``[2, N]`` what it would receive if every query spread its mass evenly.

    ``random`` measure -> ``[R, B]``: the same share for as many random patches.
    """

    why: Tensor
    object_mass: Tensor
    deep_mass: Tensor
    even: Tensor
    random: Mapping[str, Tensor]
    layers: tuple[int | str, int | str]
    grid: Grid
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    @property
    def kept(self) -> Tensor:
        """Which patches stay, ``[B, N]`` bool."""
        return self.why != PRUNED

    def recall(self) -> dict[str, Tensor]:
        """Share of the mass on patches that the kept ones receive, ``object`` and ``deep``, each ``[B]``; NaN without any."""
        return _recall(self.kept, self.object_mass, self.deep_mass)

    def inside(self, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Share of an object's patches that are kept ``[B]``, and the share of all patches, which random ones would have.

        ``truth`` ``[B, ...]`` is of patches or of pixels; NaN where it covers half of no patch."""
        object_ = self.grid.covered(truth) >= 0.5
        if object_.shape != self.kept.shape:
            raise WorkbenchError(f"truth holds a mask for each of {len(self.kept)} images; got {list(truth.shape)}")
        return (self.kept & object_).sum(1) / object_.sum(1).double(), self.kept.double().mean(1)

    def summary(self) -> pd.DataFrame:
        """One row per layer: ``recall`` of mass with its 95% interval over images, and that of random patches with the range of
        95% of the draws; then how many of each kind are kept per image."""
        import pandas as pd

        rows = []
        counts = {f"{name}s": float((self.why == i).sum(1).double().mean()) for i, name in enumerate(WHY) if i}
        for (name, found), layer in zip(self.recall().items(), self.layers, strict=True):
            low, high = interval(found)
            draws = self.random[name].mean(1)
            rows.append(
                {
                    "mass": name, "layer": layer, "recall": float(found.nanmean()), "recall_low": float(low),
                    "recall_high": float(high), "random": float(draws.mean()), "random_low": float(draws.quantile(0.025)),
                    "random_high": float(draws.quantile(0.975)), **counts,
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def frame(self) -> pd.DataFrame:
        """One row per image and patch: ``image, patch, row, column, why, object_mass, deep_mass``, with their nulls."""
        table = self.grid.table(
            {
                "object_mass": self.object_mass,
                "object_mass_null": self.even[0].expand_as(self.object_mass),
                "deep_mass": self.deep_mass,
                "deep_mass_null": self.even[1].expand_as(self.deep_mass),
            }
        )
        table.insert(4, "why", [WHY[i] for i in self.why.flatten().tolist()])
        return table

    def plot(self, ax: Axes | None = None, image: int = 0) -> Axes:
        """The grid of one image, coloured by why a patch is kept."""
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        if not 0 <= image < len(self.why):
            raise UnknownName("image", image, range(len(self.why)))
        colours = ("0.92", "#c44e52", "#dd8452", "#4c72b0")
        ax = axis(ax, 4.6, 4.0)
        height, width = self.grid.size
        values = self.grid.image(self.why[image]).numpy()
        ax.imshow(values, cmap=ListedColormap(colours), vmin=0, vmax=3, extent=(0, width, height, 0))
        ax.legend(handles=[Patch(color=c, label=name) for c, name in zip(colours, WHY, strict=True)], fontsize=7)
        ax.set(
            xlabel="pixels",
            ylabel="pixels",
            title=f"{int(self.kept[image].sum())} tokens kept\n{self.provenance.model}",
        )
        return ax


@torch.no_grad()
def hiprune(
    source: Source,
    grid: Grid,
    *,
    keep: int,
    alpha: float = 0.1,
    object_layer: int | str | float = OBJECT,
    deep_layer: int | str | float = DEEP,
    raw: bool = False,
    draws: int = 64,
    seed: int = 0,
) -> KeptTokens:
    """Which ``keep`` patches of every image stay, and as what.

    ``object_layer`` and ``deep_layer``: a layer of the maps, or a share of the depth as a float in [0, 1): L layers and a share s
    mean layer floor(s L). Gated maps count as they act, ``raw=True`` inside the gate; signed maps are refused. Maps need no rows:
    ``capture(stats=("received",), keep=False)`` is enough. ``draws`` random choices of as many patches are the null.
    """
    if not 0 < keep < grid.patches:
        raise WorkbenchError(f"between 1 and {grid.patches - 1} patches can be kept; got {keep}")
    if not 0 < alpha <= 1:
        raise WorkbenchError(f"alpha is the share of anchors and buffers, above 0 and at most 1; got {alpha!r}")
    if draws < 1:
        raise WorkbenchError(f"draws is the number of random choices, at least 1; got {draws}")
    maps = patch_maps(source, grid, raw=raw)
    names = tuple(pick_layer(maps, which) for which in (object_layer, deep_layer))
    mass = {name: received(maps[name], grid) for name in dict.fromkeys(names)}
    if len({len(each) for each in mass.values()}) > 1:
        raise WorkbenchError("layers of one run have one batch")
    shallow, deep = (mass[name] for name in names)
    why = torch.stack([_chosen(a, b, grid, keep, alpha) for a, b in zip(shallow, deep, strict=True)])
    generator = torch.Generator().manual_seed(seed)
    random: dict[str, list[Tensor]] = {"object": [], "deep": []}
    for _ in range(draws):
        for name, found in _recall(random_patches(why != PRUNED, generator), shallow, deep).items():
            random[name].append(found)
    even = torch.stack([even_share(maps[name], grid) for name in names])
    undefined = {
        f"{what} recall, image {image}": "the patches receive nothing"
        for what, values in (("object", shallow), ("deep", deep))
        for image in (values.sum(1) == 0).nonzero()[:, 0].tolist()
    }
    null = {name: torch.stack(values) for name, values in random.items()}
    return KeptTokens(why, shallow, deep, even, null, (names[0], names[1]), grid, undefined, provenance_of(source))


def received(amap: AttentionMap, grid: Grid) -> Tensor:
    """Attention that each patch receives, averaged over heads and over all real queries: ``[B, N]`` in float64."""
    real = seen_by(amap).real.sum(-1)[:, None]
    return amap.received().detach().cpu().double().mean(1)[:, grid.index] / real


def even_share(amap: AttentionMap, grid: Grid) -> Tensor:
    """The same if every query spread mass 1 evenly over what it may see, mean over images, ``[N]``."""
    seen = seen_by(amap)
    keys = seen.keys()
    total = seen.spread(torch.where(keys > 0, 1 / keys.clamp(min=1), 0.0)).mean(1) / seen.real.sum(-1)[:, None]
    return total.mean(0)[grid.index]


def pick_layer(maps: Mapping[int | str, AttentionMap], which: int | str | float) -> int | str:
    """A layer by name, or floor(s L) of L layers for a share s of the depth."""
    names = list(maps)
    if isinstance(which, float):
        if not 0 <= which < 1:
            raise WorkbenchError(f"a share of the depth lies in [0, 1); got {which!r}")
        return names[int(which * len(names) + 1e-9)]
    if which not in maps:
        raise UnknownName("layer", which, names)
    return which


def _chosen(shallow: Tensor, deep: Tensor, grid: Grid, keep: int, alpha: float) -> Tensor:
    """Why each patch of one image is kept, ``[N]``."""
    why = torch.full((grid.patches,), PRUNED)
    anchors = top_patches(shallow, min(keep, max(1, round(keep * alpha / 5))))
    why[anchors] = ANCHOR
    left = keep - int(anchors.sum())
    strongest = shallow.masked_fill(~anchors, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    for anchor in strongest[: int(anchors.sum())].tolist():
        near = [p for p in neighbours(grid, anchor) if why[p] == PRUNED][:left]
        why[near] = BUFFER
        left -= len(near)
    rest = top_patches(deep.masked_fill(why != PRUNED, float("-inf")), left)
    why[rest] = REGISTER
    return why


def neighbours(grid: Grid, patch: int) -> list[int]:
    """The up to four patches one column or one row away, left, right, above and below."""
    row, col = divmod(patch, grid.cols)
    near = ((row, col - 1), (row, col + 1), (row - 1, col), (row + 1, col))
    return [i * grid.cols + j for i, j in near if 0 <= i < grid.rows and 0 <= j < grid.cols]


def _recall(kept: Tensor, shallow: Tensor, deep: Tensor) -> dict[str, Tensor]:
    """NaN where the patches receive nothing."""
    return {name: (mass * kept).sum(1) / mass.sum(1) for name, mass in (("object", shallow), ("deep", deep))}


def _example() -> dict[str, Any]:
    return {
        "source": random_maps(tokens=13, causal=False), "grid": Grid(3, 4, (8, 8), start=1, cls=0, tokens=13), "keep": 6,
        "alpha": 0.5, "draws": 16,
    }  # fmt: skip


ANALYSES = (
    Analysis(
        name="hiprune",
        question="Which image tokens does hierarchical attention keep, and why?",
        function=hiprune,
        example=_example,
        paper="Liu et al. 2025 (arXiv 2508.00553), and the authors' code",
        source="maps",
        null="the mass that as many random patches receive; even attention per patch",
        cause="pruning_curve: the pruned tokens become the mean of the others, or are no longer seen",
        definition="layers at the published share of the depth, rows of the grid do not wrap, at least one anchor",
    ),
)
