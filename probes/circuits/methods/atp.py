"""Attribution patching of nodes: the first-order effect of replacing the output of a head or an MLP.

score = (clean - replacement) . dm/doutput at the clean run, summed over positions, mean over examples, at ``hook_z`` and
``hook_mlp_out``. This is the head importance score with a corrupted prompt in the place of zero (HISP, arXiv 2304.14997,
appendix), known as AtP, and the same number as ``eap`` at node level. Its edges are those of ``eap``: the gradient of an
output is the sum of the gradients of the inputs that read it, so a node's score is the sum over its outgoing edges.
"""

from __future__ import annotations

from workbench.circuits import Circuit
from workbench.probes.circuits.attribution import attribute
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.method import Method


def atp(setting: Setting, level: str) -> Circuit:
    """First-order effect of every node; see the module."""
    return attribute(setting, level)


METHODS = (
    Method(
        "atp",
        "first-order effect of replacing a node's output; for edges: eap",
        atp,
        "Nanda 2023; HISP of Conmy et al. 2023 (arXiv 2304.14997)",
        levels=("node",),
        positions=True,
    ),
)
