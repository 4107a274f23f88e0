"""Tables of the page of sinks, from what ``wb.sinks`` and its kin found in one run or on several texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.apps.screen.head_grid import measure_of
from workbench.apps.screen.text import readable
from workbench.maps import AttentionMap, GatedMap

if TYPE_CHECKING:
    import pandas as pd

    from workbench.probes.sinks.scores import SinkResult
    from workbench.probes.tables import HeadTable
    from workbench.run import Run

_POINTS = 512
_STRIPES = 64


@dataclass(frozen=True)
class Measure:
    """A number per head of a run: ``says`` what it is, ``unit`` for axes, ``chance`` what its null is, ``code`` that makes
    ``found`` of ``run``, and ``table`` with ``layer, head, value, null``."""

    says: str
    unit: str
    chance: str
    code: str
    table: Callable[[], pd.DataFrame]


def measures(run: Run, found: SinkResult) -> dict[str, Measure]:
    """What can be told of each head of the run; gates and learned sinks where it has them."""
    code = f"found = wb.sinks(run, epsilon={found.epsilon}{', raw=True' if found.raw else ''})"
    even = "evenly spread attention"
    known = {
        "favourite token": Measure(
            "share of the attention that the head's favourite token gets, over the queries that may see it",
            "share of the favourite token",
            even,
            code,
            lambda: favourite_of_heads(found),
        ),
        "first token": Measure(
            "share of the attention that the first token gets",
            "share of the first token",
            even,
            code,
            lambda: first_of_heads(found),
        ),
    }
    if is_gated(run):
        known |= _of_table("gate", "found = wb.gates(run, draws=50)", lambda wb: wb.gates(run, draws=50), _GATES)
    if any(has_learned_sink(amap) for amap in run.maps.values()):
        known |= _of_table("learned sink", "found = wb.learned_sinks(run)", lambda wb: wb.learned_sinks(run), _LEARNED)
    return known


_GATES = {
    "correlation": ("whether the gate closes (below 0) where the head looks at the first token", "correlation",
                    "95% of shuffled gates stay below"),
    "gate": ("how far the output gate is open on average", "mean gate", ""),
    "gate_at_sink": ("how far the gate is open where the head looks at the first token", "mean gate", "the mean gate"),
    "raw": ("weight on the first token inside the gate", "weight on the first token", ""),
    "effective": ("weight on the first token after the gate", "weight on the first token",
                  "the same gate, shuffled over the queries"),
}  # fmt: skip
_LEARNED = {
    "share": ("part of a query's weight that a learned sink takes: it goes to no token", "part of the weight",
              "the same logit against scores of 0"),
    "logit": ("the learned logit that stands in the denominator without a key", "logit", ""),
}  # fmt: skip


def _of_table(
    kind: str, code: str, make: Callable[[Any], HeadTable], said: dict[str, tuple[str, str, str]]
) -> dict[str, Measure]:
    def table(measure: str) -> pd.DataFrame:
        import workbench as wb

        return measure_of(make(wb).frame(), measure)

    return {
        f"{kind}: {name.replace('_', ' ')}": Measure(says, unit, chance, code, partial(table, name))
        for name, (says, unit, chance) in said.items()
    }


def is_gated(run: Run) -> bool:
    """Whether some layer has an output gate."""
    return any(isinstance(amap, GatedMap) for amap in run.maps.values())


def has_learned_sink(amap: AttentionMap) -> bool:
    """Whether the denominator of the softmax holds a logit without a key."""
    inner = amap.raw if isinstance(amap, GatedMap) else amap
    return getattr(getattr(inner, "scores", None), "sink", None) is not None


def favourite_of_heads(found: SinkResult) -> pd.DataFrame:
    """``layer, head, value, null, token, position`` of each head's favourite; NaN for a head without one."""
    import pandas as pd

    best = {(sink.layer, sink.head): sink for sink in found.strongest()}
    rows = []
    for layer, share in found.share.items():
        for head in range(len(share)):
            sink = best.get((layer, head))
            row: dict[str, Any] = {"layer": layer, "head": head, "value": float("nan"), "null": float("nan")}
            if sink is not None:
                token = {"token": readable(sink.token), "position": sink.key}
                row |= {"value": sink.share, "null": sink.uniform, **token}
            rows.append(row)
    return pd.DataFrame(rows)


