"""Which ranking finds what the model needs?

Every ranking of heads (or other parts) is put to the same test: parts are removed in its order and the metric watched, beside
random parts of the same layers (Wu et al. 2024, arXiv 2404.15574; LOCOS, arXiv 2607.01002, with means). The area between the
two curves, averaged over the counts of removed parts, says in the unit of the metric what the ranking is worth. A ranking that
knows nothing has about 0 on average; how far it gets by luck is seen on shuffled orders that go through the same test.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.ablation import AblationCurve, Metric, ablation_curve, default_metric, default_pool, steps_to
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, needles
from workbench.probes.importance.leave_one_out import GroupTable, leave_one_head_out
from workbench.probes.importance.outcomes import MEASURES, Judge
from workbench.probes.removal import Heads, Part, as_part
from workbench.probes.sources import site_at
from workbench.probes.tables import HeadTable
from workbench.results import Result, axis
from workbench.run import Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Ranking = Sequence[Part] | HeadTable | tuple[HeadTable, str]
"""Parts in order, a table of heads (by its first measure, largest first), or a pair of a table and the measure to rank by."""


@dataclass(frozen=True)
class RankingComparison(Result):
    """A curve per ranking, by name, all of the same metric, ablation and counts. ``areas`` name -> ``[N]``: per example the mean
    over counts of ranked minus random; ``shuffled`` ``[R]``: the areas of R shuffled orders, mean over examples. ``agreement``
    ``[K, K]``: Spearman's correlation of the places in two rankings of the parts both name."""

    curves: Mapping[str, AblationCurve]
    areas: Mapping[str, Tensor]
    shuffled: Tensor
    agreement: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per ranking: ``ranking, area`` (ranked minus random, in units of the metric: negative where removal lowers it),
        ``low, high`` (95% over examples), ``chance_low, chance_high`` (range of the shuffled orders), ``base``, ``first``
        (the part it puts first), then ``agreement_<name>`` with every ranking."""
        import pandas as pd

        rows = []
        for i, (name, curve) in enumerate(self.curves.items()):
            low, high = interval(self.areas[name])
            row = {
                "ranking": name, "area": float(self.areas[name].mean()), "low": float(low), "high": float(high),
                "chance_low": float(self.shuffled.amin()), "chance_high": float(self.shuffled.amax()),
                "base": float(curve.base.mean()), "first": curve.order[0],
            }  # fmt: skip
            rows.append(
                row | {f"agreement_{other}": float(x) for other, x in zip(self.curves, self.agreement[i], strict=True)}
            )
        return pd.DataFrame(rows)

    def by_count(self) -> pd.DataFrame:
        """One row per ranking and count: ``ranking``, then the columns of ``AblationCurve.frame``."""
        import pandas as pd

        parts = [curve.frame().assign(ranking=name) for name, curve in self.curves.items()]
        table = pd.concat(parts, ignore_index=True)
        return table[["ranking", *table.columns.drop("ranking")]]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The curves of all rankings on one axis; grey: the range of all random draws."""
        ax = axis(ax, 5.6, 3.8)
        curves = list(self.curves.values())
        draws = torch.cat([curve.random.mean(2) for curve in curves])
        counts = curves[0].counts
        ax.fill_between(counts, draws.amin(0), draws.amax(0), color="0.5", alpha=0.2, linewidth=0, label="random")
        ax.plot(counts, draws.mean(0), linestyle="--", color="0.4")
        for name, curve in self.curves.items():
            ax.plot(counts, curve.ranked.mean(1), marker="o", markersize=3, label=name)
        ax.axhline(float(curves[0].base.mean()), color="0.7", linewidth=1)
        ax.set(xlabel=f"parts removed ({curves[0].ablation})", ylabel=curves[0].metric, title=self.provenance.model)
        ax.legend(fontsize=8)
        return ax


