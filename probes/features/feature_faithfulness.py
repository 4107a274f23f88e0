"""Does a feature circuit alone behave like the model, and does the model without it lose the behaviour?

f(C) = (m(C) - m(nothing)) / (m(model) - m(nothing)), with m the mean metric over pairs. Faithfulness is f of the circuit: its
features and errors stay as the run computes them, all others at the spliced sites are replaced. Completeness is f of the model
without the circuit: only its features and errors are replaced; it is low if nothing outside does the same work (Marks et al.,
arXiv 2403.19647, section 3.3 and ``ablation.py``). f is 1 for the model, 0 for nothing, not bounded, NaN where the two agree.

Against what: random sets of as many active nodes, and neurons (hidden units of MLPs, units of z, coordinates of the stream),
scored and judged in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import Metric
from workbench.probes.features.feature_circuit import FeatureCircuit
from workbench.probes.features.feature_effects import FeatureEffects, scored
from workbench.probes.features.kept_features import KeptFeatures
from workbench.probes.features.neurons import neurons_of
from workbench.probes.features.node_gradients import Patching
from workbench.probes.features.splice import Coders
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FeatureFaithfulness(Result):
    """Faithfulness and completeness against the number of nodes.

    ``sizes`` ``[K]`` nodes are kept (or taken away), the largest absolute effects first. ``faithfulness completeness`` ``[K]`` of
    features, ``random random_completeness`` ``[R, K]`` of as many nodes drawn from all active ones, ``neurons
    neurons_completeness`` ``[K]`` of neurons; NaN where there are not that many. ``own own_completeness``: of the circuit as it
    was found, with ``own_size`` nodes. ``full`` is m(model), ``empty`` m with all features replaced (and the errors, unless
    they are always kept), ``neurons_empty`` that with all neurons replaced.
    """

    sizes: Tensor
    faithfulness: Tensor
    completeness: Tensor
    random: Tensor
    random_completeness: Tensor
    neurons: Tensor
    neurons_completeness: Tensor
    own: float
    own_completeness: float
    own_size: int
    full: float
    empty: float
    neurons_empty: float
    note: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def frame(self) -> pd.DataFrame:
        """Columns ``nodes faithfulness completeness``, the same of ``neurons``, and the mean and range of the random sets."""
        import pandas as pd

        table = {
            "nodes": self.sizes.numpy(),
            "faithfulness": self.faithfulness.numpy(),
            "completeness": self.completeness.numpy(),
            "neurons": self.neurons.numpy(),
            "neurons_completeness": self.neurons_completeness.numpy(),
        }
        if len(self.random):
            table["random"] = self.random.mean(0).numpy()
            table["random_low"] = self.random.amin(0).numpy()
            table["random_high"] = self.random.amax(0).numpy()
            table["random_completeness"] = self.random_completeness.mean(0).numpy()
        return pd.DataFrame(table)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Solid: faithfulness of what stays. Dashed: completeness, of the model without it."""
        ax = axis(ax)
        x = self.sizes.numpy()
        curves = [("features", "#1f6f8b", self.faithfulness, self.completeness)]
        if not self.neurons.isnan().all():
            curves.append(("neurons", "#c1502e", self.neurons, self.neurons_completeness))
        if len(self.random):
            curves.append(("random", "grey", self.random.mean(0), self.random_completeness.mean(0)))
            ax.fill_between(x, self.random.amin(0).numpy(), self.random.amax(0).numpy(), color="grey", alpha=0.25)
        for name, colour, inside, outside in curves:
            ax.plot(x, inside.numpy(), marker="o", markersize=3, color=colour, label=name)
            ax.plot(x, outside.numpy(), marker="o", markersize=3, color=colour, linestyle="--")
        for level in (0.0, 1.0):
            ax.axhline(level, color="grey", linewidth=0.5)
        ax.set_xscale("symlog", linthresh=1)
        ax.set(xlabel="nodes", ylabel="share of the behaviour", title="kept alone (solid), taken away (dashed)")
        ax.legend()
        return ax


