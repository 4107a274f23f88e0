"""How well do a circuit's scores separate what is truly in the mechanism from what is not?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.circuits.judgement.kept import check_draws, percentiles
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_NUMBERS = 2**22


def auroc(circuit: Circuit, truth: Circuit, *, signed: bool = False, column: str | None = None) -> float:
    """Probability that a part in ``truth`` outscores a part outside of it, ties counting one half (area under the
    ROC curve); 0.5 by chance.

    Scores are compared by absolute value unless ``signed``; ``column`` takes a column of the circuit instead (a
    baseline or a z-score, always signed). A node circuit can be judged by an edge truth: its nodes are the ends of
    the kept edges, without ``input`` and ``logits``, as far as the circuit scores them. NaN if the truth holds all
    or none of the scored parts.
    """
    values, labels = _ranked(circuit, truth, signed, column)
    return float(_areas(values, labels, torch.ones(1, len(values), dtype=torch.float64))[0, 0])


def auprc(circuit: Circuit, truth: Circuit, *, signed: bool = False, column: str | None = None) -> float:
    """Average precision: precision at each part of ``truth`` in the order of scores, averaged (area under the
    precision-recall curve without interpolation, as scikit-learn computes it); parts with equal scores come together.

    Chance is the prevalence, the share of scored parts that are in the truth. Arguments and NaN are those of ``auroc``.
    """
    values, labels = _ranked(circuit, truth, signed, column)
    return float(_areas(values, labels, torch.ones(1, len(values), dtype=torch.float64))[0, 1])


@dataclass(frozen=True)
class RecoveryResult(Result):
    """``auroc`` and ``auprc`` of scores against a truth that holds ``positives`` of ``parts``, with 95% bootstrap
    intervals ``[2]`` over parts, drawn again among those inside and among those outside. ``values`` ``[parts]`` are the
    scores compared, ``inside`` ``[parts]`` the labels. NaN with a ``note`` if the truth holds all or none of the parts.
    """

    names: tuple[str, ...]
    values: Tensor
    inside: Tensor
    auroc: float
    auroc_interval: Tensor
    auprc: float
    auprc_interval: Tensor
    level: str
    note: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> int:
        return len(self.names)

    @property
    def positives(self) -> int:
        return int(self.inside.sum())

    @property
    def prevalence(self) -> float:
        """Share of the parts that are in the truth: ``auprc`` by chance."""
        return self.positives / self.parts

    def frame(self) -> pd.DataFrame:
        """Columns ``measure value low high chance positives parts``."""
        import pandas as pd

        intervals = np.stack([self.auroc_interval.numpy(), self.auprc_interval.numpy()])
        return pd.DataFrame(
            {
                "measure": ["auroc", "auprc"],
                "value": [self.auroc, self.auprc],
                "low": intervals[:, 0],
                "high": intervals[:, 1],
                "chance": [0.5, self.prevalence],
                "positives": self.positives,
                "parts": self.parts,
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The ROC curve, with the diagonal of chance."""
        ax = axis(ax)
        if 0 < self.positives < self.parts:
            from sklearn.metrics import roc_curve

            false, true, _ = roc_curve(self.inside.numpy(), self.values.numpy())
            ax.plot(false, true, marker=".")
        ax.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
        title = f"AUROC {self.auroc:.2f}, average precision {self.auprc:.2f} (chance {self.prevalence:.2f})"
        ax.set(xlabel="share of parts outside", ylabel="share of parts inside", title=title)
        return ax


def recovery(
    circuit: Circuit,
    truth: Circuit,
    *,
    signed: bool = False,
    column: str | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> RecoveryResult:
    """``auroc`` and ``auprc`` of ``circuit`` against ``truth``, with intervals over parts; arguments as in ``auroc``.

    The intervals say how much the figures hang on few parts. How much they hang on the examples, ``stability`` says.
    """
    check_draws(draws)
    values, labels = _ranked(circuit, truth, signed, column)
    areas = _areas(values, labels, torch.ones(1, len(values), dtype=torch.float64))[0]
    at_once = max(1, _NUMBERS // len(values))
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        _areas(values, labels, _weights(labels, min(at_once, draws - start), generator))
        for start in range(0, draws, at_once)
    ]
    ends = percentiles(torch.cat(drawn))
    some = bool(labels.any()) and not bool(labels.all())
    return RecoveryResult(
        names=circuit.names,
        values=values,
        inside=labels,
        auroc=float(areas[0]),
        auroc_interval=ends[:, 0],
        auprc=float(areas[1]),
        auprc_interval=ends[:, 1],
        level=circuit.level,
        note=""
        if some
        else f"the truth holds {int(labels.sum())} of {len(labels)} parts: there is nothing to separate",
        provenance={
            "circuit": dict(circuit.provenance),
            "truth": dict(truth.provenance),
            "options": {"signed": signed, "column": column, "draws": draws, "seed": seed},
        },
    )


def _ranked(circuit: Circuit, truth: Circuit, signed: bool, column: str | None) -> tuple[Tensor, Tensor]:
    """Values to rank by and labels, ``[N]`` each."""
    if circuit.level == "edge" and truth.level == "node":
        raise Refused("a node truth cannot judge edges; find the circuit with level='node'")
    if circuit.level == truth.level:
        right = {name for name, kept in zip(truth.names, truth.kept.tolist(), strict=True) if kept}
        missing = right - set(circuit.names)
        if missing:
            raise WorkbenchError(f"the circuit does not score {min(missing)!r}, which is in the truth")
    else:
        right = set(truth.nodes)
    if column is not None:
        if column not in circuit.columns:
            raise UnknownName("column of this circuit", column, circuit.columns)
        values = circuit.columns[column].double()
    else:
        values = circuit.scores if signed else circuit.scores.abs()
    if values.isnan().any():
        raise Refused(f"column {column!r} is undefined for {int(values.isnan().sum())} parts and cannot rank them")
    return values, torch.tensor([name in right for name in circuit.names], dtype=torch.bool)


def _areas(values: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """(AUROC, average precision) with weights of the parts ``[draws, N]``: ``[draws, 2]``."""
    if not labels.any() or labels.all():
        return torch.full((len(weights), 2), math.nan, dtype=torch.float64)
    levels, group = values.unique(return_inverse=True)
    group = len(levels) - 1 - group  # from the largest value down
    inside, outside = (
        weights.new_zeros(len(weights), len(levels)).index_add_(1, group, weights * part)
        for part in (labels.double(), (~labels).double())
    )
    true, false = inside.cumsum(1), outside.cumsum(1)
    positives, negatives = true[:, -1:], false[:, -1:]
    beaten = negatives - false + 0.5 * outside
    roc = (inside * beaten).sum(1) / (positives * negatives)[:, 0]
    precision = true / (true + false).clamp(min=1e-300)
    return torch.stack([roc, (inside * precision).sum(1) / positives[:, 0]], 1)


def _weights(labels: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """How often each part is drawn, ``[draws, N]``, with as many inside and outside as there are."""
    weights = torch.zeros(draws, len(labels), dtype=torch.float64)
    for members in ((labels).nonzero()[:, 0], (~labels).nonzero()[:, 0]):
        if len(members):
            picks = members[torch.randint(len(members), (draws, len(members)), generator=generator)]
            weights.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    return weights
