"""Do all queries look at the same few tokens?

The attention diversification loss (Guo et al., arXiv 2303.11126, with their token-aware pooling) averages a layer's attention
over heads to rows a_i of N keys, sets entries of at most 2/N to 0, and takes the mean over the rows of their cosine with the mean
row, whose entries of at most 2/N are 0 too: 1 if all queries look at the same tokens, 0 if no token is looked at by many. It is
averaged over layers. A row with nothing left counts 0, and so does a mean row in the published loss: attention is then spread,
which need not be diverse. ``focused`` tells how many rows have an entry left, and ``cosine`` is the same without the threshold
(identical rows 1, the identity 1 / sqrt(N)).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.padding import padding
from workbench.probes.sources import Source, maps_of, provenance_of
from workbench.probes.tables import LayerTable
from workbench.probes.visibility import Visibility, visibility
from workbench.run import Run

_CHUNK = 2**22
_UNITS = {
    "overfocus": "mean cosine of a query's row with the mean row, entries of at most 2/N set to 0",
    "cosine": "mean cosine of a query's row with the mean row",
    "focused": "part of the queries with an entry above 2/N",
}
EMPTY = "no key gets more than {threshold:g}/N on average: nothing is left to compare with; the published loss counts 0"


def overfocus(
    source: Source, threshold: float = 2.0, *, raw: bool = False, mask: Mask | None = None, seed: int = 0
) -> LayerTable:
    """Per layer ``overfocus``, ``cosine`` and ``focused``, means over sequences with 95% intervals.

    ``threshold`` is in units of 1/N, N the number of real keys. The null of the first two turns each head-mean row along the keys
    that its query may see, by a random number of them: as sharp, but at unrelated tokens. Gated maps count as they act,
    ``raw=True`` looks inside the gate. Rows are walked in chunks, twice (for the mean row, then for the cosines), so nothing of
    size Q x K is kept. ``overfocus`` is NaN for a sequence whose mean row has no entry above the threshold. Signed maps are
    refused.
    """
    if not threshold >= 0:
        raise WorkbenchError(f"the threshold is in units of 1/N, 0 or more; got {threshold!r}")
    maps = maps_of(source)
    tokens = source.tokens if isinstance(source, Run) else None
    each: dict[str, list[Tensor]] = {name: [] for name in _UNITS}
    null: dict[str, list[Tensor]] = {"overfocus": [], "cosine": []}
    undefined: dict[str, str] = {}
    for name, amap in maps.items():
        inner = amap.raw if raw and isinstance(amap, GatedMap) else amap
        if inner.sign == "signed":
            raise Refused(f"layer {name!r}: signed weights are no attention that could be compared with 2/N")
        if raw and inner.row_sum == "gate":
            raise Refused(f"layer {name!r}: {amap!r} does not hold the attention inside its gate; ask with raw=False")
        pad = padding(name, amap, tokens)
        seen = visibility(amap, mask=mask, real=pad.queries, keys=pad.keys)
        keys = torch.full((inner.shape[0],), inner.shape[3]) if pad.keys is None else pad.keys.sum(1)
        found, chance = _layer(inner, seen, threshold / keys.double(), seed)
        if bool(found["overfocus"].isnan().all()):
            undefined[f"overfocus, layer {name}"] = EMPTY.format(threshold=threshold)
        for measure in each:
            each[measure].append(found[measure])
        for measure in null:
            null[measure].append(chance[measure].nanmean())
    ends = {name: [interval(part) for part in parts] for name, parts in each.items()}
    return LayerTable(
        title="Overfocusing",
        layers=tuple(maps),
        values={name: torch.stack([part.nanmean() for part in parts]) for name, parts in each.items()},
        units=_UNITS,
        low={name: torch.stack([end[0] for end in parts]) for name, parts in ends.items()},
        high={name: torch.stack([end[1] for end in parts]) for name, parts in ends.items()},
        null={name: torch.stack(parts) for name, parts in null.items()},
        undefined=undefined,
        provenance=provenance_of(source),
    )


def overfocus_loss(weights: Tensor | Sequence[Tensor], threshold: float = 2.0) -> Tensor:
    """The published loss of attention weights ``[B, H, Q, N]``, one tensor or one per layer: a number between 0 and 1 with a
    gradient, to be minimised with weight 1 beside the task's loss.

    The threshold itself has no gradient, as in the authors' code: entries of at most threshold/N drop out.
    """
    layers = [weights] if isinstance(weights, Tensor) else list(weights)
    if not layers or any(layer.ndim != 4 for layer in layers):
        raise WorkbenchError(f"weights are [B, H, Q, N] per layer; got {[list(layer.shape) for layer in layers]}")
    parts = []
    for layer in layers:
        rows = layer.mean(1)
        mean = rows.mean(1, keepdim=True)
        rows, mean = (_above(part, threshold / layer.shape[3]) for part in (rows, mean))
        parts.append(torch.nn.functional.cosine_similarity(mean, rows, dim=-1).mean())
    return torch.stack(parts).mean()


def _layer(
    amap: AttentionMap, seen: Visibility, limit: Tensor, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measures per sequence ``[B]``, of the rows and of the turned rows."""
    batch, _, queries, keys = amap.shape
    real = seen.real.expand(batch, -1)
    count = real.sum(1).double()
    # The same turns for every sequence, counted from its first real token: a null that does not depend on the batch.
    turns = torch.rand(queries, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turns = turns[(torch.arange(queries) - real.int().argmax(1)[:, None]).clamp(min=0)]
    means = torch.zeros(2, batch, keys, dtype=torch.float64)
    for _, _, pair in _rows(amap, seen, turns):
        means += pair.sum(2)
    means /= count[:, None]
    at = limit[:, None]
    kept = _above(means, at)
    total = torch.zeros(2, 2, batch, dtype=torch.float64)
    focused = torch.zeros(batch, dtype=torch.float64)
    for lo, hi, pair in _rows(amap, seen, turns):
        on = real[:, lo:hi]
        sharp = _above(pair, at[..., None])
        total[0] += (_cosine(sharp, kept[:, :, None]) * on).sum(-1)
        total[1] += (_cosine(pair, means[:, :, None]) * on).sum(-1)
        focused += ((sharp[0] > 0).any(-1) & on).sum(-1)
    total /= count
    total[0] = torch.where(kept.sum(-1) > 0, total[0], float("nan"))
    total[1] = torch.where(means.sum(-1) > 0, total[1], float("nan"))
    # The turned rows are a null: where their mean row is flat they look at nothing together.
    flat = total[0, 1].nan_to_num(0.0)
    chance = {"overfocus": torch.where(count > 0, flat, float("nan")), "cosine": total[1, 1]}
    return {"overfocus": total[0, 0], "cosine": total[1, 0], "focused": focused / count}, chance


def _rows(amap: AttentionMap, seen: Visibility, turns: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Head-mean rows as they are and turned along their visible keys, ``[2, B, rows, K]`` in float64; padding is 0."""
    b, h, queries, keys = amap.shape
    step = max(1, _CHUNK // max(1, b * h * keys))
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        allowed = seen.tile(lo, hi).any(1).expand(b, -1, -1)
        rows = amap.rows(lo, hi).detach().cpu().double().mean(1) * allowed
        count = allowed.sum(-1, keepdim=True)
        visible = (~allowed).int().sort(dim=-1, stable=True).indices
        packed = rows.gather(-1, visible)
        turn = (turns[:, lo:hi, None] * count).long()
        source = (torch.arange(keys) + turn) % count.clamp(min=1)
        turned = torch.where(torch.arange(keys) < count, packed.gather(-1, source), 0.0)
        yield lo, hi, torch.stack([rows, torch.zeros_like(rows).scatter_(-1, visible, turned)])


def _above(values: Tensor, limit: Tensor | float) -> Tensor:
    return values * (values > limit)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Over the last axis, 0 where one is 0."""
    size = x.norm(dim=-1) * y.norm(dim=-1)
    return (x * y).sum(-1) / size.masked_fill(size == 0, float("inf"))


ANALYSES = (
    Analysis(
        name="overfocus",
        question="Do all queries look at the same few tokens?",
        function=overfocus,
        example=lambda: {"source": random_maps(batch=2, causal=False)},
        paper="Guo et al. 2023 (arXiv 2303.11126), attention diversification loss",
        source="maps",
        null="rows turned along their keys by a random number",
        definition="cosine without the threshold, focused, and NaN for an empty mean row are ours; N counts real keys",
    ),
)
