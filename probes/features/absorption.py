"""Does a feature for a special case swallow the feature of the general one?

Feature absorption (Chanin et al., arXiv 2409.14507; SAEBench): a feature for "starts with S" that is silent on "short", because
the feature for "short" points along "starts with S" as well. For each concept:

1. A logistic probe of the rows gives the concept's direction w (unit length) and says on which test rows it is present. 2.
Main features: those whose mean activation rises most with the concept, taken one by one while a logistic probe on the first k
   gains more than ``jump`` in F1. More than one is called feature splitting.
3. On every test row with the concept, which the probe finds too, P = x.w and feature i contributes p_i = f_i d_i.w with cosine
   c_i = cos(d_i, w). M is the sum of p over main features, A that of the (at most) ``absorbers`` largest positive p of other
   features with c above ``fraction_cosine``.

       full      no main feature is active, the feature with the largest p has c >= ``full_cosine`` and p >= ``proportion`` P
       fraction  0 if M >= P or A < ``proportion`` P; 1 if M <= 0; else a / (a + M) with a = min(A, P - M)

Rows with P <= 0 count as 0. The constants are SAEBench's. There p_i = f_i c_i, which takes decoder rows to have length 1.
There, too, main features are ranked by an L1 probe; here by the mean difference of ``sparse_probing``. The null is the same
code with decoder rows of the same length in random directions (mean over five draws): what the thresholds let pass by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.probes.bootstrap import interval
from workbench.probes.features.labels import Probe, class_means, columns, concepts, f1, probe, split
from workbench.probes.features.quality import writes_what_it_reads
from workbench.probes.features.reading import check_rows, chunks, like
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from workbench.coders.coder import Coder

_DRAWS = 5
"""Random decoders, whose rates are averaged."""
_NAMED = 10
"""Absorbing features that are named, at most."""


@dataclass(frozen=True)
class Absorption(Result):
    """For C ``concepts``: the rates ``full`` and ``fraction`` ``[C]`` over ``rows`` ``[C]`` judged rows, with 95% intervals
    over rows (``[C, 2]``), and with a random decoder (``null_full``, ``null_fraction``). ``main`` are the main features of
    each concept, ``absorbers`` the features that absorbed it, most frequent first, with the number of rows. ``probe_f1``
    ``[C]`` is that of the probe of whole rows, ``k_f1`` ``[C, K]`` that of the best 1 ... K features."""

    concepts: tuple[str, ...]
    full: Tensor
    fraction: Tensor
    full_interval: Tensor
    fraction_interval: Tensor
    null_full: Tensor
    null_fraction: Tensor
    rows: Tensor
    main: tuple[tuple[int, ...], ...]
    absorbers: tuple[tuple[tuple[int, int], ...], ...]
    probe_f1: Tensor
    k_f1: Tensor

    @property
    def mean_full(self) -> float:
        """Rate of full absorption, mean over concepts that have rows to judge."""
        return float(self.full.nanmean())

    @property
    def mean_fraction(self) -> float:
        return float(self.fraction.nanmean())

    @property
    def splits(self) -> tuple[int, ...]:
        """How many features share each concept."""
        return tuple(map(len, self.main))

    def frame(self) -> pd.DataFrame:
        """One row per concept: ``concept, full, full_low, full_high, full_null, fraction`` likewise, ``rows, splits, main,
        absorbers, probe_f1, k1_f1``."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "concept": name,
                    "full": float(self.full[c]),
                    "full_low": float(self.full_interval[c, 0]),
                    "full_high": float(self.full_interval[c, 1]),
                    "full_null": float(self.null_full[c]),
                    "fraction": float(self.fraction[c]),
                    "fraction_low": float(self.fraction_interval[c, 0]),
                    "fraction_high": float(self.fraction_interval[c, 1]),
                    "fraction_null": float(self.null_fraction[c]),
                    "rows": int(self.rows[c]),
                    "splits": len(self.main[c]),
                    "main": ", ".join(map(str, self.main[c])),
                    "absorbers": ", ".join(str(feature) for feature, _ in self.absorbers[c]),
                    "probe_f1": float(self.probe_f1[c]),
                    "k1_f1": float(self.k_f1[c, 0]),
                }
                for c, name in enumerate(self.concepts)
            ]
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both rates per concept, beside those of a random decoder."""
        ax = axis(ax, max(4.8, 1.5 + 0.4 * len(self.concepts)), 3.4)
        at = torch.arange(len(self.concepts)).double()
        for i, (name, values, null) in enumerate(
            (("full", self.full, self.null_full), ("fraction", self.fraction, self.null_fraction))
        ):
            place = (at + 0.35 * (i - 0.5)).tolist()
            ax.bar(place, values.tolist(), width=0.33, label=name)
            ax.plot(place, null.tolist(), "k_", label="random decoder" if i else None)
        ax.set_xticks(at.tolist(), self.concepts, rotation=60, ha="right", fontsize=7)
        ax.set(ylabel="rate of absorption", ylim=(0, None))
        ax.legend()
        return ax


@dataclass(frozen=True)
class _Limits:
    full_cosine: float
    fraction_cosine: float
    proportion: float
    absorbers: int


@torch.no_grad()
def absorption(
    coder: Coder,
    X: Any,
    labels: Any,
    *,
    jump: float = 0.03,
    most: int = 10,
    full_cosine: float = 0.025,
    fraction_cosine: float = 0.1,
    proportion: float = 0.4,
    absorbers: int = 3,
    train: int = 4000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Absorption:
    """How often other features take the place of a concept's own, for each concept in ``labels`` (see the top of this module).

    ``X`` ``[N, D]``: rows that the coder reads; ``labels`` as for ``sparse_probing`` (concepts like "starts with S", one row
    per token). At most ``most`` main features. Probes are trained on at most ``train`` balanced rows; all other rows with the
    concept are judged, NaN where the probe finds none of them. Refused: coders that write something else than they read, NaN,
    unequal numbers of rows, concepts with fewer than 8 rows on one side.
    """
    if not writes_what_it_reads(coder):
        raise Refused("absorption compares what features write with what is read: it is for autoencoders")
    x = check_rows("X", X, sum(coder.reads)).cpu()
    names, on = concepts(labels, len(x))
    if min(most, absorbers) < 1 or not 0 < proportion <= 1:
        raise WorkbenchError(
            f"most and absorbers are at least 1, proportion above 0 up to 1; got {most}, {absorbers}, {proportion}"
        )
    limits = _Limits(full_cosine, fraction_cosine, proportion, absorbers)
    found: list[dict[str, Any]] = []
    for c, name in enumerate(names):
        found.append(_concept(coder, x, on[:, c], name, jump, min(most, coder.features), train, limits, seed))
        if progress is not None:
            progress(c + 1, len(names))

    def column(key: str) -> Tensor:
        return torch.tensor([one[key] for one in found], dtype=torch.float64)

    return Absorption(
        concepts=names,
        full=column("full"),
        fraction=column("fraction"),
        full_interval=column("full_interval"),
        fraction_interval=column("fraction_interval"),
        null_full=column("null_full"),
        null_fraction=column("null_fraction"),
        rows=column("rows").long(),
        main=tuple(one["main"] for one in found),
        absorbers=tuple(one["absorbers"] for one in found),
        probe_f1=column("probe_f1"),
        k_f1=column("k_f1"),
    )


def _concept(
    coder: Coder, x: Tensor, label: Tensor, name: str, jump: float, most: int, train: int, limits: _Limits, seed: int
) -> dict[str, Any]:
    rows = split(label, name, train=train, test=len(x), seed=seed)
    seen, held = x[rows.train], x[rows.test]
    truth, goal = label[rows.train], label[rows.test]
    whole = probe(seen, truth)
    main, scores = _main(coder, seen, held, truth, goal, jump, most)
    rest = label.clone()
    rest[rows.train] = False
    judged = x[rest]
    judged = judged[whole.says(judged)]
    out: dict[str, Any] = {
        "main": main,
        "k_f1": scores,
        "probe_f1": f1(whole.says(held), goal),
        "rows": len(judged),
        "absorbers": (),
    }
    full, fraction, who = absorbed(coder, coder.W_dec, judged, whole, main, limits)
    out["full"], out["fraction"] = _mean(full), _mean(fraction)
    out["full_interval"], out["fraction_interval"] = _ends(full), _ends(fraction)
    best = torch.bincount(who[full], minlength=coder.features).topk(min(_NAMED, coder.features))
    out["absorbers"] = tuple((int(i), int(n)) for i, n in zip(best.indices, best.values, strict=True) if int(n) > 0)
    chance = []
    for i in range(_DRAWS):
        one = absorbed(coder, _random(coder.W_dec, seed + i), judged, whole, main, limits)
        chance.append([_mean(one[0]), _mean(one[1])])
    out["null_full"], out["null_fraction"] = torch.tensor(chance, dtype=torch.float64).mean(0).tolist()
    return out


def _main(
    coder: Coder, seen: Tensor, held: Tensor, truth: Tensor, goal: Tensor, jump: float, most: int
) -> tuple[tuple[int, ...], list[float]]:
    """Features that share a concept, and the F1 of a probe on the best 1 ... ``most`` of them."""
    with_it, without = class_means(coder, seen, truth[:, None])
    order = (with_it - without)[0].topk(most).indices
    fit, ask = columns(coder, seen, order), columns(coder, held, order)
    scores = [f1(probe(fit[:, :k], truth).says(ask[:, :k]), goal) for k in range(1, most + 1)]
    kept = 1
    while kept < most and scores[kept] - scores[kept - 1] > jump:
        kept += 1
    return tuple(order[:kept].tolist()), scores


def absorbed(
    coder: Coder, decoder: Tensor, x: Tensor, found: Probe, main: Sequence[int], limits: _Limits
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of ``x``: whether it is fully absorbed, its fraction, and the feature that contributes most to the probe."""
    w = (found.weight / found.weight.norm()).to(decoder.device, decoder.dtype)
    along = decoder @ w
    cosine = along / decoder.norm(dim=1).clamp(min=torch.finfo(decoder.dtype).tiny)
    others = torch.ones(coder.features, dtype=torch.bool, device=decoder.device)
    others[list(main)] = False
    fulls, fractions, firsts = [], [], []
    for part in chunks(like(x, coder), coder.features):
        f = coder.encode(part)
        p = f * along
        whole = part @ w
        own = p[:, list(main)].sum(1)
        may = p.where(others & (cosine >= limits.fraction_cosine) & (p > 0), 0.0)
        taken = may.topk(min(limits.absorbers, coder.features), dim=1).values.sum(1)
        best = p.max(dim=1)
        present = whole > 0
        fulls.append(
            present
            & ~(f[:, list(main)] > 0).any(1)
            & (cosine[best.indices] >= limits.full_cosine)
            & (best.values >= limits.proportion * whole)
        )
        part_of = torch.minimum(taken, whole - own)
        share = torch.where(own <= 0, 1.0, part_of / (part_of + own)).clamp(0, 1)
        none = ~present | (own >= whole) | (taken < limits.proportion * whole)
        fractions.append(share.masked_fill(none, 0.0))
        firsts.append(best.indices)
    if not fulls:
        empty = torch.zeros(0)
        return empty.bool(), empty, empty.long()
    return torch.cat(fulls).cpu(), torch.cat(fractions).cpu(), torch.cat(firsts).cpu()


def _random(decoder: Tensor, seed: int) -> Tensor:
    """Rows of the same length in random directions."""
    generator = torch.Generator().manual_seed(seed + 0x6E756C6C)
    rows = torch.randn(decoder.shape, generator=generator, dtype=torch.float64).to(decoder.device, decoder.dtype)
    return rows * (decoder.norm(dim=1) / rows.norm(dim=1))[:, None]


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else float("nan")


def _ends(values: Tensor) -> tuple[float, float]:
    if len(values) < 2:
        return float("nan"), float("nan")
    low, high = interval(values.double())
    return float(low), float(high)
