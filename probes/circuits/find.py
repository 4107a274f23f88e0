"""Finding circuits: which heads, MLPs and edges carry the difference between clean and corrupted prompts?"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from workbench.circuits import LEVELS, Circuit
from workbench.errors import Refused, UnknownName, check_types
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import ABLATIONS, Metric, Setting


@dataclass(frozen=True)
class Method:
    """One way to find circuits. ``options`` are the keywords it takes and their defaults."""

    name: str
    description: str
    levels: tuple[str, ...]
    ablations: tuple[str, ...]
    function: str

    def __call__(self, setting: Setting, level: str, **options: Any) -> Circuit:
        return self._resolve()(setting, level, **options)

    @property
    def options(self) -> dict[str, Any]:
        parameters = inspect.signature(self._resolve()).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def _resolve(self) -> Callable[..., Circuit]:
        module, attribute = self.function.split(":")
        return getattr(importlib.import_module(f"workbench.probes.circuits.{module}"), attribute)


_METHODS = {
    method.name: method
    for method in (
        Method(
            "patching",
            "exact effect of replacing one node or edge; a forward pass for each",
            LEVELS,
            ABLATIONS,
            "patching:patching",
        ),
        Method("eap", "first-order effect from the gradient at the clean run", LEVELS, ABLATIONS, "eap:eap"),
        Method(
            "eap-ig",
            "first-order effect from gradients averaged between replacement and clean embeddings",
            LEVELS,
            ABLATIONS,
            "eap_ig:eap_ig",
        ),
        Method(
            "discrete-sae",
            "codes of a small sparse autoencoder that only the clean prompts use, per head, with a permutation null",
            ("node",),
            ("counterfactual",),
            "discrete_sae:discrete_sae",
        ),
    )
}


def methods() -> dict[str, Method]:
    """Every method: name -> record with ``description``, ``levels``, ``ablations`` and ``options``."""
    return dict(_METHODS)


def find_circuit(
    model: Model,
    pairs: Pairs,
    method: str = "eap-ig",
    level: str | None = None,
    ablation: str = "counterfactual",
    *,
    metric: Metric | None = None,
    batch: int = 16,
    **options: Any,
) -> Circuit:
    """Score all nodes or edges of ``model`` on ``pairs``; everything is kept, ``top(n)`` and ``threshold(t)`` select.

    A positive score says that the part supports the clean behaviour: replacing it would lower the metric. ``level``
    is ``"edge"`` or ``"node"``; the finest that the method has if not given. ``ablation`` is what replaces an
    output: ``"counterfactual"`` (the paired corrupted prompt's), ``"zero"``, or ``"mean"`` (per position over the
    clean prompts). ``metric(logits, pairs) -> [B]`` is the logit difference unless given. ``options`` are the
    method's own, see ``methods()[name].options``. Raises ``UnknownName`` for an unknown method, level, ablation or
    option, ``WorkbenchError`` for an option of another type, and ``Refused`` where the model or method cannot serve the level.
    """
    if method not in _METHODS:
        raise UnknownName("circuit method", method, _METHODS)
    chosen = _METHODS[method]
    if level is None:
        level = "edge" if "edge" in chosen.levels else "node"
    if level not in LEVELS:
        raise UnknownName("circuit level", level, LEVELS)
    if level not in chosen.levels:
        raise Refused(f"method {method!r} has no {level} level; it has: {', '.join(chosen.levels)}")
    setting = Setting.of(model, pairs, metric, ablation, batch)
    if ablation not in chosen.ablations:
        raise Refused(f"method {method!r} cannot use ablation {ablation!r}; it has: {', '.join(chosen.ablations)}")
    known = chosen.options
    for name in options:
        if name not in known:
            raise UnknownName(f"option of {method!r}", name, known)
    check_types(f"method {method!r}", {name: type(value) for name, value in known.items()}, options)
    circuit = chosen(setting, level, **options)
    return replace(
        circuit, provenance={**setting.provenance(method, level, {**known, **options}), **circuit.provenance}
    )
