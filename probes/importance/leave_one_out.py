"""What does the model lose without one head?

One head at a time (or the query heads of one KV group) is removed and the prediction compared with that of the whole model: the
probability of what is right, the Jensen-Shannon divergence of the two predictions, accuracy and loss, as in the pruning-based
metrics of arXiv 2303.13731 (names from its abstract, formulas ours). With ``ablation="mean"`` this is mean-ablation. Beside each
number stands the effect of a random change of the same size: at every token the head's output moves as far as the removal moves
it, in a random direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, needles
from workbench.probes.importance.outcomes import Judge
from workbench.probes.removal import Heads, Removal, all_heads, kv_groups, sites_of, variations
from workbench.probes.tables import HeadTable
from workbench.run import Run
from workbench.sites import Site

UNITS = {
    "probability_drop": "probability lost",
    "divergence": "nats",
    "accuracy_change": "accuracy, after - before",
    "loss_change": "nats, after - before",
}
BY = ("head", "kv-group")


@dataclass(frozen=True)
class Effects:
    """``of[measure]`` ``[P, N]``: what removing each of P parts does to each of N examples; ``null`` likewise for random changes
    of the same size, mean over draws (empty without draws)."""

    parts: tuple[Site | Heads, ...]
    of: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    plain: Run


@dataclass(frozen=True)
class GroupTable(HeadTable):
    """A row per KV group of ``size`` query heads, in the place of a row per head."""

    size: int = 1


def leave_one_head_out(
    model: Model,
    inputs: Any,
    *,
    ablation: str = "mean",
    labels: Tensor | None = None,
    by: str = "head",
    stack: str = "",
    draws: int = 1,
    seed: int = 0,
) -> HeadTable:
    """Effect of removing each head, mean over examples with 95% bootstrap intervals.

    ``inputs``: ``Pairs``, texts or tokens, or images with ``labels`` ``[B]``. ``ablation``: ``zero``, ``mean``, ``resample`` or
    ``counterfactual`` (pairs). ``by="kv-group"`` removes all query heads that share keys and values: then a row is a group.
    ``stack`` names the half of a two-stack model. Measures: ``probability_drop`` (before - after, of what is right),
    ``divergence`` (Jensen-Shannon, nats, at most ln 2), ``accuracy_change`` and ``loss_change`` (after - before: a head that
    helps has a negative and a positive one). ``null``: a random change of the same size per token, mean over ``draws``; 0
    draws leave it out. Costs (1 + draws) runs per head, several to a batch. One example has no interval.
    """
    found = effects(model, inputs, ablation=ablation, labels=labels, by=by, stack=stack, draws=draws, seed=seed)
    bounds = {name: interval(values.T) for name, values in found.of.items()}
    undefined = {} if len(found.plain.tokens.ids) > 1 else {"interval": "one example says nothing about the next"}
    group = model.shape.heads // model.shape.kv_heads
    make = HeadTable if by == "head" else partial(GroupTable, size=group)
    return make(
        title=f"Without one {by} ({ablation})",
        values={name: by_layer(found.parts, values.mean(1)) for name, values in found.of.items()},
        units=UNITS,
        low={name: by_layer(found.parts, low) for name, (low, _) in bounds.items()},
        high={name: by_layer(found.parts, high) for name, (_, high) in bounds.items()},
        null={name: by_layer(found.parts, values.mean(1)) for name, values in found.null.items()},
        undefined=undefined,
        provenance=found.plain.provenance,
    )


@torch.no_grad()
def effects(
    model: Model, inputs: Any, *, ablation: str, labels: Tensor | None, by: str, stack: str, draws: int, seed: int
) -> Effects:
    """Effects per part and example; see ``leave_one_head_out``."""
    if by not in BY:
        raise UnknownName("unit to remove", by, BY)
    if draws < 0:
        raise WorkbenchError(f"draws is a number of random changes, at least 0; got {draws}")
    judge = Judge.of(model, inputs, labels)
    parts: Sequence[Site | Heads] = all_heads(model, stack) if by == "head" else kv_groups(model, stack)
    removal = Removal.of(model, inputs, parts, ablation)
    before = judge.scores(removal.plain)

    def change(run: Run) -> Tensor:
        after = judge.scores(run)
        return torch.stack(
            [
                before["probability"] - after["probability"],
                judge.moved(run, removal.plain),
                after["accuracy"] - before["accuracy"],
                after["loss"] - before["loss"],
            ]
        )

    exact = torch.stack([change(run) for run in removal.runs([[part] for part in parts])], 1)
    noise = [
        {site: _random_change(removal.edit(site), (seed, draw, i, j)) for j, site in enumerate(sites_of(part))}
        for draw in range(draws)
        for i, part in enumerate(parts)
    ]
    random = [change(run) for run in variations(model, removal.plain, noise)]
    null = torch.stack(random, 1).unflatten(1, (draws, len(parts))).mean(1) if draws else ()
    return Effects(
        tuple(parts), dict(zip(UNITS, exact, strict=True)), dict(zip(UNITS, null, strict=False)), removal.plain
    )


def by_layer(parts: Sequence[Site | Heads], values: Tensor) -> dict[int | str, Tensor]:
    """``values`` ``[P]`` of parts in layer order as layer -> ``[H]``; layers of a stack are called ``"decoder.0"``."""
    found: dict[int | str, list[Tensor]] = {}
    for part, value in zip(parts, values, strict=True):
        assert part.layer is not None
        name = f"{part.stack}.{part.layer}" if part.stack else part.layer
        found.setdefault(name, []).append(value)
    return {name: torch.stack(row) for name, row in found.items()}


def _random_change(instead: Edit, seed: tuple[int, ...]) -> Edit:
    """A step as long as from the output to what stands in for it, at every token, in a direction of its own."""
    number = sum(value * 1_000_003**power for power, value in enumerate(seed)) % 2**63

    def edit(output: Tensor) -> Tensor:
        length = (instead(output) - output).norm(dim=-1, keepdim=True)
        generator = torch.Generator().manual_seed(number)
        direction = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        return output + direction / direction.norm(dim=-1, keepdim=True) * length

    return edit


def _example() -> dict[str, Any]:
    model = bundled("compiled-needle")
    return {"model": model, "inputs": needles(model, 32, 3)}


ANALYSES = (
    Analysis(
        name="leave-one-head-out",
        question="What does the model lose without one head?",
        function=leave_one_head_out,
        example=_example,
        paper="Li et al. 2023 (arXiv 2303.13731); Michel et al. 2019 (arXiv 1905.10650)",
        source="model",
        null="a random change of the head's output, as large at every token as its removal",
        cause="leave_one_head_out removes the head; ablation_curve removes them one after the other",
        definition="the abstract names the measures; their formulas, the interval and the null are ours",
    ),
)
