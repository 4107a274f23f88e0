"""Optimal ablation (arXiv 2409.09951): replace a part by the one constant that costs the behaviour least.

a* = argmin_a E[KL(whole model || model in which the part always gives a)], KL at the answer position in nats, one constant
per head, MLP or input for all prompts and positions. What is lost even with a* is information that the part carried: other
replacements add the damage of outputs that the rest of the model never meets. Published: optimal effects are 11 %, 33 %
and 17.7 % of those of zero, mean and resampled outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs, divergence
from workbench.probes.circuits.components import Acts, Edits, Setting, components, gather, heads_first
from workbench.sites import Site

Answers = tuple[Pairs, Tensor]
"""A batch and the whole model's logits on its clean prompts."""

Part = tuple[Site, int]
"""A site with all heads, and the index on its head axis (0 where it has none)."""

_SETTLED = 1e-6
"""A part that costs fewer nats already has its constant: the KL cannot be negative."""


def optimal_constants(setting: Setting, sites: Sequence[Site], *, steps: int = 50, rate: float = 0.2) -> Acts:
    """The constants a* of all parts at ``sites``, ``[1, 1, H, D]`` or ``[1, 1, D]`` by site.

    Each part is replaced alone. Adam begins at the better of mean (over prompts and positions) and zero, with steps of
    ``rate`` in units of the part's root mean square that fall to nothing along a cosine; the best constant seen is
    returned, so that none costs more than mean or zero on these pairs. Parts that cost less than 1e-6 nats stay as they
    are. Deterministic. Published: constants per part from the mean by Adam; steps and rate are ours.
    """
    return _fitted(setting, _whole(setting), sites, steps, rate)[0]


def ablation_effects(model: Model, pairs: Pairs, *, batch: int = 16, steps: int = 50, rate: float = 0.2) -> Circuit:
    """What each head and MLP costs when it is replaced: KL(whole model || ablated model) in nats, mean over examples.

    Scores are the effects with the optimal constant; the columns ``zero``, ``mean`` (one constant, over prompts and
    positions) and ``counterfactual`` those with other replacements. Optimal is at most zero and mean. The mean per
    position that ``ablation="mean"`` takes is no constant, and can cost less than any.
    """
    setting = Setting.of(model, pairs, None, "optimal", batch)
    units = components(model)
    sites = list(dict.fromkeys(unit.site.whole for unit in units))
    at = [(unit.site.whole, unit.site.head or 0) for unit in units]
    whole = _whole(setting)
    constants, zero, mean = _fitted(setting, whole, sites, steps, rate)
    best = {site: heads_first(value) for site, value in constants.items()}

    def corrupted(pairs: Pairs) -> Acts:
        return {site: heads_first(value) for site, value in gather(model, pairs.corrupt, sites)[0].items()}

    costs = _mean_costs(setting, whole, at, lambda _: best)
    other = _mean_costs(setting, whole, at, corrupted)
    columns = {"zero": _listed(zero, at), "mean": _listed(mean, at), "counterfactual": other}
    provenance = {
        **setting.provenance("optimal-ablation", "node", {"steps": steps, "rate": rate}),
        "unit": "nats of KL at the answer position",
    }
    kept = torch.ones(len(units), dtype=torch.bool)
    return Circuit("node", tuple(unit.name for unit in units), costs, kept, provenance, columns)


def mean_and_size(setting: Setting, sites: Sequence[Site]) -> tuple[Acts, Acts]:
    """Mean output of every part over prompts and positions, ``[H, 1, 1, D]`` (H = 1 without a head axis), and its root mean
    square over prompts, positions and D, ``[H, 1, 1, 1]``."""
    mean: Acts = {}
    square: Acts = {}
    for pairs in setting.chunks():
        share = len(pairs) / len(setting.pairs)
        for site, value in gather(setting.model, pairs.clean, sites)[0].items():
            value = heads_first(value)
            mean[site] = mean.get(site, 0) + share * value.mean((1, 2), keepdim=True)
            square[site] = square.get(site, 0) + share * value.square().mean((1, 2, 3), keepdim=True)
    return mean, {site: value.sqrt() for site, value in square.items()}


@torch.no_grad()
def _whole(setting: Setting) -> list[Answers]:
    found = [(pairs, setting.model.run(pairs.clean).logits) for pairs in setting.chunks()]
    if any(logits is None for _, logits in found):
        raise Refused(f"{setting.model.name} gives no logits, so optimal constants have no loss to minimise")
    return [(pairs, logits) for pairs, logits in found if logits is not None]


