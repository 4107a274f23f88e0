"""First-order scores from gradients: sum over positions of (clean - replacement) . gradient of the metric.

Methods differ in where the gradient is taken. ``eap`` takes it at the clean run; others average it over runs in which
some outputs are held at given values (``Steps``); ``relp`` changes the backward pass by edits. The sum is the same for
all. Positive means that replacing the part would lower the metric.

An edge's score is one entry of a product [writers, B * T * D] . [B * T * D, readers] for each layer: what a writer's
output loses is multiplied with the gradients of all inputs that can read it, and no tensor has an entry per writer,
reader and channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from workbench.circuits import Circuit
from workbench.errors import Refused
from workbench.models.protocol import Edit
from workbench.pairs import Pairs
from workbench.probes.circuits.components import (
    INPUT,
    Acts,
    Edits,
    Setting,
    components,
    edge_graph,
    gather,
    heads_first,
    reader_sites,
    stacked,
    writer_sites,
)
from workbench.probes.circuits.replacements import Replacements
from workbench.run import EMPTY
from workbench.sites import Site


@dataclass(frozen=True)
class Steps:
    """Runs whose gradients are averaged: ``held`` says for each of them what outputs are held at, site by site, the
    same sites in all. ``source`` is the site whose parts are scored with the mean; None: all parts. ``weight`` multiplies
    the scores."""

    held: tuple[Acts, ...]
    source: Site | None = None
    weight: float = 1.0


Path = Callable[[Acts, Acts], Iterable[Steps]]
"""(clean outputs, their replacements), both with ``INPUT``, to the steps at which gradients are taken. Scores of the same
part in several steps add up."""


def attribute(
    setting: Setting, level: str, path: Path | None = None, edits: Mapping[Site | str, Edit] = EMPTY
) -> Circuit:
    """Scores of all nodes or edges, mean over examples. ``path`` None takes the gradient at the clean run. ``edits`` act in
    the runs whose gradient is taken, on sites other than those of parts and inputs; they may change gradients only."""
    names, scores = (_nodes if level == "node" else _edges)(setting, path, edits)
    return Circuit(level, names, scores / len(setting.pairs), torch.ones(len(names), dtype=torch.bool))


def slopes(
    setting: Setting,
    pairs: Pairs,
    sites: Sequence[Site],
    held: Sequence[Acts] = ({},),
    edits: Mapping[Site | str, Edit] = EMPTY,
    read: Sequence[Site] = (),
) -> tuple[Acts, Acts]:
    """The gradient of the summed metric at ``sites`` on the clean prompts, its mean over the runs ``held``, and what the last
    of them had at ``read``. Several runs go through the model together, ``setting.at_once`` of them."""
    mean: Acts = {}
    acts: Acts = {}
    for lo in range(0, len(held), setting.at_once):
        group = held[lo : lo + setting.at_once]
        found, acts = _gradients(setting, pairs, sites, group, edits, read)
        for site, grad in found.items():
            grad = grad.unflatten(0, (len(group), -1)).sum(0) if len(group) > 1 else grad
            mean[site] = mean[site].add_(grad) if site in mean else grad
    if len(held) > 1:
        mean = {site: grad.div_(len(held)) for site, grad in mean.items()}
    return mean, acts


def _gradients(
    setting: Setting,
    pairs: Pairs,
    sites: Sequence[Site],
    held: Sequence[Acts],
    edits: Mapping[Site | str, Edit],
    read: Sequence[Site],
) -> tuple[Acts, Acts]:
    """Gradients of one run of as many copies of the batch as there are entries in ``held``."""
    ends: dict[Site, torch.autograd.graph.GradientEdge] = {}
    like: Acts = {}

    def at(site: Site) -> Edit:
        def edit(value: Tensor) -> Tensor:
            if site in held[0]:
                value = torch.cat([run[site].to(value) for run in held]).requires_grad_()
            elif not value.requires_grad:
                value = value.detach().requires_grad_()
            # A tensor of its own, so that what the model does to its input in place comes after the place of the gradient.
            own = value.view_as(value) if value.grad_fn is not None else value.clone()
            ends[site], like[site] = get_gradient_edge(own), own.detach()
            return own

        return edit

    marked: Edits = {site: at(site) for site in dict.fromkeys((INPUT, *held[0], *sites))}
    with torch.enable_grad():
        run = setting.model.run(pairs.clean.repeat(len(held), 1), read=read, edit={**edits, **marked})
        if run.logits is None:
            raise Refused(f"{setting.model.name} gives no logits, so its metric has no gradient")
        total = torch.stack([setting.measure(part, pairs).sum() for part in run.logits.chunk(len(held))]).sum()
        if not total.requires_grad:
            raise Refused(f"the metric of {setting.model.name} has no gradient; use method='patching'")
        found = torch.autograd.grad(total, [ends[site] for site in sites], allow_unused=True)
    grads = {
        site: torch.zeros_like(like[site], memory_format=torch.contiguous_format) if grad is None else grad
        for site, grad in zip(sites, found, strict=True)
    }
    return grads, {site: run.acts[site].detach() for site in read}


def _batches(
    setting: Setting,
    writers: Sequence[Site],
    readers: Sequence[Site],
    path: Path | None,
    edits: Mapping[Site | str, Edit],
) -> Iterator[tuple[Pairs, Acts, Iterator[tuple[Steps, Acts]]]]:
    """For every batch: what the writers lose (clean - replacement), and the mean gradients at the readers, steps by steps.

    Without a path the clean outputs come from the run whose gradient is taken, and there is no third forward pass."""
    writers = list(dict.fromkeys(writers if path is None else (INPUT, *writers)))
    replacements = Replacements(setting, writers)
    for pairs in setting.chunks():
        if path is None:
            slope, clean = slopes(setting, pairs, readers, edits=edits, read=writers)
        else:
            clean, _ = gather(setting.model, pairs.clean, writers, logits=None)
        instead = replacements.of(pairs, clean)
        lost = {site: clean[site] - instead[site] for site in writers}
        if path is None:
            yield pairs, lost, iter([(Steps(()), slope)])
        else:
            yield pairs, lost, ((s, slopes(setting, pairs, readers, s.held, edits)[0]) for s in path(clean, instead))


def _nodes(setting: Setting, path: Path | None, edits: Mapping[Site | str, Edit]) -> tuple[tuple[str, ...], Tensor]:
    units = components(setting.model)
    sites = list(dict.fromkeys(unit.site.whole for unit in units))
    totals: dict[Site, Tensor] = {}
    for pairs, lost, found in _batches(setting, sites, sites, path, edits):
        for steps, slope in found:
            for site in sites if steps.source is None else [steps.source]:
                product = (lost[site].double() * slope[site].double()).sum(-1)  # [B, T] or [B, T, H]
                score = steps.weight * by_place(product, setting, pairs)
                totals[site] = totals[site] + score if site in totals else score
    values = [totals[unit.site.whole][:, unit.site.head or 0] for unit in units]
    return setting.places.of_each([unit.name for unit in units]), torch.stack(values).flatten()


def by_place(values: Tensor, setting: Setting, pairs: Pairs) -> Tensor:
    """Values of tokens ``[B, T]`` or of tokens and heads ``[B, T, H]`` summed over the batch, ``[places, 1 or H]``."""
    flat = values.flatten(0, 1).reshape(-1, 1 if values.ndim == 2 else values.shape[2]).cpu()
    place = setting.places.index(pairs).flatten()
    return flat.new_zeros(len(setting.places), flat.shape[1]).index_add_(0, place, flat)


def _edges(setting: Setting, path: Path | None, edits: Mapping[Site | str, Edit]) -> tuple[tuple[str, ...], Tensor]:
    graph = edge_graph(setting.model)
    writers, readers = writer_sites(graph), reader_sites(graph)
    width = {site: graph.heads if site.kind == "result" else 1 for site in writers}
    first = dict(zip(writers, accumulate(width.values(), initial=0), strict=False))
    together = [
        (sources, [site for site, _ in group])
        for sources, group in groupby(readers.items(), lambda item: graph.slots[item[1].start].sources)
    ]
    matrix = torch.zeros(len(setting.places), len(graph.writers), len(graph.slots), dtype=torch.float64)
    for pairs, lost, found in _batches(setting, writers, list(readers), path, edits):
        index = setting.places.index(pairs).flatten()
        present = index.unique().tolist()
        for steps, slope in found:
            at = 0 if steps.source is None else first[steps.source]
            rows = stacked(lost, writers if steps.source is None else [steps.source]).flatten(
                1, 2
            )  # [writers, B * T, D]
            for sources, sites in together:
                if sources <= at:
                    continue
                span = slice(readers[sites[0]].start, readers[sites[-1]].stop)
                grad = torch.cat([heads_first(slope[site]) for site in sites]).flatten(1, 2)  # [slots, B * T, D]
                for place in present:
                    here = slice(None) if len(setting.places) == 1 else (index == place).nonzero()[:, 0].to(grad.device)
                    score = rows[: sources - at, here].flatten(1) @ grad[:, here].flatten(1).T
                    matrix[place, at : at + len(score), span] += steps.weight * score.double().cpu()
    return setting.places.of_each(graph.edges), matrix[:, graph.source, graph.slot].T.flatten()
