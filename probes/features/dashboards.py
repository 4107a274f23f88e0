"""Pages that show what features of a coder stand for.

The texts are streamed three times, each in bounded memory: once for the statistics of every feature; once for the chosen
ones, for their strongest tokens, histograms, correlations with all features, and a uniform sample of tokens from each part of
the range of their activations (0 to the largest); and once more for the batches that hold a chosen token, to cut its window.
Strongest tokens alone make a feature look purer than it is; the samples by range show what it mostly does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.coders.use import check_use
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model, Tokens
from workbench.probes.features.direct_logits import direct_logits, head_shares
from workbench.probes.features.feature_pages import Example, FeatureDashboard, FeaturePage
from workbench.probes.features.reading import (
    Places,
    Rows,
    Sites,
    Texts,
    batches,
    check_features,
    chunks,
    count,
    like,
    places,
    rows,
)

if TYPE_CHECKING:
    from workbench.coders.coder import Coder

_DEFAULT = 20
"""Features that are shown where none are named."""
_BINS = 20


@dataclass
class _Statistics:
    """Of every feature over all positions: how often it is active, and the sums of its activations and their squares."""

    active: Tensor
    total: Tensor
    square: Tensor
    largest: Tensor
    tokens: int = 0
    longest: int = 0
    model: Any = None


@torch.no_grad()
def feature_dashboard(
    coder: Coder,
    model: Model,
    texts: Texts,
    features: Sequence[int] | Tensor | None = None,
    *,
    site: Sites | None = None,
    target: Sites | None = None,
    top: int = 10,
    ranges: int = 5,
    per_range: int = 3,
    window: tuple[int, int] = (12, 6),
    logits: int = 10,
    correlated: int = 5,
    attributed: int = 0,
    batch: int = 8,
    ignore: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureDashboard:
    """Pages of ``features``; by default of the 20 that write most (sum of f^2 |d|^2).

    Each page has the ``top`` strongest tokens, and ``per_range`` tokens drawn at random from each of ``ranges`` equal parts
    of the range of activations, with ``window`` tokens before and after; ``logits`` tokens that it raises and lowers;
    ``correlated`` features that go with it; the share of each head for coders of z. ``attributed``: for so many of the
    strongest tokens, what each source token adds (exact, ``feature_attribution``). Refused: unknown features, and what
    ``coder_quality`` refuses of texts.
    """
    for name, number in (("top", top), ("ranges", ranges), ("batch", batch)):
        if number < 1:
            raise WorkbenchError(f"{name} is at least 1; got {number}")
    for name, number in (
        ("per_range", per_range),
        ("logits", logits),
        ("correlated", correlated),
        ("attributed", attributed),
    ):
        if number < 0:
            raise WorkbenchError(f"{name} is at least 0; got {number}")
    if len(window) != 2 or min(window) < 0:
        raise WorkbenchError(f"window is how many tokens to show before and after; got {window}")
    where = places(coder, site, target)
    chosen = None if features is None else check_features(features, coder.features)
    if chosen is not None and not chosen:
        raise WorkbenchError("no feature given: leave features out for those that write most")
    stream = _Stream(coder, model, texts, where, batch, ignore, progress)
    found = _statistics(stream)
    check_use(coder, model, site, found.longest, stacklevel=4)
    if chosen is None:
        power = found.square * coder.W_dec.detach().double().square().sum(1).cpu()
        order = power.topk(min(_DEFAULT, coder.features)).indices
        chosen = order[power[order] > 0].tolist() or [0]
    picked = _Picked(coder, torch.tensor(chosen), found, top, ranges, per_range, seed)
    for part in stream.read():
        picked.add(part)
    examples = _windows(stream, picked, window)
    notes: list[str] = []
    if attributed:
        examples = _attributed(stream, chosen, examples, attributed, notes)
    words = _words(coder, model, where, chosen, logits, notes)
    site_out = where.writes[-1]
    heads = torch.zeros(len(chosen), 0)
    if site_out.kind == "z" and site_out.head is None and len(coder.writes) == 1:
        heads = head_shares(coder, chosen, model.shape.heads).cpu()
    together = picked.correlations(found, correlated)
    pages = tuple(
        FeaturePage(
            feature=feature,
            density=float(found.active[feature]) / found.tokens,
            mean=float(found.total[feature] / found.active[feature].clamp(min=1)),
            largest=float(found.largest[feature]),
            histogram=picked.histogram[i],
            examples=tuple(examples[i]),
            raises=words[0][i] if words else (),
            lowers=words[1][i] if words else (),
            heads=heads[i],
            goes_with=together[i],
        )
        for i, feature in enumerate(chosen)
    )
    return FeatureDashboard(
        kind=coder.kind,
        features=coder.features,
        reads=tuple(map(str, where.reads)),
        writes=tuple(map(str, where.writes)),
        texts=count(texts),
        tokens=found.tokens,
        pages=pages,
        notes=tuple(notes),
        provenance=found.model,
    )


@dataclass(frozen=True)
class _Stream:
    coder: Coder
    model: Model
    texts: Texts
    where: Places
    batch: int
    ignore: Sequence[int]
    progress: Callable[[int, int], None] | None

    def read(self) -> Any:
        """Batches of judged rows, without logits."""
        return rows(self.model, self.texts, self.where, batch=self.batch, ignore=self.ignore, progress=self.progress)


def _statistics(stream: _Stream) -> _Statistics:
    f = stream.coder.features
    total, square, largest = (torch.zeros(f, dtype=torch.float64) for _ in range(3))
    out = _Statistics(torch.zeros(f, dtype=torch.int64), total, square, largest)
    for part in stream.read():
        out.model = out.model or part.run.provenance
        out.tokens += len(part.x)
        out.longest = max(out.longest, int(part.run.tokens.mask.sum(1).max()))
        for x in chunks(like(part.x, stream.coder), f):
            code = stream.coder.encode(x).double().cpu()
            out.active += (code > 0).sum(0)
            out.total += code.sum(0)
            out.square += code.square().sum(0)
            out.largest = torch.maximum(out.largest, code.amax(0))
    return out


class _Picked:
    """Strongest tokens, samples by range, histograms and products of S chosen features, from one reading."""

    def __init__(
        self, coder: Coder, chosen: Tensor, found: _Statistics, top: int, ranges: int, per_range: int, seed: int
    ) -> None:
        self.coder, self.chosen, self.ranges = coder, chosen, ranges
        self.largest = found.largest[chosen]
        s = len(chosen)
        self.best = _Kept(s, top)
        self.samples = [_Kept(s, per_range) for _ in range(ranges)]
        self.histogram = torch.zeros(s, _BINS, dtype=torch.int64)
        self.products = torch.zeros(s, coder.features, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, part: Rows) -> None:
        at = 0
        for x in chunks(like(part.x, self.coder), self.coder.features):
            code = self.coder.encode(x).double().cpu()
            mine = code[:, self.chosen].T.contiguous()
            refs = torch.stack([part.text[at : at + len(x)] + part.first, self._places(part, at, len(x))], -1)
            at += len(x)
            self.products += mine @ code
            on = mine > 0
            self.best.add(mine, mine, refs, on)
            place = mine / self.largest.clamp(min=1e-300)[:, None]
            bins = (place * _BINS).ceil().long().sub(1).clamp(0, _BINS - 1)
            self.histogram.scatter_add_(1, bins, on.long())
            key = torch.rand(mine.shape, generator=self.generator, dtype=torch.float64)
            step = (place * self.ranges).ceil().long().sub(1).clamp(0, self.ranges - 1)
            for r, sample in enumerate(self.samples):
                sample.add(key, mine, refs, on & (step == r))

    @staticmethod
    def _places(part: Rows, start: int, size: int) -> Tensor:
        """Positions among the real tokens of their text, whichever side the padding is on."""
        rank = part.run.tokens.mask.cpu().long().cumsum(1) - 1
        rows_ = slice(start, start + size)
        return rank[part.text[rows_], part.position[rows_]]

    def correlations(self, found: _Statistics, number: int) -> list[tuple[tuple[int, float], ...]]:
        """The features whose activations correlate most with each chosen one, over all positions."""
        n = found.tokens
        mean, spread = found.total / n, (found.square / n - (found.total / n).square()).clamp(min=0).sqrt()
        covariance = self.products / n - mean[self.chosen, None] * mean
        size = spread[self.chosen, None] * spread
        r = torch.where(size > 1e-12, covariance / size.clamp(min=1e-300), -1.0)
        r[torch.arange(len(self.chosen)), self.chosen] = -1
        out = []
        for row in r:
            best = row.topk(min(number, len(row)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            out.append(tuple((other, value) for other, value in pairs if value > 0))
        return out

    def examples(self) -> list[list[tuple[str, int, int, float]]]:
        """``(group, text, position, activation)`` per feature: the strongest, then the samples from the strongest range
        down."""
        out: list[list[tuple[str, int, int, float]]] = []
        for i in range(len(self.chosen)):
            mine = [("top", *one) for one in self.best.of(i)]
            for r in range(self.ranges - 1, -1, -1):
                name = f"{100 * r / self.ranges:.0f}-{100 * (r + 1) / self.ranges:.0f}%"
                mine += [(name, *one) for one in self.samples[r].of(i)]
            out.append(mine)
        return out


class _Kept:
    """The rows with the largest keys, per feature: the strongest, or a uniform sample where keys are random."""

    def __init__(self, features: int, size: int) -> None:
        self.key = torch.full((features, size), -1.0, dtype=torch.float64)
        self.value = torch.zeros(features, size, dtype=torch.float64)
        self.refs = torch.zeros(features, size, 2, dtype=torch.int64)

    def add(self, key: Tensor, value: Tensor, refs: Tensor, on: Tensor) -> None:
        """Consider rows ``[S, N]``; ``refs`` ``[N, 2]`` are their text and position, ``on`` those that may be taken."""
        size = self.key.shape[1]
        if not size or not bool(on.any()):
            return
        keys = torch.cat([self.key, key.where(on, -1.0)], 1)
        best = keys.topk(size, dim=1)
        every = refs.expand(len(keys), -1, -1)
        self.value = torch.cat([self.value, value], 1).gather(1, best.indices)
        self.refs = torch.cat([self.refs, every], 1).gather(1, best.indices[..., None].expand(-1, -1, 2))
        self.key = best.values

    def of(self, feature: int) -> list[tuple[int, int, float]]:
        """``(text, position, activation)``, strongest first."""
        kept = self.key[feature] >= 0
        found = [
            (int(t), int(p), float(v))
            for (t, p), v in zip(self.refs[feature][kept].tolist(), self.value[feature][kept].tolist(), strict=True)
        ]
        return sorted(found, key=lambda one: (-one[2], one[0], one[1]))


def _windows(stream: _Stream, picked: _Picked, window: tuple[int, int]) -> list[list[Example]]:
    """Every picked token with the tokens around it and the feature's activations there."""
    asked = picked.examples()
    wanted: dict[int, list[tuple[int, int]]] = {}
    for i, mine in enumerate(asked):
        for j, (_, text, _, _) in enumerate(mine):
            wanted.setdefault(text, []).append((i, j))
    out: list[list[Example | None]] = [[None] * len(mine) for mine in asked]
    needed = {text // stream.batch for text in wanted}
    for first, tokens in batches(stream.model, stream.texts, stream.batch):
        if first // stream.batch not in needed:
            continue
        for part in rows(stream.model, tokens, stream.where, batch=stream.batch, ignore=stream.ignore):
            grid = torch.zeros(*part.real.shape, len(picked.chosen), dtype=torch.float64)
            codes = [stream.coder.encode(x)[:, picked.chosen.to(x.device)] for x in chunks(
                like(part.x, stream.coder), stream.coder.features)]  # fmt: skip
            grid[part.text, part.position] = torch.cat(codes).double().cpu()
            labels = _labels(part.run.tokens)
            for b, mask in enumerate(part.run.tokens.mask.cpu()):
                columns = mask.nonzero()[:, 0].tolist()
                for i, j in wanted.get(first + b, ()):
                    group, text, position, activation = asked[i][j]
                    start, end = max(0, position - window[0]), min(len(columns), position + window[1] + 1)
                    seen = columns[start:end]
                    out[i][j] = Example(
                        group=group,
                        text=text,
                        position=position,
                        activation=activation,
                        at=position - start,
                        tokens=tuple(labels[b][c] for c in seen),
                        values=tuple(grid[b, seen, i].tolist()),
                    )
    return [[one for one in mine if one is not None] for mine in out]


def _labels(tokens: Tokens) -> tuple[tuple[str, ...], ...]:
    return tokens.labels or tuple(tuple(f"#{i} " for i in row) for row in tokens.ids.tolist())


def _attributed(
    stream: _Stream, chosen: Sequence[int], examples: list[list[Example]], number: int, notes: list[str]
) -> list[list[Example]]:
    """The same examples, the first ``number`` of each feature with what every source token adds."""
    from dataclasses import replace

    from workbench.probes.features.feature_attribution import feature_attribution

    out = []
    for feature, mine in zip(chosen, examples, strict=True):
        done = list(mine)
        for j, example in enumerate(mine[:number]):
            text = _one(stream, example.text)
            try:
                got = feature_attribution(
                    stream.coder, stream.model, text, feature, example.position, site=stream.where.reads[0]
                )
            except Refused as error:
                notes.append(f"no attribution by source: {error}")
                return examples
            done[j] = replace(example, sources=got.by_source[0, 0], source_tokens=tuple(got.tokens))
        out.append(done)
    return out


def _one(stream: _Stream, text: int) -> Any:
    """One text without its padding."""
    if isinstance(stream.texts, str):
        return stream.texts
    if isinstance(stream.texts, Tokens):
        real = stream.texts.mask[text]
        return stream.texts.ids[text][real][None]
    if isinstance(stream.texts, Tensor):
        return stream.texts[text][None]
    return stream.texts[text]


def _words(
    coder: Coder, model: Model, where: Places, chosen: Sequence[int], number: int, notes: list[str]
) -> tuple[list[tuple[tuple[str, float], ...]], list[tuple[tuple[str, float], ...]]] | None:
    if not number:
        return None
    try:
        found = direct_logits(coder, model, where.writes[-1], chosen, count=number)
    except Refused as error:
        notes.append(f"no logits: {error}")
        return None
    pairs = ((found.top, found.top_values), (found.bottom, found.bottom_values))
    raises, lowers = ([_said(model, *row) for row in zip(ids, values, strict=True)] for ids, values in pairs)
    return raises, lowers


def _said(model: Model, ids: Tensor, values: Tensor) -> tuple[tuple[str, float], ...]:
    names = [f"#{i}" for i in ids.tolist()]
    if model.tokenizer is not None:
        names = [str(token) for token in model.tokenizer.convert_ids_to_tokens(ids.tolist())]
    return tuple(zip(names, values.tolist(), strict=True))
