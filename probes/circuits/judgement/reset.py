"""Does a method find the mechanism, or the form of the graph?

On a network with permuted weights there is no mechanism, so scores of the method there should separate the true parts of
the trained network from the others no better than chance. Chance is not 0.5: edges into values and logits score higher
than edges into queries on any network, and a truth that consists of such edges is then recovered from noise. ``form`` is
that part: the AUROC of the reset network's scores against random truths of the same sizes in the same layers and channels.
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
from workbench.probes.circuits.judgement.controls import random_circuits, reset_network
from workbench.probes.circuits.judgement.labels import auroc
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ResetResult(Result):
    """AUROC against one truth: ``trained`` of the model itself, ``reset`` ``[R]`` of reset networks, ``form`` ``[R, L]`` of
    the reset networks against random truths of the same form. ``trained_form`` ``[L]`` is the same for the model."""

    trained: float
    trained_form: Tensor
    reset: Tensor
    form: Tensor
    level: str
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def excess(self) -> float:
        """Mean over resets of the AUROC beyond that of the form: near 0 if the method reads the mechanism."""
        return float((self.reset - self.form.mean(1)).mean())

    @property
    def error(self) -> float:
        """Standard error of ``excess`` over resets; NaN for a single one."""
        return float((self.reset - self.form.mean(1)).std() / len(self.reset) ** 0.5)

    def frame(self) -> pd.DataFrame:
        """Columns ``network auroc form form_low form_high``: ``form`` is the mean over random truths, with their range."""
        import pandas as pd

        form = torch.cat([self.trained_form[None], self.form])
        return pd.DataFrame(
            {
                "network": ["trained", *(f"reset {i}" for i in range(len(self.reset)))],
                "auroc": [self.trained, *self.reset.tolist()],
                "form": form.mean(1).numpy(),
                "form_low": form.amin(1).numpy(),
                "form_high": form.amax(1).numpy(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """AUROC of every network beside the range that the form alone gives."""
        ax = axis(ax)
        table = self.frame()
        ax.vlines(range(len(table)), table["form_low"], table["form_high"], color="grey", label="random truths")
        ax.plot(range(len(table)), table["auroc"], linestyle="none", marker="o", label="the truth")
        ax.axhline(0.5, color="grey", linewidth=0.5)
        ax.set_xticks(range(len(table)), list(table["network"]), rotation=90)
        ax.set(ylabel="AUROC", ylim=(0, 1.02))
        ax.legend()
        return ax


def reset_control(
    model: Model,
    pairs: Pairs,
    truth: Circuit,
    method: str = "eap-ig",
    level: str | None = None,
    ablation: str = "counterfactual",
    *,
    resets: int = 5,
    truths: int = 50,
    seed: int = 0,
    metric: Metric | None = None,
    batch: int = 16,
    **options: Any,
) -> ResetResult:
    """Run ``method`` on ``model`` and on ``resets`` networks with its weights permuted (``reset_network``), and score each
    against ``truth`` and against ``truths`` random truths of its form. The rest is as in ``find_circuit``."""
    if resets < 1 or truths < 1:
        raise WorkbenchError(f"resets and truths are numbers, at least 1; got {resets} and {truths}")

    def found(network: Model) -> Circuit:
        return find_circuit(network, pairs, method, level, ablation, metric=metric, batch=batch, **options)

    trained = found(model)
    own = truth
    if trained.level == "node" and truth.level == "edge":
        own = Circuit.of("node", trained.names, set(truth.nodes) & set(trained.names))
    others = random_circuits(own, truths, seed=seed)
    again = [found(reset_network(model, seed=seed + i)) for i in range(resets)]

    def against(circuit: Circuit) -> Tensor:
        return torch.tensor([auroc(circuit, other) for other in others], dtype=torch.float64)

    return ResetResult(
        trained=auroc(trained, own),
        trained_form=against(trained),
        reset=torch.tensor([auroc(circuit, own) for circuit in again], dtype=torch.float64),
        form=torch.stack([against(circuit) for circuit in again]),
        level=trained.level,
        provenance={
            **trained.provenance,
            "analysis": "reset network",
            "control": {"resets": resets, "truths": truths, "seed": seed},
            "truth": dict(truth.provenance),
        },
    )
