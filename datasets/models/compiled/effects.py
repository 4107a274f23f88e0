"""Exact effect of every edge of a small model, one forward pass each: what the labels of compiled models are held to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workbench.errors import Refused
from workbench.graph import Graph, Slot, circuit_graph
from workbench.models.native import NativeModel
from workbench.models.protocol import Edit
from workbench.pairs import Pairs, Task
from workbench.sites import Site


@torch.no_grad()
def edge_effects(model: NativeModel, task: Task, pairs: Pairs) -> Tensor:
    """``[E]``: mean fall of the task's metric when one edge alone carries what the corrupted prompts have on it.

    Edges are those of ``circuit_graph`` for the model's sizes, in its order. Positive: the edge supports the clean behaviour.
    """
    graph = graph_of(model)
    if graph.kv_heads != graph.heads:
        raise Refused("exact effects are taken of models with one key-value head per head; compile without kv_heads")
    change = [
        b - a for a, b in zip(_outputs(model, graph, pairs.clean), _outputs(model, graph, pairs.corrupt), strict=True)
    ]

    def metric(edit: Mapping[Site | str, Edit | Tensor]) -> Tensor:
        logits = model.run(pairs.clean, edit=edit).logits
        assert logits is not None
        return task.metric(logits, pairs).double()

    clean = metric({})
    found = []
    for slot in graph.slots:
        for source in range(slot.sources):
            delta = change[source]
            if not (delta @ _reads(model, slot)).any():
                found.append(0.0)
                continue
            found.append(float((clean - metric({_site(slot): _plus(delta)})).mean()))
    return torch.tensor(found, dtype=torch.float64)


def _plus(delta: Tensor) -> Edit:
    return lambda x: x + delta


def graph_of(model: NativeModel) -> Graph:
    """The graph of a native model."""
    shape = model.shape
    return circuit_graph(shape.layers, shape.heads, shape.kv_heads, mlp=bool(model.net.config.mlp_width))


def _outputs(model: NativeModel, graph: Graph, ids: Tensor) -> list[Tensor]:
    """What every node that writes adds to the residual stream, ``[B, T, D]`` each, in the order of ``graph.writers``."""
    layers = range(graph.layers)
    sites = [Site("resid_pre", 0), *(Site("result", layer) for layer in layers)]
    acts = model.run(ids, read=[*sites, *(Site("mlp_out", layer) for layer in layers if graph.mlp)]).acts
    found = [acts[sites[0]]]
    for layer in layers:
        found += acts[Site("result", layer)].unbind(2)
        if graph.mlp:
            found.append(acts[Site("mlp_out", layer)])
    return found


def _reads(model: NativeModel, slot: Slot) -> Tensor:
    """What the reader sees of its input, ``[D, ...]``, a norm aside: where a change is zero in it, the edge has no effect."""
    if slot.reader == "logits":
        return model.weight("W_U")
    if slot.channel == "in":
        return model.weight("W_in", slot.layer)
    return model.weight(f"W_{slot.channel.upper()}", slot.layer)[slot.index]


def _site(slot: Slot) -> Site:
    if slot.reader == "logits":
        return Site("resid_post", slot.layer - 1)
    if slot.channel == "in":
        return Site("mlp_in", slot.layer)
    return Site(f"{slot.channel}_input", slot.layer, slot.index)
