"""Which heads look at the previous token, at earlier copies of the token, or at what followed them?

A score is the mean mass that a head puts on the keys a condition names, over the queries for which the condition
names any key they may see:

    previous    k = q - 1
    duplicate   k < q with the query's token
    induction   k <= q right after an earlier copy of the query's token (Olsson et al., arXiv 2209.11895)
    first       the first real token, for queries after it
    current     k = q

Nulls. On a model, duplicate and induction heads are measured on random tokens repeated after a random period, and
the null is the same keys when the second half is other random tokens: a head that only likes a distance keeps its
score. On a given text, the null shuffles the tokens' identities over the positions. For ``previous``, ``first`` and
``current`` the key is drawn at random among the earlier ones. ``uniform`` is the score of attention spread evenly over
what a query may see, scaled by the gate where the map is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench import mods
from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Model, Tokens
from workbench.mods import Mod
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.heads.repeats import repeats, task_words
from workbench.probes.heads.weights import PER, grouped
from workbench.probes.masses import mean_masses
from workbench.probes.sources import inner, maps_of
from workbench.probes.visibility import Visibility, layer_visibility
from workbench.results import Result, head_map
from workbench.run import Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_ROUNDING = 1e-12
"""Masses that differ by less are equal, summed in another order: over a constant null the difference would be infinite."""
KINDS: dict[str, Callable[[Tensor], Mod]] = {
    "previous": lambda ids: mods.previous(),
    "duplicate": mods.same_token,
    "induction": mods.induction,
    "first": lambda ids: _first(ids),
    "current": lambda ids: mods.diagonal(),
}
USUAL = ("previous", "duplicate", "induction")
_PLACES = ("previous", "first", "current")
"""Kinds that name a place, whatever token stands there."""


class Head(NamedTuple):
    """One head's score."""

    layer: int | str
    head: int
    value: float
    null: float
    z: float


