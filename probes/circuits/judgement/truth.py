"""Labels by effect: which parts do something, measured exactly.

Ground truth is relative to the corruption: a part that does the same on the clean and on the corrupted prompt has no
effect under any patching, however much the mechanism needs it. So the truth that methods are scored against is the set of
parts whose exact patch has an effect under this corruption and ablation.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from workbench.circuits import Circuit
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import Metric, Setting
from workbench.probes.circuits.find import find_circuit

SHARE = 0.05


@torch.no_grad()
def effect_truth(
    model: Model,
    pairs: Pairs,
    level: str = "edge",
    ablation: str = "counterfactual",
    *,
    share: float | None = None,
    tolerance: float | None = None,
    metric: Metric | None = None,
    batch: int = 16,
    positions: str = "all",
) -> Circuit:
    """The exact single-patch effects of all nodes or edges, keeping those that count.

    ``tolerance`` keeps |effect| > tolerance, in units of the metric: for models whose other effects are zero by
    construction. ``share`` keeps |effect| >= share of |m(clean) - m(corrupt)|: for trained models, 0.05 if neither is
    given. Scores are the mean effects, so a part with effects of either sign on different prompts can come out small;
    ``provenance["threshold"]`` is the limit in units of the metric.
    """
    if share is not None and tolerance is not None:
        raise WorkbenchError("share= or tolerance= says what counts as an effect; give one of them")
    chosen = SHARE if share is None else share
    if tolerance is not None and tolerance < 0:
        raise WorkbenchError(f"tolerance is an effect in units of the metric, at least 0; got {tolerance}")
    if not 0 < chosen <= 1:
        raise WorkbenchError(f"share is a share of |m(clean) - m(corrupt)|, above 0 and at most 1; got {share}")
    circuit = find_circuit(model, pairs, "patching", level, ablation, metric=metric, batch=batch, positions=positions)
    size = circuit.scores.abs()
    if tolerance is not None:
        kept, limit = size > tolerance, tolerance
    else:
        setting = Setting.of(model, pairs, metric, ablation, batch)
        clean, corrupt = (
            sum(float(setting.measure(model.run(ids(part)).logits, part).double().sum()) for part in setting.chunks())
            / len(pairs)
            for ids in (lambda part: part.clean, lambda part: part.corrupt)
        )
        if abs(clean - corrupt) <= 1e-6 * max(abs(clean), abs(corrupt), 1e-6):
            raise Refused(
                f"the metric is {clean:.4g} on clean and on corrupted prompts, so no effect is a share of their "
                "difference; give tolerance=, or another corruption"
            )
        limit = chosen * abs(clean - corrupt)
        kept = size >= limit
    return replace(circuit, kept=kept, provenance={**circuit.provenance, "threshold": limit})