@torch.no_grad()
def feature_faithfulness(
    model: Model,
    coders: Coders,
    circuit: FeatureCircuit | FeatureEffects,
    pairs: Pairs,
    metric: Metric | None = None,
    *,
    sizes: Iterable[int] | None = None,
    ablation: str = "mean",
    errors: str = "nodes",
    neurons: bool = True,
    controls: int = 3,
    seed: int = 0,
    batch: int = 16,
    mask: Tensor | None = None,
) -> FeatureFaithfulness:
    """Judge a feature circuit, or a ranking of features, on ``pairs``, which may be others than it was found on.

    ``ablation``: ``"mean"`` as in the paper (over the corrupted prompts, per position), ``"counterfactual"`` or ``"zero"``.
    ``errors``: error terms are ``"nodes"`` of the circuit like features, always ``"kept"``, or always ``"replaced"``. ``sizes``
    are numbers of nodes; powers of two up to all of them unless given. ``neurons`` scores neurons in the way that the circuit was
    scored and judges them. ``controls`` counts random sets.
    """
    effects = circuit.effects if isinstance(circuit, FeatureCircuit) else circuit
    own = circuit.kept if isinstance(circuit, FeatureCircuit) else torch.arange(len(effects))
    if controls < 0:
        raise WorkbenchError(f"controls counts random sets, at least 0; got {controls}")
    chosen = _sizes(sizes, len(effects))
    positions = effects.provenance["positions"]
    patching = Patching.of(model, coders, pairs, metric, ablation, batch, positions, mask)
    kept = KeptFeatures.of(patching, effects, errors)
    generator = torch.Generator().manual_seed(seed)
    n = len(effects)
    orders = [effects.order, *(torch.randperm(n, generator=generator) for _ in range(controls))]
    none = torch.arange(0)
    whole = kept.metrics([(none, True), (own, True), (own, False)]).mean(1)
    empty, full = float(whole[0]), float(torch.cat([patching.metric(b).double() for b in patching.batches()]).mean())
    curves = torch.stack([_curves(kept, order, chosen, empty, full) for order in orders])
    alone = _shares(whole[1:], empty, full)
    blank = torch.full((2, len(chosen)), float("nan"), dtype=torch.float64)
    units, units_empty = _neurons(patching, effects, chosen, full) if neurons else (blank, float("nan"))
    note = (
        ""
        if _apart(full, empty)
        else f"the metric is {full:.4g} with everything and with nothing: shares are undefined"
    )
    options = {"errors": errors, "controls": controls, "seed": seed}
    return FeatureFaithfulness(
        sizes=torch.tensor(chosen),
        faithfulness=curves[0, 0],
        completeness=curves[0, 1],
        random=curves[1:, 0],
        random_completeness=curves[1:, 1],
        neurons=units[0],
        neurons_completeness=units[1],
        own=float(alone[0]),
        own_completeness=float(alone[1]),
        own_size=len(own),
        full=full,
        empty=empty,
        neurons_empty=units_empty,
        note=note,
        provenance={
            **patching.setting.provenance("feature-faithfulness", "feature", options),
            "ablation": ablation,
            "circuit": effects.provenance,
        },
    )


def _neurons(patching: Patching, effects: FeatureEffects, sizes: list[int], full: float) -> tuple[Tensor, float]:
    """Curves ``[2, K]`` of neurons, scored as the features were, and the metric with all of them replaced."""
    units = replace(patching, splice=neurons_of(patching.splice, patching.setting.pairs.clean[:1]))
    found = scored(
        replace(units, ablation=effects.provenance["ablation"]),
        effects.provenance["method"],
        effects.provenance["options"].get("steps", 1),
    )[0]
    kept = KeptFeatures.of(units, found, "nodes")
    empty = float(kept.metrics([(torch.arange(0), True)]).mean())
    return _curves(kept, found.order, sizes, empty, full), empty


def _curves(kept: KeptFeatures, order: Tensor, sizes: list[int], empty: float, full: float) -> Tensor:
    """Faithfulness and completeness ``[2, K]`` of the first nodes of ``order``; NaN for more than there are."""
    able = [size for size in sizes if size <= len(order)]
    values = kept.metrics([(order[:size], inside) for inside in (True, False) for size in able]).mean(1)
    found = torch.full((2, len(sizes)), float("nan"), dtype=torch.float64)
    found[:, : len(able)] = _shares(values, empty, full).view(2, -1)
    return found


def _shares(means: Tensor, empty: float, full: float) -> Tensor:
    return (means - empty) / (full - empty) if _apart(full, empty) else torch.full_like(means, float("nan"))


def _apart(full: float, empty: float) -> bool:
    return abs(full - empty) > 1e-6 * max(abs(full), abs(empty), 1e-6)


def _sizes(sizes: Iterable[int] | None, n: int) -> list[int]:
    if sizes is None:
        return [0, *(2**i for i in range(n.bit_length()) if 2**i < n), n]
    chosen = sorted(set(sizes))
    if not chosen or chosen[0] < 0 or chosen[-1] > n:
        raise WorkbenchError(f"sizes are numbers of nodes from 0 to {n}; got {chosen}")
    return chosen