def compare_rankings(
    model: Model,
    inputs: Any,
    rankings: Mapping[str, Ranking],
    *,
    metric: str | Metric | None = None,
    ablation: str = "mean",
    labels: Tensor | None = None,
    counts: Sequence[int] | None = None,
    pool: Iterable[Part] | None = None,
    random: int = 8,
    seed: int = 0,
) -> RankingComparison:
    """An ablation curve per ranking and the area between it and random removal, with 95% intervals over examples.

    ``inputs``: ``Pairs``, several of them (prompts of several lengths; what stands in for a removed part is then that of each
    batch), or what ``model.run`` takes. ``rankings``: name -> parts in order, best first; or a table of heads, by its first
    measure, or ``(table, measure)``. ``metric``, ``ablation``, ``pool``, ``random`` and ``seed`` as in ``ablation_curve``; the
    metric is by default the answer's probability of pairs, else the loss of texts or ``kl``; with ``labels`` ``[B]`` it is
    ``probability`` (default), ``loss`` or ``accuracy`` of the class. ``counts``: how many to remove, by default up to ten steps
    to what the shortest ranking names and to half of the pool, beyond which random parts overlap the ranked ones. ``random`` is
    also how many shuffled orders of the same parts are tested, at least 2.

    Rank on one set of examples and compare on another: a ranking made on these very examples flatters itself.
    """
    if not rankings:
        raise WorkbenchError("no ranking given: name them, as {'mine': table, 'other': [(0, 1), (2, 3)]}")
    if random < 2:
        raise WorkbenchError(f"random is the number of random rankings, at least 2 to see chance; got {random}")
    batches = _batches(inputs)
    if labels is not None and len(batches) > 1:
        raise WorkbenchError("pairs have answers of their own; leave labels out")
    orders = {name: ranked_parts(ranking) for name, ranking in rankings.items()}
    for name, order in orders.items():
        if not order:
            raise Refused(f"ranking {name!r} names no parts")
    everything = list(dict.fromkeys(as_part(part) for order in orders.values() for part in order))
    drawn = list(dict.fromkeys(map(as_part, pool))) if pool is not None else default_pool(model, everything)
    if counts is None:
        counts = steps_to(max(1, min(*map(len, orders.values()), len(drawn) // 2)))
    if labels is not None and not callable(metric):
        metric = _class_metric(Judge.of(model, batches[0], labels), metric or MEASURES[0])
    options: dict[str, Any] = dict(ablation=ablation, counts=counts, pool=drawn)

    def curve(order: Sequence[Part], random: int, seed: int) -> AblationCurve:
        chosen = [default_metric(model, batch) if metric is None else metric for batch in batches]
        return _joined([
            ablation_curve(model, batch, order, metric=one, random=random, seed=seed, **options)
            for batch, one in zip(batches, chosen, strict=True)
        ])  # fmt: skip

    curves = {name: curve(order, random, seed) for name, order in orders.items()}
    generator = torch.Generator().manual_seed(seed)
    luck = []
    for draw in range(random):
        order = [everything[i] for i in torch.randperm(len(everything), generator=generator).tolist()]
        luck.append(_area(curve(order, 1, seed + draw)).mean())
    return RankingComparison(
        curves=curves,
        areas={name: _area(curve) for name, curve in curves.items()},
        shuffled=torch.stack(luck),
        agreement=_agreement([curve.order for curve in curves.values()]),
        provenance=next(iter(curves.values())).provenance,
    )


def _batches(inputs: Any) -> list[Any]:
    """Several batches of pairs, or the one input given."""
    if isinstance(inputs, Sequence) and not isinstance(inputs, str) and any(isinstance(x, Pairs) for x in inputs):
        if not all(isinstance(part, Pairs) for part in inputs):
            raise WorkbenchError("a list that holds Pairs holds nothing else; build them with wb.task(...).build(...)")
        return list(inputs)
    return [inputs]


def _joined(curves: Sequence[AblationCurve]) -> AblationCurve:
    """The curves of one ranking and the same random draws on several batches, as one over all examples."""
    base = torch.cat([curve.base for curve in curves])
    ranked, drawn = (torch.cat([getattr(curve, name) for curve in curves], -1) for name in ("ranked", "random"))
    return replace(curves[0], base=base, ranked=ranked, random=drawn)


def _area(curve: AblationCurve) -> Tensor:
    return (curve.ranked - curve.random.mean(0)).mean(0)


def ranked_parts(ranking: Ranking) -> list[Part]:
    """The parts of a ranking, first to last. Heads without a number are left out."""
    if isinstance(ranking, HeadTable):
        ranking = (ranking, next(iter(ranking.values)))
    if isinstance(ranking, tuple) and ranking and isinstance(ranking[0], HeadTable):
        table, measure = ranking
        size = table.size if isinstance(table, GroupTable) else 0
        found = [_part(head.layer, head.head, size) for head in table.top(str(measure))]
        if not found:
            raise Refused(f"no head of {table.title!r} has a number for {measure!r}: there is nothing to rank")
        return found
    return list(cast("Sequence[Part]", ranking))


def _part(layer: int | str, row: int, size: int) -> Part:
    site = site_at("z", layer, row)
    if size:
        return Heads(site.layer or 0, tuple(range(row * size, (row + 1) * size)), site.stack)
    return site


def _class_metric(judge: Judge, name: str) -> Metric:
    if name not in MEASURES:
        from workbench.errors import UnknownName

        raise UnknownName("metric of a class", name, MEASURES)

    def metric(run: Run) -> Tensor:
        return judge.scores(run)[name]

    metric.__name__ = name
    return metric


def _agreement(orders: Sequence[Sequence[str]]) -> Tensor:
    from scipy.stats import spearmanr

    found = torch.eye(len(orders), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(orders)), 2):
        both = [part for part in orders[i] if part in set(orders[j])]
        one, two = ([float(order.index(part)) for part in both] for order in (orders[i], orders[j]))
        value = float(spearmanr(one, two).statistic) if len(both) > 2 else float("nan")
        found[i, j] = found[j, i] = value
    return found


def _example() -> dict[str, Any]:
    model = bundled("compiled-needle")
    pairs = needles(model, 32, 3)
    return {
        "model": model,
        "inputs": pairs,
        "rankings": {
            "leave-one-out": leave_one_head_out(model, pairs, draws=0),
            "by number": [(layer, head) for layer in range(2) for head in range(4)],
        },
        "random": 3,
    }


ANALYSES = (
    Analysis(
        name="ranking-comparison",
        question="Which ranking of the heads names those that the model needs?",
        function=compare_rankings,
        example=_example,
        paper="Michel et al. 2019 (arXiv 1905.10650); Wu et al. 2024 (arXiv 2404.15574); LOCOS 2026 (arXiv 2607.01002)",
        source="model",
        null="random heads of the same layers, and shuffled orders in the place of the ranking",
        cause="compare_rankings",
        definition="the area between the curves, its interval and its range by chance are ours",
    ),
)
