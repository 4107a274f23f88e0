"""Is the circuit all of the mechanism? Whatever is taken away from it should cost it what it costs the model.

For a set K of the circuit's parts, completeness compares F(C without K) with F(M without K), where F is the mean
metric, C the circuit and M the model (Wang et al. 2022, arXiv 2211.00593, section 4). If C misses a backup, M without
K recovers where C without K does not. K runs over nothing (plain faithfulness), random sets (each part of C with
probability 1/2), the parts of one role, and a greedy search for the worst. Published for IOI in GPT-2 small: gap
.46 for K = nothing, 3.09 for the greedy worst case, of a logit difference of 3.56 (mean ablation). The greedy search
is their idea; its steps as written here are our reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.graph import name_place
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
class CompletenessResult(Result):
    """One entry per set K: its ``kinds`` (``none``, ``random``, the name of a role, ``greedy``) and ``removed`` parts.

    ``circuit`` ``[R]`` is F(C without K), ``model`` ``[R]`` F(M without K), in units of the metric; ``low`` and ``high``
    ``[R]`` the 95% bootstrap interval over examples of circuit - model, for the K as found: searching for the worst K is
    not part of the resampling. ``full`` is F(M), ``empty`` F of nothing kept, ``evaluated`` how many sets were run.
    """

    kinds: tuple[str, ...]
    removed: tuple[tuple[str, ...], ...]
    circuit: Tensor
    model: Tensor
    low: Tensor
    high: Tensor
    full: float
    empty: float
    level: str
    evaluated: int
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> Tensor:
        """|F(C without K) - F(M without K)|, ``[R]``: 0 is complete."""
        return (self.circuit - self.model).abs()

    @property
    def worst(self) -> float:
        """The largest gap over all sets K."""
        return float(self.gap.max())

    def frame(self) -> pd.DataFrame:
        """Columns ``kind removed circuit model gap low high share parts``: ``removed`` counts K, ``share`` is the gap as a
        share of |F(M) - F(nothing)|, ``parts`` names K."""
        import pandas as pd

        span = abs(self.full - self.empty)
        return pd.DataFrame(
            {
                "kind": list(self.kinds),
                "removed": [len(parts) for parts in self.removed],
                "circuit": self.circuit.numpy(),
                "model": self.model.numpy(),
                "gap": self.gap.numpy(),
                "low": self.low.numpy(),
                "high": self.high.numpy(),
                "share": self.gap.numpy() / (span or float("nan")),
                "parts": [" ".join(parts) for parts in self.removed],
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """F(M without K) against F(C without K); a complete circuit lies on the diagonal."""
        ax = axis(ax)
        for kind in dict.fromkeys(self.kinds):
            at = [i for i, each in enumerate(self.kinds) if each == kind]
            ax.plot(self.circuit[at].numpy(), self.model[at].numpy(), linestyle="none", marker="o", label=kind)
        ends = torch.cat([self.circuit, self.model])
        span = [float(ends.min()), float(ends.max())]
        ax.plot(span, span, color="grey", linewidth=0.5)
        ax.set(xlabel="F(circuit without K)", ylabel="F(model without K)", title=f"worst gap {self.worst:.3g}")
        ax.legend()
        return ax


@torch.no_grad()
def completeness(
    model: Model,
    circuit: Circuit,
    pairs: Pairs,
    ablation: str = "counterfactual",
    *,
    roles: Mapping[str, Sequence[str]] | None = None,
    random: int = 10,
    restarts: int = 3,
    steps: int = 10,
    tries: int = 10,
    metric: Metric | None = None,
    batch: int = 16,
    seed: int = 0,
) -> CompletenessResult:
    """Gaps of ``circuit``'s kept set for K = nothing, ``random`` random sets, the parts of each of ``roles`` (name ->
    names of parts, without a place for all places; those outside the circuit do not count) and the worst set of each
    of ``restarts`` greedy searches.

    A greedy search starts with nothing and makes ``steps`` steps: of ``tries`` parts of C drawn anew, the one with the
    largest gap joins K (all parts if fewer are left, which makes the search deterministic and one restart enough); the
    best K on its way counts. At most 2 x ``restarts`` x ``steps`` x ``tries`` kept sets are run on all pairs.
    """
    for name, value in (("random", random), ("restarts", restarts), ("steps", steps)):
        if value < 0:
            raise WorkbenchError(f"{name} is a number, at least 0; got {value}")
    if tries < 1:
        raise WorkbenchError(f"tries is how many parts compete for a step, at least 1; got {tries}")
    if not len(circuit):
        raise Refused("the circuit keeps nothing, so nothing can be taken away from it; choose parts with top(n)")
    kept = Kept.of(model, circuit, pairs, metric, ablation, batch)
    values = Remembered(kept)
    everything = torch.ones(len(circuit.names), dtype=torch.bool)
    inside = circuit.kept.nonzero()[:, 0].tolist()

    def differences(sets: Sequence[Sequence[int]]) -> Tensor:
        """F(C without K) and F(M without K) per example, ``[sets, 2, examples]``."""
        keeps = [without(base, k) for k in sets for base in (circuit.kept, everything)]
        return values(keeps).unflatten(0, (-1, 2))

    def gaps(sets: Sequence[Sequence[int]]) -> Tensor:
        own, whole = differences(sets).mean(2).unbind(1)
        return (own - whole).abs()

    generator = torch.Generator().manual_seed(seed)
    chosen: list[tuple[str, tuple[int, ...]]] = [("none", ())]
    for _ in range(random):
        coins = torch.rand(len(inside), generator=generator) < 0.5
        chosen.append(("random", tuple(i for i, gone in zip(inside, coins.tolist(), strict=True) if gone)))
    for role, parts in (roles or {}).items():
        chosen.append((role, _members(circuit, parts)))
    for _ in range(min(restarts, 1) if tries >= len(inside) else restarts):
        found: tuple[int, ...] = ()
        best, largest = found, -1.0
        for _ in range(min(steps, len(inside))):
            left = [i for i in inside if i not in found]
            drawn = torch.randperm(len(left), generator=generator)[:tries].sort().values
            sets = [(*found, left[i]) for i in drawn.tolist()]
            scores = gaps(sets)
            found = sets[int(scores.argmax())]
            if float(scores.max()) > largest:
                best, largest = found, float(scores.max())
        if best:
            chosen.append(("greedy", tuple(sorted(best))))

    own, whole = differences([k for _, k in chosen]).unbind(1)  # [R, examples]
    low, high = interval((own - whole).T, seed=seed)
    ends = values([everything, ~everything]).mean(1)
    options = {"random": random, "restarts": restarts, "steps": steps, "tries": tries, "seed": seed}
    return CompletenessResult(
        kinds=tuple(kind for kind, _ in chosen),
        removed=tuple(tuple(circuit.names[i] for i in k) for _, k in chosen),
        circuit=own.mean(1),
        model=whole.mean(1),
        low=low,
        high=high,
        full=float(ends[0]),
        empty=float(ends[1]),
        level=circuit.level,
        evaluated=len(values),
        provenance={
            **kept.setting.provenance("completeness", circuit.level, options),
            "circuit": dict(circuit.provenance),
        },
    )


def _members(circuit: Circuit, parts: Sequence[str]) -> tuple[int, ...]:
    """Kept parts with one of these names, whole or without their place."""
    bare = [name_place(name)[0] for name in circuit.names]
    for part in parts:
        if part not in circuit.names and part not in bare:
            raise UnknownName(f"{circuit.level} of this circuit", part, circuit.names)
    wanted = set(parts)
    return tuple(
        i
        for i, (name, short) in enumerate(zip(circuit.names, bare, strict=True))
        if bool(circuit.kept[i]) and (name in wanted or short in wanted)
    )
