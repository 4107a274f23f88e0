"""What the metric loses if one feature is replaced and nothing else: the finite difference behind attribution."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.probes.features.node_gradients import Batch, Patching
from workbench.sites import Site


@torch.no_grad()
def exact(
    patching: Patching, batch: Batch, site: Site, clean: Tensor, features: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """Effects of features ``[B, T, F]`` and of the error ``[B, T]`` of one site: m(clean) - m(with this one replaced).

    ``features`` and ``error`` are what each would lose (clean - replaced), ``clean`` ``[B, T, D]`` is the site's tensor. A
    feature is replaced at one place at a time, at all positions of the place together; the effect stands at the first position
    where it changes. One run per feature and place.
    """
    own = patching.metric(batch)
    directions = patching.splice.coders[site].W_dec.detach()
    place = batch.place.to(clean.device)
    effects, rest = torch.zeros_like(features), error.new_zeros(error.shape[:2])
    for number in place.unique().tolist():
        here = ((place == number) & batch.real.to(clean.device))[..., None]
        for feature in ((features != 0) & here).flatten(0, 1).any(0).nonzero()[:, 0].tolist():
            lost = (features[..., feature, None] * here) * directions[feature]
            _put(
                effects[..., feature],
                features[..., feature] * here[..., 0],
                own - _run(patching, batch, site, clean, lost),
            )
        if bool((error * here).any()):
            lost = error * here
            _put(rest, lost.norm(dim=-1), own - _run(patching, batch, site, clean, lost))
    return effects, rest


def _run(patching: Patching, batch: Batch, site: Site, clean: Tensor, lost: Tensor) -> Tensor:
    return patching.metric(batch, {site: clean - lost})


def _put(effects: Tensor, changed: Tensor, values: Tensor) -> None:
    """The effect of each pair ``[B]``, written at the first position ``[B, T]`` where something changed; 0 where nothing did."""
    moved = changed != 0
    rows = moved.any(1).nonzero()[:, 0]
    effects[rows, moved.int().argmax(1)[rows]] = values.to(effects)[rows]
