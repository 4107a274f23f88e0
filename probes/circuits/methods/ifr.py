"""Information flow routes: how much of a sum is each of its terms? (arXiv 2403.00824)

For a sum y = sum_i x_i at a position, proximity_i = max(0, ||y||_1 - ||y - x_i||_1), and the importance of x_i is its share
of all proximities. No metric, no corrupted prompt, no gradient: scores say what is written into the stream, not whether it
matters for the answer. Scores are at least 0 and mean over examples and positions.

Node level is the paper's. A block adds its heads to the stream x: y = x + sum over heads h and tokens j of
A_h,ij v_h,j W_O,h, and every head at every token it attends to is a term, as is x. A head's score is the sum over its
tokens j. An MLP is a term of y = x + MLP(x). Constant biases are no terms.

Edge level is the reading of the edge graph's benchmarks (the code to arXiv 2403.17806): y is the input of a node, its
terms are the outputs of all earlier writers. Queries, keys and values of all heads of a layer read the same stream, so a
writer's edges into them all score the same; attention patterns do not enter.

Where no term is nearer than nothing (all proximities 0) nothing flows, and all shares are 0. Thresholding the routes top
down, as in the paper, is ``circuit.threshold``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.circuits import Circuit
from workbench.errors import Refused
from workbench.models.protocol import Model
from workbench.probes.circuits.attribution import by_place
from workbench.probes.circuits.components import (
    Acts,
    Setting,
    components,
    edge_graph,
    gather,
    heads_first,
    reader_sites,
    served,
    writer_sites,
)
from workbench.probes.circuits.method import Method
from workbench.run import Run
from workbench.sites import Site

_NUMBERS = 2**24


def ifr(setting: Setting, level: str) -> Circuit:
    """Share of every node in what its block writes, or of every writer in what a node reads; see the module. One forward
    pass per batch; ``ablation`` and ``metric`` are not used, and the provenance says so."""
    names, scores = _nodes(setting) if level == "node" else _edges(setting)
    scores = scores / (len(setting.pairs) * setting.pairs.clean.shape[1])
    kept = torch.ones(len(names), dtype=torch.bool)
    return Circuit(level, names, scores, kept, {"ablation": "none", "metric": "none"})


def proximity(whole: Tensor, part: Tensor) -> Tensor:
    """max(0, ||y||_1 - ||y - x||_1) over the last axis."""
    return (whole.abs().sum(-1) - (whole - part).abs().sum(-1)).clamp(min=0)


def shares(near: Tensor, axis: int | tuple[int, ...] = 0) -> Tensor:
    """Proximities over their sum, 0 where all are 0."""
    total = near.sum(axis, keepdim=True)
    return torch.where(total > 0, near / total.clamp(min=torch.finfo(near.dtype).tiny), 0)


@torch.no_grad()
def _edges(setting: Setting) -> tuple[tuple[str, ...], Tensor]:
    graph = edge_graph(setting.model)
    writers, readers = writer_sites(graph), reader_sites(graph)
    streams = {site: _stream(site) for site in readers}
    matrix = torch.zeros(len(setting.places), len(graph.writers), len(graph.slots), dtype=torch.float64)
    for pairs in setting.chunks():
        acts, _ = gather(setting.model, pairs.clean, [*dict.fromkeys((*writers, *streams.values()))], logits=None)
        found: Acts = {}
        for site, span in readers.items():
            stream, sources = streams[site], graph.slots[span.start].sources
            if stream not in found:
                near = torch.cat(
                    [proximity(acts[stream], heads_first(acts[w])) for w in _first(writers, graph.heads, sources)]
                )
                found[stream] = by_place(shares(near).double().permute(1, 2, 0), setting, pairs)  # [places, sources]
            matrix[:, :sources, span] += found[stream][..., None]
    return setting.places.of_each(graph.edges), matrix[:, graph.source, graph.slot].T.flatten()


def _stream(reader: Site) -> Site:
    """Where the stream is read that a node's input is: one tensor for queries, keys and values of all heads."""
    return Site("resid_pre", reader.layer) if reader.kind in ("q_input", "k_input", "v_input") else reader


def _first(writers: Sequence[Site], heads: int, count: int) -> list[Site]:
    """The sites that hold the first ``count`` writers."""
    found: list[Site] = []
    for site in writers:
        if count <= 0:
            break
        found.append(site)
        count -= heads if site.kind == "result" else 1
    return found


