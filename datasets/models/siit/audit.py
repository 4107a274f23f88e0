"""What a trained network must pass, its labels, and what is written beside its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.circuits import Circuit, edge_parts
from workbench.datasets.models.siit.effects import edge_effects, gap, graph_of, node_effects
from workbench.datasets.models.siit.program import VARIABLES, Sources, answers, draw, duplicate
from workbench.datasets.models.siit.swap import components, plain, swapped
from workbench.datasets.models.siit.train import COMPONENTS
from workbench.datasets.tasks.ioi import IOI
from workbench.models.native import NativeModel
from workbench.pairs import Pairs

REQUIRED = 0.995
SHARE = 0.05
"""Least effect of a kept edge, as a share of |m(clean) - m(corrupted)|."""


def flow() -> tuple[tuple[str, str], ...]:
    """The program's causal graph between components: (source, target)."""
    first, second, third = (COMPONENTS[variable] for variable in VARIABLES)
    return (("input", first), (first, second), ("input", third), (second, third), (third, "logits"))


def held_out(model: NativeModel, n: int = 64, seed: int = 11) -> Pairs:
    """Pairs of the task's test split under its default corruption, from which labels and effects are computed."""
    return IOI(split="test").build(seed, model.tokenizer, n)


@torch.no_grad()
def measure(model: NativeModel, n: int = 1000, seed: int = 7) -> dict[str, Any]:
    """Accuracy, intervention and strict accuracy on ``n`` prompts of the test split.

    ``accuracy``: share of prompts whose largest logit is in the program's answer. ``iia``: the same with a variable's
    component from a source, against the program's answer under that intervention, over those prompts whose answer it changes.
    ``strict``: with another component from a source, against the answer to the base; ``kl``: mean KL divergence, in nats, of
    that run from the run without a swap.
    """
    net, tokenizer = model.net, model.tokenizer
    base = draw(tokenizer, seed=seed, n=n, split="test")
    source = base[Sources(base)(torch.arange(n), torch.Generator().manual_seed(seed))]
    before, _ = plain(net, base.ids, base.end)
    _, wrote = plain(net, source.ids, source.end)
    names, said, logp = components(net.config), answers(base), before.log_softmax(-1)

    def hits(logits: Tensor, sets: Tensor) -> Tensor:
        return (logits.argmax(-1, keepdim=True) == sets).any(-1).double()

    right, nobody = hits(before, said), duplicate(base) == 0
    found: dict[str, Any] = {
        "accuracy": right[~nobody].mean().item(),
        "accuracy_nobody": right[nobody].mean().item(),
        "iia": {},
        "strict": {},
        "kl": {},
    }
    variable_of = {component: variable for variable, component in COMPONENTS.items()}
    for index, name in enumerate(names):
        logits = swapped(net, base.ids, base.end, wrote, torch.full((n,), index))
        if name in variable_of:
            variable = VARIABLES.index(variable_of[name])
            wanted = answers(base, source, torch.full((n,), variable))
            changed = (wanted != said).any(1)
            found["iia"][variable_of[name]] = hits(logits, wanted)[changed].mean().item()
        else:
            found["strict"][name] = hits(logits, said).mean().item()
            found["kl"][name] = nn.functional.kl_div(
                logits.log_softmax(-1), logp, log_target=True, reduction="batchmean"
            ).item()
    found["iia"] = {variable: found["iia"][variable] for variable in VARIABLES}
    return found


def shortfalls(found: dict[str, Any]) -> list[str]:
    """Requirements that ``measure`` found unmet, as readable text; none for a network that may be bundled."""
    shares = {"accuracy": found["accuracy"], "accuracy with nobody named twice": found["accuracy_nobody"]}
    shares |= {f"interchange accuracy of {name}": value for name, value in found["iia"].items()}
    shares |= {f"strict accuracy of {name}": value for name, value in found["strict"].items()}
    return [f"{name} {value:.4f}" for name, value in shares.items() if not value > REQUIRED]


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
