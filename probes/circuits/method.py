"""What a circuit discovery method is: a scoring function and what it can do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workbench.circuits import LEVELS, Circuit
from workbench.probes.circuits.components import ABLATIONS, Setting


@dataclass(frozen=True)
class Method:
    """One way to find circuits.

    ``function(setting, level, *, options...)`` returns the scored ``Circuit``; its keywords are the ``options``.
    ``paper`` is the source. ``levels`` (the last is the default) and ``ablations`` are those it can serve, ``positions``
    whether it can tell positions apart, ``training`` whether it optimises something, so that its cost grows with a
    number of steps. ``contrast`` marks methods that compare activations and need pairs of ``task.contrast()``, whose
    corrupted prompts do not call for the behaviour. ``unit`` is what its scores count.
    """

    name: str
    description: str
    function: Callable[..., Circuit]
    paper: str
    levels: tuple[str, ...] = LEVELS
    ablations: tuple[str, ...] = ABLATIONS
    positions: bool = False
    training: bool = False
    contrast: bool = False
    unit: str = "units of the metric"

    def __call__(self, setting: Setting, level: str, **options: Any) -> Circuit:
        return self.function(setting, level, **options)

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of the method and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
