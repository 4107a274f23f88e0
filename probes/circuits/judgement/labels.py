"""How well do a circuit's scores separate what is truly in the mechanism from what is not?"""

from __future__ import annotations

import math

from scipy.stats import rankdata

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError


def auroc(circuit: Circuit, truth: Circuit, *, signed: bool = False, column: str | None = None) -> float:
    """Probability that a part in ``truth`` outscores a part outside of it, ties counting one half (area under the
    ROC curve).

    Scores are compared by absolute value unless ``signed``; ``column`` takes a column of the circuit instead (a
    baseline or a z-score, always signed). A node circuit can be judged by an edge truth: its nodes are the ends of
    the kept edges, without ``input`` and ``logits``, as far as the circuit scores them. NaN if the truth holds all
    or none of the scored parts.
    """
    if circuit.level == "edge" and truth.level == "node":
        raise Refused("a node truth cannot judge edges; find the circuit with level='node'")
    if circuit.level == truth.level:
        right = {name for name, kept in zip(truth.names, truth.kept.tolist(), strict=True) if kept}
        missing = right - set(circuit.names)
        if missing:
            raise WorkbenchError(f"the circuit does not score {sorted(missing)[0]!r}, which is in the truth")
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
    labels = [name in right for name in circuit.names]
    inside, outside = sum(labels), len(labels) - sum(labels)
    if not inside or not outside:
        return math.nan
    ranks = rankdata(values.numpy())
    return float(
        (sum(r for r, label in zip(ranks, labels, strict=True) if label) - inside * (inside + 1) / 2)
        / (inside * outside)
    )
