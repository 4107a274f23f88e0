"""What do the patterns of heads look like, at one size?

The pattern of a head in one sequence is its map pooled to ``side`` x ``side`` cells that share queries and keys evenly: a
cell's weight is the mean over its queries of the mass on its keys, so rows keep their sums. Cells cut through tokens in
proportion; a map of fewer tokens than cells is enlarged. Patterns of different texts and images can then be compared, which is
what the clustering of head patterns starts from (ViT visual analytics, arXiv 2303.13731).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.similarity.aligned import aligned_layers
from workbench.probes.sources import Source, provenance_of
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FAMILIES = ("identity", "ring", "row", "column", "cls", "uniform")


@dataclass(frozen=True)
class HeadPatterns(Result):
    """``patterns`` ``[N, side, side]``, rows are query cells; pattern n is of ``layer[n]``, ``head[n]`` in sequence
    ``sequence[n]``. ``null`` ``[N, side, side]``: even attention over what each query may see, with the rows' own sums."""

    patterns: Tensor
    null: Tensor
    sequence: tuple[int, ...]
    layer: tuple[int | str, ...]
    head: tuple[int, ...]
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per pattern: ``sequence, layer, head, mass`` (mean sum of a row), ``diagonal`` (share of it on the cells of the
        queries), ``first`` (share on the first column), ``from_even`` (mean over rows of half the absolute difference from even
        attention, 0 to 1 for rows of sum 1); NaN but for the mass where a head has no weight."""
        import pandas as pd

        mass = self.patterns.sum((1, 2)) / self.patterns.shape[1]
        scale = self.patterns.sum((1, 2))
        apart = (self.patterns - self.null).abs().sum(2).mean(1) / 2
        empty = self.patterns.abs().sum((1, 2)) == 0
        return pd.DataFrame(
            {
                "sequence": self.sequence,
                "layer": self.layer,
                "head": self.head,
                "mass": mass.numpy(),
                "diagonal": (self.patterns.diagonal(dim1=1, dim2=2).sum(1) / scale).numpy(),
                "first": (self.patterns[:, :, 0].sum(1) / scale).numpy(),
                "from_even": apart.masked_fill(empty, float("nan")).numpy(),
            }
        )

    def plot(self, ax: Axes | None = None, limit: int = 64) -> Axes:
        """A gallery of the first ``limit`` patterns, each scaled to its own largest weight."""
        shown = scaled(self.patterns[:limit])
        side = shown.shape[1]
        across = math.ceil(math.sqrt(len(shown)))
        down = math.ceil(len(shown) / across)
        sheet = torch.full((down * (side + 1) - 1, across * (side + 1) - 1), float("nan"), dtype=shown.dtype)
        for n, pattern in enumerate(shown):
            y, x = n // across * (side + 1), n % across * (side + 1)
            sheet[y : y + side, x : x + side] = pattern
        ax = axis(ax, 5.5, 5.5)
        ax.imshow(sheet.numpy(), cmap="viridis", interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(f"{len(shown)} of {len(self.patterns)} patterns, layer by layer\n{self.provenance.model}")
        return ax


def head_patterns(source: Source, *, side: int = 32, raw: bool = False) -> HeadPatterns:
    """The patterns of all heads of all layers in all sequences, ``[B * L * H, side, side]``.

    Padding is left out before pooling, so that every sequence fills the whole pattern. ``raw`` looks inside the gate. Patterns of
    signed maps are signed, and their null is that of rows with weight 1. Rows are walked in chunks.
    """
    if side < 2:
        raise WorkbenchError(f"a pattern has at least 2 x 2 cells; got side={side}")
    patterns, null, labels = [], [], []
    for name, layer in aligned_layers(source, raw=raw).items():
        b, h, queries, keys = layer.shape
        over_queries = _cells(layer.real_queries.sum(1), queries, side)
        over_queries = over_queries / over_queries.sum(-1, keepdim=True).clamp(min=1e-300)
        over_keys = _cells(layer.real_keys.sum(1), keys, side)
        found, even = (torch.zeros(b, h, side, side, dtype=torch.float64) for _ in range(2))
        for lo, hi, rows in layer.chunks(copies=2):
            seen = layer.visible(lo, hi)
            weight = rows.sum(-1, keepdim=True)
            if layer.amap.sign == "signed":
                weight = torch.ones_like(weight)
            spread = seen * (weight / seen.sum(-1, keepdim=True).clamp(min=1))
            for part, into in ((rows, found), (spread, even)):
                into += over_queries[:, None, :, lo:hi] @ (part @ over_keys.mT[:, None])
        patterns.append(found.flatten(0, 1))
        null.append(even.flatten(0, 1))
        labels += [(sequence, name, head) for sequence in range(b) for head in range(h)]
    sequence, names, heads = zip(*labels, strict=True)
    return HeadPatterns(torch.cat(patterns), torch.cat(null), sequence, names, heads, provenance_of(source))


def planted_heads(
    grid: int = 6, copies: int = 4, *, noise: float = 0.3, seed: int = 0
) -> tuple[list[AttentionMap], tuple[str, ...]]:
    """Synthetic heads of an image of ``grid`` x ``grid`` patches after a CLS token, and the family of every head.

    A layer per copy, a head per family: a patch attends to itself (``identity``), to patches at Chebyshev distance 1 .. grid // 2
    (``ring``; the distance changes from copy to copy), to its ``row``, its ``column``, the ``cls`` token, or everything
    (``uniform``). Weights are multiplied by exp(noise * normal) and rows sum to 1; the CLS token attends evenly.
    """
    n = grid * grid
    y, x = torch.arange(n) // grid, torch.arange(n) % grid
    down, across = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for copy in range(copies):
        ring = torch.maximum(down, across) == 1 + copy % max(1, grid // 2)
        inside = {"identity": torch.eye(n).bool(), "ring": ring, "row": down == 0, "column": across == 0}
        heads = []
        for family in FAMILIES:
            weight = torch.full((n + 1, n + 1), 1e-3, dtype=torch.float64)
            weight[0] = 1.0
            if family in inside:
                weight[1:, 1:][inside[family]] = 1.0
            elif family == "cls":
                weight[1:, 0] = 1.0
            else:
                weight[:] = 1.0
            weight = weight * torch.exp(noise * torch.randn(n + 1, n + 1, dtype=torch.float64, generator=generator))
            heads.append(weight / weight.sum(-1, keepdim=True))
        layers.append(AttentionMap.from_dense(torch.stack(heads)[None]))
    return layers, FAMILIES * copies


def scaled(patterns: Tensor) -> Tensor:
    """Each pattern over its largest absolute weight: the shape of a pattern, whatever its sharpness."""
    return patterns / patterns.abs().amax((1, 2), keepdim=True).clamp(min=1e-300)


def _cells(lengths: Tensor, width: int, side: int) -> Tensor:
    """How much of each token belongs to each cell, ``[B, side, width]``: columns of real tokens sum to 1."""
    token, cell = torch.arange(width, dtype=torch.float64), torch.arange(side, dtype=torch.float64)[:, None]
    step = lengths.double()[:, None, None] / side
    overlap = torch.minimum(token + 1, (cell + 1) * step) - torch.maximum(
        token.expand(len(lengths), 1, -1), cell * step
    )
    return overlap.clamp(min=0) * (token < lengths[:, None, None])


ANALYSES = (
    Analysis(
        name="head-patterns",
        question="What do the patterns of heads look like, at one size?",
        function=head_patterns,
        example=lambda: {"source": random_maps(batch=2), "side": 8},
        paper="ViT visual analytics 2023 (arXiv 2303.13731), abstract",
        source="maps",
        null="even attention over what each query may see",
        definition="Pooling to cells by overlap is ours; the paper flattens maps of one image size.",
    ),
)
