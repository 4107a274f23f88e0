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
from workbench.probes.circuits.replacements import Replacements
from workbench.sites import Site

Path = Callable[[Tensor, Tensor], list[Tensor]]
"""(clean embeddings, their replacement) -> the embeddings at which the gradient is taken and averaged."""


def attribute(setting: Setting, level: str, path: Path) -> Circuit:
    """Scores of all nodes or edges, mean over examples, with the gradient averaged over ``path``."""
    names, scores = _nodes(setting, path) if level == "node" else _edges(setting, path)
    kept = torch.ones(len(names), dtype=torch.bool)
    return Circuit(level, names, scores / len(setting.pairs), kept)


def _nodes(setting: Setting, path: Path) -> tuple[tuple[str, ...], Tensor]:
    units = components(setting.model)
    sites = list(dict.fromkeys(unit.site.whole for unit in units))
    totals: dict[Site, Tensor] = {}
    replacements = Replacements(setting, [INPUT, *sites])
    for pairs in setting.chunks():
        clean, _ = gather(setting.model, pairs.clean, [INPUT, *sites])
        instead = replacements.of(pairs, clean)
        slope = _slope(setting, pairs, sites, path(clean[INPUT], instead[INPUT]))
        for site in sites:
            product = ((clean[site] - instead[site]).double() * slope[site].double()).sum(-1)  # [B, T] or [B, T, H]
            score = by_place(product, setting, pairs)
            totals[site] = totals[site] + score if site in totals else score
    values = [totals[unit.site.whole][:, unit.site.head or 0] for unit in units]
    return setting.places.of_each([unit.name for unit in units]), torch.stack(values).flatten()


def by_place(values: Tensor, setting: Setting, pairs: Pairs) -> Tensor:
    """Values of tokens ``[B, T]`` or of tokens and heads ``[B, T, H]`` summed over the batch, ``[places, 1 or H]``."""
    flat = values.flatten(0, 1).reshape(-1, 1 if values.ndim == 2 else values.shape[2]).cpu()
    place = setting.places.index(pairs).flatten()
    return flat.new_zeros(len(setting.places), flat.shape[1]).index_add_(0, place, flat)


def _edges(setting: Setting, path: Path) -> tuple[tuple[str, ...], Tensor]:
    graph = edge_graph(setting.model)
    writers, readers = writer_sites(graph), reader_sites(graph)
    replacements = Replacements(setting, writers)
    matrix = torch.zeros(len(setting.places), len(graph.writers), len(graph.slots), dtype=torch.float64)
    for pairs in setting.chunks():
        clean, _ = gather(setting.model, pairs.clean, writers)
        instead = replacements.of(pairs, clean)
        lost = (stacked(clean, writers) - stacked(instead, writers)).flatten(1, 2)  # [writers, B*T, D]
        slope = _slope(setting, pairs, list(readers), path(clean[INPUT], instead[INPUT]))
        index = setting.places.index(pairs).flatten()
        for site, span in readers.items():
            sources, grad = graph.slots[span.start].sources, heads_first(slope[site]).flatten(1, 2)
            for place in index.unique().tolist():
                here = slice(None) if len(setting.places) == 1 else (index == place).nonzero()[:, 0].to(grad.device)
                score = lost[:sources, here].flatten(1) @ grad[:, here].flatten(1).T
                matrix[place, :sources, span] += score.double().cpu()
    return setting.places.of_each(graph.edges), matrix[:, graph.source, graph.slot].T.flatten()


def _slope(setting: Setting, pairs: Pairs, sites: list[Site], points: list[Tensor]) -> Acts:
    """Mean gradient over the points of the path."""
    mean: Acts = {}
    for point in points:
        for site, grad in gradients(setting, pairs, sites, point).items():
            mean[site] = mean[site] + grad / len(points) if site in mean else grad / len(points)
    return mean
