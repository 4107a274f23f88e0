"""Which heads look at the needle before the answer begins, and how much cache does each of them deserve?

HeadKV-style importance (SnapKV's window of last tokens, one number per head):

    importance(h) = max over the last 8 prompt tokens t of  sum over the needle of A[t, j]

``cache_budget`` turns scores into key-value cache sizes as HeadKV does (arXiv 2410.19258): every head gives b / beta of its
budget b to a pool that is shared out in proportion to the scores,

    b_h = (b - b / beta)  +  S_h * (b / beta) * L * H,      S_h = score_h / sum of scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.padding import padding
from workbench.probes.retrieval.trials import windows_elsewhere
from workbench.probes.sources import Source, inner, maps_of, need_shares, provenance_of, tokens_of
from workbench.probes.tables import HeadTable, Layers

WINDOW = 8
BETA = 1.2
NOWHERE = "no stretch outside of the needle is as long as it is, so that there is nothing to compare with"
ALIKE = "no head has a positive score, so that the pool is shared out evenly"


def head_kv(source: Source, spans: Tensor, window: int = WINDOW, *, raw: bool = False) -> HeadTable:
    """``importance``: the largest mass that any of the last ``window`` real tokens of a prompt puts on its needle, mean over
    prompts with 95% bootstrap intervals.

    ``source``: a run on the prompts (not the answers) with captured maps, or maps. ``spans`` ``[B, 2]``: the needle of each
    prompt. The null is the same statistic averaged over all stretches as long as the needle before the window. Refuses a needle
    inside the window, where every head looks at it, and signed maps. Only the last rows are made.
    """
    if window < 1:
        raise WorkbenchError(f"the window holds one token or more; got {window}")
    values, chance = {}, {}
    for name, amap in maps_of(source).items():
        reach = _reach(name, amap, tokens_of(source))
        values[name], chance[name] = _importance(name, amap, spans, reach, window, raw)
    nowhere = any(bool(part.isnan().all()) for part in chance.values())
    return HeadTable.averaged(
        "Attention to the needle before the answer",
        {"importance": values},
        {"importance": f"largest attention to the needle from the last {window} tokens"},
        null={"importance": chance},
        undefined={"importance null": NOWHERE} if nowhere else {},
        provenance=provenance_of(source),
    )


def cache_budget(table: HeadTable, budget: int, *, measure: str | None = None, beta: float = BETA) -> HeadTable:
    """``share`` of the whole cache and ``tokens`` of every head, when heads have ``budget`` tokens on average.

    ``beta`` > 1: heads keep ``budget - budget / beta`` whatever their score and share out the rest. Tokens are whole numbers that
    add up to the whole (largest remainders). Undefined and negative scores count as 0. The null is an even split.
    """
    if budget < 1 or isinstance(budget, bool) or not isinstance(budget, int):
        raise WorkbenchError(f"budget is a number of tokens per head, at least 1; got {budget!r}")
    if not beta > 1:
        raise WorkbenchError(f"beta is larger than 1; got {beta}")
    name = measure if measure is not None else next(iter(table.values))
    if name not in table.values:
        raise UnknownName("measure", name, table.values)
    rows = table.values[name]
    sizes = [len(row) for row in rows.values()]
    scores = torch.cat([row.double().cpu().nan_to_num(0.0).clamp(min=0) for row in rows.values()])
    heads, alike = len(scores), not bool(scores.sum() > 0)
    parts = torch.full_like(scores, 1 / heads) if alike else scores / scores.sum()
    wanted = budget - budget / beta + parts * (budget / beta * heads)
    whole = wanted.floor()
    missing = round(float(wanted.sum())) - int(whole.sum())
    whole[(wanted - whole).sort(descending=True, stable=True).indices[:missing]] += 1

    def split(numbers: Tensor) -> Layers:
        return dict(zip(rows, numbers.split(sizes), strict=True))

    even = torch.full_like(scores, float(budget))
    return HeadTable(
        title=f"Cache of {budget} tokens per head, shared out by {name.replace('_', ' ')}",
        values={"tokens": split(whole), "share": split(wanted / wanted.sum())},
        units={"tokens": "tokens in the cache", "share": "part of the whole cache"},
        null={"tokens": split(even), "share": split(torch.full_like(scores, 1 / heads))},
        undefined={"share": ALIKE} if alike else {},
        provenance=table.provenance,
    )


def _reach(name: int | str, amap: AttentionMap, tokens: Tokens | None) -> list[tuple[int, int]]:
    """The first real key of every sequence, and the row after its last real query."""
    b, _, queries, keys = amap.shape
    pad = padding(name, amap, tokens)
    asked = torch.ones(b, queries, dtype=torch.bool) if pad.queries is None else pad.queries
    shown = torch.ones(b, keys, dtype=torch.bool) if pad.keys is None else pad.keys
    empty = (~asked.any(1) | ~shown.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise WorkbenchError(f"layer {name}: prompt {empty[0]} is padding alone")
    ends = queries - asked.flip(1).int().argmax(1)
    return list(zip(shown.int().argmax(1).tolist(), ends.tolist(), strict=True))


def _importance(
    name: int | str, amap: AttentionMap, spans: Tensor, reach: list[tuple[int, int]], window: int, raw: bool
) -> tuple[Tensor, Tensor]:
    """Importance and its mean over other stretches, ``[B, H]`` each."""
    amap = inner(name, amap, raw)
    need_shares(name, amap, "are no shares of attention to the needle")
    if spans.shape != (amap.shape[0], 2):
        raise WorkbenchError(f"spans are [B, 2] with B={amap.shape[0]}; got {list(spans.shape)}")
    found, chance = [], []
    for end in dict.fromkeys(end for _, end in reach):
        if end < window:
            raise WorkbenchError(
                f"layer {name}: a prompt of {end} tokens has no {window} last ones; ask for a smaller window"
            )
        rows = amap.rows(end - window, end).detach().double().cpu()
        running = torch.nn.functional.pad(rows.cumsum(-1), (1, 0))
        for b in (b for b, (_, own) in enumerate(reach) if own == end):
            lo, hi = spans[b].tolist()
            begin, first = reach[b][0], end - window + amap.offset
            if not begin <= lo < hi <= first:
                raise WorkbenchError(
                    f"the needle of prompt {b} is [{lo}, {hi}); it has to lie before the last {window} tokens, from {first} on"
                )
            found.append((b, (running[b, ..., hi] - running[b, ..., lo]).amax(-1)))
            others = windows_elsewhere(running[b], lo, hi, first, begin)
            chance.append((b, others.amax(-2).mean(-1)))
    order = [torch.stack([row for _, row in sorted(part, key=lambda pair: pair[0])]) for part in (found, chance)]
    return order[0], order[1]


def _example() -> dict[str, Any]:
    return {"source": random_maps(batch=2), "spans": torch.tensor([[1, 3], [2, 4]]), "window": 4}


ANALYSES = (
    Analysis(
        name="head-kv",
        question="Which heads look at the needle before the answer begins?",
        function=head_kv,
        example=_example,
        paper="HeadKV 2024 (arXiv 2410.19258); its form over the last 8 tokens as in LOCOS 2026 (arXiv 2607.01002)",
        source="maps",
        null="all stretches as long as the needle",
        cause="compare_rankings",
    ),
    Analysis(
        name="cache-budget",
        question="How much of a key-value cache does each head deserve?",
        function=cache_budget,
        example=lambda: {"table": head_kv(**_example()), "budget": 64},
        paper="HeadKV 2024 (arXiv 2410.19258), allocation of the budget",
        source="tensors",
        null="an even split",
        definition="whole tokens by largest remainders",
    ),
)
