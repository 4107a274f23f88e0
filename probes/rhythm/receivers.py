"""Which heads keep coming back to a few tokens?

Receiver heads (Bogdan et al., arXiv 2506.19143): the mean attention that each token gets from the queries well after
it, and the kurtosis of these column means over the tokens. A head that returns to a few of them has a heavy tail, hence
a large kurtosis. There, columns are sentences; ``sentences`` gives their number for every token, and without it every
token is a column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.padding import padding
from workbench.probes.rhythm.bands import first_key
from workbench.probes.rhythm.waad import NO_DISTANCE
from workbench.probes.similarity.aligned import shuffled as elsewhere
from workbench.probes.sources import Source, inner, maps_of, need_shares, provenance_of, tokens_of
from workbench.probes.tables import HeadTable

_CHUNK = 2**22
_SAME = 1e-9
"""Column means that differ by a smaller part of the largest are the same: rounding has no kurtosis."""


def receiver_heads(
    source: Source,
    *,
    prompt: int = 0,
    near: int = 4,
    least: int = 8,
    sentences: Tensor | None = None,
    raw: bool = False,
    seed: int = 0,
) -> HeadTable:
    """Kurtosis (0 for a normal distribution) of the mean attention that tokens get from queries ``near`` or more tokens
    later.

    ``prompt``: its columns and queries are left out. Columns with fewer than ``least`` such queries are left out, as
    are padding tokens. ``sentences`` ``[T]`` or ``[B, T]`` numbers the sentence of every token from 0 on; then columns
    are sentences (weights summed) and ``near`` is in sentences, the published 4. The null gives each row's weights to
    random keys of the same row, the same ones in every sequence. NaN with fewer than four columns. Refused for signed
    and channel maps.
    """
    if near < 0 or least < 1:
        raise WorkbenchError(f"near is 0 or more, least 1 or more; got near={near}, least={least}")
    maps = maps_of(source)
    each, null = {}, {}
    undefined = {}
    for name, amap in maps.items():
        asked = inner(name, amap, raw)
        need_shares(name, asked, NO_DISTANCE)
        b, _, queries, keys = asked.shape
        if queries != keys:
            raise Refused(
                f"layer {name!r}: columns are compared over one text; this map has {queries} queries of {keys} keys"
            )
        first = first_key(prompt, keys)
        real = padding(name, amap, tokens_of(source)).queries
        real = torch.ones(b, keys, dtype=torch.bool) if real is None else real
        real = real & (torch.arange(keys) >= first)
        place = torch.arange(keys).expand(b, -1) if sentences is None else _numbers(sentences, b, keys)
        own, shuffled, enough = _columns(asked, real, place, near, least, seed)
        each[name], null[name] = _kurtosis(own, enough), _kurtosis(shuffled, enough)
        if bool(each[name].isnan().any()):
            undefined[str(name)] = (
                f"fewer than four columns are seen by {least} queries that stand {near} or more after them, or all get the same"
            )
    return HeadTable.averaged(
        "Receiver heads", {"kurtosis": each}, {"kurtosis": "excess kurtosis of column means"}, null={"kurtosis": null},
        undefined=undefined, provenance=provenance_of(source),
    )  # fmt: skip


def _columns(
    amap: AttentionMap, real: Tensor, place: Tensor, near: int, least: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Column means ``[B, H, C]``, the same with every row's weights on random keys of its own, and which columns
    ``[B, C]`` count."""
    b, h, queries, keys = amap.shape
    columns = int(place.max()) + 1
    total, shuffled = (torch.zeros(b, h, columns, dtype=torch.float64) for _ in range(2))
    count = torch.zeros(b, columns, dtype=torch.float64)
    into = place[:, None].expand(b, h, keys)
    present = torch.zeros(b, columns).scatter_add_(1, place, real.float()) > 0
    step = max(1, min(queries, _CHUNK // (b * h * keys)))
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        after = place[:, lo:hi, None] - place[:, None] >= near
        named = after & (torch.arange(lo, hi)[:, None] >= torch.arange(keys)) & real[:, None] & real[:, lo:hi, None]
        rows = amap.rows(lo, hi).detach().cpu().double() * named[:, None]
        total.scatter_add_(2, into, rows.sum(2))
        shuffled.scatter_add_(2, into, elsewhere(rows, named[:, None], lo, seed).sum(2))
        seen = (
            torch.zeros(b, hi - lo, columns).scatter_add_(2, place[:, None].expand(b, hi - lo, keys), named.float()) > 0
        )
        count += seen.sum(1)
    enough = present & (count >= least)
    return total / count[:, None], shuffled / count[:, None], enough


def _kurtosis(columns: Tensor, enough: Tensor) -> Tensor:
    """Excess kurtosis over the columns that count, ``[B, H]``."""
    from scipy.stats import kurtosis

    found = torch.full(columns.shape[:2], float("nan"), dtype=torch.float64)
    for b, kept in enumerate(enough):
        own = columns[b][:, kept]
        if own.shape[1] < 4:
            continue
        varies = own.amax(-1) - own.amin(-1) > _SAME * own.amax(-1)
        if bool(varies.any()):
            found[b, varies] = torch.as_tensor(kurtosis(own[varies].numpy(), axis=-1))
    return found


def _numbers(sentences: Tensor, batch: int, keys: int) -> Tensor:
    numbers = torch.as_tensor(sentences).cpu()
    numbers = numbers.expand(batch, -1) if numbers.ndim == 1 else numbers
    if numbers.shape != (batch, keys) or numbers.is_floating_point() or int(numbers.min()) < 0:
        raise WorkbenchError(
            f"sentences numbers the tokens [B, T] = {[batch, keys]} from 0 on; got {list(numbers.shape)}"
        )
    if bool((numbers.diff(dim=1) < 0).any()):
        raise WorkbenchError("sentences are numbered in the order of the text")
    return numbers.long()


ANALYSES = (
    Analysis(
        name="receiver-heads",
        question="Which heads keep coming back to a few tokens?",
        function=receiver_heads,
        example=lambda: {"source": random_maps(2, tokens=32)},
        paper="Bogdan et al. 2025 (arXiv 2506.19143)",
        source="maps",
        null="every row's weights on random keys of the same row",
        definition="without sentences every token is a column",
    ),
)
