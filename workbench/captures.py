"""What to record about attention while a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.mods import Mod

STATS = ("received", "entropy", "distance", "distance2", "top1")
REDUCTIONS = ("sum", "mean", "max", "abs")


@dataclass(frozen=True)
class Capture:
    """A request for attention maps. Build it with ``capture``; ``Model.run(..., maps=capture(...))`` honours it."""

    layers: tuple[int | str, ...] | None = None
    blocks: int | None = None
    reduce: tuple[str, ...] = ("sum",)
    stats: tuple[str, ...] = ()
    keep: bool = True
    window: int | None = None
    topk: int | None = None
    mass: tuple[tuple[str, Mod | Tensor], ...] = ()
    store: Path | None = None


def capture(
    *,
    layers: Iterable[int | str] | int | str | None = None,
    blocks: int | None = None,
    reduce: Iterable[str] | str = ("sum",),
    stats: Iterable[str] = (),
    window: int | None = None,
    topk: int | None = None,
    mass: Mapping[str, Mod | Tensor] | None = None,
    keep: bool = True,
    store: str | Path | None = None,
) -> Capture:
    """A capture request. Whatever it names is computed in one pass over the layer's queries and keys while the model runs.

    ``layers``: which layers (all by default). ``blocks``: side of the square blocks of the block maps, in tokens, and
    ``reduce`` which ones (``sum``, ``mean``, ``max``, ``abs``). ``stats``: ``received``, ``entropy``, ``distance``,
    ``distance2`` (its second moment), ``top1``. ``window``: also the distance cut at that many tokens. ``topk``: also that
    many top keys of every row. ``mass``: names and what each is the mass of, a function (b, h, q, k) or one weight per key
    ``[K]`` or ``[B, K]``; ``map.mass(name)`` answers.

    ``keep``: keep q, k and LSE (linear in tokens, in the model's own type) so that any exact tile or further statistic can be
    computed later; with ``keep=False`` only what was asked for here can be answered. ``store``: a folder that q, k, LSE and
    everything computed go to, layer by layer, instead of to memory; ``open_maps`` reads it back, in any process.
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
    sizes = {
        "blocks is the side of a block in tokens": blocks,
        "window cuts a distance, in tokens": window,
        "topk is a number of keys": topk,
    }
    for what, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise WorkbenchError(f"{what}, at least 1; got {value!r}")
    for key, weights in (mass or {}).items():
        if not isinstance(key, str) or not (callable(weights) or hasattr(weights, "ndim")):
            raise WorkbenchError(
                f"mass names functions (b, h, q, k) or tensors of one weight per key; got {key!r}: {type(weights).__name__}"
            )
    return Capture(
        None if layers is None else tuple(layers),
        blocks,
        reduce,
        stats,
        keep,
        window,
        topk,
        tuple((mass or {}).items()),
        None if store is None else Path(store),
    )
