"""Do twin models sink less attention into the first token, and do their activations grow less?

F-Attn, sink score and largest residual activation of two models on the same texts, on the maps as they act (``effective``, rows
scaled by the gate) and inside the gate (``raw``, what the published F-Attn of gated models measures: softmax weights, .467
without and .048 with a gate; Qiu et al., arXiv 2505.06708). For a layer without a gate both are the same map. Intervals are
bootstraps over sequences; where both models saw the same tokens, sequences are resampled together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.probes.bootstrap import resampled_means
from workbench.probes.catalogue import Analysis
from workbench.probes.sinks.scores import SinkResult, sinks
from workbench.probes.sources import maps_of
from workbench.results import Result, axis
from workbench.run import Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

QUANTITIES = ("f_attn", "sink_score", "largest", "largest_later")
MAPS = ("effective", "raw")


@dataclass(frozen=True)
class SinkComparison(Result):
    """Sinks of two models on the same texts. ``results[i]`` are the effective and the raw result of ``labels[i]``; a model
    without gates has one result, which is both. ``paired`` tells whether both saw the same tokens."""

    labels: tuple[str, str]
    results: tuple[tuple[SinkResult, ...], tuple[SinkResult, ...]]
    paired: bool

    @property
    def sequences(self) -> tuple[int, int]:
        """How many sequences each model saw."""
        a, b = (len(self._values(i, "effective", "f_attn")) for i in (0, 1))
        return a, b

    def frame(self) -> pd.DataFrame:
        """One row per model and map, then second minus first: ``model, map, f_attn, sink_score, largest, largest_later`` with
        intervals (``_low _high``, NaN for a single sequence), ``mean_gate``, and ``largest_of_all``.

        ``map`` is ``effective`` (rows scaled by the gate, if any), ``raw``, or ``both`` for a model without gates. ``largest`` is
        the mean over sequences of the largest absolute residual activation of a sequence, ``largest_later`` the same after the
        first token, ``largest_of_all`` the largest of any sequence; NaN where no residual stream was read.
        """
        import pandas as pd

        rows = []
        for label, found in zip(self.labels, self.results, strict=True):
            for result in found:
                kind = "both" if len(found) == 1 else MAPS[result.raw]
                row: dict[str, Any] = {"model": label, "map": kind}
                for quantity in QUANTITIES:
                    low, high = result.interval(quantity)
                    row |= _cells(quantity, result.mean(quantity), low, high)
                gates = [gate.mean() for gate in result.gate.values()]
                row["mean_gate"] = float(torch.stack(gates).mean()) if gates else float("nan")
                rows.append(row | {"largest_of_all": float("nan") if result.largest is None else result.largest})
        for kind in MAPS if self.gated else ("both",):
            row = {"model": f"{self.labels[1]} - {self.labels[0]}", "map": kind}
            for quantity in QUANTITIES:
                a, b = (self._result(i, kind).mean(quantity) for i in (0, 1))
                row |= _cells(quantity, b - a, *self.difference(quantity, kind))
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def gated(self) -> bool:
        """Whether either model has gates, so that effective and raw maps differ."""
        return any(len(found) > 1 for found in self.results)

    def difference(self, quantity: str = "f_attn", map: str = "effective") -> tuple[float, float]:
        """95% bootstrap interval of second minus first; NaN for a single sequence."""
        return _ends(*self._draws(quantity, map), lambda a, b: b - a)

    def ratio(self, quantity: str = "f_attn", map: str = "effective") -> tuple[float, float, float]:
        """How many times the first model's value is the second's, with its 95% bootstrap interval (NaN for a single
        sequence, or where the second is 0)."""
        a, b = (self._result(i, map).mean(quantity) for i in (0, 1))
        return (a / b if b else float("nan"), *_ends(*self._draws(quantity, map), _over))

    def layers(self) -> pd.DataFrame:
        """Attention to the first token by layer: ``layer, map, first, second, difference`` with intervals; second minus first.
        A layer that only one model has is NaN in the other."""
        import pandas as pd

        names = list(dict.fromkeys(name for i in (0, 1) for name in self._result(i, "effective").paid))
        rows = []
        for kind in MAPS if self.gated else ("both",):
            for name in names:
                a, b = (self._paid(i, kind, name) for i in (0, 1))
                rows.append({"layer": name, "map": kind, **self._pair(a.mean(1), b.mean(1))})
        return pd.DataFrame(rows)

    def heads(self) -> pd.DataFrame:
        """Attention to the first token by head, largest difference of the effective maps first: ``layer, head, map, first,
        second, difference`` with intervals. Only heads that both models have."""
        import pandas as pd

        rows = []
        for kind in MAPS if self.gated else ("both",):
            for name in self._result(0, kind).paid:
                if name not in self._result(1, kind).paid:
                    continue
                a, b = (self._paid(i, kind, name) for i in (0, 1))
                for head in range(min(a.shape[1], b.shape[1])):
                    rows.append({"layer": name, "head": head, "map": kind, **self._pair(a[:, head], b[:, head])})
        if not rows:
            raise WorkbenchError(f"{self.labels[0]} and {self.labels[1]} have no layer in common")
        table = pd.DataFrame(rows)
        order = table["difference"].abs().where(table["map"] != "raw", -1.0).sort_values(ascending=False, kind="stable")
        return table.loc[order.index].reset_index(drop=True)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Attention to the first token by layer, one line per model and map."""
        ax = axis(ax)
        for label, found in zip(self.labels, self.results, strict=True):
            for result in found:
                table = result.layers()
                name = f"{label}, attention inside the gate" if result.raw else label
                places = range(len(table))
                ax.plot(places, table["f_attn"], marker="o", linestyle="--" if result.raw else "-", label=name)
                ax.fill_between(places, table["f_attn_low"], table["f_attn_high"], alpha=0.2, linewidth=0)
                ax.set_xticks(places, [str(layer) for layer in table["layer"]])
        ax.set(
            xlabel="layer",
            ylabel="mean attention to the first token",
            title="Attention given to the first token",
            ylim=(0, 1),
        )
        ax.legend()
        return ax

    def _result(self, index: int, kind: str) -> SinkResult:
        if kind not in (*MAPS, "both"):
            raise UnknownName("kind of map", kind, MAPS)
        return self.results[index][-1 if kind == "raw" else 0]

    def _values(self, index: int, kind: str, quantity: str) -> Tensor:
        return self._result(index, kind).per_sequence(quantity)

    def _paid(self, index: int, kind: str, name: int | str) -> Tensor:
        """``[B, H]``, or one NaN for a layer that the model lacks."""
        result = self._result(index, kind)
        if name not in result.paid or name in result.undefined:
            return torch.full((len(self._values(index, kind, "f_attn")), 1), float("nan"), dtype=torch.float64)
        return result.paid[name]

    def _draws(self, quantity: str, kind: str) -> tuple[Tensor, Tensor]:
        return self._resampled(*(self._values(i, kind, quantity) for i in (0, 1)))

    def _resampled(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Means of resampled sequences; NaN if a model has a single one."""
        if len(a) < 2 or len(b) < 2:
            return (torch.full((1,), float("nan"), dtype=torch.float64),) * 2
        return resampled_means(a, seed=0), resampled_means(b, seed=0 if self.paired else 1)

    def _pair(self, a: Tensor, b: Tensor) -> dict[str, float]:
        draws = self._resampled(a, b)
        first, second = float(a.nanmean()), float(b.nanmean())
        cells: dict[str, float] = {}
        for name, value, make in (
            ("first", first, lambda x, y: x),
            ("second", second, lambda x, y: y),
            ("difference", second - first, lambda x, y: y - x),
        ):
            cells |= _cells(name, value, *_ends(*draws, make))
        return cells


def compare_sinks(a: Run, b: Run, labels: tuple[str, str] = ("a", "b"), epsilon: float = 0.3) -> SinkComparison:
    """Sinks of twin models side by side: F-Attn, sink score and mean gate of the effective and the raw maps, and the largest
    residual activations if ``hook_resid_*`` sites were read; intervals need several sequences."""
    if len(labels) != 2:
        raise WorkbenchError(f"two runs take two labels; got {labels!r}")
    for run in (a, b):
        if not isinstance(run, Run):
            raise WorkbenchError(
                f"compare_sinks takes two runs, model.run(..., maps=wb.capture()); got {type(run).__name__}"
            )
    results = []
    for run in (a, b):
        gated = any(isinstance(amap, GatedMap) for amap in maps_of(run).values())
        results.append(tuple(sinks(run, epsilon, raw=raw) for raw in ((False, True) if gated else (False,))))
    paired = a.tokens.ids.shape == b.tokens.ids.shape and bool((a.tokens.ids.cpu() == b.tokens.ids.cpu()).all())
    return SinkComparison((labels[0], labels[1]), (results[0], results[1]), paired)


def _cells(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, float("nan"), a / b)


def _ends(a: Tensor, b: Tensor, make: Any) -> tuple[float, float]:
    draws = make(a, b)
    return float(draws.nanquantile(0.025)), float(draws.nanquantile(0.975))


def _twins() -> dict[str, Any]:
    from workbench.models.protocol import Tokens
    from workbench.probes.examples import random_rows
    from workbench.run import Maps

    plain = AttentionMap.from_dense(random_rows(4, 2, 12))
    tokens = Tokens.of(torch.arange(48).reshape(4, 12))
    gate = torch.rand(4, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"a": Run(tokens, maps=Maps({0: plain})), "b": Run(tokens, maps=Maps({0: GatedMap(plain, gate)}))}


ANALYSES = (
    Analysis(
        name="sink-comparison",
        question="Do twin models sink less attention into the first token, and do their activations grow less?",
        function=compare_sinks,
        example=_twins,
        paper="Qiu et al. 2025 (arXiv 2505.06708), table on F-Attn and massive activations",
        source="run",
        null="the twin without a gate",
        definition="largest activations are those of the residual streams that the run read, per sequence",
    ),
)
