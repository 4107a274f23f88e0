"""Which features carry the difference between clean and corrupted prompts?

The indirect effect of feature i at a position is what the metric loses if the feature takes its value on the corrupted prompt
(Marks et al., arXiv 2403.19647, eq. 2-4): IE = dm/df_i (f_i clean - f_i replaced), with the gradient at the clean run
(``attribution``), or its mean over runs in which all features and the error of this one site go from clean to replaced in steps
(``ig``: alpha = k / steps for k = 0 ... steps - 1, as the authors' code does it). The error term of a site is one further node:
its gradient and its difference are vectors, their inner product is its effect.

Sign: positive supports the clean behaviour. With the paper's metric, logit(corrupted answer) - logit(clean answer), its
dm/df (f_patch - f_clean) is the same number.

Completeness: the effects of ``ig`` at one site add up to m(clean) - m(all of this site replaced), exactly for a model that is
linear behind the site, otherwise up to the error of a Riemann sum, |m'(1) - m'(0)| / (2 steps) to first order with m' the slope
along the path. ``FeatureEffects.completeness`` has both numbers. Where the site is a cut of the model (``hook_resid_post``) and
the ablation counterfactual, the second is m(clean) - m(corrupted).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import Metric
from workbench.probes.features.exact_patching import exact
from workbench.probes.features.node_gradients import Batch, Codes, Patching, Replaced, Values
from workbench.probes.features.splice import ERROR, Coders, given
from workbench.results import Result, axis
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

METHODS = ("ig", "attribution", "exact")
_DRAWN = 25


@dataclass(frozen=True)
class FeatureEffects(Result):
    """Effects of features and error terms, those alone that are active on some prompt.

    Row n is feature ``feature[n]`` (-1: the error term) of site ``sites[site[n]]`` at ``places[place[n]]``. ``places`` is one
    empty text (positions added up), the positions, or the spans of the task. ``effect`` ``[N]`` float64: mean over pairs, in
    units of the metric, positive supports the clean behaviour. ``clean`` and ``replaced`` ``[N]``: the value of the feature,
    added up over the place, mean over pairs (of the error its norm). ``full`` is m(clean), ``without`` ``[S]`` m with all of a
    site replaced.
    """

    sites: tuple[str, ...]
    places: tuple[str, ...]
    site: Tensor
    place: Tensor
    feature: Tensor
    effect: Tensor
    clean: Tensor
    replaced: Tensor
    full: float
    without: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.effect)

    @property
    def names(self) -> tuple[str, ...]:
        """``blocks.0.hook_mlp_out/17``, ``blocks.0.hook_mlp_out/error``, with ``@place`` where places are told apart."""
        rows = zip(self.site.tolist(), self.place.tolist(), self.feature.tolist(), strict=True)
        return tuple(
            f"{self.sites[s]}/{'error' if f == ERROR else f}" + (f"@{self.places[p]}" if self.places[p] else "")
            for s, p, f in rows
        )

    @property
    def order(self) -> Tensor:
        """Rows by falling absolute effect; ties in their order."""
        return self.effect.abs().argsort(descending=True, stable=True)

    def take(self, rows: Tensor) -> FeatureEffects:
        """Some rows, in this order."""
        columns = {
            name: getattr(self, name)[rows] for name in ("site", "place", "feature", "effect", "clean", "replaced")
        }
        return FeatureEffects(
            self.sites, self.places, **columns, full=self.full, without=self.without, provenance=self.provenance
        )

    def of(self, site: Site | str) -> FeatureEffects:
        """The rows of one site."""
        name = str(Site.parse(site))
        if name not in self.sites:
            raise UnknownName("spliced site", name, self.sites)
        return self.take((self.site == self.sites.index(name)).nonzero()[:, 0])

    def completeness(self) -> pd.DataFrame:
        """Per site the ``sum`` of its effects and the ``difference`` m(clean) - m(site replaced) that it is to reach."""
        import pandas as pd

        sums = self.effect.new_zeros(len(self.sites)).index_add_(0, self.site, self.effect)
        return pd.DataFrame(
            {"site": list(self.sites), "sum": sums.numpy(), "difference": (self.full - self.without).numpy()}
        )

    def frame(self) -> pd.DataFrame:
        """Columns ``site place feature effect clean replaced``, largest absolute effect first; the error is feature -1."""
        import pandas as pd

        rows = self.order
        table = {
            "site": [self.sites[i] for i in self.site[rows].tolist()],
            "place": [self.places[i] for i in self.place[rows].tolist()],
            "feature": self.feature[rows].numpy(),
            "effect": self.effect[rows].numpy(),
            "clean": self.clean[rows].numpy(),
            "replaced": self.replaced[rows].numpy(),
        }
        return pd.DataFrame(table)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars of the largest effects."""
        top = self.take(self.order[:_DRAWN].flip(0))
        ax = axis(ax, 6, 1.2 + 0.22 * len(top))
        colours = ["#c1502e" if f == ERROR else "#1f6f8b" for f in top.feature.tolist()]
        ax.barh(list(top.names), top.effect.numpy(), color=colours)
        ax.axvline(0, color="grey", linewidth=0.5)
        ax.set(xlabel="indirect effect", title=f"{min(_DRAWN, len(self))} of {len(self):,} features and errors")
        return ax


