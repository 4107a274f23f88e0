"""How far, in patches, does each head look?

The attention strength of a head at k hops is the mass that a patch gives to the patches at Chebyshev distance k (the ring of up
to 8 k patches around it), averaged over all patches p of the image:

    S_k = 1/N sum_p sum_{q: max(|row_p - row_q|, col_p - col_q|) = k} A[p, q]

(Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", arXiv 2303.13731; the paper was read
in its abstract, so this definition is ours.) Mass on the class token and on tokens that are no patches stands beside it, and so
do the class token's own row, so that all parts of a row add up to its sum. Rings are cut at the border, which is in the null:
what S_k would be if each patch spread its mass evenly over the tokens that it may see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sources import Source, provenance_of
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.on_patches import (
    even_sums,
    hop_distance,
    is_summary,
    named_masses,
    patch_maps,
    patch_rows,
)
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BESIDE = ("class", "others")


class _Layer(NamedTuple):
    """``strength even`` ``[B, H, R + 2]``: R rings, class token, other tokens. ``reach`` ``[B, H, N]``: mean hops of every patch.
    ``cls`` ``[B, H, 3]``: the class token's row on patches, itself and others, or None."""

    strength: Tensor
    even: Tensor
    reach: Tensor
    cls: Tensor | None


@dataclass(frozen=True)
class HopProfile(Result):
    """Layer -> ``[H, R + 2]``: attention strength at 0 ... R - 1 hops, then mass on the class token and on other tokens; means
    over images, ``low`` and ``high`` their 95% interval (NaN for one image), ``uniform`` the null.

    ``reach`` layer -> ``[H, N]``: mean hops of each patch's attention to patches, weighted by it; NaN where it gives none to
    any. ``from_class`` layer -> ``[H, 3]``: mass of the class token's row on all patches, on itself, on others; without a class
    token empty.
    """

    strength: Mapping[int | str, Tensor]
    low: Mapping[int | str, Tensor]
    high: Mapping[int | str, Tensor]
    uniform: Mapping[int | str, Tensor]
    reach: Mapping[int | str, Tensor]
    from_class: Mapping[int | str, Tensor]
    grid: Grid
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per layer, head, query (``patches`` or ``class``) and key (``hop k``, ``patches``, ``class`` or ``others``):
        ``strength, low, high, uniform``."""
        import pandas as pd

        rings = [f"hop {k}" for k in range(next(iter(self.strength.values())).shape[1] - len(BESIDE))]
        parts = []
        for layer, strength in self.strength.items():
            heads, width = strength.shape
            columns = (strength, self.low[layer], self.high[layer], self.uniform[layer])
            names = ("strength", "low", "high", "uniform")
            parts.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "head": torch.arange(heads).repeat_interleave(width).numpy(),
                        "query": "patches",
                        "key": [*rings, *BESIDE] * heads,
                        **{name: part.flatten().numpy() for name, part in zip(names, columns, strict=True)},
                    }
                )
            )
            if layer in self.from_class:
                own = self.from_class[layer]
                parts.append(
                    pd.DataFrame(
                        {
                            "layer": layer,
                            "head": torch.arange(heads).repeat_interleave(3).numpy(),
                            "query": "class",
                            "key": ["patches", *BESIDE] * heads,
                            "strength": own.flatten().numpy(),
                        }
                    )
                )
        return pd.concat(parts, ignore_index=True)

    def ring(self, layer: int | str, head: int) -> int:
        """The hops at which a head is strongest above what even attention would give there."""
        strength = self._of(layer, head)
        return int((strength - self.uniform[layer][head])[: -len(BESIDE)].argmax())

    def image(self, layer: int | str, head: int) -> Tensor:
        """Mean hops of every patch, where it lies: ``[rows, cols]``."""
        self._of(layer, head)
        return self.grid.image(self.reach[layer][head])

    def plot(self, ax: Axes | None = None, layer: int | str | None = None) -> Axes:
        """Strength over hops, a line per head of one layer (the last by default); dashed: even attention."""
        name = list(self.strength)[-1] if layer is None else layer
        self._of(name, 0)
        rings = self.strength[name].shape[1] - len(BESIDE)
        ax = axis(ax, 4.8, 3.2)
        for head, row in enumerate(self.strength[name]):
            ax.plot(range(rings), row[:rings].numpy(), marker=".", label=f"head {head}")
        ax.plot(range(rings), self.uniform[name].mean(0)[:rings].numpy(), linestyle="--", color="0.4", label="even")
        ax.set(xlabel="hops (patches)", ylabel="attention strength", title=f"Layer {name}\n{self.provenance.model}")
        ax.legend(fontsize=7)
        return ax

    def _of(self, layer: int | str, head: int) -> Tensor:
        if layer not in self.strength:
            raise UnknownName("layer", layer, self.strength)
        if not 0 <= head < len(self.strength[layer]):
            raise UnknownName("head", head, range(len(self.strength[layer])))
        return self.strength[layer][head]


@torch.no_grad()
def hops(source: Source, grid: Grid, *, queries: Sequence[int] | None = None, raw: bool = False) -> HopProfile:
    """Attention strength by hops, of every head.

    ``grid`` says where patches lie (``grid_of(model)``). ``queries`` are the patches to average over (all by default): one
    patch gives the profile of its own row. Gated maps count as they act, ``raw=True`` inside the gate; signed maps are refused.
    Rows are read in chunks; a map captured with ``keep=False`` answers if ``image_mods(grid)`` were among its masses.
    """
    chosen = torch.arange(grid.patches) if queries is None else torch.tensor(list(queries), dtype=torch.long)
    if not len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= grid.patches:
        raise WorkbenchError(f"queries are patches 0 ... {grid.patches - 1}, at least one; got {list(queries or ())}")
    found = {name: _layer(amap, grid, chosen) for name, amap in patch_maps(source, grid, raw=raw).items()}
    bounds = {name: interval(layer.strength) for name, layer in found.items()}
    undefined = {}
    if grid.cls is None:
        undefined["class"] = "this model has no class token"
    elif any(layer.cls is None for layer in found.values()):
        undefined["from_class"] = "the map was captured without rows: the class token's own row is not among its masses"
    return HopProfile(
        strength={name: layer.strength.mean(0) for name, layer in found.items()},
        low={name: low for name, (low, _) in bounds.items()},
        high={name: high for name, (_, high) in bounds.items()},
        uniform={name: layer.even.mean(0) for name, layer in found.items()},
        reach={name: layer.reach.nanmean(0) for name, layer in found.items()},
        from_class={name: layer.cls.mean(0) for name, layer in found.items() if layer.cls is not None},
        grid=grid,
        undefined=undefined,
        provenance=provenance_of(source),
    )


def _layer(amap: AttentionMap, grid: Grid, chosen: Tensor) -> _Layer:
    rings = max(grid.rows, grid.cols)
    b, h, _, _ = amap.shape
    strength, even = (torch.zeros(b, h, rings + 2, dtype=torch.float64) for _ in range(2))
    reach = torch.full((b, h, grid.patches), float("nan"), dtype=torch.float64)
    far = torch.arange(rings, dtype=torch.float64)
    wanted = torch.zeros(grid.patches)
    wanted[chosen] = 1
    if is_summary(amap):
        parts = _named(amap, grid, rings)
        sums = parts.sum(-1, keepdim=True)
        for patches, row in even_sums(amap, grid):
            even += ((_rings(row, grid, patches, rings) * sums[:, :, patches]) * wanted[patches, None]).sum(2)
        strength = (parts * wanted[:, None]).sum(2)
        reach = parts[..., :rings] @ far / parts[..., :rings].sum(-1)
        return _Layer(strength / wanted.sum(), even / wanted.sum(), reach, None)
    for patches, rows, spread in patch_rows(amap, grid):
        parts = _rings(rows, grid, patches, rings)
        strength += (parts * wanted[patches, None]).sum(2)
        even += (_rings(spread, grid, patches, rings) * wanted[patches, None]).sum(2)
        reach[..., patches] = parts[..., :rings] @ far / parts[..., :rings].sum(-1)
    cls = None
    if grid.cls is not None:
        row = amap.rows(grid.cls, grid.cls + 1).detach().cpu().double()[:, :, 0]
        cls = torch.stack([grid.of_tokens(row).sum(-1), row[..., grid.cls]], -1)
        cls = torch.cat([cls, row.sum(-1, keepdim=True) - cls.sum(-1, keepdim=True)], -1)
    return _Layer(strength / wanted.sum(), even / wanted.sum(), reach, cls)


def _rings(rows: Tensor, grid: Grid, patches: Tensor, rings: int) -> Tensor:
    """``rows`` ``[B, H, c, K]`` summed over rings, class token and others: ``[B, H, c, R + 2]``."""
    out = rows.new_zeros(*rows.shape[:3], rings + 2)
    at = hop_distance(grid, patches).expand(*rows.shape[:3], -1)
    out.scatter_add_(-1, at, rows[..., grid.index])
    if grid.cls is not None:
        out[..., rings] = rows[..., grid.cls]
    out[..., rings + 1] = rows.sum(-1) - out[..., : rings + 1].sum(-1)
    return out


def _named(amap: AttentionMap, grid: Grid, rings: int) -> Tensor:
    """The same from named masses, ``[B, H, N, R + 2]``."""
    names = [*(f"hop {k}" for k in range(rings)), *BESIDE]
    return torch.stack(named_masses(amap, grid, names), -1)


ANALYSES = (
    Analysis(
        name="attention-hops",
        question="How far, in patches, does each head look?",
        function=hops,
        example=lambda: {
            "source": random_maps(tokens=13, causal=False),
            "grid": Grid(3, 4, (8, 8), start=1, cls=0, tokens=13),
        },
        paper="Li et al. 2023 (arXiv 2303.13731), attention strength by hops",
        source="maps",
        null="each patch's mass spread evenly over the tokens that it may see",
        definition="mean over patches of the mass at each Chebyshev distance; the abstract was read, not the text",
    ),
)
