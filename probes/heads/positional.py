"""How much of a head's attention do positions explain, and how much what stands there?

Over sequences b of different tokens, with A_b one sequence's map and u even attention over what a query sees,

    positional = 1 - sum_b |A_b - mean A|^2 / (n - 1) / (sum_b |A_b - u|^2 / n)

summed over cells (q, k): the part of what a head does beyond even attention that is the same whatever the tokens are. 1 is a
purely positional head, 0 one that follows content alone; dividing by n - 1 takes out what a mean of n sequences explains by
chance, so that small negative numbers occur. By distance the mean runs over all cells of one distance q - k (the first key
apart, as sinks are a place too); by blocks, cells are blocks of the map, each divided by its number of queries.

The other way round (``moved_tokens``): the tokens before the last few are put in another order, and the weights that the last
queries give are compared with the old ones, token by token (``follows``) and place by place (``stays``), as correlations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Model, Tokens
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, random_maps
from workbench.probes.heads.kinds import token_maps
from workbench.probes.heads.repeats import task_words, vocabulary
from workbench.probes.sources import Source, inner, maps_of, need_shares, provenance_of, tokens_of
from workbench.probes.tables import HeadTable
from workbench.probes.visibility import Visibility, layer_visibility

_CHUNK = 2**22
_EVEN = 1e-9
"""A head whose mean squared departure from even attention is smaller (per query) is even: there is nothing to explain."""


def positional_share(source: Source, *, by: str | int = "cell", raw: bool = False, seed: int = 0) -> HeadTable:
    """``positional`` and ``content`` = 1 - positional of every head, with intervals over sequences.

    ``source``: a run, or maps, of two or more sequences of different tokens, best random ones; padding on the right alone.
    ``by``: ``cell`` compares (query, key) by (query, key), ``distance`` the profile over distances, a number the block maps of
    that size, which maps of long texts answer without rows. The null (for cells and distances) shuffles the weights of
    every row over the keys it sees, differently in every sequence: nothing positional is left. A head that attends evenly
    is NaN. Gated maps count as they act, ``raw`` inside the gate; signed maps are refused. Rows are walked in chunks.
    """
    if by not in ("cell", "distance") and (isinstance(by, str | bool) or not isinstance(by, int) or by < 1):
        raise WorkbenchError(f"by is 'cell', 'distance' or the size of blocks, at least 1; got {by!r}")
    generator = torch.Generator().manual_seed(seed)
    each: dict[int | str, Tensor] = {}
    null: dict[int | str, Tensor] = {}
    undefined: dict[str, str] = {}
    for layer, found in maps_of(source).items():
        amap = inner(layer, found, raw)
        seen = _checked(layer, amap, tokens_of(source))
        each[layer], chance = _by_blocks(amap, seen, by) if isinstance(by, int) else _by_rows(amap, seen, by, generator)
        if chance is not None:
            null[layer] = chance
        if bool(each[layer].nanmean(0).isnan().any()):
            undefined[f"layer {layer}"] = "heads that attend evenly: there is nothing to explain"
    return HeadTable.averaged(
        f"Attention explained by position ({by})",
        {"positional": each},
        dict.fromkeys(("positional", "content"), "share of the variance beyond even attention"),
        single={"content": {layer: 1 - part.nanmean(0) for layer, part in each.items()}},
        null={"positional": null} if null else {},
        undefined=undefined,
        provenance=provenance_of(source),
    )


def _checked(layer: int | str, amap: AttentionMap, tokens: Tokens | None) -> Visibility:
    need_shares(layer, amap, "have no departure from even attention")
    if amap.shape[0] < 2:
        raise WorkbenchError(
            f"positions are what sequences share: give two or more of different tokens; layer {layer!r} has {amap.shape[0]}"
        )
    mask = None if tokens is None else tokens.mask.cpu()
    if mask is not None and bool((mask.int().diff(dim=1) > 0).any()):
        raise WorkbenchError(
            "positions are counted from the first token: pad on the right, or give sequences of one length"
        )
    return layer_visibility(layer, amap, tokens)


def _by_rows(amap: AttentionMap, seen: Visibility, by: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Per sequence and head the share explained ``[B, H]``, of the map and of its shuffled twin."""
    b, h, queries, keys = amap.shape
    parts = [_Profile(b, h, keys + 1) if by == "distance" else _Cells(b, h) for _ in range(2)]
    step = max(1, min(queries, _CHUNK // max(1, b * h * keys)))
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        tile = seen.tile(lo, hi).expand(b, -1, -1, -1)
        rows = torch.where(tile, amap.rows(lo, hi).detach().cpu(), 0.0).double()
        at = torch.arange(lo, hi)[:, None] + amap.offset - torch.arange(keys) + 1
        at = torch.where(torch.arange(keys) == 0, 0, at.clamp(min=0))
        for part, weights in zip(parts, (rows, _shuffled(rows, tile, generator)), strict=True):
            total = weights.sum(-1, keepdim=True)
            even = torch.where(tile, total / tile.sum(-1, keepdim=True).clamp(min=1), 0.0)
            part.add(weights, even, tile.double(), at)
    return parts[0].share(), parts[1].share()


def _shuffled(rows: Tensor, tile: Tensor, generator: torch.Generator) -> Tensor:
    """The weights of each row in a random order over the keys the row sees; all heads of a sequence alike."""
    b, h, queries, keys = tile.shape
    noise = torch.rand(queries, b, h, keys, generator=generator).movedim(
        0, 2
    )  # the same however rows are cut into chunks
    order = noise.masked_fill(~tile, 2.0).argsort(-1)
    places = (~tile).int().argsort(dim=-1, stable=True)
    order, places = order.expand(rows.shape), places.expand(rows.shape)
    return torch.zeros_like(rows).scatter(-1, places, rows.gather(-1, order))


class _Cells:
    """Sums over cells (q, k) of the squared departure from their mean over sequences, and from even attention."""

    def __init__(self, b: int, h: int) -> None:
        self.left, self.whole = (torch.zeros(b, h, dtype=torch.float64) for _ in range(2))
        self.queries = 0

    def add(self, weights: Tensor, even: Tensor, seen: Tensor, at: Tensor) -> None:
        count = seen.sum(0)
        several = seen * (count > 1)
        mean = (weights * seen).sum(0) / count.clamp(min=1)
        unbiased = count / (count - 1).clamp(min=1)
        self.left += ((weights - mean).square() * several * unbiased).sum((-1, -2))
        self.whole += ((weights - even).square() * several).sum((-1, -2))
        self.queries += weights.shape[2]

    def share(self) -> Tensor:
        share = 1 - self.left / self.whole
        return share.masked_fill(self.whole <= _EVEN * self.queries, float("nan"))


class _Profile:
    """The same with the mean over all cells of one distance, and of all sequences."""

    def __init__(self, b: int, h: int, kinds: int) -> None:
        self.sums, self.counts = (torch.zeros(b, h, kinds, dtype=torch.float64) for _ in range(2))
        self.squares, self.whole = (torch.zeros(b, h, dtype=torch.float64) for _ in range(2))
        self.queries = 0

    def add(self, weights: Tensor, even: Tensor, seen: Tensor, at: Tensor) -> None:
        flat = at.flatten().expand(*weights.shape[:2], -1)
        self.sums.scatter_add_(2, flat, weights.flatten(2))
        self.counts.scatter_add_(2, flat, seen.expand(weights.shape).flatten(2))
        self.squares += weights.square().sum((-1, -2))
        self.whole += (weights - even).square().sum((-1, -2))
        self.queries += weights.shape[2]

    def share(self) -> Tensor:
        mean = self.sums.sum(0) / self.counts.sum(0).clamp(min=1)
        left = self.squares - 2 * (self.sums * mean).sum(-1) + (self.counts * mean.square()).sum(-1)
        return (1 - left / self.whole).masked_fill(self.whole <= _EVEN * self.queries, float("nan"))


def _by_blocks(amap: AttentionMap, seen: Visibility, size: int) -> tuple[Tensor, None]:
    """Block maps divided by the number of queries of a block; even attention of a block from the keys its queries see."""
    b, h, queries, keys = amap.shape
    if not bool(seen.real.all()):
        raise WorkbenchError("block maps cannot leave padding out: give sequences of one length, or by='cell'")
    blocks = amap.blocks(size, "sum").detach().cpu().double()
    per_block = torch.full((blocks.shape[2],), float(size), dtype=torch.float64)
    per_block[-1] = queries - size * (blocks.shape[2] - 1)
    blocks = blocks / per_block[:, None]
    total = blocks.sum(-1, keepdim=True)
    parts = []
    for i in range(blocks.shape[2]):
        tile = seen.tile(i * size, min(queries, (i + 1) * size)).double()
        part = (tile / tile.sum(-1, keepdim=True).clamp(min=1)).mean(2)
        padded = torch.nn.functional.pad(part, (0, blocks.shape[3] * size - keys))
        parts.append(padded.unflatten(-1, (-1, size)).sum(-1))
    even = torch.stack(parts, 2)
    cells = _Cells(b, h)
    cells.add(blocks, even * total, torch.ones(b, 1, *blocks.shape[2:], dtype=torch.float64), torch.zeros(1))
    return cells.share(), None


@torch.no_grad()
def moved_tokens(
    model: Model,
    *,
    sequences: int = 16,
    length: int = 48,
    queries: int = 8,
    words: Sequence[int | str] | None = None,
    layers: Sequence[int | str] | None = None,
    raw: bool = False,
    seed: int = 0,
) -> HeadTable:
    """Does attention follow tokens that move, or stay with the place?

    Random tokens from a pool of ``length`` / 4 words per sequence, so that they repeat, are run twice: as they are, and with
    all but the start token and the last ``queries`` tokens in another order. Measures are ``follows``, the correlation over
    the moved tokens of the weight that a query gives each before and after, and ``stays``, the same by place; means over
    queries and sequences with intervals over sequences. Null: tokens paired at random. NaN where weights do not vary. ``words``
    are what to draw from, as in ``head_scores``.
    """
    if sequences < 1 or queries < 1 or length < queries + 6:
        raise WorkbenchError(
            f"sequences and queries are at least 1, length at least queries + 6; got {sequences}, {queries}, {length}"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = random_texts(model, sequences, length, words, generator)
    start = ids.shape[1] - length
    count = length - queries
    orders = torch.stack([torch.randperm(count, generator=generator) for _ in range(sequences)])
    moved = ids.clone()
    moved[:, start : start + count] = ids[:, start : start + count].gather(1, orders)
    request = capture(layers=layers)
    before, after = (model.run(x, maps=request, logits=None) for x in (ids, moved))
    old, skipped = token_maps(maps_of(before), before.tokens, raw)
    new, _ = token_maps(maps_of(after), after.tokens, raw)
    names = ("follows", "stays")
    each: dict[str, dict[int | str, Tensor]] = {name: {} for name in (*names, "null")}
    span = slice(start, start + count)
    strangers = torch.stack([torch.randperm(count, generator=generator) for _ in range(sequences)])
    for layer in old:
        a, b = (m[layer].rows(start + count, start + length)[..., span].cpu().double() for m in (old, new))
        pairs = {"follows": (_pick(a, orders), b), "stays": (a, b), "null": (_pick(a, strangers), b)}
        for name, (x, y) in pairs.items():
            each[name][layer] = correlation(x, y).nanmean(-1)
    null = each.pop("null")
    undefined = {f"layer {name}": "no self-attention over the tokens" for name in skipped}
    if any(bool(row.nanmean(0).isnan().any()) for row in each["follows"].values()):
        undefined["follows"] = undefined["stays"] = "heads that give all moved tokens the same weight"
    units = dict.fromkeys(names, "correlation of weights")
    return HeadTable.averaged(
        "Attention to tokens that move", each, units, null=dict.fromkeys(names, null), undefined=undefined,
        provenance=before.provenance,
    )  # fmt: skip


def random_texts(
    model: Model, sequences: int, length: int, words: Sequence[int | str] | None, generator: torch.Generator
) -> Tensor:
    """Ids ``[sequences, start + length]``: the start token if there is one, then tokens drawn from a pool of ``length`` / 4
    different ones for each sequence."""
    words = task_words(model) if words is None else words
    start, drawn = vocabulary(model, words)
    pool = max(2, min(len(drawn), length // 4))
    room = model.shape.context
    if len(drawn) < 2 or (room is not None and room < length + len(start)):
        raise Refused(
            f"{model.name} has {len(drawn)} tokens to draw and a context of {room}: no room for {length} random tokens"
        )
    rows = []
    for _ in range(sequences):
        own = drawn[torch.randperm(len(drawn), generator=generator)[:pool]]
        rows.append(own[torch.randint(pool, (length,), generator=generator)])
    return torch.cat([start.expand(sequences, -1), torch.stack(rows)], 1)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation over the last axis, NaN where one of the two does not vary."""
    x, y = (v - v.mean(-1, keepdim=True) for v in (x, y))
    norms = x.norm(dim=-1), y.norm(dim=-1)
    flat = (norms[0] <= 1e-9) | (norms[1] <= 1e-9)
    return ((x * y).sum(-1) / (norms[0] * norms[1])).masked_fill(flat, float("nan"))


def _pick(weights: Tensor, order: Tensor) -> Tensor:
    """Weights ``[B, H, Q, N]`` in the order ``[B, N]``."""
    index: Any = order[:, None, None].expand(weights.shape)
    return weights.gather(-1, index)


ANALYSES = (
    Analysis(
        name="positional-share",
        question="How much of a head's attention do positions explain?",
        function=positional_share,
        example=lambda: {"source": random_maps(batch=4)},
        paper="positions against content: Ke et al. 2021 (arXiv 2006.15595) separate the two in the scores",
        source="maps",
        null="weights of each row shuffled over the keys it sees",
        definition="our own: share of the variance beyond even attention that the mean over sequences explains",
    ),
    Analysis(
        name="moved-tokens",
        question="Does attention follow a token that moves?",
        function=moved_tokens,
        example=lambda: {"model": bundled(), "sequences": 4, "length": 24, "queries": 4},
        paper="positions against content: Ke et al. 2021 (arXiv 2006.15595) separate the two in the scores",
        source="model",
        null="tokens paired at random",
        cause="the input itself is changed",
        definition="our own: correlation of the weights before and after the tokens are put in another order",
    ),
)
