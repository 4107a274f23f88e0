"""Finding circuits: which heads, MLPs and edges carry the difference between clean and corrupted prompts?"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from workbench.circuits import LEVELS, Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError, check_types
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import Metric, Setting
from workbench.probes.circuits.method import Method

__all__ = ["Method", "find_circuit", "methods"]


@cache
def _known() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for path in sorted((Path(__file__).parent / "methods").glob("*.py")):
        module = importlib.import_module(f"workbench.probes.circuits.methods.{path.stem}")
        for method in getattr(module, "METHODS", ()):
            if method.name in found:
                raise WorkbenchError(f"two circuit methods are called {method.name!r}")
            found[method.name] = method
    return found


def methods() -> dict[str, Method]:
    """Every method: name -> record with ``description``, ``paper``, ``levels``, ``ablations``, ``positions``, ``contrast``
    and ``options``, from the tuples ``METHODS`` of the modules in ``probes/circuits/methods/``."""
    return dict(_known())


def find_circuit(
    model: Model,
    pairs: Pairs,
    method: str = "eap-ig",
    level: str | None = None,
    ablation: str = "counterfactual",
    *,
    metric: Metric | None = None,
    batch: int = 16,
    positions: str = "all",
    **options: Any,
) -> Circuit:
    """Score all nodes or edges of ``model`` on ``pairs``; everything is kept, ``top(n)`` and ``threshold(t)`` select.

    A positive score says that the part supports the clean behaviour: replacing it would lower the metric. ``level``
    is ``"edge"`` or ``"node"``; the last of ``methods()[name].levels`` if not given. ``ablation`` is what replaces an
    output: ``"counterfactual"`` (the paired corrupted prompt's), ``"zero"``, ``"mean"`` (per position over the
    clean prompts), or ``"optimal"`` (the constant that costs the behaviour least). ``positions`` is ``"all"`` (a part
    stands for all positions), ``"each"`` (a part at each position, ``a1.h2@5``) or ``"spans"`` (at each span that the
    task names, ``a1.h2@END``). ``metric(logits, pairs) -> [B]`` is the logit difference unless given. ``options`` are the
    method's own, see ``methods()[name].options``. Raises ``UnknownName`` for an unknown method, level, ablation or
    option, ``WorkbenchError`` for an option of another type, and ``Refused`` where the model or method cannot serve the level.
    """
    known_methods = _known()
    if method not in known_methods:
        raise UnknownName("circuit method", method, known_methods)
    chosen = known_methods[method]
    if level is None:
        level = chosen.levels[-1]
    if level not in LEVELS:
        raise UnknownName("circuit level", level, LEVELS)
    if level not in chosen.levels:
        raise Refused(f"method {method!r} has no {level} level; it has: {', '.join(chosen.levels)}")
    setting = Setting.of(model, pairs, metric, ablation, batch, positions)
    if positions != "all" and not chosen.positions:
        able = ", ".join(name for name, each in methods().items() if each.positions)
        raise Refused(f"method {method!r} does not tell positions apart; these do: {able}")
    if ablation not in chosen.ablations:
        raise Refused(f"method {method!r} cannot use ablation {ablation!r}; it has: {', '.join(chosen.ablations)}")
    known = chosen.options
    for name in options:
        if name not in known:
            raise UnknownName(f"option of {method!r}", name, known)
    check_types(f"method {method!r}", {name: type(value) for name, value in known.items()}, options)
    circuit = chosen(setting, level, **options)
    return replace(
        circuit,
        provenance={
            **setting.provenance(method, level, {**known, **options}),
            "unit": chosen.unit,
            **circuit.provenance,
        },
    )
