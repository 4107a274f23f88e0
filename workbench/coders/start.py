"""Where training starts: biases and directions taken from the first rows of data."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.coders.coder import Coder
from workbench.errors import UnknownName, WorkbenchError

STARTS = ("active-subspace", "random")
ROWS = 16_384
"""Rows that statistics of the start are taken from, at most."""
_SIZED = 2048
_ROGUE = 0.5
_COVERED = 0.99


def geometric_median(x: Tensor, rounds: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the smallest sum of distances to the rows of x ``[N, D]``, ``[D]``, by Weiszfeld's iteration.

    The bias of an autoencoder starts there (Bricken et al. 2023): unlike the mean it does not follow outliers."""
    point = x.mean(0)
    for _ in range(rounds):
        weight = 1 / (x - point).norm(dim=1).clamp(min=1e-12)
        new = (x * weight[:, None]).sum(0) / weight.sum()
        moved, point = (new - point).norm(), new
        if moved <= tolerance * point.norm().clamp(min=1e-12):
            break
    return point


def active_subspace(x: Tensor) -> Tensor:
    """An orthonormal basis ``[d, D]`` of the directions in which the centred rows of x ``[N, D]`` vary.

    d is the least number of principal directions with 99% of the variance. Directions that alone hold more than all that
    come after them, as the few huge dimensions of residual streams do, are kept but left out of that count.
    """
    centred = x - x.mean(0)
    _, size, basis = torch.linalg.svd(centred, full_matrices=False)
    variance = size.pow(2)
    rogue = 0
    while rogue < len(variance) - 1 and variance[rogue] > _ROGUE * variance[rogue:].sum():
        rogue += 1
    share = variance[rogue:].cumsum(0) / variance[rogue:].sum().clamp(min=1e-30)
    wanted = rogue + int((share < _COVERED).sum()) + 1
    return basis[: min(wanted, len(basis))]


@torch.no_grad()
def begin(coder: Coder, x: Tensor, target: Tensor, start: str, generator: torch.Generator) -> None:
    """Set biases and directions of an untrained coder from rows ``x [N, D_in]`` and ``target [N, D_out]``.

    ``b_dec`` is the geometric median of the target. Directions are random: with ``random`` in all of space, with
    ``active-subspace`` within that of the data (Wang et al. 2025, arXiv 2508.16929): attention outputs fill a part of space
    alone, and features that read the rest are never active. An autoencoder's encoder is its decoder transposed.
    """
    if start not in STARTS:
        raise UnknownName("start", start, STARTS)
    if not len(x) or not bool(torch.isfinite(x).all() & torch.isfinite(target).all()):
        raise WorkbenchError("training starts from rows of finite numbers; got none, or NaN or infinities among them")
    coder.b_dec.copy_(geometric_median(target[:ROWS]))

    def directions(rows: Tensor) -> Tensor:
        basis = active_subspace(rows[:ROWS]) if start == "active-subspace" else None
        width = rows.shape[1] if basis is None else len(basis)
        drawn = torch.randn(coder.features, width, generator=generator, dtype=torch.float32).to(rows)
        drawn = drawn if basis is None else drawn @ basis
        return drawn / drawn.norm(dim=1, keepdim=True)

    read = directions(x)
    coder.W_enc.copy_(read.T)
    if coder.centred:
        coder.W_dec.copy_(read)
        _fit_size(coder, x[:_SIZED], target[:_SIZED])
        return
    if coder.d_in == coder.d_out and x.data_ptr() == target.data_ptr():  # a crosscoder: one direction for all its parts
        coder.W_dec.copy_(read)
    else:
        coder.W_dec.copy_(directions(target))
    middle = geometric_median(x[:ROWS])
    coder.b_enc.copy_(-middle @ coder.W_enc)
    _fit_size(coder, x[:_SIZED], target[:_SIZED])


def _fit_size(coder: Coder, x: Tensor, target: Tensor) -> None:
    """Scale the encoder so that the first outputs have the right size: many random features are active at once, each of which
    alone would explain a good part, and what they write together would be far too much."""
    written = coder.decode(coder.activate(coder.pre(x))) - coder.b_dec
    size = written.pow(2).sum()
    if size > 0:
        factor = float((written * (target - coder.b_dec)).sum() / size)
        if factor > 0:
            coder.W_enc.mul_(factor)
            coder.b_enc.mul_(factor)
