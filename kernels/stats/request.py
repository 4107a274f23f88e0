"""What can be asked of ``attention_stats``, checked, and the order in which forms return it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.scores import Relative, Scores

REDUCTIONS = ("sum", "mean", "max", "abs")
STATS = ("received", "entropy", "distance", "windowed", "distance2", "top1")
TRITON_TOPK = 64
"""Top keys per row that the Triton form keeps in registers."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """A checked request: block side, reductions, statistics, cut of the windowed distance, number of top keys, key weights
    ``[B or 1, K]`` and pair weights in the order of ``AttentionStats.mass``, factor of the rows."""

    block: int | None = None
    reduce: tuple[str, ...] = ()
    stats: tuple[str, ...] = ()
    window: int | None = None
    topk: int | None = None
    keys: tuple[Tensor, ...] = ()
    pairs: tuple[Callable[..., Tensor], ...] = ()
    gate: Tensor | None = None


def layout(wanted: Wanted) -> list[str]:
    """Names of the tensors that a form returns, in order."""
    names = ["lse", *(f"blocks {name}" for name in wanted.reduce)]
    for name in wanted.stats:
        names += ["top1 values", "top1 keys"] if name == "top1" else [name]
    names += ["topk values", "topk keys"] if wanted.topk else []
    return names + [f"mass {i}" for i in range(len(wanted.keys) + len(wanted.pairs))]


def block_cells(queries: int, keys: int, size: int, like: Tensor) -> Tensor:
    """Number of cells in each block, ``[Q/size, K/size]`` rounded up."""
    rows, columns = (
        (n - torch.arange(0, n, size, dtype=like.dtype, device=like.device)).clamp(max=size) for n in (queries, keys)
    )
    return rows[:, None] * columns


def triton_cannot(scores: Scores, topk: int | None) -> str:
    """What of a call the Triton form does not do, empty if it does everything."""
    if not (scores.bias is None or isinstance(scores.bias, Tensor | Relative)):
        return "the bias is a function of rows (pass a tensor or a Relative table)"
    if scores.q.shape[3] > 256:
        return f"heads of width {scores.q.shape[3]} (256 at most)"
    if topk is not None and topk > TRITON_TOPK:
        return f"topk={topk} ({TRITON_TOPK} at most)"
    return ""
