"""The labels of a trained network, and what is written beside its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.circuits import Circuit, edge_parts
from workbench.datasets.models.siit.effects import edge_effects, gap, graph_of, node_effects
from workbench.datasets.models.siit.program import VARIABLES
from workbench.datasets.models.siit.swap import COMPONENTS
from workbench.datasets.tasks.ioi import IOI
from workbench.models.native import NativeModel
from workbench.pairs import Pairs

SHARE = 0.05
"""Least effect of a kept edge, as a share of |m(clean) - m(corrupted)|."""


def flow() -> tuple[tuple[str, str], ...]:
    """The program's causal graph between components: (source, target)."""
    first, second, third = (COMPONENTS[variable] for variable in VARIABLES)
    return (("input", first), (first, second), ("input", third), (second, third), (third, "logits"))


def held_out(model: NativeModel, n: int = 64, seed: int = 11) -> Pairs:
    """Pairs of the task's test split under its default corruption, from which labels and effects are computed."""
    return IOI(split="test").build(seed, model.tokenizer, n)


def truth(model: NativeModel, pairs: Pairs) -> Circuit:
    """The labels over all edges, on clean prompts of ``pairs``, in units of the logit difference, means over examples.

    Scores and the column ``effect``: exact effect of the corrupted value on the edge. ``kept``: effect of at least ``SHARE`` of
    |m(clean) - m(corrupted)|. Column ``cut``: exact effect of zeros on the edge, and ``needed``: edges between the program's
    components (with the prompt and the logits) whose cut has at least that size. Training fixes which components compute,
    not by which channels they hand on; ``needed`` has what was measured.
    """
    graph = graph_of(model)
    effect, cut = (edge_effects(model, pairs, ablation).mean(1) for ablation in ("counterfactual", "zero"))
    span = gap(model, pairs).mean().item()
    least, own = SHARE * abs(span), {"input", *COMPONENTS.values(), "logits"}
    inside = torch.tensor([own.issuperset(edge_parts(edge)[:2]) for edge in graph.edges])
    provenance = {
        "method": "strict interchange-intervention training",
        "labels": f"exact effect of at least {SHARE:.0%} of m(clean) - m(corrupted)",
        "model": model.name,
        "revision": model.revision,
        "corruption": IOI.corruption,
        "metric": "logit_difference",
        "gap": span,
        "examples": len(pairs),
    }
    columns = {"effect": effect, "cut": cut, "needed": inside & (cut.abs() >= least)}
    return Circuit("edge", graph.edges, effect, effect.abs() >= least, provenance, columns)


def audit(model: NativeModel, pairs: Pairs, circuit: Circuit) -> dict[str, Any]:
    """What ``audit.json`` says besides ``measure``: nodes, edges, and the exact effect of every node on ``pairs``.

    ``effects``: mean exact effect, in units of the logit difference. ``leak``: mean over prompts of the size of the effect of
    a node outside the program, as a share of ``gap``, |m(clean) - m(corrupted)|.
    """
    span, effects = gap(model, pairs), node_effects(model, pairs)
    mine = set(COMPONENTS.values())
    return {
        "task": "ioi",
        "corruption": IOI.corruption,
        "revision": model.revision,
        "variables": COMPONENTS,
        "nodes": list(graph_of(model).nodes),
        "edges": len(circuit.names),
        "program": [list(edge) for edge in flow()],
        "kept": _names(circuit, circuit.kept),
        "needed": _names(circuit, circuit.columns["needed"]),
        "kept_not_needed": _names(circuit, circuit.kept & ~circuit.columns["needed"]),
        "cut_outside": _names(
            circuit, ~circuit.columns["needed"] & (circuit.columns["cut"].abs() >= SHARE * abs(span.mean()))
        ),
        "examples": len(pairs),
        "gap": span.mean().item(),
        "effects": {name: value.mean().item() for name, value in effects.items()},
        "leak": {
            name: (value.abs().mean() / span.abs().mean()).item() for name, value in effects.items() if name not in mine
        },
    }


def _names(circuit: Circuit, flags: Tensor) -> list[str]:
    return [name for name, flag in zip(circuit.names, flags.tolist(), strict=True) if flag]
