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
    Replacements,
    Setting,
    components,
    edge_graph,
    gather,
    reader_sites,
    stacked,
    writer_sites,
)
from workbench.sites import Site


def patching(setting: Setting, level: str) -> Circuit:
    """Exact effect of every node or edge; see the module."""
    names, scores = _nodes(setting) if level == "node" else _edges(setting)
    kept = torch.ones(len(names), dtype=torch.bool)
    return Circuit(level, tuple(names), scores / len(setting.pairs), kept)


@torch.no_grad()
def _nodes(setting: Setting) -> tuple[list[str], Tensor]:
    units = components(setting.model)
    sites = list(dict.fromkeys(unit.site.whole for unit in units))
    replacements = Replacements(setting, sites)
    scores = torch.zeros(len(units), dtype=torch.float64)
    for pairs in setting.chunks():
        clean, logits = gather(setting.model, pairs.clean, sites)
        instead = replacements.of(pairs, clean)
        before = setting.measure(logits, pairs).double().sum()
        for lo in range(0, len(units), setting.at_once):
            group = units[lo : lo + setting.at_once]
            edits: Edits = {site: _replace(site, group, instead) for site in {unit.site.whole for unit in group}}
            scores[lo : lo + len(group)] += before.cpu() - _totals(setting, pairs, len(group), edits)
    return [unit.name for unit in units], scores


def _replace(site: Site, group: list[Component], instead: Acts) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        copies = value.unflatten(0, (len(group), -1))
        for copy, unit in zip(copies, group, strict=True):
            if unit.site.whole == site:
                part = copy if unit.site.head is None else copy[:, :, unit.site.head]
                part.copy_(instead[site] if unit.site.head is None else instead[site][:, :, unit.site.head])
        return value

    return edit


@torch.no_grad()
def _edges(setting: Setting) -> tuple[tuple[str, ...], Tensor]:
    graph = edge_graph(setting.model)
    writers = writer_sites(graph)
    replacements = Replacements(setting, writers)
    matrix = torch.zeros(len(graph.writers), len(graph.slots), dtype=torch.float64)
    for pairs in setting.chunks():
        clean, logits = gather(setting.model, pairs.clean, writers)
        change = stacked(replacements.of(pairs, clean), writers) - stacked(clean, writers)
        before = setting.measure(logits, pairs).double().sum().cpu()
        differs = change.flatten(1).any(1).tolist()
        for site, span in reader_sites(graph).items():
            sources = graph.slots[span.start].sources
            todo = [(s, slot) for slot in range(span.start, span.stop) for s in range(sources) if differs[s]]
            for lo in range(0, len(todo), setting.at_once):
                group = todo[lo : lo + setting.at_once]
                edit = _change(change, [(source, slot - span.start) for source, slot in group])
                effect = before - _totals(setting, pairs, len(group), {site: edit})
                for (source, slot), value in zip(group, effect, strict=True):
                    matrix[source, slot] += value
    return graph.edges, matrix[graph.source, graph.slot]


def _change(change: Tensor, group: list[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
    """Copy k of the batch gets ``change`` of its source added to its slot of the site."""

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        copies = value.unflatten(0, (len(group), -1))
        for copy, (source, index) in zip(copies, group, strict=True):
            (copy[:, :, index] if copy.ndim == 4 else copy).add_(change[source])
        return value

    return edit


def _totals(setting: Setting, pairs: Pairs, copies: int, edits: Edits) -> Tensor:
    """Metric summed over the examples of each of ``copies`` edited copies of the batch, ``[copies]``."""
    logits = setting.model.run(pairs.clean.repeat(copies, 1), edit=edits).logits
    assert logits is not None
    return torch.stack([setting.measure(part, pairs).double().sum().cpu() for part in logits.chunk(copies)])
