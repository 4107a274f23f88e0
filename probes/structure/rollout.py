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
from workbench.probes.padding import padding
from workbench.probes.sources import Source, inner, maps_of, need_shares, tokens_of

_CHUNK = 2**22


def rollout(
    source: Source, *, queries: Sequence[int] | None = None, residual: float = 0.5, raw: bool = False
) -> Tensor:
    """Attention rollout of all layers of one stack, ``[B, T, T]``, or ``[B, len(queries), T]`` for some queries;
    float64.

    Rows sum to 1, as far as the maps' own rows have weight. With ``queries`` nothing of size T x T is built: rows are
    carried back through the layers one after another (``rmatvec``), at any length. Negative queries count back from the
    last real token of each sequence; rows of padding are NaN. ``residual`` is the share r of the stream itself. Gated
    maps count as they act; ``raw=True`` looks inside the gate. Refused for signed and channel maps, and maps that are
    not of one set of tokens.
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
    real = real_tokens_of(source)
    places = placed(chosen, real)
    at = places.clamp(min=0)
    rows = torch.zeros(b, len(chosen), length, dtype=torch.float64).scatter_(2, at[..., None], 1.0)
    for amap in reversed(layers):
        rows = _back(amap, rows, residual)
    known = real.gather(1, at) & (places >= 0)
    return rows.masked_fill(~known[..., None], float("nan"))


def real_tokens_of(source: Source) -> Tensor:
    """Which tokens of the maps of one stack are no padding, bool ``[B, T]``."""
    name, amap = next(iter(maps_of(source).items()))
    real = padding(name, amap, tokens_of(source)).queries
    return torch.ones(amap.shape[0], amap.shape[2], dtype=torch.bool) if real is None else real


def placed(queries: Sequence[int], real: Tensor) -> Tensor:
    """The places ``[B, n]`` of queries in each sequence; negative ones count back from the last real token, and are
    negative still where a sequence has not so many places."""
    asked = torch.tensor(list(queries))
    after = real.shape[1] - real.flip(1).int().argmax(1)
    return torch.where(asked < 0, after[:, None] + asked, asked)


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
    kept = residual + (1 - residual) * amap.row_sums().detach().cpu().double().mean(1)  # [B, T]
    scaled = torch.where(kept[:, None] > 0, rows / kept[:, None].clamp(min=1e-300), 0.0)
    return (1 - residual) * _carried(amap, scaled) + residual * scaled


def _carried(amap: AttentionMap, rows: Tensor) -> Tensor:
    """``rows`` ``[B, n, T]`` times the mean of the heads. Few rows go through every head at once, many through the mean of the
    heads a part at a time, so that nothing much larger than rows or T x T is held."""
    b, heads, length, _ = amap.shape
    if rows.shape[1] * heads <= length:
        spread = rows.transpose(1, 2)[:, None].expand(-1, heads, -1, -1).to(amap.row_sums().device)
        return amap.rmatvec(spread.contiguous()).detach().cpu().double().sum(1).transpose(1, 2) / heads
    total = torch.zeros_like(rows)
    step = max(1, _CHUNK // (b * heads * length))
    for lo in range(0, length, step):
        hi = min(length, lo + step)
        total += rows[:, :, lo:hi] @ amap.rows(lo, hi).detach().cpu().double().mean(1)
    return total


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
