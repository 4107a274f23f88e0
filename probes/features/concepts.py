"""Can a concept be taken out of activations by its features, and nothing else with it?

Both measures (SAEBench; Karvonen et al., arXiv 2411.18895) ablate the N features of a coder with the largest effect on a
probe: f_i is set to 0, what the coder does not rebuild stays, so that x becomes x - sum f_i d_i. Effect of feature i on the
probe w of a concept: (mean f_i with it - mean f_i without it) d_i.w.

**Spurious correlation removal (SCR).** A probe is trained where two concepts always come together, so that it uses both.
Without the features of the spurious one its accuracy on the intended one, over balanced rows, should be that of an unbiased
probe:

    SCR = (acc_ablated - acc_biased) / (acc_clean - acc_biased)

Features are ranked by the absolute effect on a probe of the spurious concept. Both directions are computed; the ``chosen`` one
removes the concept that the biased probe follows more. NaN where the bias costs nothing.

**Targeted probe perturbation (TPP).** One probe per class, each against the rest. Without the features of class c its own probe
should fail and those of the other classes should not:

    TPP = mean over c of [ (acc_c - acc_c|c) - mean over j != c of (acc_j - acc_j|c) ]

Features are ranked by their effect, where the mean difference counts only if positive. At most .5 for perfect probes: what is
lost is what a balanced probe knows beyond chance; ``normalised`` divides by that.

The null ablates as many random active features (mean over five draws).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.features.labels import (
    FEWEST,
    Probe,
    Split,
    alive,
    class_means,
    columns,
    concepts,
    flags,
    probe,
    split,
)
from workbench.probes.features.quality import writes_what_it_reads
from workbench.probes.features.reading import check_rows
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from workbench.coders.coder import Coder

COUNTS = (2, 5, 10, 20, 50, 100, 500)
"""Numbers of ablated features, as in SAEBench."""
_RANDOM = 5


@dataclass(frozen=True)
class SpuriousRemoval(Result):
    """``score`` and ``null`` ``[2, N]``: SCR by the number of ablated ``counts``, for removing the second concept (row 0) and
    the first (row 1). ``biased``, ``clean`` ``[2]`` and ``ablated`` ``[2, N]`` are the accuracies behind it, on the concept
    that stays. ``chosen`` is the row that counts, ``features`` ``[2, largest count]`` what is ablated, best first, -1 where
    no effect is left."""

    concepts: tuple[str, str]
    counts: tuple[int, ...]
    score: Tensor
    null: Tensor
    biased: Tensor
    clean: Tensor
    ablated: Tensor
    features: Tensor
    chosen: int

    def at(self, count: int) -> float:
        """SCR of the chosen direction with so many features ablated."""
        return float(self.score[self.chosen, _place(self.counts, count)])

    def frame(self) -> pd.DataFrame:
        """One row per direction and count: ``removed, kept, count, score, null, biased, clean, ablated, chosen``."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "removed": self.concepts[1 - d],
                    "kept": self.concepts[d],
                    "count": n,
                    "score": float(self.score[d, i]),
                    "null": float(self.null[d, i]),
                    "biased": float(self.biased[d]),
                    "clean": float(self.clean[d]),
                    "ablated": float(self.ablated[d, i]),
                    "chosen": d == self.chosen,
                }
                for d in range(2)
                for i, n in enumerate(self.counts)
            ]
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Score of the chosen direction against the number of ablated features."""
        title = f"SCR: {self.concepts[1 - self.chosen]} removed, {self.concepts[self.chosen]} kept"
        return _curve(ax, self.counts, self.score[self.chosen], self.null[self.chosen], title)


@dataclass(frozen=True)
class TargetedPerturbation(Result):
    """``score``, ``normalised`` and ``null`` ``[N]``: TPP by the number of ablated ``counts``. ``accuracy`` ``[C]`` is that of
    each class's probe, ``ablated`` ``[N, C, C]`` that of probe j (last axis) without the features of class c, ``features``
    ``[C, largest count]`` those features, best first, -1 where no effect is left."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    score: Tensor
    normalised: Tensor
    null: Tensor
    accuracy: Tensor
    ablated: Tensor
    features: Tensor

    def at(self, count: int) -> float:
        """TPP with so many features ablated per class."""
        return float(self.score[_place(self.counts, count)])

    def frame(self) -> pd.DataFrame:
        """One row per class and count: ``class, count, intended`` (loss of its own probe), ``unintended`` (mean loss of the
        others), ``score, accuracy``."""
        import pandas as pd

        rows = []
        for i, n in enumerate(self.counts):
            intended, unintended = _losses(self.accuracy, self.ablated[i])
            for c, name in enumerate(self.classes):
                rows.append(
                    {
                        "class": name,
                        "count": n,
                        "intended": float(intended[c]),
                        "unintended": float(unintended[c]),
                        "score": float(intended[c] - unintended[c]),
                        "accuracy": float(self.accuracy[c]),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Score against the number of ablated features."""
        return _curve(ax, self.counts, self.score, self.null, f"TPP: mean over {len(self.classes)} classes")


@torch.no_grad()
def spurious_removal(
    coder: Coder,
    X: Any,
    first: Any,
    second: Any,
    *,
    names: tuple[str, str] = ("first", "second"),
    counts: Sequence[int] = COUNTS,
    train: int = 4000,
    test: int = 1000,
    seed: int = 0,
) -> SpuriousRemoval:
    """SCR of two concepts on rows ``X`` ``[N, D]`` with bool labels ``first`` and ``second`` ``[N]``.

    All four combinations must occur at least 8 times. The rows are split into training and test rows within each; the biased
    probe sees only training rows on which both agree. Counts beyond the number of features are left out. Refused: coders that
    write something else than they read, NaN, unequal numbers of rows.
    """
    x = _rows(coder, X)
    pair = torch.stack([flags(name, value, len(x)) for name, value in zip(names, (first, second), strict=True)], 1)
    kept = _counts(counts, coder)
    cells = _cells(pair, names, train, test, seed)
    seen, held = cells.train, cells.test
    agree = seen[pair[seen, 0] == pair[seen, 1]]
    biased = probe(x[agree], pair[agree, 0])
    own = [probe(x[seen], pair[seen, d]) for d in range(2)]
    effects = _effects(coder, x[seen], pair[seen], own, positive=False)
    goal = pair[held]
    out: dict[str, list[Tensor]] = {key: [] for key in ("score", "null", "ablated", "features")}
    before, clean = [], []
    for d in range(2):
        chosen = _top(effects[1 - d].abs(), max(kept))
        start, ceiling = biased.accuracy(x[held], goal[:, d]), own[d].accuracy(x[held], goal[:, d])
        after = [biased.accuracy(rows, goal[:, d]) for rows in _without(coder, x[held], chosen, kept)]
        random = [
            torch.tensor([biased.accuracy(rows, goal[:, d]) for rows in _without(coder, x[held], one, kept)])
            for one in _random(coder, x[seen], max(kept), seed)
        ]
        gap = ceiling - start
        undefined = float("nan")
        reached = torch.tensor(after, dtype=torch.float64)
        out["ablated"].append(reached)
        out["score"].append((reached - start) / gap if gap > 0 else torch.full_like(reached, undefined))
        by_chance = torch.stack(random).double().mean(0)
        out["null"].append((by_chance - start) / gap if gap > 0 else torch.full_like(reached, undefined))
        out["features"].append(_padded(chosen, max(kept)))
        before.append(start)
        clean.append(ceiling)
    return SpuriousRemoval(
        concepts=names,
        counts=kept,
        biased=torch.tensor(before, dtype=torch.float64),
        clean=torch.tensor(clean, dtype=torch.float64),
        chosen=0 if before[0] <= before[1] else 1,
        **{key: torch.stack(values) for key, values in out.items()},
    )


@torch.no_grad()
def targeted_perturbation(
    coder: Coder,
    X: Any,
    labels: Any,
    *,
    counts: Sequence[int] = COUNTS,
    train: int = 4000,
    test: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TargetedPerturbation:
    """TPP of at least two classes on rows ``X`` ``[N, D]``; ``labels`` as for ``sparse_probing`` (classes ``[N]``, usually).

    Each probe is trained and tested on as many rows of its class as of others. Counts beyond the number of features are left
    out. Refused: a single class, coders that write something else than they read, NaN, unequal numbers of rows, a class with
    fewer than 8 rows.
    """
    x = _rows(coder, X)
    names, on = concepts(labels, len(x))
    if len(names) < 2:
        raise WorkbenchError("TPP compares at least two classes; got one")
    kept = _counts(counts, coder)
    splits = [split(on[:, c], name, train=train, test=test, seed=seed) for c, name in enumerate(names)]
    probes = [probe(x[s.train], on[s.train, c]) for c, s in enumerate(splits)]
    accuracy = torch.tensor(
        [p.accuracy(x[s.test], on[s.test, j]) for j, (p, s) in enumerate(zip(probes, splits, strict=True))],
        dtype=torch.float64,
    )
    seen = torch.cat([s.train for s in splits]).unique()

    def ablated(features: Tensor) -> Tensor:
        """Accuracies ``[N, C]`` of every probe without the first n of ``features``."""
        found = []
        for j, (p, s) in enumerate(zip(probes, splits, strict=True)):
            found.append([p.accuracy(rows, on[s.test, j]) for rows in _without(coder, x[s.test], features, kept)])
        return torch.tensor(found, dtype=torch.float64).T

    tables, chosen = [], []
    for c, s in enumerate(splits):
        effects = _effects(coder, x[s.train], on[s.train, c : c + 1], probes[c : c + 1], positive=True)[0]
        chosen.append(_top(effects, max(kept)))
        tables.append(ablated(chosen[-1]))
        if progress is not None:
            progress(c + 1, len(names))
    by_class = torch.stack(tables, 1)
    random = torch.stack([ablated(one) for one in _random(coder, x[seen], max(kept), seed)])
    null = torch.stack([_tpp(accuracy, row[:, None].expand(-1, len(names), -1)) for row in random]).mean(0)
    score = _tpp(accuracy, by_class)
    return TargetedPerturbation(
        classes=names,
        counts=kept,
        score=score,
        normalised=score / (accuracy.mean() - 0.5).clamp(min=1e-12),
        null=null,
        accuracy=accuracy,
        ablated=by_class,
        features=torch.stack([_padded(one, max(kept)) for one in chosen]),
    )


def _tpp(accuracy: Tensor, ablated: Tensor) -> Tensor:
    """``[N]`` from the accuracies of each class's probe ``[C]`` and those after ablating each class ``[N, C, C]``."""
    return torch.stack([(a - b).mean() for a, b in (_losses(accuracy, table) for table in ablated)])


def _losses(accuracy: Tensor, ablated: Tensor) -> tuple[Tensor, Tensor]:
    """What the probe of each class loses without its features, and what those of the others lose in the mean, ``[C]`` each."""
    lost = accuracy - ablated
    own = lost.diagonal()
    return own, (lost.sum(1) - own) / (len(own) - 1)


def _effects(coder: Coder, x: Tensor, labels: Tensor, probes: Sequence[Probe], *, positive: bool) -> Tensor:
    """Effect ``[C, F]`` of every feature on each probe."""
    with_it, without = class_means(coder, x, labels)
    difference = with_it - without
    difference = difference.clamp(min=0) if positive else difference
    decoder = coder.W_dec.detach().cpu().double()
    return difference * torch.stack([decoder @ p.weight for p in probes])


def _top(effects: Tensor, count: int) -> Tensor:
    """The features of the largest effects, best first; those without any effect are left out."""
    some = int((effects != 0).sum())
    ranked = effects.where(effects != 0, float("-inf"))
    return ranked.topk(min(count, some)).indices


def _random(coder: Coder, x: Tensor, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pool = alive(coder, x)
    return [pool[torch.randperm(len(pool), generator=generator)[:count]] for _ in range(_RANDOM)]


def _without(coder: Coder, x: Tensor, features: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """``x`` without the first n of ``features``, for every n in ``counts``: float64 ``[N, D]`` each."""
    codes = columns(coder, x, features)
    decoder = coder.W_dec.detach().cpu().double()[features]
    return [x.double() - codes[:, :n] @ decoder[:n] for n in counts]


def _cells(pair: Tensor, names: tuple[str, str], train: int, test: int, seed: int) -> Split:
    """Training and test rows with the four combinations of two concepts equally often."""
    generator = torch.Generator().manual_seed(seed)
    combination = pair[:, 0].long() * 2 + pair[:, 1].long()
    cells = [(combination == i).nonzero()[:, 0] for i in range(4)]
    fewest = min(map(len, cells))
    if fewest < FEWEST:
        raise Refused(
            f"each combination of {names[0]!r} and {names[1]!r} is needed at least {FEWEST} times; "
            f"got {[len(cell) for cell in cells]} for neither, second, first, both"
        )
    cells = [cell[torch.randperm(len(cell), generator=generator)] for cell in cells]
    cut = min(train // 4, int(0.8 * fewest))
    end = cut + min(test // 4, fewest - cut)
    return Split(torch.cat([cell[:cut] for cell in cells]), torch.cat([cell[cut:end] for cell in cells]))


def _rows(coder: Coder, X: Any) -> Tensor:
    if not writes_what_it_reads(coder):
        raise Refused("features are ablated in the activations that they write: SCR and TPP are for autoencoders")
    return check_rows("X", X, sum(coder.reads)).cpu()


def _counts(counts: Sequence[int], coder: Coder) -> tuple[int, ...]:
    found = tuple(sorted({int(n) for n in counts if n <= coder.features}))
    if not found or found[0] < 1:
        raise WorkbenchError(
            f"counts are numbers of features, 1 to {coder.features} for this coder; got {tuple(counts)}"
        )
    return found


def _place(counts: Sequence[int], count: int) -> int:
    if count not in counts:
        raise UnknownName("number of ablated features", count, counts)
    return counts.index(count)


def _padded(features: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(features, (0, count - len(features)), value=-1)


def _curve(ax: Axes | None, counts: Sequence[int], score: Tensor, null: Tensor, title: str) -> Axes:
    ax = axis(ax, 4.8, 3.4)
    curves: Mapping[str, tuple[Tensor, str]] = {"top features": (score, "-o"), "random features": (null, "--")}
    for name, (values, style) in curves.items():
        ax.plot(counts, values.tolist(), style, label=name)
    ax.set(xlabel="features ablated", ylabel="score", xscale="log", title=title)
    ax.legend()
    return ax
