"""What does an approximation of attention get wrong, and where?

Two maps of one shape are compared row by row: total variation, half the sum of |P~ - P|, is the share of a query's mass
that has moved; block maps of the signed and of the absolute difference say where it went from and to. For DeltaLLM's
rule, keys whose channels have moved by less than a threshold since the token before keep their old value outside of a
local window: the curve sets the share of key entries that need not be computed against the mass that moves. Moved mass
is not loss: that takes a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.attention_map import CHUNK, AttentionMap
from workbench.errors import Refused, WorkbenchError
from workbench.mixers.pruning import held_keys_map
from workbench.patterns.lazy import LazyMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.results import Result, axis
from workbench.run import Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class MapError(Result):
    """``moved`` ``[H, Q]``: total variation per query, mean over examples; ``worst`` ``[H]``: the largest single weight
    error; ``signed`` and ``absolute`` ``[H, Q/size, K/size]``: sums of P~ - P and of |P~ - P|, mean over examples."""

    moved: Tensor
    worst: Tensor
    signed: Tensor
    absolute: Tensor
    size: int

    def frame(self) -> pd.DataFrame:
        """One row per head: ``head, moved, worst_row, worst_weight``."""
        import pandas as pd

        rows = {"moved": self.moved.mean(-1), "worst_row": self.moved.amax(-1), "worst_weight": self.worst}
        table = pd.DataFrame({name: values.tolist() for name, values in rows.items()})
        table.insert(0, "head", range(len(table)))
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Where mass moved, all heads together: red lost, blue gained."""
        ax = axis(ax, 4.4, 3.8)
        picture = self.signed.mean(0)
        top = float(picture.abs().max()) or 1.0
        image = ax.imshow(picture.numpy(), cmap="RdBu", vmin=-top, vmax=top, interpolation="nearest")
        ax.set(xlabel=f"key block of {self.size}", ylabel="query block", title="approximation - exact")
        ax.figure.colorbar(image, ax=ax, label="mass")
        return ax


def map_error(exact: AttentionMap, approximate: AttentionMap, *, size: int = 64) -> MapError:
    """The error of ``approximate`` against ``exact``, two maps of one shape, walked in row chunks.

    Raises ``WorkbenchError`` for maps of unequal shape or domain.
    """
    if exact.shape != approximate.shape or exact.domain != approximate.domain:
        raise WorkbenchError(
            f"maps of one shape and domain; got {list(exact.shape)} {exact.domain} and {list(approximate.shape)} "
            f"{approximate.domain}"
        )
    b, h, q, k = exact.shape
    difference = LazyMap(
        exact.shape,
        lambda lo, hi: approximate.rows(lo, hi).double() - exact.rows(lo, hi).double(),
        sign="signed",
        row_sum="free",
    )
    step = max(1, CHUNK // (b * h * k))
    moved, worst = [], torch.zeros(h, dtype=torch.float64)
    for lo in range(0, q, step):
        rows = difference.rows(lo, min(q, lo + step)).abs().cpu()
        moved.append(rows.sum(-1).mean(0) / 2)
        worst = torch.maximum(worst, rows.amax((0, 2, 3)))
    signed, absolute = (difference.blocks(size, name).mean(0).cpu() for name in ("sum", "abs"))
    return MapError(torch.cat(moved, -1), worst, signed, absolute, size)


@dataclass(frozen=True)
class HeldKeys(Result):
    """DeltaLLM's trade on captured layers. ``held`` layer -> ``[T, H]``: the share of key entries outside of the window
    that keep their value, for each of T thresholds; ``moved`` layer -> ``[T, H]``: mean total variation of the rows."""

    held: Mapping[int | str, Tensor]
    moved: Mapping[int | str, Tensor]
    thresholds: tuple[float, ...]
    window: int
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per layer, head and threshold: ``layer, head, threshold, held, moved``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": layer, "head": head, "threshold": threshold,
                "held": float(self.held[layer][t, head]), "moved": float(self.moved[layer][t, head]),
            }
            for layer in self.held
            for head in range(self.held[layer].shape[1])
            for t, threshold in enumerate(self.thresholds)
        )  # fmt: skip

    def plot(self, ax: Axes | None = None) -> Axes:
        """Moved mass over held entries, one line per layer, mean over heads."""
        ax = axis(ax, 4.6, 3.2)
        for layer in self.held:
            ax.plot(
                self.held[layer].mean(1).numpy(), self.moved[layer].mean(1).numpy(), marker=".", label=f"layer {layer}"
            )
        ax.set(xlabel="share of key entries held", ylabel="attention mass moved")
        ax.legend()
        return ax


def held_key_errors(
    run: Run, thresholds: Sequence[float] = (0.0, 0.1, 0.2, 0.5, 1.0), *, window: int = 64, size: int = 64
) -> HeldKeys:
    """DeltaLLM's held keys on every captured layer of a run, against the layer's own map.

    Refused for layers whose map is not that of a softmax over kept queries and keys. Thresholds are in units of the
    keys.
    """
    if not run.maps:
        raise WorkbenchError("this run captured no attention; run it again with maps=wb.capture()")
    if not len(thresholds) or min(thresholds) < 0 or window < 1:
        raise WorkbenchError(
            f"thresholds are not negative, a window is one key or more; got {list(thresholds)}, {window}"
        )
    held: dict[int | str, Tensor] = {}
    moved: dict[int | str, Tensor] = {}
    for layer, amap in run.maps.items():
        if not isinstance(amap, SoftmaxMap):
            raise Refused(f"layer {layer!r}: keys are held in softmax attention with its q and k; this is {amap!r}")
        if amap.scores.bias is not None or amap.scores.softcap is not None or amap.scores.sink is not None:
            raise Refused(f"layer {layer!r}: held keys are modelled without biases, softcap and sink logits")
        shares, errors = [], []
        q, k = amap.scores.q, amap.scores.k
        groups = q.shape[1] // k.shape[1]
        for threshold in thresholds:
            found = held_keys_map(q, k, threshold=threshold, window=window, mask=amap.mask, scale=amap.scores.scale)
            shares.append(found.reused().double().mean((0, 2)).repeat_interleave(groups).cpu())
            errors.append(map_error(amap, found, size=size).moved.mean(-1))
        held[layer], moved[layer] = torch.stack(shares), torch.stack(errors)
    return HeldKeys(held, moved, tuple(thresholds), window, run.provenance)
