"""EAP with integrated gradients over inputs (arXiv 2403.17806, eq. 2).

The gradient is averaged over embeddings on the straight line from the replacement to the clean prompt,
e(t) = e' + t (e - e'); everything else is as in ``eap``.
"""

from __future__ import annotations

from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.circuits.attribution import attribute
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.method import Method

RULES = ("left", "midpoint")


def eap_ig(setting: Setting, level: str, *, steps: int = 5, rule: str = "left") -> Circuit:
    """Mean gradient at t = k/steps, k = 0 .. steps-1 (``rule="left"``, as published) or t = (k + 1/2)/steps
    (``"midpoint"``).

    ``steps`` forward and backward passes per batch.
    """
    if not isinstance(steps, int) or steps < 1:
        raise WorkbenchError(f"steps is a whole number of points on the path, at least 1; got {steps!r}")
    if rule not in RULES:
        raise UnknownName("integration rule", rule, RULES)
    shift = 0.5 if rule == "midpoint" else 0.0

    def path(clean: Tensor, instead: Tensor) -> list[Tensor]:
        return [instead + (k + shift) / steps * (clean - instead) for k in range(steps)]

    return attribute(setting, level, path)


METHODS = (
    Method(
        "eap-ig",
        "first-order effect from gradients averaged between replacement and clean embeddings",
        eap_ig,
        "Hanna et al. 2024 (arXiv 2403.17806), eq. 2",
        positions=True,
    ),
)