def _fitted(
    setting: Setting, whole: list[Answers], sites: Sequence[Site], steps: int, rate: float
) -> tuple[Acts, Acts, Acts]:
    """The constants, and the costs ``[H]`` by site of zero and of the mean."""
    if steps < 0 or rate <= 0:
        raise WorkbenchError(f"optimal constants take steps >= 0 and rate > 0; got steps={steps}, rate={rate}")
    sites = list(dict.fromkeys(sites))
    mean, size = mean_and_size(setting, sites)
    parts = [(site, head) for site in sites for head in range(len(mean[site]))]
    nothing = {site: torch.zeros_like(value) for site, value in mean.items()}
    zero = _by_site(_mean_costs(setting, whole, parts, lambda _: nothing), mean, parts)
    average = _by_site(_mean_costs(setting, whole, parts, lambda _: mean), mean, parts)
    worse = {site: (average[site] > zero[site]).to(mean[site].device)[:, None, None, None] for site in sites}
    start = {site: torch.where(worse[site], nothing[site], mean[site]) for site in sites}
    best = {site: value.clone() for site, value in start.items()}
    lowest = {site: torch.minimum(average[site], zero[site]) for site in sites}
    open_ones = [(site, head) for site, head in parts if lowest[site][head] > _SETTLED]
    for lo in range(0, len(open_ones), setting.at_once):
        _descend(whole, setting.model, open_ones[lo : lo + setting.at_once], start, size, best, lowest, steps, rate)
    shaped = {site: (v.permute(1, 2, 0, 3) if len(v) > 1 or _headed(site) else v[0]) for site, v in best.items()}
    return shaped, zero, average


def _descend(
    whole: list[Answers],
    model: Model,
    group: list[Part],
    start: Acts,
    size: Acts,
    best: Acts,
    lowest: Acts,
    steps: int,
    rate: float,
) -> None:
    """Adam on the constants of one group of parts; ``best`` and ``lowest`` are updated where a constant costs less."""
    examples = sum(len(pairs) for pairs, _ in whole)
    moves = {site: torch.zeros_like(start[site], requires_grad=True) for site in dict.fromkeys(s for s, _ in group)}
    optimizer = torch.optim.Adam(moves.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    with torch.enable_grad():
        for step in range(steps + 1):
            values = {site: start[site] + size[site] * move for site, move in moves.items()}
            found = torch.zeros(len(group), dtype=torch.float64)
            slopes = {site: torch.zeros_like(move) for site, move in moves.items()}
            for answers in whole:
                costs = _costs(model, answers, group, values)
                found += costs.detach().double().cpu()
                if step < steps:
                    new = torch.autograd.grad(costs.sum(), list(moves.values()), retain_graph=True)
                    slopes = {site: slopes[site] + slope for site, slope in zip(moves, new, strict=True)}
            for (site, head), cost in zip(group, found / examples, strict=True):
                if cost < lowest[site][head]:
                    lowest[site][head] = cost
                    best[site][head] = values[site][head].detach()
            for site, move in moves.items():
                move.grad = slopes[site] / examples
            optimizer.step()
            schedule.step()


def _mean_costs(
    setting: Setting, whole: list[Answers], parts: Sequence[Part], values: Callable[[Pairs], Acts]
) -> Tensor:
    """Mean KL per example of every part replaced by ``values(pairs)``, float64 ``[parts]``."""
    total = torch.zeros(len(parts), dtype=torch.float64)
    with torch.no_grad():
        for answers in whole:
            instead = values(answers[0])
            for lo in range(0, len(parts), setting.at_once):
                group = list(parts[lo : lo + setting.at_once])
                total[lo : lo + len(group)] += _costs(setting.model, answers, group, instead).double().cpu()
    return total / len(setting.pairs)


def _costs(model: Model, answers: Answers, group: list[Part], values: Acts) -> Tensor:
    """KL summed over the examples for each part of the group, one copy of the batch each, ``[group]``. ``values`` are
    ``[H, B or 1, T or 1, D]`` by site."""
    pairs, full = answers
    edits: Edits = {site: _replace(site, group, values[site]) for site in dict.fromkeys(s for s, _ in group)}
    logits = model.run(pairs.clean.repeat(len(group), 1), edit=edits).logits
    assert logits is not None
    return torch.stack([divergence(full, part, pairs).sum() for part in logits.chunk(len(group))])


def _replace(site: Site, group: list[Part], values: Tensor) -> Callable[[Tensor], Tensor]:
    copies, heads = zip(*[(copy, head) for copy, (where, head) in enumerate(group) if where == site], strict=True)

    def edit(value: Tensor) -> Tensor:
        copied = value.unflatten(0, (len(group), -1)).clone()
        new = values.to(value)[list(heads)]
        if copied.ndim == 5:
            copied[list(copies), :, :, list(heads)] = new.expand(-1, *copied.shape[1:3], -1)
        else:
            copied[list(copies)] = new.expand(-1, *copied.shape[1:3], -1)
        return copied.flatten(0, 1)

    return edit


def _by_site(costs: Tensor, like: Acts, parts: Sequence[Part]) -> Acts:
    found = {site: torch.zeros(len(value), dtype=torch.float64) for site, value in like.items()}
    for (site, head), cost in zip(parts, costs, strict=True):
        found[site][head] = cost
    return found


def _listed(costs: Acts, parts: Sequence[Part]) -> Tensor:
    return torch.stack([costs[site][head] for site, head in parts])


def _headed(site: Site) -> bool:
    return site.kind in ("z", "result")
