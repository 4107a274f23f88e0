"""First-order scores from gradients: sum over positions of (clean - replacement) . gradient of the metric.

``eap`` takes the gradient at the clean run, ``eap-ig`` its average over a path of embeddings; both share this sum.
Positive means that replacing the component would lower the metric.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.pairs import Pairs
from workbench.probes.circuits.components import (
    INPUT,
    Acts,
    Replacements,
    Setting,
    components,
    edge_graph,
    gather,
    gradients,
    heads_first,
    reader_sites,
    stacked,
    writer_sites,
)
from workbench.sites import Site

Path = Callable[[Tensor, Tensor], list[Tensor]]
"""(clean embeddings, their replacement) -> the embeddings at which the gradient is taken and averaged."""


def attribute(setting: Setting, level: str, path: Path) -> Circuit:
    """Scores of all nodes or edges, mean over examples, with the gradient averaged over ``path``."""
    names, scores = _nodes(setting, path) if level == "node" else _edges(setting, path)
    kept = torch.ones(len(names), dtype=torch.bool)
    return Circuit(level, tuple(names), scores / len(setting.pairs), kept)


def _nodes(setting: Setting, path: Path) -> tuple[list[str], Tensor]:
    units = components(setting.model)
    sites = list(dict.fromkeys(unit.site.whole for unit in units))
    totals: dict[Site, Tensor] = {}
    replacements = Replacements(setting, [INPUT, *sites])
    for pairs in setting.chunks():
        clean, _ = gather(setting.model, pairs.clean, [INPUT, *sites])
        instead = replacements.of(pairs, clean)
        slope = _slope(setting, pairs, sites, path(clean[INPUT], instead[INPUT]))
        for site in sites:
            product = (clean[site] - instead[site]).double() * slope[site].double()
            score = product.sum((0, 1, 3) if product.ndim == 4 else (0, 1, 2)).cpu()
            totals[site] = totals[site] + score if site in totals else score
    values = [totals[unit.site.whole][... if unit.site.head is None else unit.site.head] for unit in units]
    return [unit.name for unit in units], torch.stack(values)


def _edges(setting: Setting, path: Path) -> tuple[tuple[str, ...], Tensor]:
    graph = edge_graph(setting.model)
    writers, readers = writer_sites(graph), reader_sites(graph)
    replacements = Replacements(setting, writers)
    matrix = torch.zeros(len(graph.writers), len(graph.slots), dtype=torch.float64)
    for pairs in setting.chunks():
        clean, _ = gather(setting.model, pairs.clean, writers)
        instead = replacements.of(pairs, clean)
        lost = (stacked(clean, writers) - stacked(instead, writers)).flatten(1)  # [writers, B*T*D]
        slope = _slope(setting, pairs, list(readers), path(clean[INPUT], instead[INPUT]))
        for site, span in readers.items():
            sources = graph.slots[span.start].sources
            matrix[:sources, span] += (lost[:sources] @ heads_first(slope[site]).flatten(1).T).double().cpu()
    return graph.edges, matrix[graph.source, graph.slot]


def _slope(setting: Setting, pairs: Pairs, sites: list[Site], points: list[Tensor]) -> Acts:
    """Mean gradient over the points of the path."""
    mean: Acts = {}
    for point in points:
        for site, grad in gradients(setting, pairs, sites, point).items():
            mean[site] = mean[site] + grad / len(points) if site in mean else grad / len(points)
    return mean
