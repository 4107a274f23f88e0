"""Does a rule that picks blocks of keys pick those that the attention goes to?

A rule gives every (query block, key block) a score; keeping the best blocks of a row gives a sparsity, the share of visible
blocks that is dropped, and a recall, the share of attention mass inside of the kept ones. The curve of recall over sparsity
is compared with the oracle, which ranks by the true mass, and with random choice. Recall says what a sparse kernel would see
of the mass, not what the model loses: that takes a run with the blocks hidden.

Rules that need no training, from queries and keys after rotary positions: products of block means, and those of chunk means
scaled by the root of the chunk's length (DHSA). A trained one is the gate of ``kernels/seer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.mixers.chosen import block_means
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.padding import padding
from workbench.probes.sources import one_map
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KEPT = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class SelectionCurves(Result):
    """``recall`` rule -> ``[H, len(kept)]``, mean over examples and query blocks; ``sparsity`` ``[len(kept)]``, the share of
    visible blocks dropped (a row keeps one block at least). Rules ``oracle`` and ``random`` are always there."""

    recall: Mapping[str, Tensor]
    sparsity: Tensor
    kept: tuple[float, ...]
    size: int
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per rule, head and budget: ``rule, head, kept, sparsity, recall``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "rule": rule,
                "head": head,
                "kept": kept,
                "sparsity": float(self.sparsity[i]),
                "recall": float(values[head, i]),
            }
            for rule, values in self.recall.items()
            for head in range(len(values))
            for i, kept in enumerate(self.kept)
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Recall over sparsity, mean over heads, one line per rule."""
        ax = axis(ax, 4.6, 3.2)
        for rule, values in self.recall.items():
            dashed = rule in ("oracle", "random")
            ax.plot(self.sparsity.numpy(), values.mean(0).numpy(), "--" if dashed else "-", marker=".", label=rule)
        ax.set(xlabel="share of visible blocks dropped", ylabel="attention mass kept", ylim=(0, 1.03))
        ax.legend()
        return ax


def block_mean_scores(q: Tensor, k: Tensor, size: int) -> Tensor:
    """Products of block means, ``[B, H, Q/size, K/size]``: q ``[B, H, Q, E]``, k ``[B, G, K, E]``. Not scaled."""
    _check(q, k, size)
    return block_means(q, size) @ block_means(k, size).repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)


def chunk_scores(q: Tensor, k: Tensor, bounds: Sequence[int], size: int) -> Tensor:
    """Scores of chunks of any length, as DHSA has them, for blocks ``[B, H, Q/size, K/size]``.

    ``bounds`` are the starts of the chunks, from 0 on. A chunk is represented by its mean times the root of its length; a
    block's score is the mean over the tokens of both sides of their chunks' products, each chunk's product standing for all
    its tokens.
    """
    _check(q, k, size)
    starts = [*bounds]
    if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)) or starts[-1] >= k.shape[2]:
        raise WorkbenchError(f"bounds are increasing starts of chunks below {k.shape[2]}, the first 0; got {starts}")
    if q.shape[2] != k.shape[2]:
        raise WorkbenchError(f"chunks are of one sequence: as many queries as keys; got {q.shape[2]} and {k.shape[2]}")
    spread = torch.zeros(k.shape[2], len(starts), dtype=k.dtype, device=k.device)
    member = torch.bucketize(torch.arange(k.shape[2]), torch.tensor(starts), right=True) - 1
    spread[torch.arange(k.shape[2]), member] = 1.0
    lengths = spread.sum(0)
    scaled = spread / lengths.sqrt()
    keys = (scaled.T @ k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    table = (scaled.T @ q) @ keys.transpose(-1, -2)
    share = block_means(spread[None, None], size)
    return share @ table @ share.transpose(-1, -2)


def selection_curves(
    amap: AttentionMap,
    scores: Mapping[str, Tensor],
    size: int,
    *,
    kept: Sequence[float] = KEPT,
    seed: int = 0,
) -> SelectionCurves:
    """Recall of each rule's ``scores`` ``[B, H or 1, Q/size, K/size]`` against the true block map of ``amap``.

    ``kept`` are shares of the visible blocks of a row, in (0, 1]. A block is visible if the map has weight in it; rows
    without any are left out, and so are queries that the map's own mask names as padding. Refused for maps with negative
    weights, whose mass says nothing about what matters.
    """
    if one_map(amap).sign == "signed":
        raise Refused("a signed map has no mass to recall: weights cancel")
    on = padding(0, amap, None).queries
    told = amap if on is None or bool(on.all()) else GatedMap(amap, on[:, None].expand(amap.shape[:3]).double())
    mass = told.blocks(size, "sum").double()
    wrong = [share for share in kept if not 0 < share <= 1]
    if wrong or not len(kept):
        raise WorkbenchError(f"kept holds shares of the visible blocks, in (0, 1]; got {list(kept)}")
    generator = torch.Generator().manual_seed(seed)
    ranks: dict[str, Tensor] = {
        "oracle": mass,
        "random": torch.rand(mass.shape, generator=generator, dtype=torch.float64),
    }
    for name, table in scores.items():
        if name in ranks:
            raise WorkbenchError(f"a rule cannot be called {name!r}: that curve is always there")
        if table.ndim != 4 or table.shape[2:] != mass.shape[2:] or table.shape[1] not in (1, mass.shape[1]):
            raise WorkbenchError(
                f"scores of {name!r} are [B, H, Q/{size}, K/{size}] = {list(mass.shape)}; got {list(table.shape)}"
            )
        ranks[name] = table.double().expand_as(mass)
    visible = mass > 0
    count = visible.sum(-1)
    total = mass.sum(-1)
    real = total > 0
    keep = torch.stack([(count * share).ceil().clamp(min=1) for share in kept])
    recall: dict[str, Tensor] = {}
    for name, table in ranks.items():
        order = table.masked_fill(~visible, float("-inf")).argsort(dim=-1, descending=True, stable=True)
        gained = torch.nn.functional.pad(mass.gather(-1, order).cumsum(-1), (1, 0))
        share = torch.stack([gained.gather(-1, k[..., None].long()).squeeze(-1) for k in keep], -1)
        share = share / total.masked_fill(~real, 1.0)[..., None]
        recall[name] = (share * real[..., None]).sum((0, 2)) / real.sum((0, 2))[:, None]
    dropped = torch.stack([1 - (k * real).sum() / (count * real).sum() for k in keep])
    return SelectionCurves(recall, dropped, tuple(kept), size)


def _check(q: Tensor, k: Tensor, size: int) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3] or size < 1:
        raise WorkbenchError(
            f"q is [B, H, Q, E] and k [B, G, K, E] with G dividing H, blocks of one token or more; got {list(q.shape)}, "
            f"{list(k.shape)}, size={size}"
        )


ANALYSES = (
    Analysis(
        name="selection-curves",
        question="Does a rule that picks blocks of keys pick those that the attention goes to?",
        function=selection_curves,
        example=lambda: {"amap": random_maps(1, tokens=16)[0], "scores": {}, "size": 4},
        paper="SeerAttention (Learning Intrinsic Sparse Attention in Your LLMs, 2024), recall against sparsity",
        source="maps",
        null="random blocks, and the oracle that ranks by the true mass",
        cause="workbench.probes.structure.oracle.sparsified",
    ),
)
