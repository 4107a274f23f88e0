"""What is left of the behaviour, example by example, when only the circuit is kept?

A mean metric can be right while the circuit is wrong on most prompts, and a circuit that is right on average can be
arbitrarily wrong on some (adversarial circuit evaluation, arXiv 2407.15166, known to us by its abstract and numbers:
mean KL 5.15, 2.09 and 3.91 for the published IOI, greater-than and docstring circuits, with far worse tails).
So: KL, accuracy, agreement and the metric per example, with the tail of the KL, next to random circuits of the same
size, the whole model and nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import UnknownName
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.bootstrap import resampled_means
from workbench.probes.circuits.components import Metric
from workbench.probes.circuits.judgement.controls import random_circuits
from workbench.probes.circuits.judgement.kept import Kept, agrees, check_draws, correct, kl, percentiles
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MEASURES = ("kl", "correct", "agrees", "metric")
_TAIL = 100
"""Examples below which a 99th percentile is only another name for the largest."""


@dataclass(frozen=True)
class PerformanceResult(Result):
    """``values`` ``[sets, measures, examples]`` of the kept sets ``sets`` (``circuit``, ``full``, ``empty``, ``random
    0``, ...) and of the ``measures``: ``kl`` = KL(whole model || kept set) at the answer position in nats, ``correct`` =
    1 where the largest logit is an answer, ``agrees`` = 1 where it is the whole model's, ``metric``. ``low`` and ``high``
    ``[sets, measures]`` are 95% bootstrap intervals of the means over examples. ``size`` is how many of ``parts`` are
    kept."""

    sets: tuple[str, ...]
    measures: tuple[str, ...]
    values: Tensor
    low: Tensor
    high: Tensor
    size: int
    parts: int
    level: str
    note: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def of(self, which: str, measure: str) -> Tensor:
        """One measure of one kept set, ``[examples]``."""
        for what, name, known in (("kept set", which, self.sets), ("measure", measure, self.measures)):
            if name not in known:
                raise UnknownName(what, name, known)
        return self.values[self.sets.index(which), self.measures.index(measure)]

    def worst(self, n: int = 5) -> Tensor:
        """Numbers of the ``n`` examples on which the circuit is farthest from the model, by KL."""
        return self.of("circuit", "kl").argsort(descending=True, stable=True)[:n]

    @property
    def chance(self) -> dict[str, float]:
        """Per measure the share of draws at least as good as the circuit, the circuit counted among them: (1 + random
        circuits that are no worse) / (1 + random circuits)."""
        means = self.values.mean(2)
        found = {}
        for i, name in enumerate(self.measures):
            better = means[3:, i] <= means[0, i] if name == "kl" else means[3:, i] >= means[0, i]
            found[name] = (1 + int(better.sum())) / (1 + len(better)) if len(better) else math.nan
        return found

    def frame(self) -> pd.DataFrame:
        """A row per kept set: the mean of every measure with ``_low`` and ``_high``, then ``kl_median kl_99 kl_max`` over
        examples (``kl_99`` is NaN below 100 examples) and ``worst``, the example with the largest KL."""
        import pandas as pd

        table: dict[str, Any] = {"set": list(self.sets)}
        for i, name in enumerate(self.measures):
            table[name] = self.values[:, i].mean(1).numpy()
            table[f"{name}_low"], table[f"{name}_high"] = self.low[:, i].numpy(), self.high[:, i].numpy()
        losses = self.values[:, self.measures.index("kl")]
        table["kl_median"] = losses.quantile(0.5, dim=1).numpy()
        table["kl_99"] = losses.quantile(0.99, dim=1).numpy() if losses.shape[1] >= _TAIL else math.nan
        table["kl_max"] = losses.amax(1).numpy()
        table["worst"] = losses.argmax(1).numpy()
        return pd.DataFrame(table)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of examples whose KL is at most x: of the circuit, of nothing kept, and of the random circuits."""
        ax = axis(ax)
        share = torch.arange(1, self.values.shape[2] + 1).numpy() / self.values.shape[2]
        for name, rows in zip(self.sets, self.values, strict=True):
            if name != "full":
                x = rows[self.measures.index("kl")].clamp(min=1e-12).sort().values.numpy()
                control = name.startswith("random")
                label = name if not control or name == "random 0" else None
                ax.step(
                    x, share, where="post", color="grey" if control else None, alpha=0.5 if control else 1, label=label
                )
        ax.set_xscale("log")
        ax.set(
            xlabel="KL(model || kept), nats",
            ylabel="share of examples",
            title=f"{self.size:,} of {self.parts:,} {self.level}s kept",
        )
        ax.legend()
        return ax


@torch.no_grad()
def kept_performance(
    model: Model,
    circuit: Circuit,
    pairs: Pairs,
    ablation: str = "counterfactual",
    *,
    metric: Metric | None = None,
    batch: int = 16,
    controls: int = 5,
    matched: bool = True,
    seed: int = 0,
    draws: int = 1000,
) -> PerformanceResult:
    """KL to the whole model, accuracy, agreement and metric of ``circuit``'s kept set, next to the whole model, nothing
    kept, and ``controls`` random circuits of the same size (``matched`` by layer, see ``random_circuits``).

    The largest KL is over the given prompts with the given replacements; a search for worse ones can only raise it.
    """
    check_draws(draws)
    kept = Kept.of(model, circuit, pairs, metric, ablation, batch)
    others = random_circuits(circuit, controls, seed=seed, matched=matched)
    everything = torch.ones(len(circuit.names), dtype=torch.bool)
    sets = {"circuit": circuit.kept, "full": everything, "empty": ~everything}
    sets |= {f"random {i}": other.kept for i, other in enumerate(others)}
    values = kept.measure(list(sets.values()), [kl, correct, agrees, kept.metric])
    low, high = percentiles(resampled_means(values.permute(2, 0, 1), draws=draws, seed=seed), len(pairs) < 2)
    return PerformanceResult(
        sets=tuple(sets),
        measures=MEASURES,
        values=values,
        low=low,
        high=high,
        size=len(circuit),
        parts=len(circuit.names),
        level=circuit.level,
        note=_note(others, len(pairs)),
        provenance={
            **kept.setting.provenance(
                "kept performance",
                circuit.level,
                {"controls": controls, "matched": matched, "seed": seed, "draws": draws},
            ),
            "circuit": dict(circuit.provenance),
        },
    )


def _note(others: Sequence[Circuit], examples: int) -> str:
    notes = []
    if others and others[0].provenance["choices"] == 1:
        notes.append("no other circuit has as many parts in the same layers: the random ones are the circuit itself")
    if examples < _TAIL:
        notes.append(f"{examples} examples have no 99th percentile; it takes {_TAIL}")
    return "; ".join(notes)
