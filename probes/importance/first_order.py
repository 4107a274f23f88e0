"""How much would the loss change without a head, to first order?

Importance of a head = mean over examples of |sum over tokens of z . dL/dz|, z the head's output before W_O (after W_O the number
is the same): the derivative of the loss with respect to a switch that multiplies the head, Michel et al. 2019 (arXiv 1905.10650),
there normalised in every layer to length one. The signed first-order estimate of removing it is (z' - z) . dL/dz
with z' what stands in for z. One forward and one backward pass replace a run per head; how well they do is measured beside it,
by the exact effects and their rank correlation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused
from workbench.models.protocol import Edit, Model
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, needles
from workbench.probes.importance.leave_one_out import by_layer, effects
from workbench.probes.importance.outcomes import Judge
from workbench.probes.removal import Removal, all_heads
from workbench.probes.tables import HeadTable
from workbench.sites import Site

UNITS = {
    "importance": "nats",
    "normalised": "share of the layer (length 1)",
    "estimate": "nats, after - before",
    "exact": "nats, after - before",
}
_RESAMPLES = 1000


@dataclass(frozen=True)
class FirstOrder(HeadTable):
    """``correlation``: Spearman's, over all heads, of ``importance`` with the size of the exact effect and of ``estimate`` with
    the exact effect, each ``[3]``: the value and its 95% bootstrap interval over examples. Empty without exact effects."""

    correlation: Mapping[str, Tensor] = field(default_factory=dict)


def first_order(
    model: Model,
    inputs: Any,
    *,
    ablation: str = "zero",
    labels: Tensor | None = None,
    stack: str = "",
    exact: bool = True,
) -> FirstOrder:
    """First-order importance of every head, mean over examples with 95% bootstrap intervals, and its agreement with the truth.

    ``inputs``, ``ablation``, ``labels`` and ``stack`` as in ``leave_one_head_out``; the loss is that of the answer, the next
    token or the class, nats per example. Measures: ``importance`` (|z . dL/dz|, at least 0), ``normalised`` (divided by the
    length of its layer's importances), ``estimate`` (first-order change of the loss if the head is removed), ``exact`` (the
    change itself, a run per head; ``exact=False`` leaves it out). ``null`` of importance: the gradients of another example of
    the batch, which know the sizes and not the task; NaN for a single example.
    """
    judge = Judge.of(model, inputs, labels)
    heads = all_heads(model, stack)
    removal = Removal.of(model, inputs, heads, ablation)
    sites = list(dict.fromkeys(head.whole for head in heads))
    z, slope = gradients(model, removal, judge, sites)
    per: dict[str, list[Tensor]] = {"importance": [], "estimate": [], "null": []}
    for site in sites:
        per["importance"].append(_dot(z[site], slope[site]).abs())
        per["estimate"].append(_dot(removal.edit(site)(z[site]).double() - z[site].double(), slope[site]))
        other = slope[site].roll(len(slope[site]) // _batch(removal), 0)
        per["null"].append(_dot(z[site], other).abs())
    found = {name: torch.cat(values, 1) for name, values in per.items()}  # [N, heads]
    examples = len(found["importance"])
    if examples < 2:
        found["null"] = torch.full_like(found["null"], float("nan"))
    undefined = {} if examples > 1 else {"null": "the gradients of another example need two", "interval": "one example"}
    correlation: dict[str, Tensor] = {}
    if exact:
        options: dict[str, Any] = dict(ablation=ablation, labels=labels, by="head", stack=stack, draws=0, seed=0)
        found["exact"] = effects(model, inputs, **options).of["loss_change"].T
        correlation["importance"] = _agreement(found["importance"], found["exact"], torch.abs)
        correlation["estimate"] = _agreement(found["estimate"], found["exact"], lambda change: change)
    shown = [name for name in UNITS if name in found]
    bounds = {name: interval(found[name]) for name in shown}
    values = {name: by_layer(heads, found[name].mean(0)) for name in shown}
    lengths = {layer: row.norm() for layer, row in values["importance"].items()}
    values["normalised"] = {layer: row / lengths[layer] for layer, row in values["importance"].items()}
    for layer, length in lengths.items():
        if not length:
            undefined[f"normalised {layer}"] = "no head of this layer changes the loss to first order"
    return FirstOrder(
        title=f"First-order importance ({ablation})",
        values={name: values[name] for name in UNITS if name in values},
        units=UNITS,
        low={name: by_layer(heads, low) for name, (low, _) in bounds.items()},
        high={name: by_layer(heads, high) for name, (_, high) in bounds.items()},
        null={"importance": by_layer(heads, found["null"].mean(0))},
        undefined=undefined,
        provenance=removal.plain.provenance,
        correlation=correlation,
    )


def gradients(
    model: Model, removal: Removal, judge: Judge, sites: list[Site]
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """The tensors of ``sites`` and the gradients of each example's own loss there."""
    values: dict[Site, Tensor] = {}
    leaves: dict[Site, Tensor] = {}

    def at(site: Site) -> Callable[[Tensor], Tensor]:
        def edit(value: Tensor) -> Tensor:
            values[site] = value.detach()
            leaves[site] = torch.zeros_like(value, memory_format=torch.contiguous_format).requires_grad_()
            return value + leaves[site]

        return edit

    edits: dict[Site | str, Edit | Tensor] = {site: at(site) for site in sites}
    with torch.enable_grad():
        loss = judge.scores(model.run(removal.plain.tokens, edit=edits))["loss"].sum()
        if not loss.requires_grad:
            raise Refused(f"the loss of {model.name} has no gradient; use leave_one_head_out")
        # A layer that the loss does not depend on has gradient zero.
        found = torch.autograd.grad(loss, [leaves[site] for site in sites], allow_unused=True)
    slope = {
        site: torch.zeros_like(leaves[site]) if grad is None else grad for site, grad in zip(sites, found, strict=True)
    }
    return values, slope


