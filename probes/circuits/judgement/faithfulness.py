"""Faithfulness: does the circuit alone, with everything else replaced, behave like the whole model?

f(C) = (m(C) - m(empty)) / (m(all) - m(empty)), with m the mean metric, C the parts that stay, and everything that
the circuit scores but does not keep replaced (counterfactual, zero or mean). f is 1 for the whole graph, 0 for the
empty one, and not bounded to [0, 1]. At edge level a kept edge carries what its source computes inside the circuit,
a dropped one the source's replacement. At node level dropped heads and MLPs are replaced; what the circuit does not
score (embeddings; MLPs in a circuit of heads) stays. Areas follow the MIB benchmark (arXiv 2504.13151, read in its
code): CPR = area under f of the largest signed scores, CMD = area of |1 - f| of the largest absolute scores, by
trapezoids over the fraction, from the smallest fraction on. m is a mean over examples, so f does not depend on how
they are batched. Intervals draw the examples again, for the three means of f together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.bootstrap import resampled_means
from workbench.probes.circuits.components import Metric
from workbench.probes.circuits.judgement.kept import Kept, check_draws, percentiles
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class FaithfulnessResult(Result):
    """Faithfulness against circuit size.

    ``fractions`` ``[F]`` of all parts, ``kept`` ``[F]`` parts. ``faithfulness`` ``[F]`` keeps the largest absolute
    scores, ``signed`` ``[F]`` the largest signed ones, ``reversed`` ``[F]`` the smallest absolute ones, which is to be
    worse than ``random`` ``[R, F]``, random parts. ``low`` and ``high`` ``[F]`` are the 95% bootstrap interval of
    ``faithfulness`` over examples, ``cpr_interval`` and ``cmd_interval`` ``[2]`` those of the areas. ``own`` is f of the
    circuit's own kept set, with ``own_interval`` ``[2]``. ``full`` and ``empty`` are m(all) and m(empty). ``note`` says so
    where they agree (f is undefined: NaN) and where the metric is smaller with everything (the signed ranking is upside
    down).
    """

    fractions: Tensor
    kept: Tensor
    faithfulness: Tensor
    low: Tensor
    high: Tensor
    signed: Tensor
    reversed: Tensor
    random: Tensor
    cpr_interval: Tensor
    cmd_interval: Tensor
    own: float
    own_interval: Tensor
    full: float
    empty: float
    level: str
    note: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: trapezoid area of f over the fraction, circuits by signed score. Larger is
        better; not bounded, so read it next to ``cmd``."""
        return float(_area(self.fractions, self.signed))

    @property
    def cmd(self) -> float:
        """Circuit-model distance: trapezoid area of |1 - f| over the fraction, circuits by absolute score. 0 is
        perfect."""
        return float(_area(self.fractions, (1 - self.faithfulness).abs()))

    @property
    def reversed_cpr(self) -> float:
        """``cpr`` of the ``reversed`` ranking."""
        return float(_area(self.fractions, self.reversed))

    @property
    def reversed_cmd(self) -> float:
        """``cmd`` of the ``reversed`` ranking."""
        return float(_area(self.fractions, (1 - self.reversed).abs()))

    @property
    def random_cpr(self) -> Tensor:
        """``cpr`` of every random ranking, ``[R]``."""
        return _area(self.fractions, self.random)

    @property
    def random_cmd(self) -> Tensor:
        """``cmd`` of every random ranking, ``[R]``."""
        return _area(self.fractions, (1 - self.random).abs())

    def frame(self) -> pd.DataFrame:
        """Columns ``fraction kept faithfulness`` (by absolute score), its interval ``low high``, ``signed``, ``reversed``,
        and the random control's mean and range."""
        import pandas as pd

        table = {
            "fraction": self.fractions.numpy(),
            "kept": self.kept.numpy(),
            "faithfulness": self.faithfulness.numpy(),
            "low": self.low.numpy(),
            "high": self.high.numpy(),
            "signed": self.signed.numpy(),
            "reversed": self.reversed.numpy(),
        }
        if len(self.random):
            table["random"] = self.random.mean(0).numpy()
            table["random_low"] = self.random.amin(0).numpy()
            table["random_high"] = self.random.amax(0).numpy()
        return pd.DataFrame(table)

    def plot(self, ax: Axes | None = None) -> Axes:
        """f over the kept fraction with its interval, and the random circuits' range."""
        ax = axis(ax)
        x = self.fractions.numpy()
        ax.plot(x, self.faithfulness.numpy(), marker="o", label="largest |score|")
        ax.fill_between(x, self.low.numpy(), self.high.numpy(), alpha=0.2)
        ax.plot(x, self.signed.numpy(), marker="s", linestyle="--", label="largest score")
        ax.plot(x, self.reversed.numpy(), marker=".", linestyle=":", label="smallest |score|")
        if len(self.random):
            ax.fill_between(x, self.random.amin(0).numpy(), self.random.amax(0).numpy(), alpha=0.25, color="grey")
            ax.plot(x, self.random.mean(0).numpy(), color="grey", label="random")
        for level in (0.0, 1.0):
            ax.axhline(level, color="grey", linewidth=0.5)
        ax.set_xscale("log")
        ax.set(
            xlabel=f"fraction of {self.level}s kept",
            ylabel="faithfulness",
            title=f"CPR {self.cpr:.2f}, CMD {self.cmd:.2f}",
        )
        ax.legend()
        return ax


