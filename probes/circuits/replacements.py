"""What takes the place of a part's output: the corrupted prompt's value, zero, the mean, or the best constant."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.pairs import Pairs
from workbench.probes.circuits.components import Acts, Setting, gather
from workbench.sites import Site


class Replacements:
    """What replaces the outputs at ``sites``, by ``setting.ablation``.

    ``counterfactual``: the paired corrupted prompt's output. ``zero``: zeros. ``mean``: the mean per position over all
    clean prompts. ``optimal``: one constant per part that costs the behaviour least (``optimal_constants``). Means and
    constants are computed once.
    """

    def __init__(self, setting: Setting, sites: Sequence[Site]) -> None:
        self.setting, self.sites = setting, tuple(sites)
        self._constant: Acts = {}
        if setting.ablation == "mean":
            for pairs in setting.chunks():
                for site, value in gather(setting.model, pairs.clean, self.sites, logits=None)[0].items():
                    share = value.sum(0, keepdim=True) / len(setting.pairs)
                    self._constant[site] = self._constant[site] + share if site in self._constant else share
        elif setting.ablation == "optimal":
            from workbench.probes.circuits.optimal import optimal_constants

            self._constant = optimal_constants(setting, self.sites)

    def of(self, pairs: Pairs, clean: Acts) -> Acts:
        """Replacement for every site of ``clean``, of the same shapes."""
        if self.setting.ablation == "counterfactual":
            return gather(self.setting.model, pairs.corrupt, self.sites, logits=None)[0]
        if self.setting.ablation == "zero":
            return {site: torch.zeros_like(clean[site]) for site in self.sites}
        return {site: self._constant[site].to(clean[site]).expand_as(clean[site]) for site in self.sites}