def _batch(removal: Removal) -> int:
    return len(removal.plain.tokens.ids)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over tokens and width of ``[B, T, H, E]`` products, ``[B, H]`` in float64 on the CPU."""
    return (a.double() * b.double()).sum((1, 3)).cpu()


def _agreement(estimate: Tensor, exact: Tensor, size: Callable[[Tensor], Tensor]) -> Tensor:
    """Spearman's correlation over heads of two means over examples ``[N, heads]``, and its bootstrap interval: ``[3]``."""
    from scipy.stats import rankdata

    def spearman(rows: Tensor) -> Tensor:
        """``rows`` ``[D, N]`` counts how often each example was drawn."""
        weights = rows / rows.sum(1, keepdim=True)
        ranks = [
            torch.from_numpy(rankdata(mean.numpy(), axis=1)) for mean in (weights @ estimate, weights @ size(exact))
        ]
        a, b = (x - x.mean(1, keepdim=True) for x in ranks)
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))

    examples = len(exact)
    value = spearman(torch.ones(1, examples, dtype=torch.float64))[0]
    if examples < 2:
        return torch.stack([value, value * float("nan"), value * float("nan")])
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(examples, (_RESAMPLES, examples), generator=generator)
    counts = torch.zeros(_RESAMPLES, examples, dtype=torch.float64)
    counts.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    draws = spearman(counts)
    return torch.stack([value, draws.nanquantile(0.025), draws.nanquantile(0.975)])


def _example() -> dict[str, Any]:
    model = bundled("compiled-needle")
    return {"model": model, "inputs": needles(model, 32, 3)}


ANALYSES = (
    Analysis(
        name="first-order-importance",
        question="How much would the loss change without a head, to first order?",
        function=first_order,
        example=_example,
        paper="Michel et al. 2019 (arXiv 1905.10650), head importance score",
        source="model",
        null="the same with the gradients of another example",
        cause="leave_one_head_out, whose loss change stands beside the estimate with their rank correlation",
        definition="normalised by the length of the layer as published; intervals, null and correlation are ours",
    ),
)
