"""ACDC (arXiv 2304.14997, algorithm 1): go from the output to the input and drop every edge that can be spared.

Parts are visited in reverse order of computation, within a layer the inputs of queries first, then of keys, then of
values; each is replaced on top of everything dropped so far and stays dropped if the loss rises by less than ``tau``.
The order of the three is ours: with corrupted values in place already, a head that looks at the wrong token may copy
the right word from it, and what guides its attention would go unseen.

Loss: KL(whole model || circuit) of the next token at the answer position, or the fall of the metric. One forward pass
per part, batch and threshold, each on the circuit that is left, so scores depend on the order of the visit. With KL
everything is kept as tau goes to 0 and nothing as it grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.pairs import divergence
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.masked import Masked, MaskedEdges, Prepared, masked
from workbench.probes.circuits.method import Method

OBJECTIVES = ("kl", "metric")
LOWEST, HIGHEST = 1e-4, 1.0
"""Ends of the published grid of thresholds, 10^linspace(-4, 0, 21)."""


@torch.no_grad()
def acdc(setting: Setting, level: str, *, tau: float = 1e-3, taus: int = 1, objective: str = "kl") -> Circuit:
    """Which parts a greedy removal keeps.

    ``objective``: ``"kl"`` (nats) or ``"metric"`` (loss = m(whole) - m(circuit)). ``kept`` is the circuit at ``tau``,
    column ``rise`` how much the loss rose when the part was tried. With ``taus=1`` that is the score. With more, the
    removal runs again for that many thresholds from 1e-4 to 1, and the score is the largest of them that keeps a
    part, 0 if none does: the ranking behind the published ROC curves, which use 21.
    """
    if objective not in OBJECTIVES:
        raise UnknownName("objective of acdc", objective, OBJECTIVES)
    if not tau >= 0 or taus < 1:
        raise WorkbenchError(
            f"tau is a rise of the loss, 0 or more, and taus a number of thresholds; got {tau}, {taus}"
        )
    model = masked(setting, level)
    batches = [model.prepare(pairs) for pairs in setting.chunks()]
    kept, rise = _removal(model, batches, tau, objective)
    scores = rise
    if taus > 1:
        scores = torch.zeros(len(kept), dtype=torch.float64)
        for threshold in torch.logspace(_log(LOWEST), _log(HIGHEST), taus, dtype=torch.float64).tolist():
            scores[_removal(model, batches, threshold, objective)[0]] = threshold
    return Circuit(level, model.names, scores, kept, {}, {"rise": rise})


def _removal(model: Masked, batches: list[Prepared], tau: float, objective: str) -> tuple[Tensor, Tensor]:
    """Kept parts ``[N]`` and what trying each did to the loss ``[N]``."""
    keep = torch.ones(len(model.names))
    rise = torch.zeros(len(keep), dtype=torch.float64)
    current = 0.0  # the whole model's loss, by definition and free of rounding: at tau = 0 nothing goes
    for part in _visits(model):
        keep[part] = 0
        loss = _loss(model, batches, keep, objective)
        rise[part] = loss - current
        if loss - current < tau:
            current = loss
        else:
            keep[part] = 1
    return keep.bool(), rise


def _visits(model: Masked) -> list[int]:
    """The parts in the order of the visit."""
    if not isinstance(model, MaskedEdges):
        return list(reversed(range(len(model.names))))
    places = len(model.setting.places)
    edges: list[int] = []
    for layer in reversed(range(model.graph.layers + 1)):
        slots = [(i, slot) for i, slot in enumerate(model.graph.slots) if slot.layer == layer]
        for channel in ("in", "q", "k", "v"):
            for number, slot in reversed(slots):
                if slot.channel == channel:
                    first = sum(each.sources for each in model.graph.slots[:number])
                    edges += reversed(range(first, first + slot.sources))
    return [edge * places + place for edge in edges for place in reversed(range(places))]


def _loss(model: Masked, batches: list[Prepared], keep: Tensor, objective: str) -> float:
    total = 0.0
    for batch in batches:
        logits = model.logits(batch, keep)
        if objective == "kl":
            # Rounding can put a divergence of zero below zero, and a part that does nothing would go at tau = 0.
            total += float(divergence(batch.logits.double(), logits.double(), batch.pairs).clamp(min=0).sum())
        else:
            measure = model.setting.measure
            total += float((measure(batch.logits, batch.pairs) - measure(logits, batch.pairs)).double().sum())
    return total / len(model.setting.pairs)


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log10())


METHODS = (
    Method(
        "acdc",
        "greedy removal from the output to the input: what can be spared goes for good",
        acdc,
        "Conmy et al. 2023 (arXiv 2304.14997), algorithm 1",
        positions=True,
        unit="rise of the loss when the part was tried, or the largest threshold that keeps it",
    ),
)
