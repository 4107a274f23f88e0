"""Activation patching: how much does the metric drop when one component, or one edge, carries its replacement?

Node: the clean prompt runs with the output of one head or MLP replaced. Edge: it runs with one input of one node
changed by (replacement - clean) of one writer's output, everything downstream recomputed (path patching with a
single edge, arXiv 2304.05969). Score = m(clean) - m(patched), mean over examples: the exact effect, in units of the
metric. One forward pass per node or edge and batch; several go through the model together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.pairs import Pairs
from workbench.probes.circuits.components import (
    Acts,
    Component,
    Edits,
    Setting,
    components,
    edge_graph,
    gather,
    reader_sites,
    stacked,
    writer_sites,
)
from workbench.probes.circuits.method import Method
from workbench.probes.circuits.replacements import Replacements
from workbench.sites import Site


def patching(setting: Setting, level: str) -> Circuit:
    """Exact effect of every node or edge; see the module."""
    names, scores = _nodes(setting) if level == "node" else _edges(setting)
    kept = torch.ones(len(names), dtype=torch.bool)
    return Circuit(level, names, scores / len(setting.pairs), kept)


@torch.no_grad()
def _nodes(setting: Setting) -> tuple[tuple[str, ...], Tensor]:
    units = components(setting.model)
    sites = list(dict.fromkeys(unit.site.whole for unit in units))
    replacements = Replacements(setting, sites)
    parts = [(unit, place) for unit in units for place in range(len(setting.places))]
    scores = torch.zeros(len(parts), dtype=torch.float64)
    for pairs in setting.chunks():
        clean, logits = gather(setting.model, pairs.clean, sites)
        instead = replacements.of(pairs, clean)
        where = setting.places.index(pairs)
        before = setting.measure(logits, pairs).double().sum()
        for lo in range(0, len(parts), setting.at_once):
            group = parts[lo : lo + setting.at_once]
            edits: Edits = {site: _replace(site, group, instead, where) for site in {u.site.whole for u, _ in group}}
            scores[lo : lo + len(group)] += before.cpu() - _totals(setting, pairs, len(group), edits)
    return setting.places.of_each([unit.name for unit in units]), scores


def _replace(
    site: Site, group: list[tuple[Component, int]], instead: Acts, where: Tensor
) -> Callable[[Tensor], Tensor]:
    """Copy k of the batch gets the replacement of its unit at the tokens of its place."""

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        copies = value.unflatten(0, (len(group), -1))
        for copy, (unit, place) in zip(copies, group, strict=True):
            if unit.site.whole == site:
                here = (where == place).to(value.device)
                part, new = (
                    (copy, instead[site])
                    if unit.site.head is None
                    else (copy[:, :, unit.site.head], instead[site][:, :, unit.site.head])
                )
                part[here] = new[here]
        return value

    return edit


@torch.no_grad()
def _edges(setting: Setting) -> tuple[tuple[str, ...], Tensor]:
    graph = edge_graph(setting.model)
    writers = writer_sites(graph)
    replacements = Replacements(setting, writers)
    matrix = torch.zeros(len(setting.places), len(graph.writers), len(graph.slots), dtype=torch.float64)
    for pairs in setting.chunks():
        clean, logits = gather(setting.model, pairs.clean, writers)
        change = stacked(replacements.of(pairs, clean), writers) - stacked(clean, writers)
        before = setting.measure(logits, pairs).double().sum().cpu()
        where = setting.places.index(pairs)
        differs = [
            [bool(change[source, where == place].any()) for place in range(len(setting.places))]
            for source in range(len(change))
        ]
        for site, span in reader_sites(graph).items():
            sources = graph.slots[span.start].sources
            todo = [
                (source, slot, place)
                for slot in range(span.start, span.stop)
                for source in range(sources)
                for place in range(len(setting.places))
                if differs[source][place]
            ]
            for lo in range(0, len(todo), setting.at_once):
                group = todo[lo : lo + setting.at_once]
                edit = _change(change, [(source, slot - span.start, place) for source, slot, place in group], where)
                effect = before - _totals(setting, pairs, len(group), {site: edit})
                for (source, slot, place), value in zip(group, effect, strict=True):
                    matrix[place, source, slot] += value
    return setting.places.of_each(graph.edges), matrix[:, graph.source, graph.slot].T.flatten()


def _change(change: Tensor, group: list[tuple[int, int, int]], where: Tensor) -> Callable[[Tensor], Tensor]:
    """Copy k of the batch gets ``change`` of its source, at the tokens of its place, added to its slot of the site."""

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        copies = value.unflatten(0, (len(group), -1))
        for copy, (source, index, place) in zip(copies, group, strict=True):
            here = (where == place).to(value.device)
            (copy[:, :, index] if copy.ndim == 4 else copy)[here] += change[source][here]
        return value

    return edit


def _totals(setting: Setting, pairs: Pairs, copies: int, edits: Edits) -> Tensor:
    """Metric summed over the examples of each of ``copies`` edited copies of the batch, ``[copies]``."""
    logits = setting.model.run(pairs.clean.repeat(copies, 1), edit=edits).logits
    assert logits is not None
    return torch.stack([setting.measure(part, pairs).double().sum().cpu() for part in logits.chunk(copies)])


METHODS = (
    Method(
        "patching",
        "exact effect of replacing one node or edge; a forward pass for each",
        patching,
        "Goldowsky-Dill et al. 2023 (arXiv 2304.05969), single nodes and edges",
        positions=True,
    ),
)