@dataclass(frozen=True)
class HeadScores(Result):
    """Scores per layer ``[C, H]``, C counting ``kinds``.

    ``value``: mean over sequences; ``low high``: 95% bootstrap interval over sequences, NaN for a single one;
    ``null``, ``uniform``: see the module; ``z``: (value - null) / standard deviation of the null. Everything is NaN
    where no query has a key to look at, and ``undefined`` says so. ``skipped`` names layers that are no
    self-attention over the tokens.
    """

    kinds: tuple[str, ...]
    value: Mapping[int | str, Tensor]
    null: Mapping[int | str, Tensor]
    low: Mapping[int | str, Tensor]
    high: Mapping[int | str, Tensor]
    uniform: Mapping[int | str, Tensor]
    z: Mapping[int | str, Tensor]
    sequences: int
    source: str
    undefined: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per layer, head and kind: ``layer, head, kind, value, null, low, high, uniform, z``."""
        import pandas as pd

        parts = []
        columns = ("value", "null", "low", "high", "uniform", "z")
        for layer, value in self.value.items():
            count, heads = value.shape
            index = {
                "layer": layer,
                "head": torch.arange(heads).repeat(count).numpy(),
                "kind": [kind for kind in self.kinds for _ in range(heads)],
            }
            parts.append(pd.DataFrame(index | {c: getattr(self, c)[layer].flatten().numpy() for c in columns}))
        return pd.concat(parts, ignore_index=True)

    def top(self, kind: str, n: int | None = None) -> list[Head]:
        """Heads by falling score of one kind."""
        at = self._index(kind)
        found = [
            Head(layer, head, *(float(part[layer][at, head]) for part in (self.value, self.null, self.z)))
            for layer, value in self.value.items()
            for head in range(value.shape[1])
            if value[at, head].isfinite()
        ]
        return sorted(found, key=lambda h: -h.value)[:n]

    def plot(self, ax: Axes | None = None, kind: str = "induction") -> Axes:
        """Layer x head heat map of one kind."""
        if kind not in self.kinds and kind == "induction":
            kind = self.kinds[0]
        at = self._index(kind)
        title = f"{kind.capitalize()} score of each head\n{self.provenance.model}"
        rows = [value[at] for value in self.value.values()]
        return head_map(ax, rows, list(self.value), title=title, unit="mean attention mass", limits=(0.0, 1.0))

    def _index(self, kind: str) -> int:
        if kind not in self.kinds:
            raise UnknownName("head score", kind, self.kinds)
        return self.kinds.index(kind)


def head_scores(
    source: Model | Run,
    *,
    kinds: Sequence[str] = USUAL,
    batches: int = 4,
    sequences: int = 8,
    period: tuple[int, int] = (16, 48),
    words: Sequence[int | str] | None = None,
    shuffles: int = 16,
    layers: Sequence[int | str] | None = None,
    per: str = "query",
    raw: bool = False,
    seed: int = 0,
) -> HeadScores:
    """Previous-token, duplicate-token and induction scores with their nulls; ``kinds`` may also name ``first`` and ``current``.

    ``source``: a model, which is run on ``batches`` batches of ``sequences`` rows of random tokens, each batch
    repeated after its own period drawn from ``period`` (cut to the model's context and vocabulary); or a run with
    captured maps, whose tokens are shuffled ``shuffles`` times for the null. ``words`` (ids or texts of single
    tokens) are what to draw from: by default all ordinary tokens, and for the bundled models, which cannot repeat
    just any word, those of the induction task; the result's ``source`` says which. ``layers`` restricts what a
    model captures. ``per``: ``query`` heads, or ``kv`` / ``kv-max`` for the mean / largest score of the heads that share keys
    and values, taken in every sequence and in every draw of the null. Gated maps count as they act; ``raw=True`` looks
    inside the gate. Rows are walked in chunks; nothing of size Q x K is kept.
    """
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownName("head score", kind, KINDS)
    if not kinds:
        raise WorkbenchError(f"no score asked for; known: {', '.join(KINDS)}")
    if per not in PER:
        raise UnknownName("grouping of heads", per, PER)
    for name, number in (("batches", batches), ("sequences", sequences), ("shuffles", shuffles)):
        if number < 1:
            raise WorkbenchError(f"{name} is at least 1; got {number}")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(source, Run):
        tokens = source.tokens
        maps, skipped = token_maps(maps_of(source), tokens, raw)
        shuffled = shuffled_tokens(tokens, shuffles, generator)
        measured = {
            name: _measure(kinds, amap, amap, tokens, layer_visibility(name, amap, tokens), shuffled, generator, per)
            for name, amap in maps.items()
        }
        return _scores(kinds, [measured], "text", skipped, source.provenance)
    if not isinstance(source, Model):
        raise WorkbenchError(f"expected a model or a run; got {type(source).__name__}")
    parts = []
    known = task_words(source) if words is None else None
    words = known if words is None else words
    drawn = "words of the induction task" if known is not None else "all tokens" if words is None else "given words"
    for normal, control in repeats(source, batches, sequences, period, generator, words):
        request = capture(layers=layers)
        with torch.no_grad():
            run = source.run(normal, maps=request, logits=None)
            other = source.run(control, maps=request, logits=None)
        maps, skipped = token_maps(maps_of(run), run.tokens, raw)
        controls, _ = token_maps(maps_of(other), run.tokens, raw)
        parts.append(
            {
                name: _measure(
                    kinds,
                    amap,
                    controls[name],
                    run.tokens,
                    layer_visibility(name, amap, run.tokens),
                    None,
                    generator,
                    per,
                )
                for name, amap in maps.items()
            }
        )
    return _scores(kinds, parts, f"random repeats of {drawn}", skipped, run.provenance)


class _Measured(NamedTuple):
    """Of one batch: ``value uniform`` ``[B, C, H]``; ``null`` ``[draws, B, C, H]``."""

    value: Tensor
    uniform: Tensor
    null: Tensor


def token_maps(
    maps: Mapping[int | str, AttentionMap], tokens: Tokens, raw: bool
) -> tuple[dict[int | str, AttentionMap], tuple[str, ...]]:
    """Layers that are self-attention over the run's tokens, and the names of the others."""
    rows, length = tokens.ids.shape
    if not length:
        raise WorkbenchError("these scores compare tokens; the model's input has no token ids")
    kept: dict[int | str, AttentionMap] = {}
    skipped = []
    for name, amap in maps.items():
        stack = name.split(".")[0] if isinstance(name, str) else ""
        if stack in ("decoder", "cross", "vision") or amap.shape[0] != rows or amap.shape[2] != length:
            skipped.append(str(name))
        elif amap.shape[3] != length:
            raise Refused(
                f"layer {name!r} sees {amap.shape[3]} keys and the run holds {length} tokens: it continues a cache whose "
                "tokens are not known here; run the whole text at once"
            )
        else:
            kept[name] = inner(name, amap, raw)
    if not kept:
        raise Refused(f"no captured layer is self-attention over the {length} tokens; captured: {', '.join(skipped)}")
    return kept, tuple(skipped)


def identities(tokens: Tokens) -> Tensor:
    """Token ids ``[B, T]``, -1 on padding: many models pad with a token that texts hold too."""
    return tokens.ids.cpu().masked_fill(~tokens.mask.cpu(), -1)


def shuffled_tokens(tokens: Tokens, draws: int, generator: torch.Generator) -> list[Tensor]:
    """Token identities permuted over the real positions of each row, the first one kept."""
    ids, real = identities(tokens), tokens.mask.cpu()
    found = [ids.clone() for _ in range(draws)]
    for b in range(len(ids)):
        places = real[b].nonzero()[1:, 0]
        for shuffled in found:
            shuffled[b, places] = ids[b, places[torch.randperm(len(places), generator=generator)]]
    return found


def _measure(
    kinds: Sequence[str],
    amap: AttentionMap,
    control: AttentionMap,
    tokens: Tokens,
    seen: Visibility,
    shuffled: list[Tensor] | None,
    generator: torch.Generator,
    per: str,
) -> _Measured:
    """Scores of one layer. The null is ``control`` on the same keys, or the same map on the keys of
    ``shuffled`` tokens; for places the same map on random keys."""
    ids = identities(tokens)
    draws = 1 if shuffled is None else len(shuffled)
    mods = [KINDS[kind](ids) for kind in kinds]
    others: dict[str, list[Mod]] = {}
    for kind in kinds:
        if kind in _PLACES:
            others[kind] = [_random_earlier(ids, generator) for _ in range(draws)]
        elif shuffled is not None:
            others[kind] = [KINDS[kind](row) for row in shuffled]
    masses, even = mean_masses(amap, seen, [*mods, *(mod for found in others.values() for mod in found)])
    nulls = dict(zip(others, masses[len(kinds) :].split(draws), strict=True)) if others else {}
    if len(others) < len(kinds):
        rest = [kind for kind in kinds if kind not in others]
        broken, _ = mean_masses(control, seen, [KINDS[kind](ids) for kind in rest])
        nulls |= {kind: broken[i : i + 1] for i, kind in enumerate(rest)}
    count = len(kinds)
    null = torch.stack([nulls[kind] for kind in kinds], 2)
    parts = masses[:count].transpose(0, 1), even[:count].transpose(0, 1), null
    return _Measured(*(grouped(part, amap.kv_heads, per) for part in parts))


def _first(ids: Tensor) -> Mod:
    """The first real token of each row, for the queries after it."""
    start = (ids >= 0).int().argmax(1)
    return lambda b, h, q, k: (k == start.to(q.device)[b]) & (q > k)


def _random_earlier(ids: Tensor, generator: torch.Generator) -> Mod:
    """For every query one key drawn evenly among the earlier ones."""
    rows, length = ids.shape
    table = (torch.rand(rows, length, generator=generator) * torch.arange(length)).long()
    return lambda b, h, q, k: (k == table.to(q.device)[b, q]) & (k < q)


def _scores(
    kinds: tuple[str, ...],
    parts: Sequence[Mapping[int | str, _Measured]],
    source: str,
    skipped: tuple[str, ...],
    provenance: Provenance,
) -> HeadScores:
    found: dict[str, dict[int | str, Tensor]] = {c: {} for c in ("value", "null", "low", "high", "uniform", "z")}
    sequences = 0
    for layer in parts[0]:
        value = torch.cat([part[layer].value for part in parts])
        sequences = len(value)
        found["value"][layer] = value.nanmean(0)
        found["low"][layer], found["high"][layer] = interval(value)
        found["uniform"][layer] = torch.cat([part[layer].uniform for part in parts]).nanmean(0)
        draws = torch.cat([part[layer].null for part in parts], dim=1)
        found["null"][layer] = draws.nanmean((0, 1))
        spread = _spread(draws.nanmean(1)) if len(draws) > 1 else _spread(draws[0]) / sequences**0.5
        gap = found["value"][layer] - found["null"][layer]
        found["z"][layer] = torch.where(gap.abs() < _ROUNDING, 0.0, gap / spread)
    undefined = {
        kind: "no query has such a key: no token occurs twice" if kind not in _PLACES else "no query has an earlier key"
        for i, kind in enumerate(kinds)
        if all(value[i].isnan().all() for value in found["value"].values())
    }
    return HeadScores(
        kinds, **found, sequences=sequences, source=source, undefined=undefined, skipped=skipped, provenance=provenance
    )


def _spread(draws: Tensor) -> Tensor:
    """Standard deviation over the first axis, undefined for a single draw."""
    return draws.std(0) if len(draws) > 1 else torch.full_like(draws[0], float("nan"))


ANALYSES = (
    Analysis(
        name="head-scores",
        question="Which heads look at the previous token, at copies of the token, at what followed them, at the first token?",
        function=head_scores,
        example=lambda: {"source": bundled(), "kinds": tuple(KINDS), "batches": 1, "sequences": 4, "period": (8, 12)},
        paper="Olsson et al. 2022 (arXiv 2209.11895)",
        source="model",
        null="other tokens in the second half; shuffled tokens; random earlier keys; evenly spread attention",
        cause="role_ablation",
    ),
)
