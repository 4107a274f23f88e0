"""Finding circuits: which heads, MLPs and edges carry the difference between clean and corrupted prompts?"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from workbench.circuits import LEVELS, Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError, check_types
from workbench.models.protocol import Model
from workbench.pairs import Pairs, Task
from workbench.probes.circuits.components import ABLATIONS, Metric, Setting
from workbench.probes.circuits.method import Method
from workbench.probes.circuits.places import POSITIONS

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
    chosen, level = check_request(method, level, ablation, positions, options)
    setting = Setting.of(model, pairs, metric, ablation, batch, positions)
    circuit = chosen(setting, level, **options)
    return replace(
        circuit,
        provenance={
            **setting.provenance(method, level, {**chosen.options, **options}),
            "unit": chosen.unit,
            **circuit.provenance,
        },
    )


def pairs_for(method: str, task: Task, model: Model, examples: int, seed: int) -> Pairs:
    """``examples`` pairs of ``task`` as ``method`` compares them: methods that look at activations (``contrast``) get the task's
    negatives as corrupted prompts."""
    if method not in _known():
        raise UnknownName("circuit method", method, _known())
    chosen = task.contrast() if _known()[method].contrast else task
    return chosen.build(seed=seed, tokenizer=model.tokenizer, n=examples)


def check_request(
    method: str, level: str | None, ablation: str, positions: str, options: Mapping[str, Any]
) -> tuple[Method, str]:
    """The method and the level of a request to ``find_circuit``, which refuses the others as here; it takes no model."""
    known = _known()
    if method not in known:
        raise UnknownName("circuit method", method, known)
    chosen = known[method]
    level = chosen.levels[-1] if level is None else level
    for what, name, names in (
        ("circuit level", level, LEVELS),
        ("ablation", ablation, ABLATIONS),
        ("positions", positions, POSITIONS),
    ):
        if name not in names:
            raise UnknownName(what, name, names)
    if level not in chosen.levels:
        raise Refused(f"method {method!r} has no {level} level; it has: {', '.join(chosen.levels)}")
    if positions != "all" and not chosen.positions:
        able = ", ".join(name for name, each in known.items() if each.positions)
        raise Refused(f"method {method!r} does not tell positions apart; these do: {able}")
    if ablation not in chosen.ablations:
        raise Refused(f"method {method!r} cannot use ablation {ablation!r}; it has: {', '.join(chosen.ablations)}")
    for name in options:
        if name not in chosen.options:
            raise UnknownName(f"option of {method!r}", name, chosen.options)
    check_types(f"method {method!r}", {name: type(value) for name, value in chosen.options.items()}, options)
    return chosen, level
