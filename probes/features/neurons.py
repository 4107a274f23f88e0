"""Neurons as a dictionary: every coordinate of a tensor is a feature of its own, with either sign, and no error is left."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.probes.circuits.components import served
from workbench.probes.features.splice import Splice, splice
from workbench.sites import Site

_UNITS = {"mlp_out": "mlp_post", "attn_out": "z"}


class Neurons:
    """The identity on width D: F = D, f = x."""

    def __init__(self, like: Tensor) -> None:
        self.features = len(like)
        self.W_dec = torch.eye(len(like), dtype=like.dtype, device=like.device)
        self.b_dec = torch.zeros_like(like)

    def encode(self, x: Tensor) -> Tensor:
        return x


def neurons_of(coders: Splice, ids: Tensor) -> Splice:
    """The neurons that the features of spliced coders are compared with: an MLP's hidden units in the place of its output, the
    units of z in that of the attention output, and the coordinates of any other site themselves; ``ids`` is some input."""
    known = served(coders.model)
    sites = dict.fromkeys(_units(site, known) for site in coders.sites)
    acts = coders.model.run(ids, read=list(sites), logits=None).acts
    like = next(iter(coders.coders.values())).W_dec
    return splice(coders.model, {site: Neurons(acts[site].flatten(2)[0, 0].detach().to(like)) for site in sites})


def _units(site: Site, known: set[Site]) -> Site:
    inner = Site(_UNITS.get(site.kind, site.kind), site.layer, None, site.stack)
    return inner if inner in known else site
