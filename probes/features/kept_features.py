"""What a model does when it keeps some features and error terms and all others at the spliced sites are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.features.feature_effects import FeatureEffects
from workbench.probes.features.node_gradients import Batch, Patching, Replaced
from workbench.probes.features.splice import ERROR, given
from workbench.sites import Site

ERRORS = ("nodes", "kept", "replaced")


@dataclass(frozen=True)
class KeptFeatures:
    """The spliced model as a function of which of the scored ``nodes`` it keeps. ``errors`` says what error terms are: nodes like
    features, always kept, or always replaced."""

    patching: Patching
    nodes: FeatureEffects
    errors: str

    @classmethod
    def of(cls, patching: Patching, nodes: FeatureEffects, errors: str) -> KeptFeatures:
        if errors not in ERRORS:
            raise UnknownName("treatment of errors", errors, ERRORS)
        sites = tuple(map(str, patching.sites))
        if nodes.sites != sites:
            raise Refused(
                f"the circuit was found with coders at {', '.join(nodes.sites)}; these coders are at {', '.join(sites)}"
            )
        if nodes.places != patching.setting.places.names:
            raise WorkbenchError(
                f"the circuit tells {len(nodes.places)} places apart and these pairs have {len(patching.setting.places)}"
            )
        for number, (site, coder) in enumerate(patching.splice.coders.items()):
            largest = _largest(nodes, number)
            if largest >= coder.features:
                raise Refused(f"the circuit has feature {largest} at {site}, whose coder has {coder.features}")
        return cls(patching, nodes, errors)

    @torch.no_grad()
    def metrics(self, keeps: Sequence[tuple[Tensor, bool]]) -> Tensor:
        """The metric per pair, ``[keeps, pairs]`` float64, for each of (rows of ``nodes``, inside): with ``inside`` these rows
        stay and everything else is replaced, without it they are replaced and everything else stays."""
        tables = [self._tables(rows, inside) for rows, inside in keeps]
        replaced = Replaced(self.patching)
        cells: list[list[Tensor]] = [[] for _ in keeps]
        for batch in self.patching.batches():
            clean = self.patching.splice.values(given(batch.pairs.clean, batch.mask))
            codes = replaced.of(batch, clean)
            instead = {site: codes(site) for site in self.patching.sites}
            for cell, table in zip(cells, tables, strict=True):
                cell.append(self._run(batch, instead, table).double().cpu())
        return torch.stack([torch.cat(cell) for cell in cells])

    def _run(
        self, batch: Batch, instead: dict[Site, tuple[Tensor, Tensor]], table: dict[Site, tuple[Tensor, Tensor]]
    ) -> Tensor:
        def change(site: Site, features: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
            place, padding = batch.place.to(features.device), ~batch.real.to(features.device)
            stay, whole = (part.to(features.device) for part in table[site])
            stay = stay if len(stay) == 1 else stay[place]
            new, rest = instead[site]
            return (
                torch.where(stay | padding[..., None], features, new),
                torch.where((whole[place] | padding)[..., None], error, rest),
            )

        run = self.patching.splice.run(given(batch.pairs.clean, batch.mask), change)
        return self.patching.measure(run.logits, batch.pairs)

    def _tables(self, rows: Tensor, inside: bool) -> dict[Site, tuple[Tensor, Tensor]]:
        """By site: which features stay ``[places, F]``, and which errors ``[places]``."""
        nodes, found = self.nodes, {}
        for number, (site, coder) in enumerate(self.patching.splice.coders.items()):
            here = rows[nodes.site[rows] == number]
            feature, place = nodes.feature[here], nodes.place[here]
            stay = torch.full((len(nodes.places), coder.features), not inside)
            whole = torch.full((len(nodes.places),), not inside)
            known = feature != ERROR
            stay[place[known], feature[known]] = inside
            whole[place[~known]] = inside
            if self.errors != "nodes":
                whole[:] = self.errors == "kept"
            found[site] = stay, whole
        return found


def _largest(nodes: FeatureEffects, number: int) -> int:
    """The largest index of a feature at a site; the error's where there is none."""
    features = nodes.feature[nodes.site == number]
    return int(features.max()) if len(features) else ERROR
