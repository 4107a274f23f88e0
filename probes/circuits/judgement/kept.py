"""What a model does when it keeps some of a circuit's parts and everything else that the circuit scores is replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.graph import name_place
from workbench.models.protocol import Model
from workbench.pairs import Pairs, accuracy, divergence
from workbench.probes.circuits.components import Metric, Setting
from workbench.probes.circuits.masked import Masked, Prepared, masked

Measure = Callable[[Tensor, Prepared], Tensor]
"""(logits of the reduced model, its batch) -> one number per example, ``[B]``."""


@dataclass(frozen=True)
class Kept:
    """The model of a setting as a function of which of a circuit's parts it keeps."""

    model: Masked
    order: Tensor
    """For every part of the masked model, its index in the circuit's names."""

    @classmethod
    def of(
        cls, model: Model, circuit: Circuit, pairs: Pairs, metric: Metric | None, ablation: str, batch: int = 16
    ) -> Kept:
        """Refused unless the circuit scores all edges of the model, or nodes of it, each at every place."""
        setting = Setting.of(model, pairs, metric, ablation, batch, positions_of(circuit))
        bare = list(dict.fromkeys(name_place(name)[0] for name in circuit.names))
        made = masked(setting, circuit.level, None if circuit.level == "edge" else bare)
        at = {name: i for i, name in enumerate(circuit.names)}
        known = set(made.names)
        for name in circuit.names:
            if name not in known:
                shown = (
                    list(made.names) if len(made.names) < 200 else [*made.names[:3], f"... {len(made.names):,} in all"]
                )
                raise UnknownName(f"{circuit.level} of {model.name}", name, shown)
        if len(at) != len(known):
            missing = next(name for name in made.names if name not in at)
            raise Refused(
                f"the circuit scores {len(at):,} of the {len(known):,} {circuit.level}s of {model.name}, {missing!r} is "
                "missing; judging it needs all of them, as find_circuit gives them"
            )
        return cls(made, torch.tensor([at[name] for name in made.names]))

    @property
    def setting(self) -> Setting:
        return self.model.setting

    @torch.no_grad()
    def measure(self, keeps: Sequence[Tensor], measures: Sequence[Measure]) -> Tensor:
        """Each of ``measures`` for each kept set (bool over the circuit's names), per example:
        ``[keeps, measures, examples]`` float64."""
        if not measures:
            raise WorkbenchError("there is nothing to measure")
        rows: list[list[list[Tensor]]] = [[[] for _ in measures] for _ in keeps]
        for pairs in self.setting.chunks():
            batch = self.model.prepare(pairs)
            for row, keep in zip(rows, keeps, strict=True):
                logits = self.model.logits(batch, keep[self.order].to(torch.float32))
                for cell, each in zip(row, measures, strict=True):
                    cell.append(each(logits, batch).double().cpu())
        return torch.stack([torch.stack([torch.cat(cell) for cell in row]) for row in rows])

    def metric(self, logits: Tensor, batch: Prepared) -> Tensor:
        """The setting's metric."""
        return self.setting.measure(logits, batch.pairs)


def kl(logits: Tensor, batch: Prepared) -> Tensor:
    """KL(whole model || reduced model) of the next token at the answer position, in nats."""
    return divergence(batch.logits, logits, batch.pairs)


def correct(logits: Tensor, batch: Prepared) -> Tensor:
    """1 where the largest logit is one of the answers."""
    return accuracy(logits, batch.pairs)


def agrees(logits: Tensor, batch: Prepared) -> Tensor:
    """1 where the reduced model's largest logit at the answer position is the whole model's."""
    rows = torch.arange(len(batch.pairs), device=logits.device)
    position = batch.pairs.position.to(logits.device)
    return (logits[rows, position].argmax(-1) == batch.logits[rows, position].argmax(-1)).float()


def positions_of(circuit: Circuit) -> str:
    """Which ``positions`` a circuit tells apart, from its names."""
    places = {name_place(name)[1] for name in circuit.names}
    if places <= {""}:
        return "all"
    if "" in places:
        raise WorkbenchError("some names of this circuit have a place and some have none")
    return "each" if all(place.isdigit() for place in places) else "spans"
