"""Which heads look at earlier copies of the current token, or behind them, and what do the others lose with a short cache?

RazorAttention (arXiv 2407.15891): random tokens are repeated (published: 2,500 tokens, 4 times), p is the period, and

    echo(h)      = mean over queries i >= p of A[i, i - p]          the same token, one period back
    induction(h) = mean over queries i >= p of A[i, i - p + 1]      the token after it

A key-value head has the largest score of its query heads. The first 1% of key-value heads by echo and the first 14% by induction
keep all keys; the others keep the first tokens, the last max(4000, N / 5) and one compensation token (``Streaming``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from workbench import mods
from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Model
from workbench.mods import Mod
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, random_maps
from workbench.probes.heads.repeats import vocabulary
from workbench.probes.masses import mean_masses
from workbench.probes.padding import Padding, padding
from workbench.probes.retrieval.streaming import KVHead, Streaming
from workbench.probes.sources import Source, maps_of, need_shares, provenance_of, tokens_of, ungated
from workbench.probes.tables import HeadTable
from workbench.probes.visibility import visibility
from workbench.run import Run

PERIOD, REPEATS = 2500, 4
ECHO, INDUCTION = 0.01, 0.14
SINKS, LOCAL, LOCAL_PART = 4, 4000, 5


def razor_policy(tokens: int, sink: int = SINKS) -> Streaming:
    """The published policy of compressed heads at a length: the last ``max(4000, N / 5)`` tokens and the compensation token.
    The number of first tokens is not published; it is 4 here."""
    return Streaming(sink, max(LOCAL, tokens // LOCAL_PART), compensate=True)


@torch.no_grad()
def razor_scores(
    model: Model,
    period: int | None = None,
    repeats: int = REPEATS,
    *,
    sequences: int = 2,
    words: Sequence[int | str] | None = None,
    echo: float = ECHO,
    induction: float = INDUCTION,
    seed: int = 0,
) -> HeadTable:
    """``echo`` and ``induction`` of every query head, and ``kept`` (1 or 0): whether its key-value head keeps all keys.

    ``period``: tokens before the repeat, by default 2,500 or what fits ``repeats`` times into the length the model was made for.
    Tokens are drawn from ``words`` (all ordinary tokens by default), different ones where there are enough. Means over sequences
    with 95% bootstrap intervals. The null is the same statistic on as many tokens without a repeat. ``echo`` and ``induction``
    are the parts of the key-value heads that are kept, one at least. Only two masses per row are kept.
    """
    start, drawn = vocabulary(model, words)
    longest = model.shape.trained or model.shape.context
    if repeats < 2 or sequences < 1:
        raise WorkbenchError(f"repeats is at least 2 and sequences at least 1; got {repeats} and {sequences}")
    if period is None:
        period = PERIOD if longest is None else min(PERIOD, (longest - len(start)) // repeats)
    if period < 2:
        raise WorkbenchError(
            f"a period has two tokens or more; got {period} (name a shorter repeat or a longer context)"
        )
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([_draw(drawn, period, generator) for _ in range(sequences)])
    other = torch.stack([_draw(drawn, period * repeats, generator) for _ in range(sequences)])
    head = start.expand(sequences, -1)
    where = {"echo": mods.previous(period), "induction": mods.previous(period - 1)}
    request = capture(mass=where, keep=False)
    run = model.run(torch.cat([head, once.repeat(1, repeats)], 1), maps=request, logits=None)
    control = model.run(torch.cat([head, other], 1), maps=request, logits=None)
    first = len(start) + period
    each = {name: {layer: _mean(run, layer, name, first) for layer in run.maps} for name in where}
    scores = {name: {layer: part.mean(0) for layer, part in rows.items()} for name, rows in each.items()}
    kept = _kept(scores, {layer: amap.kv_heads for layer, amap in run.maps.items()}, echo, induction)
    return HeadTable.averaged(
        f"Echo and induction heads, {period} tokens repeated {repeats} times",
        each,
        {
            "echo": "attention to the same token",
            "induction": "attention to the token after it",
            "kept": "keeps all keys",
        },
        single={"kept": kept},
        null={name: {layer: _mean(control, layer, name, first) for layer in run.maps} for name in where},
        provenance=run.provenance,
    )


def razor_heads(table: HeadTable, kv_heads: int) -> tuple[list[KVHead], list[KVHead]]:
    """Key-value heads ``(layer, kv head)`` that keep all keys, and the others, from ``razor_scores``."""
    kept: list[KVHead] = []
    others: list[KVHead] = []
    if "kept" not in table.values:
        raise UnknownName("measure", "kept", table.values)
    for layer, row in table.values["kept"].items():
        if not isinstance(layer, int):
            raise Refused("key-value heads are named by layer numbers; this model has several stacks")
        if len(row) % kv_heads:
            raise WorkbenchError(f"layer {layer} has {len(row)} query heads, no multiple of {kv_heads} key-value heads")
        for group, flag in enumerate(row.view(kv_heads, -1)[:, 0]):
            (kept if flag else others).append((layer, group))
    return kept, others


def razor_recall(source: Source, kept: Collection[KVHead] = (), policy: Streaming | None = None) -> HeadTable:
    """Which part of its attention a head keeps with the short cache: ``recall`` on the first and the last tokens, whatever
    the head, and ``policy``, the same with the key-value heads in ``kept`` at 1.

    ``source``: a run with captured maps, or maps. ``policy``: by default the published one at the map's number of keys (the
    compensation token gives back values, no mass, and is left out). "First" counts from the first real token. Both are the mean
    mass on those keys over real queries divided by the mean mass on all. The null is evenly spread attention. Gates are looked
    inside of, since they do not choose keys; signed maps are refused. Rows are walked in chunks.
    """
    each, policies, null, undefined = {}, {}, {}, {}
    for name, amap in maps_of(source).items():
        asked = ungated(amap)
        need_shares(name, asked, "are no parts of a mass to recall")
        rule = policy or razor_policy(asked.shape[3])
        pad = padding(name, asked, tokens_of(source))
        seen = visibility(asked, real=pad.queries, keys=pad.keys)
        mean, even = mean_masses(asked, seen, [_held(rule, _starts(pad, asked)), mods.full()])
        each[name], null[name] = mean[0] / mean[1], even[0] / even[1]
        whole = torch.zeros(asked.shape[1], dtype=torch.bool)
        for layer, group in kept:
            if layer == name:
                size = asked.shape[1] // asked.kv_heads
                whole[group * size : (group + 1) * size] = True
        policies[name] = torch.where(whole, 1.0, each[name].nanmean(0))
        if bool(each[name].isnan().any()):
            undefined[str(name)] = "a head has no weight in some sequence, so there is nothing to keep"
    return HeadTable.averaged(
        "Attention that a short cache keeps",
        {"recall": each},
        {"recall": "part of the attention mass", "policy": "part of the attention mass"},
        single={"policy": policies},
        null={"recall": null, "policy": null},
        undefined=undefined,
        provenance=provenance_of(source),
    )


def _draw(drawn: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(drawn) >= count:
        return drawn[torch.randperm(len(drawn), generator=generator)[:count]]
    return drawn[torch.randint(len(drawn), (count,), generator=generator)]


def _mean(run: Run, layer: int | str, name: str, first: int) -> Tensor:
    return run.maps[layer].mass(name)[:, :, first:].double().mean(-1).cpu()


def _kept(
    scores: dict[str, dict[int | str, Tensor]], groups: dict[int | str, int], echo: float, induction: float
) -> dict[int | str, Tensor]:
    """1 for the query heads of the key-value heads that come first by either score, ``[H]`` per layer."""
    layers = list(groups)
    sizes = [groups[layer] for layer in layers]
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    for name, part in (("echo", echo), ("induction", induction)):
        if not 0 <= part <= 1:
            raise WorkbenchError(f"{name} is the part of the key-value heads that is kept, 0 to 1; got {part}")
        best = torch.cat([scores[name][layer].view(groups[layer], -1).amax(1) for layer in layers])
        count = max(1, round(part * len(best))) if part else 0
        chosen[best.topk(count).indices] = True
    each = zip(layers, chosen.split(sizes), strict=True)
    return {
        layer: flags.repeat_interleave(len(scores["echo"][layer]) // groups[layer]).double() for layer, flags in each
    }


def _starts(pad: Padding, amap: AttentionMap) -> Tensor:
    """The first real key of each sequence, ``[B]``."""
    return torch.zeros(amap.shape[0], dtype=torch.long) if pad.keys is None else pad.keys.int().argmax(1)


def _held(policy: Streaming, starts: Tensor) -> Mod:
    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k - starts[b] < policy.sink) | ((q - k).abs() < policy.recent)

    return mod


ANALYSES = (
    Analysis(
        name="razor-scores",
        question="Which heads look at earlier copies of the current token, or behind them?",
        function=razor_scores,
        example=lambda: {"model": bundled("tiny-softmax"), "period": 24},
        paper="RazorAttention 2024 (arXiv 2407.15891)",
        source="model",
        null="as many random tokens without a repeat",
        cause="streaming_effect",
        definition="the number of kept heads is rounded, one at least per score",
    ),
    Analysis(
        name="razor-recall",
        question="Which part of its attention does a head keep with a short cache?",
        function=razor_recall,
        example=lambda: {"source": random_maps(), "kept": [(0, 1)], "policy": Streaming(1, 4)},
        paper="RazorAttention 2024 (arXiv 2407.15891)",
        source="maps",
        null="evenly spread attention",
        cause="streaming_effect",
    ),
)
