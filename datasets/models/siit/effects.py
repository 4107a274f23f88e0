"""Exact effects of single edges and nodes: the labels of a trained network.

One run per edge or node on clean prompts: one input of one node is changed by (replacement - clean) of one writer's output, or
one node writes what it writes on the corrupted prompt; everything after it is computed anew. The effect is the metric of the
clean run minus that of the patched run, per example. The replacement of an edge is what the corrupted prompt has there
(``counterfactual``) or nothing (``zero``): the first finds what carries the difference between the prompts, the second also
what carries what they share.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from workbench.datasets.pairs import one_of
from workbench.errors import WorkbenchError
from workbench.graph import Graph, circuit_graph, edge_parts
from workbench.models.native import NativeModel
from workbench.pairs import Pairs, logit_difference
from workbench.sites import Site

ABLATIONS = ("counterfactual", "zero")


def graph_of(model: NativeModel) -> Graph:
    """All edges of the model, MLPs included."""
    shape = model.shape
    return circuit_graph(shape.layers, shape.heads, shape.kv_heads, mlp=bool(model.net.config.mlp_width))


@torch.no_grad()
def gap(model: NativeModel, pairs: Pairs) -> Tensor:
    """m(clean) - m(corrupted) per example ``[B]``."""
    return _metric(model, pairs) - _metric(model, pairs, ids=pairs.corrupt)


@torch.no_grad()
def edge_effects(model: NativeModel, pairs: Pairs, ablation: str = "counterfactual") -> Tensor:
    """Effect of each edge of ``graph_of(model)``, ``[edges, B]``."""
    one_of("ablation of an edge", ablation, ABLATIONS)
    graph = graph_of(model)
    writers = {name: _writer(name) for name in graph.writers}
    clean, corrupt = (model.run(ids, read=writers.values()).acts for ids in (pairs.clean, pairs.corrupt))
    zero = ablation == "zero"
    change = {name: (0 if zero else corrupt[site]) - clean[site] for name, site in writers.items()}
    before = _metric(model, pairs)
    found = []
    for edge in graph.edges:
        source, target, channel = edge_parts(edge)
        reader = _reader(target, channel, model.shape.layers)
        found.append(before - _metric(model, pairs, {reader: lambda x, add=change[source]: x + add}))
    return torch.stack(found)


@torch.no_grad()
def node_effects(model: NativeModel, pairs: Pairs) -> dict[str, Tensor]:
    """Effect of each head and MLP, name -> ``[B]``."""
    sites = {name: _writer(name, "z") for name in graph_of(model).writers[1:]}
    corrupt = model.run(pairs.corrupt, read=sites.values()).acts
    before = _metric(model, pairs)
    return {name: before - _metric(model, pairs, {site: corrupt[site]}) for name, site in sites.items()}


def _metric(model: NativeModel, pairs: Pairs, edit: dict | None = None, ids: Tensor | None = None) -> Tensor:
    logits = model.run(pairs.clean if ids is None else ids, edit=edit or {}).logits
    assert logits is not None
    return logit_difference(logits.double(), pairs)


def _writer(name: str, head: str = "result") -> Site:
    """Where a node's output can be read: heads at ``head`` (``result`` or ``z``)."""
    if name == "input":
        return Site("resid_pre", 0)
    layer, index = _parts(name)
    return Site("mlp_out", layer) if index is None else Site(head, layer, index)


def _reader(name: str, channel: str, layers: int) -> Site:
    if name == "logits":
        return Site("resid_post", layers - 1)
    layer, index = _parts(name)
    return Site("mlp_in", layer) if index is None else Site(f"{channel}_input", layer, index)


def _parts(name: str) -> tuple[int, int | None]:
    found = re.fullmatch(r"a(\d+)\.[hg](\d+)|m(\d+)", name)
    if found is None:
        raise WorkbenchError(f"{name!r} is no head or MLP of a circuit graph; they are called a0.h1 and m0")
    layer, head, mlp = found.groups()
    return (int(mlp), None) if mlp else (int(layer), int(head))
