"""Do two tasks share their circuits, and do the heads of one repair the other?

The experiment of Merullo et al. (arXiv 2310.08744): find the circuit of each task by path patching, compare them, give the
heads roles, and force the heads that only the first task uses to attend where the second one needs them. Published for GPT-2
medium with indirect objects and colored objects: 25 of 32 heads are in both circuits (78%, |A and B| / |A|), as against 16.7%
with greater-than and 25% with world capitals; importances of heads correlate with .69 (Spearman). That is one extraction
without seeds. What two random circuits of the same sizes have in common stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.compare import ComparisonResult, compare_circuits
from workbench.probes.circuits.reuse.repair import Repair, repair
from workbench.probes.circuits.reuse.roles import ROLES, CircuitRoles, circuit_roles
from workbench.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FORCED_ROLES = ("inhibition", "negative")
"""Roles whose heads are forced unless others are named, as published."""


@dataclass(frozen=True)
class Reuse(Result):
    """The circuits of two tasks side by side. ``circuits`` and ``roles`` are by task, ``comparison`` takes the first as A."""

    circuits: Mapping[str, Circuit]
    comparison: ComparisonResult
    roles: Mapping[str, CircuitRoles] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.circuits)

    @property
    def shared(self) -> tuple[str, ...]:
        """Nodes that both circuits keep."""
        first, second = self.circuits.values()
        return tuple(name for name in first.nodes if name in second.nodes)

    def frame(self) -> pd.DataFrame:
        """One row per node that one of the circuits keeps: ``node``, then ``kept``, ``score`` and ``roles`` of each task."""
        import pandas as pd

        wholes = {task: circuit.over_positions() for task, circuit in self.circuits.items()}
        nodes = dict.fromkeys(name for circuit in self.circuits.values() for name in circuit.nodes)
        order = {name: i for i, name in enumerate(next(iter(wholes.values())).names)}
        names = sorted(nodes, key=lambda name: order.get(name, len(order)))
        table: dict[str, list[Any]] = {"node": names}
        for task, whole in wholes.items():
            scores = dict(zip(whole.names, whole.scores.tolist(), strict=True))
            table[f"kept {task}"] = [name in self.circuits[task].nodes for name in names]
            table[f"score {task}"] = [scores.get(name, float("nan")) for name in names]
        for task, found in self.roles.items():
            known = dict(zip(found.heads, found.labels, strict=True))
            table[f"roles {task}"] = [", ".join(known.get(name, ())) for name in names]
        return pd.DataFrame(table)

    def plot(self, ax: Axes | None = None) -> Axes:
        """What the circuits have in common, next to chance."""
        return self.comparison.plot(ax)


def circuit_reuse(
    model: Model,
    pairs: Mapping[str, Pairs],
    *,
    circuits: Mapping[str, Circuit] | None = None,
    method: str = "path-patching",
    top: int | None = None,
    roles: bool = True,
    batch: int = 16,
    **options: Any,
) -> Reuse:
    """The circuits of two tasks (``pairs`` by task, the first is A), what they share, and the roles of their heads.

    Circuits are found at node level by ``method`` with its ``options``, unless ``circuits`` gives them. ``top`` keeps that
    many of each; needed for methods that only rank. ``roles=False`` leaves roles out.
    """
    if len(pairs) != 2:
        raise WorkbenchError(f"reuse compares two tasks; got {', '.join(pairs) or 'none'}")
    if circuits is not None:
        if set(circuits) != set(pairs) or options:
            raise WorkbenchError("circuits= gives one circuit per task, and then there are no options of a method")
        found = {task: circuits[task] for task in pairs}
    else:
        found = {
            task: find_circuit(model, each, method=method, level="node", batch=batch, **options)
            for task, each in pairs.items()
        }
    if top is not None:
        found = {task: circuit.top(top) for task, circuit in found.items()}
    for task, circuit in found.items():
        if len(circuit) in (0, len(circuit.names)):
            much = "every part" if len(circuit) else "nothing"
            raise WorkbenchError(f"the circuit of {task} keeps {much}, which says nothing about reuse; pass top=")
    first, second = found.values()
    told = {}
    if roles:
        told = {
            task: circuit_roles(model, pairs[task], [n for n in circuit.nodes if ".h" in n], batch=batch)
            for task, circuit in found.items()
        }
    provenance = {"model": model.name, "tasks": list(pairs), "circuits": [dict(c.provenance) for c in found.values()]}
    return Reuse(found, compare_circuits(first, second), told, provenance)


def idle_heads(reuse: Reuse, roles: Sequence[str] = FORCED_ROLES) -> dict[str, tuple[str, ...]]:
    """By role, the heads that have it in the first task and are not in the circuit of the second; no empty roles."""
    source, target = reuse.tasks
    for role in roles:
        if role not in ROLES:
            raise UnknownName("role", role, ROLES)
    if source not in reuse.roles:
        raise WorkbenchError("the heads have no roles yet; call circuit_reuse(..., roles=True)")
    busy = set(reuse.circuits[target].nodes)
    found = {role: tuple(name for name in reuse.roles[source].of(role) if name not in busy) for role in roles}
    return {role: heads for role, heads in found.items() if heads}


def repairs(
    model: Model,
    pairs: Pairs,
    groups: Mapping[str, Sequence[str]],
    onto: Sequence[str],
    *,
    movers: Sequence[str] = (),
    controls: int = 8,
    batch: int = 16,
    seed: int = 0,
) -> dict[str, Repair]:
    """``repair`` with all ``groups`` of heads together, then with each alone, by name."""
    if not groups or not all(groups.values()):
        raise WorkbenchError(
            "there are no heads to force; name some, or find a circuit with inhibition or negative heads"
        )
    sets = {" + ".join(groups): [name for heads in groups.values() for name in heads], **groups}
    return {
        name: repair(model, pairs, heads, onto, movers=movers, controls=controls, batch=batch, seed=seed)
        for name, heads in sets.items()
    }
