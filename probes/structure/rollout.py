"""Through which tokens does attention lead, layer after layer?

Rollout (Abnar and Zuidema, arXiv 2005.00928): with A_l the mean over heads of layer l and the residual stream counted
as attention of a token to itself,

    R = Abar_L ... Abar_2 Abar_1,     Abar_l = row-normalised (1 - r) A_l + r I,     r = 1/2.

Row q says where the attention of query q ends up in the input. It follows weights alone: values, MLPs and signs play no
part, so it is a description. ``attributed_rollout`` weighs each layer by what the output depends on, and ``flow``
bounds the same paths by their narrowest part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.maps import DENSE_LIMIT, AttentionMap
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sources import Source, inner, maps_of, need_shares


def rollout(
    source: Source, *, queries: Sequence[int] | None = None, residual: float = 0.5, raw: bool = False
) -> Tensor:
    """Attention rollout of all layers of one stack, ``[B, T, T]``, or ``[B, len(queries), T]`` for some queries;
    float64.

    Rows sum to 1, as far as the maps' own rows have weight. With ``queries`` nothing of size T x T is built: rows are
    carried back through the layers one after another (``rmatvec``), at any length. ``residual`` is the share r of the
    stream itself. Gated maps count as they act; ``raw=True`` looks inside the gate. Refused for signed and channel
    maps, and maps that are not of one set of tokens.
    """
    layers = square_layers(source, raw)
    if not 0 <= residual < 1:
        raise WorkbenchError(f"residual is the share of the stream itself, in [0, 1); got {residual}")
    b, _, length, _ = layers[0].shape
    chosen = range(length) if queries is None else [int(q) for q in queries]
    if not len(chosen) or not all(-length <= q < length for q in chosen):
        raise WorkbenchError(f"queries are positions below {length}; got {list(chosen)[:8]}")
    if b * len(chosen) * length > DENSE_LIMIT:
        raise Refused(
            f"a rollout of {len(chosen)} queries over {length} tokens is too large; name some with queries=[...]"
        )
    rows = torch.eye(length, dtype=torch.float64)[torch.tensor([q % length for q in chosen])].expand(b, -1, -1)
    for amap in reversed(layers):
        rows = _back(amap, rows, residual)
    return rows


def square_layers(source: Source, raw: bool = False) -> list[AttentionMap]:
    """The maps of one stack over one set of tokens, first layer first; refuses others."""
    found = []
    shapes = set()
    for name, amap in maps_of(source).items():
        asked = inner(name, amap, raw)
        need_shares(name, asked, "do not roll out")
        if asked.channelwise:
            raise Refused(f"layer {name!r}: every channel has a map of its own; there is no one path to follow")
        shapes.add((asked.shape[0], asked.shape[2], asked.shape[3]))
        found.append(asked)
    if len(shapes) > 1 or any(q != k for _, q, k in shapes):
        raise WorkbenchError(
            f"layers follow each other over one set of tokens; got maps [B, Q, K] {sorted(shapes)}: choose the layers of one "
            "stack, as in {name: m for name, m in run.maps.items() if ...}"
        )
    return found


def _back(amap: AttentionMap, rows: Tensor, residual: float) -> Tensor:
    """``rows`` ``[B, n, T]`` times Abar of a layer."""
    heads, device = amap.shape[1], amap.row_sums().device
    kept = residual + (1 - residual) * amap.row_sums().detach().cpu().double().mean(1)  # [B, T]
    scaled = torch.where(kept[:, None] > 0, rows / kept[:, None].clamp(min=1e-300), 0.0)
    spread = scaled.transpose(1, 2)[:, None].expand(-1, heads, -1, -1).to(device)
    carried = amap.rmatvec(spread.contiguous()).detach().cpu().double().sum(1).transpose(1, 2) / heads
    return (1 - residual) * carried + residual * scaled


ANALYSES = (
    Analysis(
        name="rollout",
        question="Through which tokens does attention lead, layer after layer?",
        function=rollout,
        example=lambda: {"source": random_maps()},
        paper="Abnar and Zuidema 2020 (arXiv 2005.00928)",
        source="maps",
        null="the rollout of even attention over the visible keys",
    ),
)
