"""How far does information travel through layers of sparse attention?

A mask lets a query see some keys directly; after m layers, what it can have heard of is what the mask's m-th boolean power lets
through. A window of W reaches m (W - 1) tokens back, blocks at distances 2^k reach everything after about log2 of their number
(PowerAttention, whose argument this is). The heads of a layer count together, since any of them can carry the information; a
position also keeps its own stream from layer to layer.

Counted in blocks: a block hears of another if any of its tokens sees any of the other's. That is exact for blocks of one
token and for block masks; for others it is an upper bound, which the smallest block makes tight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.probes.catalogue import Analysis
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_LIMIT = 4096


@dataclass(frozen=True)
class Reach(Result):
    """``needed`` ``[n, n]``: layers until block i has heard of block j, 0 for itself, -1 if never within ``layers``. ``share``,
    ``farthest`` and ``edges`` have one number per layer: the share of the pairs that dense attention connects, the distance in
    tokens from the last block to the farthest that it has heard of, and the share of pairs that the layer itself connects."""

    needed: Tensor
    share: Tensor
    farthest: Tensor
    edges: Tensor
    size: int
    provenance: Provenance = field(default_factory=lambda: Provenance("mask"))

    @property
    def layers(self) -> int | None:
        """Layers until every block has heard of every block that dense attention shows it; None if more than were asked for."""
        done = (self.share >= 1).nonzero()
        return int(done[0, 0]) + 1 if len(done) else None

    def frame(self) -> pd.DataFrame:
        """One row per layer: ``layers, share, farthest, edges``."""
        import pandas as pd

        columns = {"share": self.share, "farthest": self.farthest, "edges": self.edges}
        table = pd.DataFrame({name: values.tolist() for name, values in columns.items()})
        table.insert(0, "layers", range(1, len(table) + 1))
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Layers needed, per pair of blocks; what is never reached stays empty."""
        ax = axis(ax, 4.6, 3.8)
        shown = self.needed.double().masked_fill(self.needed < 0, float("nan")).numpy()
        image = ax.imshow(shown, cmap="viridis_r", interpolation="nearest")
        ax.set(xlabel=f"key block of {self.size}", ylabel="query block", title="layers until information arrives")
        ax.figure.colorbar(image, ax=ax, label="layers")
        return ax


def reach(
    pattern: Mask | AttentionMap | Tensor | Sequence[Mask | AttentionMap | Tensor],
    *,
    tokens: int | None = None,
    layers: int = 8,
    size: int = 64,
    threshold: float = 0.0,
) -> Reach:
    """Growth of the receptive field over ``layers`` layers of one pattern, or of a list of patterns, one per layer (repeated
    from the start if there are more layers than patterns).

    A ``Mask`` needs ``tokens``; a map counts as connecting where its largest weight in a block exceeds ``threshold``; a bool
    tensor ``[n, n]`` (or ``[H, n, n]``, heads joined) is taken as blocks of ``size`` tokens. Raises ``WorkbenchError`` for
    patterns that are not square or differ in size, ``Refused`` above 4,096 blocks.
    """
    patterns: list[Any] = list(pattern) if isinstance(pattern, list | tuple) else [pattern]
    if layers < 1 or size < 1 or not patterns:
        raise WorkbenchError(
            f"reach wants a pattern, layers and a block size of at least 1; got layers={layers}, size={size}"
        )
    found = [_blocks(one, tokens, size, threshold) for one in patterns]
    n = len(found[0])
    if any(one.shape != (n, n) for one in found):
        raise WorkbenchError(f"patterns of one size; got {[list(one.shape) for one in found]} blocks")
    causal = not any(bool(one.triu(1).any()) for one in found)
    possible = torch.ones(n, n).tril() if causal else torch.ones(n, n)
    total = float(possible.sum())
    heard, needed = torch.eye(n), torch.full((n, n), -1, dtype=torch.int64)
    needed.fill_diagonal_(0)
    share, farthest, edges = [], [], []
    last = torch.arange(n)
    for layer in range(layers):
        one = found[layer % len(found)]
        step = one.float().fill_diagonal_(1.0)
        heard = ((step @ heard) > 0).float()
        needed[(heard > 0) & (needed < 0)] = layer + 1
        share.append(float((heard * possible).sum()) / total)
        farthest.append(int((n - 1 - last[heard[-1] > 0]).max()) * size)
        edges.append(float((one.float() * possible).sum()) / total)
    numbers = [torch.tensor(values, dtype=torch.float64) for values in (share, farthest, edges)]
    return Reach(needed, numbers[0], numbers[1], numbers[2], size)


def _blocks(pattern: Mask | AttentionMap | Tensor, tokens: int | None, size: int, threshold: float) -> Tensor:
    """Which block sees which, ``[n, n]`` bool, over all heads of the first example."""
    if isinstance(pattern, Mask):
        if tokens is None or tokens < 1:
            raise WorkbenchError("a mask says nothing about its length: reach(mask, tokens=...)")
        _check_size(-(-tokens // size))
        return _of_mask(pattern, tokens, size)
    if isinstance(pattern, AttentionMap):
        _, _, q, k = pattern.shape
        if q != k:
            raise WorkbenchError(f"information goes from layer to layer over the same positions; got {q} x {k}")
        _check_size(-(-q // size))
        strongest = pattern.blocks(size, "max")[0].amax(0)
        if pattern.sign == "signed":
            strongest = pattern.blocks(size, "abs")[0].amax(0)
        return (strongest > threshold).cpu()
    joined = pattern.any(0) if pattern.ndim == 3 else pattern
    if joined.ndim != 2 or joined.dtype != torch.bool or joined.shape[0] != joined.shape[1]:
        raise WorkbenchError(f"blocks are bool [n, n] or [H, n, n]; got {pattern.dtype} {list(pattern.shape)}")
    _check_size(len(joined))
    return joined.cpu()


def _of_mask(mask: Mask, tokens: int, size: int) -> Tensor:
    n = -(-tokens // size)
    out = torch.zeros(n, n, dtype=torch.bool)
    for row in range(n):
        rows = slice(row * size, min(tokens, (row + 1) * size))
        seen = mask.tile(rows, slice(0, tokens), torch.device("cpu"))
        if seen is None:
            return torch.ones(n, n, dtype=torch.bool)
        keys = seen[0].any(0).any(0) if seen.ndim == 4 else seen.any(0)
        out[row] = torch.nn.functional.pad(keys, (0, n * size - tokens)).view(n, size).any(1)
    return out


def _check_size(blocks: int) -> None:
    if blocks > _LIMIT:
        raise Refused(f"{blocks:,} blocks are over the limit of {_LIMIT:,}: use a larger block size")


ANALYSES = (
    Analysis(
        name="reach",
        question="How far does information travel through layers of sparse attention?",
        function=reach,
        example=lambda: {"pattern": Mask(causal=True, window=4), "tokens": 32, "size": 4, "layers": 4},
        paper="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention (2025)",
        source="tensors",
        null="dense attention, which reaches everything in one layer",
    ),
)