def feature_effects(
    model: Model,
    coders: Coders,
    pairs: Pairs,
    metric: Metric | None = None,
    *,
    ablation: str = "counterfactual",
    steps: int = 10,
    method: str = "ig",
    positions: str = "all",
    batch: int = 16,
    mask: Tensor | None = None,
) -> FeatureEffects:
    """Indirect effects of every active feature, and of the error terms, of ``coders`` in ``model``.

    ``coders``: site -> autoencoder, see ``splice``. ``metric(logits, pairs) -> [B]`` is the logit difference unless given.
    ``ablation`` is what features are replaced by: ``"counterfactual"`` (their values on the paired corrupted prompt),
    ``"zero"``, or ``"mean"`` (per position over the corrupted prompts). ``method``: ``"ig"`` with ``steps`` runs per site,
    ``"attribution"`` (one run), or ``"exact"`` (one run per feature: for tiny models). ``positions``: ``"all"`` adds the effects
    of a feature up over positions, ``"each"`` and ``"spans"`` tell positions or the task's spans apart. ``mask`` ``[B, T]`` is
    False on padding, which takes no part.
    """
    return scored(Patching.of(model, coders, pairs, metric, ablation, batch, positions, mask), method, steps)[0]


@dataclass(frozen=True)
class Sloped:
    """One batch with its tensors ``[B, T, D]`` and gradients at all sites, and what replaces features."""

    batch: Batch
    clean: Values
    slopes: Values
    codes: Codes


@torch.no_grad()
def scored(patching: Patching, method: str, steps: int) -> tuple[FeatureEffects, list[Sloped]]:
    """The effects, and the gradients that they were made with (none of ``exact``)."""
    if method not in METHODS:
        raise UnknownName("method of feature effects", method, METHODS)
    if steps < 1:
        raise WorkbenchError(f"steps counts the runs of an integral, at least 1; got {steps}")
    replaced, kept = Replaced(patching), []
    sums = {site: _Sums() for site in patching.sites}
    full, without = 0.0, torch.zeros(len(patching.sites), dtype=torch.float64)
    for batch in patching.batches():
        clean = patching.splice.values(given(batch.pairs.clean, batch.mask))
        codes = replaced.of(batch, clean)
        full += float(patching.metric(batch).double().sum())
        slopes = patching.slopes(batch, patching.sites) if method == "attribution" else {}
        for number, site in enumerate(patching.sites):
            before, after = patching.splice.coded(site, clean[site]), codes(site)
            change = Change.of(patching, batch, site, clean[site], before, after)
            without[number] += float(patching.metric(batch, {site: clean[site] - change.total}).double().sum())
            if method == "exact":
                effects = exact(patching, batch, site, clean[site], change.features, change.error)
            else:
                if method == "ig":
                    held = [{site: clean[site] - k / steps * change.total} for k in range(steps)]
                    slopes[site] = patching.slopes(batch, [site], held)[site]
                effects = change.effects(patching, site, slopes[site])
            sums[site].add(patching, batch, effects, before, after)
        if method != "exact":
            kept.append(Sloped(batch, clean, slopes, codes))
    n = len(patching.setting.pairs)
    return _result(patching, sums, full / n, without / n, method, steps), kept


