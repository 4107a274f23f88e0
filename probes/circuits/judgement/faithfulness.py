"""Faithfulness: does the circuit alone, with everything else replaced, behave like the whole model?

f(C) = (m(C) - m(empty)) / (m(all) - m(empty)), with m the mean metric, C the parts that stay, and everything that
the circuit scores but does not keep replaced (counterfactual, zero or mean). f is 1 for the whole graph, 0 for the
empty one, and not bounded to [0, 1]. At edge level a kept edge carries what its source computes inside the circuit,
a dropped one the source's replacement. At node level dropped heads and MLPs are replaced; what the circuit does not
score (embeddings; MLPs in a circuit of heads) stays. Areas follow the MIB benchmark (arXiv 2504.13151): CPR = area
under f, CMD = area of |1 - f|.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import Metric
from workbench.probes.circuits.judgement.kept import Kept
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class FaithfulnessResult(Result):
    """Faithfulness against circuit size.

    ``fractions`` ``[F]`` of all parts, ``kept`` ``[F]`` parts. ``faithfulness`` ``[F]`` keeps the largest absolute
    scores, ``signed`` ``[F]`` the largest signed ones, ``random`` ``[R, F]`` random parts. ``own`` is f of the
    circuit's own kept set. ``full`` and ``empty`` are m(all) and m(empty). ``note`` says so where they agree (f is
    undefined: NaN) and where the metric is smaller with everything (the signed ranking is upside down).
    """

    fractions: Tensor
    kept: Tensor
    faithfulness: Tensor
    signed: Tensor
    random: Tensor
    own: float
    full: float
    empty: float
    level: str
    note: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: trapezoid area of f over the fraction, circuits by signed score. Larger is
        better; not bounded, so read it next to ``cmd``."""
        return _area(self.fractions, self.signed)

    @property
    def cmd(self) -> float:
        """Circuit-model distance: trapezoid area of |1 - f| over the fraction, circuits by absolute score. 0 is
        perfect."""
        return _area(self.fractions, (1 - self.faithfulness).abs())

    @property
    def random_cpr(self) -> Tensor:
        """``cpr`` of every random ranking, ``[R]``."""
        return torch.tensor([_area(self.fractions, row) for row in self.random])

    @property
    def random_cmd(self) -> Tensor:
        """``cmd`` of every random ranking, ``[R]``."""
        return torch.tensor([_area(self.fractions, (1 - row).abs()) for row in self.random])

    def frame(self) -> pd.DataFrame:
        """Columns ``fraction kept faithfulness`` (by absolute score), ``signed``, and the random control's mean and
        range."""
        import pandas as pd

        table = {
            "fraction": self.fractions.numpy(),
            "kept": self.kept.numpy(),
            "faithfulness": self.faithfulness.numpy(),
            "signed": self.signed.numpy(),
        }
        if len(self.random):
            table["random"] = self.random.mean(0).numpy()
            table["random_low"] = self.random.amin(0).numpy()
            table["random_high"] = self.random.amax(0).numpy()
        return pd.DataFrame(table)

    def plot(self, ax: Axes | None = None) -> Axes:
        """f over the kept fraction, with the random circuits' range."""
        ax = axis(ax)
        x = self.fractions.numpy()
        ax.plot(x, self.faithfulness.numpy(), marker="o", label="largest |score|")
        ax.plot(x, self.signed.numpy(), marker="s", linestyle="--", label="largest score")
        if len(self.random):
            ax.fill_between(x, self.random.amin(0).numpy(), self.random.amax(0).numpy(), alpha=0.25, color="grey")
            ax.plot(x, self.random.mean(0).numpy(), color="grey", label="random")
        for level in (0.0, 1.0):
            ax.axhline(level, color="black", linewidth=0.5)
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
) -> FaithfulnessResult:
    """Faithfulness of the best-scored ``fractions`` of ``circuit``'s parts (rounded down), next to ``controls``
    random rankings.

    ``metric``, ``ablation`` and ``batch`` are as in ``find_circuit``; the ablation need not be the one that found
    the circuit.
    """
    sizes = _sizes(fractions, len(circuit.names))
    if controls < 0:
        raise WorkbenchError(f"controls counts random rankings, at least 0; got {controls}")
    kept = Kept.of(model, circuit, pairs, metric, ablation, batch)
    setting = kept.setting
    n = len(circuit.names)
    generator = torch.Generator().manual_seed(seed)
    orders = [
        circuit.scores.abs().argsort(descending=True, stable=True),
        circuit.scores.argsort(descending=True, stable=True),
        *(torch.randperm(n, generator=generator) for _ in range(controls)),
    ]
    keeps = [_first(order, size) for order in orders for _, size in sizes]
    keeps += [circuit.kept, torch.zeros(n, dtype=torch.bool)]
    unique = list({tuple(keep.tolist()): keep for keep in keeps}.values())
    values = kept.measure(unique, [kept.metric])[:, 0].mean(1).tolist()
    found = {tuple(keep.tolist()): value for keep, value in zip(unique, values, strict=True)}
    full = sum(float(setting.measure(model.run(part.clean).logits, part).double().sum()) for part in setting.chunks())
    full /= len(pairs)
    empty = found[(False,) * n]
    gap = full - empty
    note = ""
    undefined = abs(gap) <= 1e-6 * max(abs(full), abs(empty), 1e-6)
    if undefined:
        note = f"the metric is {full:.4g} with everything and with nothing: faithfulness is undefined"
    elif gap < 0:
        note = (
            f"the metric is {full:.4g} with everything and {empty:.4g} with nothing, so positive scores work against "
            "faithfulness: the signed ranking and CPR mean something for a metric that is larger with everything"
        )
    f = [math.nan if undefined else (found[tuple(keep.tolist())] - empty) / gap for keep in keeps]
    curves = torch.tensor(f[: len(orders) * len(sizes)], dtype=torch.float64).view(len(orders), len(sizes))
    return FaithfulnessResult(
        fractions=torch.tensor([fraction for fraction, _ in sizes], dtype=torch.float64),
        kept=torch.tensor([size for _, size in sizes]),
        faithfulness=curves[0],
        signed=curves[1],
        random=curves[2:],
        own=f[-2],
        full=full,
        empty=empty,
        level=circuit.level,
        note=note,
        provenance={
            **setting.provenance("faithfulness", circuit.level, {"controls": controls, "seed": seed}),
            "circuit": dict(circuit.provenance),
        },
    )


def _sizes(fractions: Iterable[float], n: int) -> list[tuple[float, int]]:
    chosen = sorted(set(fractions))
    if not chosen or not all(0 <= fraction <= 1 for fraction in chosen):
        raise WorkbenchError(f"fractions are numbers from 0 to 1, at least one; got {chosen}")
    return [(float(fraction), int(fraction * n + 1e-9)) for fraction in chosen]


def _first(order: Tensor, size: int) -> Tensor:
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:size]] = True
    return kept


def _area(x: Tensor, y: Tensor) -> float:
    """Trapezoid area; a single point has none, and 0 would read as a perfect distance."""
    return float(np.trapezoid(y.numpy(), x.numpy())) if len(x) > 1 else math.nan
