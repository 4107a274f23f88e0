"""RelP: attribution patching with relevance in the place of the gradient (arXiv 2508.21258).

score = (clean - replacement) . coefficient, where the coefficient is what layer-wise relevance propagation sends back from
the metric at the clean run. The rules are those of ``probes.structure.relevance_rules``: norms divide by a size that is
taken as given, activations are their secants, and with ``rule="relp"`` attention patterns are taken as given, so that edges
into queries and keys score 0 by definition. ``rule="attnlrp"`` (arXiv 2402.05602) sends relevance through the patterns too.
The order of rules and sum is the paper's; the reading of its rules for norm and activation is ours.
"""

from __future__ import annotations

from workbench.circuits import Circuit
from workbench.errors import UnknownName
from workbench.probes.circuits.attribution import attribute
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.method import Method
from workbench.probes.structure.relevance_rules import propagating

RULES = ("relp", "attnlrp")


def relp(setting: Setting, level: str, *, rule: str = "relp") -> Circuit:
    """Two forward passes and one modified backward pass per batch. Native models of softmax and gated softmax, and at node
    level the Hugging Face families that have rules; others are refused."""
    if rule not in RULES:
        raise UnknownName("rule", rule, RULES)
    with propagating(setting.model, rule) as edits:
        return attribute(setting, level, edits=edits)


METHODS = (
    Method(
        "relp",
        "first-order effect with layer-wise relevance propagation in the place of the gradient",
        relp,
        "Jafari et al. 2025 (arXiv 2508.21258)",
        positions=True,
    ),
)
