"""Gradients of a metric at spliced tensors, batch by batch: what node and edge effects are made of.

Features and error are added up to the tensor, x = f W_dec + b + eps, so that moving all of a site's features and its error
along a straight line moves x along one, and the gradient at x gives all of theirs: dm/df_i = d_i . dm/dx and dm/deps = dm/dx.
Nothing as wide as the dictionary takes part in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import Edits, Metric, Setting
from workbench.probes.features.splice import Coders, Splice, given, splice
from workbench.sites import Site

ABLATIONS = ("counterfactual", "zero", "mean")
Values = dict[Site, Tensor]
Codes = Callable[[Site], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Batch:
    """Some pairs, and which of their tokens are real: ``real`` ``[B, T]``, ``place`` ``[B, T]``."""

    pairs: Pairs
    real: Tensor
    place: Tensor

    @property
    def mask(self) -> Tensor | None:
        """The padding mask of a run, ``None`` without padding."""
        return None if bool(self.real.all()) else self.real


@dataclass(frozen=True)
class Patching:
    """A checked request: the coders in the model, the pairs and metric, what replaces features, and which tokens are real."""

    splice: Splice
    setting: Setting
    ablation: str
    mask: Tensor | None

    @classmethod
    def of(
        cls,
        model: Model,
        coders: Coders,
        pairs: Pairs,
        metric: Metric | None,
        ablation: str,
        batch: int,
        positions: str,
        mask: Tensor | None,
    ) -> Patching:
        if ablation not in ABLATIONS:
            raise UnknownName("ablation of features", ablation, ABLATIONS)
        setting = Setting.of(model, pairs, metric, "counterfactual", batch, positions)
        if mask is not None:
            mask = torch.as_tensor(mask).cpu()
            if mask.dtype != torch.bool or mask.shape != pairs.clean.shape:
                raise WorkbenchError(
                    f"mask is bool {list(pairs.clean.shape)}, False on padding of clean and corrupted prompts; got "
                    f"{mask.dtype} {list(mask.shape)}"
                )
            at_answer = mask[torch.arange(len(pairs)), pairs.position.cpu()]
            if not bool(at_answer.all()):
                raise WorkbenchError(
                    "pairs.position lies on padding of some pair; the metric would be read off nothing"
                )
        return cls(splice(model, coders), setting, ablation, mask)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.splice.sites

    def batches(self) -> Iterator[Batch]:
        start = 0
        for pairs in self.setting.chunks():
            rows = slice(start, start + len(pairs))
            real = torch.ones_like(pairs.clean, dtype=torch.bool) if self.mask is None else self.mask[rows]
            yield Batch(pairs, real.cpu(), self.setting.places.index(pairs))
            start += len(pairs)

    def measure(self, logits: Tensor | None, pairs: Pairs) -> Tensor:
        """The metric ``[B]``, which must be finite."""
        values = self.setting.measure(logits, pairs)
        if not bool(torch.isfinite(values).all()):
            raise WorkbenchError("the metric of some pair is not a finite number; effects on it are undefined")
        return values

    @torch.no_grad()
    def metric(self, batch: Batch, edit: Mapping[Site, Tensor] | None = None) -> Tensor:
        """The metric ``[B]`` of the plain model, or with tensors ``[B, T, D]`` in the place of its own."""
        edits: Edits = {site: shaped(value) for site, value in (edit or {}).items()}
        return self.measure(self.splice.model.run(given(batch.pairs.clean, batch.mask), edit=edits).logits, batch.pairs)

    def slopes(self, batch: Batch, sites: Sequence[Site], held: Sequence[Values] = ({},)) -> Values:
        """Gradient of the summed metric at ``sites``, ``[B, T, D]``, mean over the runs ``held``, each of which has given
        tensors at some sites; several go through the model together."""
        total: Values = {}
        most = self.setting.at_once
        for lo in range(0, len(held), most):
            group = held[lo : lo + most]
            for site, grad in self._slopes(batch, sites, group).items():
                grad = grad.unflatten(0, (len(group), -1)).sum(0)
                total[site] = total[site] + grad if site in total else grad
        return {site: grad / len(held) for site, grad in total.items()}

    def _slopes(self, batch: Batch, sites: Sequence[Site], held: Sequence[Values]) -> Values:
        leaves: Values = {}

        def at(site: Site) -> Callable[[Tensor], Tensor]:
            def edit(value: Tensor) -> Tensor:
                if site in held[0]:
                    value = torch.cat([run[site].to(value) for run in held]).view(value.shape)
                if not value.requires_grad:
                    value = value.detach().requires_grad_()
                leaves[site] = value
                return value.clone()

            return edit

        n = len(held)
        mask = None if batch.mask is None else batch.mask.repeat(n, 1)
        tokens = given(batch.pairs.clean.repeat(n, 1), mask)
        with torch.enable_grad():
            run = self.splice.model.run(tokens, edit={site: at(site) for site in dict.fromkeys((*held[0], *sites))})
            if run.logits is None:
                raise Refused(f"{self.splice.model.name} gives no logits, so its metric has no gradient")
            total = torch.stack([self.measure(part, batch.pairs).sum() for part in run.logits.chunk(n)]).sum()
            if not total.requires_grad:
                raise Refused(
                    f"the metric of {self.splice.model.name} has no gradient at these sites; use method='exact'"
                )
            found = torch.autograd.grad(total, [leaves[site] for site in sites], allow_unused=True)
        return {
            site: (torch.zeros_like(leaves[site]) if grad is None else grad).flatten(2)
            for site, grad in zip(sites, found, strict=True)
        }


class Replaced:
    """What takes the place of features and errors.

    ``counterfactual``: those of the paired corrupted prompt. ``zero``: zeros, so that the coder's bias is left. ``mean``: their
    mean per position over the corrupted prompts of all pairs, padding left out, as the paper ablates
    (saprmarks/feature-circuits, ``ablation.py``). On padding, the clean prompt's own.
    """

    def __init__(self, patching: Patching) -> None:
        self.patching = patching
        self._mean: dict[Site, tuple[Tensor, Tensor]] = {}
        if patching.ablation == "mean":
            self._means()

    def of(self, batch: Batch, clean: Values) -> Codes:
        """A function that gives features ``[B or 1, T, F]`` and errors ``[B or 1, T, D]`` of a site, for one batch with tensors
        ``clean``."""
        patching = self.patching
        if patching.ablation == "mean":
            return self._mean.__getitem__
        if patching.ablation == "zero":
            return lambda site: (
                clean[site].new_zeros(1, clean[site].shape[1], patching.splice.coders[site].features),
                torch.zeros_like(clean[site][:1]),
            )
        rows = patching.splice.values(given(batch.pairs.corrupt, batch.mask))
        return torch.no_grad()(lambda site: patching.splice.coded(site, rows[site]))

    @torch.no_grad()
    def _means(self) -> None:
        splice = self.patching.splice
        sums: dict[Site, tuple[Tensor, Tensor]] = {}
        count = torch.zeros(self.patching.setting.pairs.clean.shape[1])
        for batch in self.patching.batches():
            count += batch.real.sum(0)
            for site, rows in splice.values(given(batch.pairs.corrupt, batch.mask)).items():
                real = batch.real[..., None].to(rows)
                features, error = splice.coded(site, rows)
                codes, left = ((part * real).sum(0, keepdim=True) for part in (features, error))
                old = sums.get(site)
                sums[site] = (codes, left) if old is None else (old[0] + codes, old[1] + left)
        for site, (features, error) in sums.items():
            n = count.clamp(min=1)[None, :, None].to(features)
            self._mean[site] = features / n, error / n


def shaped(value: Tensor) -> Callable[[Tensor], Tensor]:
    """The edit that puts a tensor ``[B, T, D]`` into a site whatever the shape of its heads."""
    return lambda own: value.to(own).view(own.shape)
