"""Edge attribution patching (arXiv 2310.10348, eq. 1): the gradient at the clean run predicts each edge's effect.

Two forward passes and one backward pass per batch for all edges together: with gradients on the clean prompts, without
on the corrupted ones. Where attention is saturated the gradient
is zero and so is the score, whatever the true effect; ``eap-ig`` and ``patching`` do not share this weakness.
"""

from __future__ import annotations

from workbench.circuits import Circuit
from workbench.probes.circuits.attribution import attribute
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.method import Method


def eap(setting: Setting, level: str) -> Circuit:
    """(clean - replacement) . dm/dinput at the clean run, summed over positions, mean over examples."""
    return attribute(setting, level)


METHODS = (
    Method(
        "eap",
        "first-order effect from the gradient at the clean run",
        eap,
        "Syed et al. 2023 (arXiv 2310.10348), eq. 1",
        positions=True,
    ),
)
