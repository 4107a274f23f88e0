"""What a model does when it keeps some of a circuit's parts and everything else that the circuit scores is replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
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
        ``[keeps, measures, examples]`` float64. A set that occurs twice runs once."""
        if not measures or not len(keeps):
            raise WorkbenchError("there is nothing to measure")
        names = len(self.order)
        for keep in keeps:
            if keep.dtype != torch.bool or keep.shape != (names,):
                raise WorkbenchError(f"a kept set is bool [{names}]; got {keep.dtype} {list(keep.shape)}")
        unique = {packed(keep): keep for keep in keeps}
        rows: dict[bytes, list[list[Tensor]]] = {key: [[] for _ in measures] for key in unique}
        for pairs in self.setting.chunks():
            batch = self.model.prepare(pairs)
            for key, keep in unique.items():
                logits = self.model.logits(batch, keep[self.order].to(torch.float32))
                for cell, each in zip(rows[key], measures, strict=True):
                    cell.append(each(logits, batch).double().cpu())
        found = {key: torch.stack([torch.cat(cell) for cell in row]) for key, row in rows.items()}
        return torch.stack([found[packed(keep)] for keep in keeps])

    def metrics(self, keeps: Sequence[Tensor]) -> Tensor:
        """The setting's metric of each kept set, per example: ``[keeps, examples]``."""
        return self.measure(keeps, [self.metric])[:, 0]

    def metric(self, logits: Tensor, batch: Prepared) -> Tensor:
        """The setting's metric."""
        return self.setting.measure(logits, batch.pairs)


class Remembered:
    """The metric of kept sets per example ``[keeps, examples]``, each set computed once however often it is asked for."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, keeps: Sequence[Tensor]) -> Tensor:
        new = {key: keep for keep in keeps if (key := packed(keep)) not in self._known}
        if new:
            self._known.update(zip(new, self._kept.metrics(list(new.values())), strict=True))
        return torch.stack([self._known[packed(keep)] for keep in keeps])

    def __len__(self) -> int:
        """How many different sets were computed."""
        return len(self._known)


def packed(keep: Tensor) -> bytes:
    """A kept set as a key of a dictionary."""
    return np.packbits(keep.numpy()).tobytes()


def without(keep: Tensor, gone: Sequence[int]) -> Tensor:
    """A kept set less the parts with these numbers."""
    rest = keep.clone()
    rest[list(gone)] = False
    return rest


def percentiles(drawn: Tensor, alone: bool = False) -> Tensor:
    """The middle 95% of bootstrap draws over the first axis, ``[2, ...]``; NaN where there was a single example to draw
    from (``alone``) or a draw is undefined."""
    ends = torch.quantile(drawn.double(), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return torch.full_like(ends, torch.nan) if alone else ends


def check_draws(draws: int) -> None:
    """Refuse fewer than 20 bootstrap draws: no percentile of them is one of 95%."""
    if draws < 20:
        raise WorkbenchError(f"draws counts bootstrap resamples, at least 20; got {draws}")


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
