"""Would other examples have given the same circuit?

The examples are drawn again with replacement, the method runs on each draw, and the circuits of the ``top`` parts are
compared by their Jaccard index |A and B| / |A or B|. Circuit discovery as an estimator with a variance: arXiv 2510.00845,
known to us by its abstract; the details here are our reading. Published Jaccard indices of resampled circuits are .67 for
IOI in GPT-2 and .39 for a Llama of 1B; above .8 with at least 100 examples is what a circuit to be interpreted should
reach. A resample holds about 63% of the examples, so the index is not that of two fresh samples: it says how much the
circuit hangs on some of its examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import Metric
from workbench.probes.circuits.find import find_circuit
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_SHOWN = 30


@dataclass(frozen=True)
class StabilityResult(Result):
    """``jaccard`` ``[R, R]`` between the circuits of every two resamples, ``to_all`` ``[R]`` of each with the circuit of all
    examples. ``frequency`` ``[N]``: share of resamples that select a part; ``scores`` ``[N]`` of all examples, ``low`` and
    ``high`` ``[N]`` the middle 95% of a part's score over resamples. ``chance`` is the mean Jaccard index of two random
    circuits of ``top`` of N parts."""

    names: tuple[str, ...]
    scores: Tensor
    low: Tensor
    high: Tensor
    selected: Tensor
    frequency: Tensor
    jaccard: Tensor
    to_all: Tensor
    top: int
    chance: float
    level: str
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def pairs(self) -> Tensor:
        """The Jaccard index of every two different resamples, ``[R (R-1) / 2]``."""
        row, column = torch.triu_indices(len(self.jaccard), len(self.jaccard), 1)
        return self.jaccard[row, column]

    @property
    def mean(self) -> float:
        """Mean Jaccard index of two resamples."""
        return float(self.pairs.mean())

    @property
    def spread(self) -> tuple[float, float]:
        """The middle 95% of the Jaccard index of two resamples."""
        ends = torch.quantile(self.pairs, torch.tensor([0.025, 0.975], dtype=torch.float64))
        return float(ends[0]), float(ends[1])

    def frame(self) -> pd.DataFrame:
        """Columns ``part score low high selected frequency``, the most frequent first; ``selected`` is by all examples."""
        import pandas as pd

        table = pd.DataFrame(
            {
                "part": list(self.names),
                "score": self.scores.numpy(),
                "low": self.low.numpy(),
                "high": self.high.numpy(),
                "selected": self.selected.numpy(),
                "frequency": self.frequency.numpy(),
            }
        )
        return table.sort_values("frequency", ascending=False, kind="stable").reset_index(drop=True)

    def plot(self, ax: Axes | None = None) -> Axes:
        """How often each of the most frequent parts is selected."""
        ax = axis(ax, 8.0)
        table = self.frame().head(_SHOWN)
        ax.bar(range(len(table)), table["frequency"], color=["C0" if own else "grey" for own in table["selected"]])
        ax.set_xticks(range(len(table)), table["part"], rotation=90)
        low, high = self.spread
        ax.set(
            ylabel="share of resamples",
            title=f"Jaccard {self.mean:.2f} ({low:.2f} to {high:.2f}) of the top {self.top}",
        )
        return ax


def stability(
    model: Model,
    pairs: Pairs,
    method: str = "eap-ig",
    level: str | None = None,
    ablation: str = "counterfactual",
    *,
    top: int,
    signed: bool = False,
    resamples: int = 20,
    seed: int = 0,
    metric: Metric | None = None,
    batch: int = 16,
    positions: str = "all",
    **options: Any,
) -> StabilityResult:
    """Find the circuit of ``top`` parts on ``resamples`` bootstrap draws of ``pairs``, ``resamples`` + 1 runs of the method.

    ``signed`` takes the largest scores instead of the largest absolute ones; everything else is as in ``find_circuit``.
    """
    if resamples < 2:
        raise WorkbenchError(f"resamples is how many draws are compared, at least 2; got {resamples}")
    if len(pairs) < 2:
        raise WorkbenchError("one example cannot be drawn again; build more pairs")

    def find(some: Pairs) -> Circuit:
        found = find_circuit(
            model, some, method, level, ablation, metric=metric, batch=batch, positions=positions, **options
        )
        return found.top(top, signed=signed)

    whole = find(pairs)
    generator = torch.Generator().manual_seed(seed)
    again = [find(pairs.take(torch.randint(len(pairs), (len(pairs),), generator=generator))) for _ in range(resamples)]
    kept = torch.stack([whole.kept, *(circuit.kept for circuit in again)]).double()
    common = kept @ kept.T
    jaccard = common / (2 * top - common)  # every circuit has ``top`` parts; NaN for none
    scores = torch.stack([circuit.scores for circuit in again])
    ends = torch.quantile(scores, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return StabilityResult(
        names=whole.names,
        scores=whole.scores,
        low=ends[0],
        high=ends[1],
        selected=whole.kept,
        frequency=kept[1:].mean(0),
        jaccard=jaccard[1:, 1:],
        to_all=jaccard[0, 1:],
        top=top,
        chance=_chance(len(whole.names), top),
        level=whole.level,
        provenance={
            **whole.provenance,
            "analysis": "stability",
            "resampling": {"top": top, "signed": signed, "resamples": resamples, "seed": seed},
        },
    )


def _chance(parts: int, top: int) -> float:
    """Mean Jaccard index of two random sets of ``top`` of ``parts``."""
    from scipy.stats import hypergeom

    return float(hypergeom(parts, top, top).expect(lambda k: k / (2 * top - k))) if top else float("nan")