def first_of_heads(found: SinkResult) -> pd.DataFrame:
    """``layer, head, value, null``: the first token's share, mean over sequences."""
    import pandas as pd

    parts = []
    for layer, first in found.first.items():
        null = found.uniform[layer][:, found.token]
        columns = {
            "layer": layer,
            "head": range(first.shape[1]),
            "value": first.nanmean(0).numpy(),
            "null": null.numpy(),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def profile(found: SinkResult, layer: int | str, head: int, points: int = _POINTS) -> pd.DataFrame:
    """``position, token, share, uniform`` of one head over the keys. More keys than ``points`` are taken in stretches of one
    length, of which the key with the largest share stands for all."""
    import pandas as pd

    share, even = found.share[layer][head], found.uniform[layer][head]
    stretch = -(-len(share) // points)
    at = torch.arange(len(share))
    if stretch > 1:
        padded = torch.nn.functional.pad(share.nan_to_num(-1.0), (0, -len(share) % stretch), value=-2.0)
        best = padded.view(-1, stretch).argmax(1)
        at = best + torch.arange(len(best)) * stretch
    tokens = [readable(found.tokens[layer][i]) for i in at.tolist()]
    return pd.DataFrame(
        {"position": at.numpy(), "token": tokens, "share": share[at].numpy(), "uniform": even[at].numpy()}
    )


def top_keys(found: SinkResult, layer: int | str, head: int, count: int = 10) -> pd.DataFrame:
    """The keys with the largest share in one head: ``position, token, share, uniform, error, queries``. Keys that fewer than
    half as many queries see as the most visible one are left out, as in ``strongest``."""
    import pandas as pd

    share, seen = found.share[layer][head], found.queries[layer]
    usable = torch.where((seen >= seen.max() / 2) & share.isfinite(), share, float("-inf"))
    best = usable.topk(min(count, len(share)))
    at = best.indices[best.values.isfinite()]
    columns = {"position": at.numpy(), "token": [readable(found.tokens[layer][i]) for i in at.tolist()]}
    numbers = {
        "share": share,
        "uniform": found.uniform[layer][head],
        "error": found.error[layer][head],
        "queries": seen,
    }
    return pd.DataFrame(columns | {name: values[at].numpy() for name, values in numbers.items()})


def stripes(found: SinkResult, count: int = _STRIPES) -> pd.DataFrame:
    """``layer, start, end, part, even, more``: the part of a layer's attention that goes to the keys from ``start`` to before
    ``end``, what it would be if attention were even, and their difference; at most ``count`` stretches of the text."""
    import pandas as pd

    parts = []
    for layer, share in found.share.items():
        seen = found.queries[layer].to(share.dtype)
        size = -(-len(seen) // count)
        own, even = (_sums((values.nan_to_num(0.0) * seen).sum(0), size) for values in (share, found.uniform[layer]))
        start = torch.arange(len(own)) * size
        columns = {"layer": layer, "start": start.numpy(), "end": (start + size).clamp(max=len(seen)).numpy()}
        own, even = own / own.sum(), even / even.sum()
        parts.append(pd.DataFrame(columns | {"part": own.numpy(), "even": even.numpy(), "more": (own - even).numpy()}))
    return pd.concat(parts, ignore_index=True)


def favourites(heads: pd.DataFrame) -> pd.DataFrame:
    """Which tokens are the favourites: ``token, heads, layers, share, uniform, error``, the one of most heads first.

    ``heads`` has a row per head, and text if there are several: ``layer, head, position, token, share, uniform``. The first
    token of a text is told apart from the same word later on. ``heads`` is a mean over texts, ``error`` the standard error of
    the mean share over texts, NaN for one."""
    given = heads[heads["token"].notna()].reset_index(drop=True)
    text = given["text"] if "text" in given else given["share"] * 0
    given = given.assign(text=text, token=given["token"] + given["position"].eq(0).map({True: " (first)", False: ""}))
    each = given.groupby("token")
    found = each.agg(
        heads=("share", "size"), layers=("layer", "nunique"), share=("share", "mean"), uniform=("uniform", "mean")
    )
    found["heads"] = found["heads"] / max(1, given["text"].nunique())
    by_text = given.groupby(["token", "text"])["share"].mean().groupby("token")
    found["error"] = by_text.std() / by_text.size() ** 0.5
    return found.sort_values(["heads", "share"], ascending=False).reset_index()


def over_texts(rows: pd.DataFrame) -> pd.DataFrame:
    """The first token's share over texts, a row per head: ``layer, head``, the mean ``value`` with its 95% bootstrap interval
    ``low, high``, its ``null``, and the ``smallest`` and ``largest`` of a text.

    ``rows`` is a table of ``work_sinks.sinks_by_text`` of one kind of map."""
    import pandas as pd

    from workbench.probes.bootstrap import interval

    wide, null = (rows.pivot(index="text", columns=["layer", "head"], values=name) for name in ("first", "even"))
    low, high = interval(torch.from_numpy(wide.to_numpy(float, copy=True)))
    found = pd.DataFrame({"value": wide.mean(), "low": low, "high": high, "null": null[wide.columns].mean()})
    return found.assign(smallest=wide.min(), largest=wide.max()).reset_index()


def twin_rows(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """The rows of ``work_sinks.twins`` by ``model``, ``layer`` or ``head``, with the columns that these have."""
    part = rows[rows["by"] == by].dropna(axis=1, how="all").drop(columns="by").reset_index(drop=True)
    whole = [name for name in ("layer", "head") if name in part and part[name].dtype.kind == "f"]
    return part.astype(dict.fromkeys(whole, int))


def _sums(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size).sum(1)