@dataclass(frozen=True)
class Change:
    """Clean minus replaced at one site, 0 on padding: ``features`` ``[B, T, F]``, ``error`` and ``total`` ``[B, T, D]``."""

    features: Tensor
    error: Tensor
    total: Tensor

    @classmethod
    def of(
        cls,
        patching: Patching,
        batch: Batch,
        site: Site,
        clean: Tensor,
        before: tuple[Tensor, Tensor],
        after: tuple[Tensor, Tensor],
    ) -> Change:
        real = batch.real[..., None].to(clean)
        features, error = ((old - new) * real for old, new in zip(before, after, strict=True))
        return cls(features, error, features @ patching.splice.coders[site].W_dec.detach() + error)

    @torch.no_grad()
    def effects(self, patching: Patching, site: Site, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Effects of features ``[B, T, F]`` and of the error ``[B, T]``."""
        slope = slope.to(self.total)
        return (
            self.features * (slope @ patching.splice.coders[site].W_dec.detach().T),
            (self.error * slope).sum(-1),
        )


class _Sums:
    """Sums over pairs by place and feature, of those alone that were active."""

    def __init__(self) -> None:
        self.keys = torch.zeros(0, 2, dtype=torch.int64)
        self.values = torch.zeros(0, 3, dtype=torch.float64)

    def add(
        self,
        patching: Patching,
        batch: Batch,
        effects: tuple[Tensor, Tensor],
        before: tuple[Tensor, Tensor],
        after: tuple[Tensor, Tensor],
    ) -> None:
        """``effects`` of features ``[B, T, F]`` and errors ``[B, T]``, with their values before and after."""
        if not all(bool(torch.isfinite(part).all()) for part in effects):
            raise WorkbenchError(
                "effects of features are not finite: the gradient of the metric is not; look at the metric"
            )
        real = batch.real.to(effects[0].device)
        norms = [part.norm(dim=-1, keepdim=True) for part in (before[1], after[1])]
        for numbers, old, new, index in (
            (effects[0], before[0], after[0], None),
            (effects[1][..., None], *norms, ERROR),
        ):
            active = ((old != 0) | (new != 0)) & real[..., None]
            b, t, f = active.nonzero(as_tuple=True)
            place = batch.place.to(b.device)[b, t]
            keys = torch.stack([place, f if index is None else torch.full_like(f, index)], 1)
            values = torch.stack([part.expand_as(active)[b, t, f].double() for part in (numbers, old, new)], 1)
            self._merge(keys.cpu(), values.cpu())

    def _merge(self, keys: Tensor, values: Tensor) -> None:
        keys, where = torch.cat([self.keys, keys]).unique(dim=0, return_inverse=True)
        values = torch.cat([self.values, values])
        self.keys, self.values = keys, values.new_zeros(len(keys), 3).index_add_(0, where, values)


def _result(
    patching: Patching, sums: dict[Site, _Sums], full: float, without: Tensor, method: str, steps: int
) -> FeatureEffects:
    setting, n = patching.setting, len(patching.setting.pairs)
    keys = torch.cat([sums[site].keys for site in patching.sites])
    values = torch.cat([sums[site].values for site in patching.sites]) / n
    if not len(keys):
        raise Refused("no feature is active on these prompts and the errors are zero; are these the model's coders?")
    site = torch.cat([torch.full((len(sums[s].keys),), i) for i, s in enumerate(patching.sites)])
    options = {"steps": steps} if method == "ig" else {}
    return FeatureEffects(
        sites=tuple(map(str, patching.sites)),
        places=setting.places.names,
        site=site,
        place=keys[:, 0].contiguous(),
        feature=keys[:, 1].contiguous(),
        effect=values[:, 0].contiguous(),
        clean=values[:, 1].contiguous(),
        replaced=values[:, 2].contiguous(),
        full=full,
        without=without,
        provenance={
            **setting.provenance(method, "feature", options),
            "ablation": patching.ablation,
            "features": {str(s): coder.features for s, coder in patching.splice.coders.items()},
        },
    )