@torch.no_grad()
def faithfulness(
    model: Model,
    circuit: Circuit,
    pairs: Pairs,
    fractions: Iterable[float] = FRACTIONS,
    ablation: str = "counterfactual",
    *,
    metric: Metric | None = None,
    batch: int = 16,
    controls: int = 5,
    seed: int = 0,
    draws: int = 1000,
) -> FaithfulnessResult:
    """Faithfulness of the best-scored ``fractions`` of ``circuit``'s parts (rounded down), next to ``controls``
    random rankings.

    ``metric``, ``ablation`` and ``batch`` are as in ``find_circuit``; the ablation need not be the one that found
    the circuit. ``draws`` resamples of the examples make the intervals.
    """
    sizes = _sizes(fractions, len(circuit.names))
    if controls < 0:
        raise WorkbenchError(f"controls counts random rankings, at least 0; got {controls}")
    check_draws(draws)
    kept = Kept.of(model, circuit, pairs, metric, ablation, batch)
    n = len(circuit.names)
    generator = torch.Generator().manual_seed(seed)
    orders = [
        circuit.scores.abs().argsort(descending=True, stable=True),
        circuit.scores.argsort(descending=True, stable=True),
        circuit.scores.abs().argsort(descending=True, stable=True).flip(0),
        *(torch.randperm(n, generator=generator) for _ in range(controls)),
    ]
    keeps = [_first(order, size) for order in orders for _, size in sizes]
    keeps += [circuit.kept, torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)]
    values = kept.metrics(keeps).T  # [examples, keeps]
    means = values.mean(0)
    full, empty = float(means[-2]), float(means[-1])
    note = ""
    undefined = abs(full - empty) <= 1e-6 * max(abs(full), abs(empty), 1e-6)
    if undefined:
        note = f"the metric is {full:.4g} with everything and with nothing: faithfulness is undefined"
    elif full < empty:
        note = (
            f"the metric is {full:.4g} with everything and {empty:.4g} with nothing, so positive scores work against "
            "faithfulness: the signed ranking and CPR mean something for a metric that is larger with everything"
        )
    f = torch.full_like(means, math.nan) if undefined else _shares(means)
    again = _shares(resampled_means(values, draws=draws, seed=seed)).where(torch.tensor(not undefined), math.nan)
    curves, drawn = (part[..., :-3].unflatten(-1, (len(orders), len(sizes))) for part in (f, again))
    x = torch.tensor([fraction for fraction, _ in sizes], dtype=torch.float64)
    alone = len(pairs) < 2
    low, high = percentiles(drawn[:, 0], alone)
    return FaithfulnessResult(
        fractions=x,
        kept=torch.tensor([size for _, size in sizes]),
        faithfulness=curves[0],
        low=low,
        high=high,
        signed=curves[1],
        reversed=curves[2],
        random=curves[3:],
        cpr_interval=percentiles(_area(x, drawn[:, 1]), alone),
        cmd_interval=percentiles(_area(x, (1 - drawn[:, 0]).abs()), alone),
        own=float(f[-3]),
        own_interval=percentiles(again[:, -3], alone),
        full=full,
        empty=empty,
        level=circuit.level,
        note=note,
        provenance={
            **kept.setting.provenance(
                "faithfulness", circuit.level, {"controls": controls, "seed": seed, "draws": draws}
            ),
            "circuit": dict(circuit.provenance),
        },
    )


def _shares(means: Tensor) -> Tensor:
    """f of means ``[..., keeps]``, whose last two are those of everything and of nothing."""
    full, empty = means[..., -2:-1], means[..., -1:]
    return (means - empty) / (full - empty)


def _sizes(fractions: Iterable[float], n: int) -> list[tuple[float, int]]:
    chosen = sorted(set(fractions))
    if not chosen or not all(0 <= fraction <= 1 for fraction in chosen):
        raise WorkbenchError(f"fractions are numbers from 0 to 1, at least one; got {chosen}")
    return [(float(fraction), int(fraction * n + 1e-9)) for fraction in chosen]


def _first(order: Tensor, size: int) -> Tensor:
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:size]] = True
    return kept


def _area(x: Tensor, y: Tensor) -> Tensor:
    """Trapezoid area over the last axis; a single point has none, and 0 would read as a perfect distance."""
    return torch.trapezoid(y, x, dim=-1) if len(x) > 1 else y.new_full(y.shape[:-1], math.nan)
