"""Does the circuit need each of its parts?

For every kept part v, minimality looks for a set K of other kept parts such that taking v away from C without K changes
the mean metric F: |F(C without K and v) - F(C without K)| (Wang et al. 2022, arXiv 2211.00593, section 4). A part that
a backup covers matters only once the backup is in K. Wang et al. find at least 1% of F(M) for every node of their IOI
circuit, the threshold here. Their K were partly chosen by hand; the greedy search is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.bootstrap import interval
from workbench.probes.circuits.components import Metric
from workbench.probes.circuits.judgement.kept import Kept, Remembered, without
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class MinimalityResult(Result):
    """For each kept part of ``names``: ``removed``, the set K of the search, and ``effect`` ``[V]`` = F(C without K) -
    F(C without K and v), in units of the metric, with its 95% bootstrap interval ``low``, ``high`` over examples for
    this K. ``full`` is F(M); a part whose ``share`` of |F(M)| stays below ``threshold`` for every K tried is not shown to
    be needed. The search ends once the threshold is passed, so an effect is a lower bound of the largest one."""

    names: tuple[str, ...]
    removed: tuple[tuple[str, ...], ...]
    effect: Tensor
    low: Tensor
    high: Tensor
    full: float
    threshold: float
    level: str
    evaluated: int
    note: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> Tensor:
        """|effect| / |F(M)|, ``[V]``; NaN where F(M) is 0."""
        return self.effect.abs() / (abs(self.full) or float("nan"))

    @property
    def needless(self) -> tuple[str, ...]:
        """Parts that no K has shown to be needed."""
        return tuple(
            name for name, share in zip(self.names, self.share.tolist(), strict=True) if share < self.threshold
        )

    def frame(self) -> pd.DataFrame:
        """Columns ``part effect low high share needed removed``, ``removed`` names K."""
        import pandas as pd

        return pd.DataFrame(
            {
                "part": list(self.names),
                "effect": self.effect.numpy(),
                "low": self.low.numpy(),
                "high": self.high.numpy(),
                "share": self.share.numpy(),
                "needed": (self.share >= self.threshold).numpy(),
                "removed": [" ".join(parts) for parts in self.removed],
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of the model's metric that each part carries, with the threshold."""
        ax = axis(ax, max(4.0, 0.3 * len(self.names)))
        ax.bar(range(len(self.names)), self.share.numpy())
        ax.axhline(self.threshold, color="grey", linewidth=0.8)
        ax.set_xticks(range(len(self.names)), list(self.names), rotation=90)
        ax.set(
            ylabel="share of F(M)",
            title=f"{len(self.names) - len(self.needless)} of {len(self.names)} {self.level}s shown to be needed",
        )
        return ax


@torch.no_grad()
def minimality(
    model: Model,
    circuit: Circuit,
    pairs: Pairs,
    ablation: str = "counterfactual",
    *,
    threshold: float = 0.01,
    steps: int = 5,
    tries: int = 10,
    metric: Metric | None = None,
    batch: int = 16,
    seed: int = 0,
) -> MinimalityResult:
    """Search, for every part that ``circuit`` keeps, for a K that shows that it is needed.

    K starts as nothing. While the effect is below ``threshold`` of |F(M)|, up to ``steps`` times, the one of ``tries``
    other kept parts drawn anew with the largest effect joins K; the best K on the way counts. Every kept set is run
    once on all pairs: one per part, and at most 2 x ``steps`` x ``tries`` more for each that is not needed at once.
    """
    if not 0 < threshold < 1:
        raise WorkbenchError(f"threshold is a share of the model's metric, between 0 and 1; got {threshold}")
    if steps < 0 or tries < 1:
        raise WorkbenchError(f"steps is at least 0 and tries at least 1; got {steps} and {tries}")
    if not len(circuit):
        raise Refused("the circuit keeps nothing, so there is no part to be needed; choose parts with top(n)")
    kept = Kept.of(model, circuit, pairs, metric, ablation, batch)
    values = Remembered(kept)
    inside = circuit.kept.nonzero()[:, 0].tolist()

    def effects(part: int, sets: Sequence[Sequence[int]]) -> Tensor:
        """F(C without K) - F(C without K and v) per example, ``[sets, examples]``."""
        found = values([without(circuit.kept, gone) for k in sets for gone in (k, (*k, part))])
        before, after = found.unflatten(0, (-1, 2)).unbind(1)
        return before - after

    alone = [without(circuit.kept, (part,)) for part in inside]
    full = float(values([torch.ones_like(circuit.kept), circuit.kept, *alone])[0].mean())  # one batch of sets
    generator = torch.Generator().manual_seed(seed)
    rows, removed = [], []
    for part in inside:
        found: tuple[int, ...] = ()
        best, effect = found, effects(part, [found])[0]
        for _ in range(min(steps, len(inside) - 1)):
            if abs(float(effect.mean())) >= threshold * abs(full):
                break
            left = [i for i in inside if i != part and i not in found]
            drawn = torch.randperm(len(left), generator=generator)[:tries].sort().values
            sets = [(*found, left[i]) for i in drawn.tolist()]
            tried = effects(part, sets)
            first = int(tried.mean(1).abs().argmax())
            found = sets[first]
            if abs(float(tried[first].mean())) > abs(float(effect.mean())):
                best, effect = found, tried[first]
        rows.append(effect)
        removed.append(tuple(circuit.names[i] for i in sorted(best)))
    found_effects = torch.stack(rows)  # [V, examples]
    low, high = interval(found_effects.T, seed=seed)
    return MinimalityResult(
        names=tuple(circuit.names[i] for i in inside),
        removed=tuple(removed),
        effect=found_effects.mean(1),
        low=low,
        high=high,
        full=full,
        threshold=threshold,
        level=circuit.level,
        evaluated=len(values),
        note="" if full else "the metric of the whole model is 0, so shares of it are undefined",
        provenance={
            **kept.setting.provenance(
                "minimality", circuit.level, {"threshold": threshold, "steps": steps, "tries": tries, "seed": seed}
            ),
            "circuit": dict(circuit.provenance),
        },
    )