@torch.no_grad()
def _nodes(setting: Setting) -> tuple[tuple[str, ...], Tensor]:
    model, units = setting.model, components(setting.model)
    mids = _served_mids(model)
    layers = [layer for layer in range(model.shape.layers) if Site("z", layer) in {unit.site.whole for unit in units}]
    mlps = {unit.site: layer for layer in layers for unit in units if unit.site == Site("mlp_out", layer)}
    totals: dict[Site, Tensor] = {}
    for pairs in setting.chunks():
        sites = [Site(kind, layer) for layer in layers for kind in ("resid_pre", "v", "result")]
        sites += [*mids.values(), *mlps, *(Site("resid_post", layer) for layer in mlps.values())]
        run = model.run(pairs.clean, read=dict.fromkeys(sites), maps=capture(layers=layers), logits=None)
        for layer in layers:
            share = _head_shares(model, run, layer, mids[layer])
            _add(totals, Site("z", layer), by_place(share.double(), setting, pairs))
        for site, layer in mlps.items():
            x, y = run.acts[mids[layer]], run.acts[Site("resid_post", layer)]
            near = torch.stack([proximity(y, x), proximity(y, run.acts[site])])
            _add(totals, site, by_place(shares(near)[1].double(), setting, pairs))
    values = [totals[unit.site.whole][:, unit.site.head or 0] for unit in units]
    return setting.places.of_each([unit.name for unit in units]), torch.stack(values).flatten()


def _served_mids(model: Model) -> dict[int, Site]:
    """Where the stream is after the attention of each layer."""
    known = served(model)
    found = {}
    for layer in range(model.shape.layers):
        mid = next((s for s in (Site("resid_mid", layer), Site("resid_post", layer)) if s in known), None)
        lacking = [
            str(s) for s in (Site("resid_pre", layer), Site("v", layer), Site("result", layer)) if s not in known
        ]
        if mid is None or lacking:
            what = lacking[0] if lacking else str(Site("resid_mid", layer))
            raise Refused(f"ifr takes heads apart into tokens, and {model.name} does not serve {what}")
        found[layer] = mid
    return found


def _add(totals: Acts, site: Site, score: Tensor) -> None:
    totals[site] = totals[site] + score if site in totals else score


def _head_shares(model: Any, run: Run, layer: int, mid: Site) -> Tensor:
    """Share of every head, summed over the tokens it reads, in the stream after the layer's attention: ``[B, T, H]``.

    Some queries at a time, so that no tensor has more than 2^24 numbers where one query allows it.
    """
    x, y, result = run.acts[Site("resid_pre", layer)], run.acts[mid], run.acts[Site("result", layer)]
    rest = y - x - result.sum(2)
    _must_agree(rest, rest.mean((0, 1)), y, f"what layer {layer} of {model.name} adds is not the sum of its heads")
    v, heads = run.acts[Site("v", layer)], result.shape[2]
    written = torch.einsum("bkhe,hed->bhkd", v.repeat_interleave(heads // v.shape[2], 2), model.weight("W_O", layer))
    batch, length = x.shape[:2]
    step = max(1, _NUMBERS // written.numel())
    found = x.new_zeros(batch, length, heads)
    for lo in range(0, length, step):
        here = slice(lo, min(lo + step, length))
        weights = run.maps[layer].rows(here.start, here.stop).to(x).transpose(1, 2)  # [B, q, H, K]
        terms = weights[..., None] * written[:, None]
        _must_agree(terms.sum(3), result[:, here], y, f"layer {layer} of {model.name} is no weighted sum of its values")
        near = proximity(y[:, here, None, None], terms).flatten(2)
        own = proximity(y[:, here], x[:, here])
        parts = shares(torch.cat([near, own[..., None]], 2), 2)[..., :-1]
        found[:, here] = parts.unflatten(2, (heads, -1)).sum(3)
    return found


def _must_agree(found: Tensor, expected: Tensor, scale: Tensor, why: str) -> None:
    error = float((found - expected).abs().max() / scale.abs().max().clamp(min=torch.finfo(scale.dtype).tiny))
    if error > 1e-3:
        raise Refused(
            f"{why} (off by {error:.2g} of the largest activation), so it cannot be taken apart; use level='edge'"
        )


METHODS = (
    Method(
        "ifr",
        "share of what is written that comes from each part; asks for no metric, corrupted prompt or gradient",
        ifr,
        "Ferrando and Voita 2024 (arXiv 2403.00824)",
        positions=True,
        unit="share of what is written",
    ),
)
