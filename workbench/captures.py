"""What to record about attention while a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workbench.errors import UnknownName, WorkbenchError

STATS = ("received", "entropy", "distance", "top1")
REDUCTIONS = ("sum", "mean", "max", "abs")


@dataclass(frozen=True)
class Capture:
    """A request for attention maps. Build it with ``capture``; ``Model.run(..., maps=capture(...))`` honours it."""

    layers: tuple[int | str, ...] | None = None
    blocks: int | None = None
    reduce: tuple[str, ...] = ("sum",)
    stats: tuple[str, ...] = ()
    keep: bool = True


def capture(
    *,
    layers: Iterable[int | str] | int | str | None = None,
    blocks: int | None = None,
    reduce: Iterable[str] | str = ("sum",),
    stats: Iterable[str] = (),
    keep: bool = True,
) -> Capture:
    """A capture request.

    ``layers``: which layers (all by default). ``blocks``: side of the square blocks of the block maps, in tokens, and
    ``reduce`` which ones (``sum``, ``mean``, ``max``, ``abs``). ``stats``: statistics computed in the same pass
    (``received``, ``entropy``, ``distance``, ``top1``). ``keep``: keep q, k and LSE (linear in tokens) so that any exact tile
    or further statistic can be computed later; with ``keep=False`` only what was asked for here can be answered.
    """
    if isinstance(layers, bool):
        raise WorkbenchError(f"layers names attention layers, all of them by default; got {layers}")
    if isinstance(layers, int | str):
        layers = (layers,)
    reduce = (reduce,) if isinstance(reduce, str) else tuple(reduce)
    stats = (stats,) if isinstance(stats, str) else tuple(stats)
    for name in reduce:
        if name not in REDUCTIONS:
            raise UnknownName("block reduction", name, REDUCTIONS)
    for name in stats:
        if name not in STATS:
            raise UnknownName("statistic", name, STATS)
    if blocks is not None and (not isinstance(blocks, int) or blocks < 1):
        raise WorkbenchError(f"blocks is the side of a block in tokens, at least 1; got {blocks!r}")
    return Capture(None if layers is None else tuple(layers), blocks, reduce, stats, keep)
