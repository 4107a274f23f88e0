"""The masked model: how it answers when every part keeps a share of its own and takes the rest from a replacement.

One share in [0, 1] per part. For a node: output = share * own + (1 - share) * replacement. For an edge: what its
target's input gets from its source is mixed in the same way, with the source's own output as it is computed inside
the masked model. All shares 1 is the model itself; all 0 replaces everything. Exact patching is a finite difference
in the shares, attribution patching their gradient at 1, and every learned mask an optimiser on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.graph import Graph
from workbench.pairs import Pairs
from workbench.probes.circuits.components import (
    Acts,
    Edits,
    Setting,
    components,
    edge_graph,
    gather,
    heads_first,
    reader_sites,
    writer_sites,
)
from workbench.probes.circuits.replacements import Replacements
from workbench.sites import Site


@dataclass(frozen=True)
class Prepared:
    """One batch with what replaces its parts: ``instead`` by site, ``place`` ``[B, T]``, and the whole model's
    ``logits``."""

    pairs: Pairs
    instead: Acts
    place: Tensor
    logits: Tensor


class Masked(ABC):
    """The masked model of a setting over nodes or edges; build it with ``masked``.

    ``names`` are the parts in order, each at each place if the setting tells places apart.
    """

    def __init__(self, setting: Setting, names: Sequence[str], sites: Sequence[Site]) -> None:
        self.setting, self.names = setting, tuple(names)
        self._sites, self._replacements = list(sites), Replacements(setting, sites)

    @torch.no_grad()
    def prepare(self, pairs: Pairs) -> Prepared:
        """One batch of pairs, ready for any number of masked runs."""
        clean, logits = gather(self.setting.model, pairs.clean, self._sites)
        if logits is None:
            raise Refused(f"{self.setting.model.name} gives no logits, so no circuit of it can be judged")
        return Prepared(pairs, self._replacements.of(pairs, clean), self.setting.places.index(pairs), logits)

    def logits(self, batch: Prepared, keep: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` with shares ``keep`` ``[N]``; differentiable in ``keep`` if gradients are enabled.

        Parts with share exactly 1 are left alone, unless ``keep`` requires a gradient.
        """
        if keep.shape != (len(self.names),):
            raise WorkbenchError(f"keep is one share per part, [{len(self.names)}]; got {list(keep.shape)}")
        run = self.setting.model.run(batch.pairs.clean, edit=self._edits(batch, keep))
        assert run.logits is not None
        return run.logits

    def metric(self, batch: Prepared, keep: Tensor) -> Tensor:
        """The setting's metric of the masked model, ``[B]``."""
        return self.setting.measure(self.logits(batch, keep), batch.pairs)

    @abstractmethod
    def _edits(self, batch: Prepared, keep: Tensor) -> Edits:
        """What a run with these shares changes."""


class MaskedNodes(Masked):
    """Shares of the outputs of heads and MLPs, ``a3.h5`` and ``m3``."""

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        units = {unit.name: unit for unit in components(setting.model)}
        chosen = tuple(units) if names is None else tuple(names)
        for name in chosen:
            if name not in units:
                raise UnknownName(f"node of {setting.model.name}", name, units)
        self._at: dict[Site, list[tuple[int, int | None]]] = {}
        for number, name in enumerate(chosen):
            site = units[name].site
            self._at.setdefault(site.whole, []).append((number, site.head))
        super().__init__(setting, setting.places.of_each(chosen), list(self._at))

    def _edits(self, batch: Prepared, keep: Tensor) -> Edits:
        shares = keep.view(-1, len(self.setting.places))
        edits: Edits = {}
        for site, parts in self._at.items():
            own = shares[[number for number, _ in parts]]
            if keep.requires_grad or (own != 1).any():
                edits[site] = _mixed(batch, site, [head for _, head in parts], own)
        return edits


def _mixed(batch: Prepared, site: Site, heads: list[int | None], shares: Tensor) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        instead = batch.instead[site].to(value)
        share = shares.to(value)[:, batch.place.to(value.device)]  # [parts, B, T]
        if heads == [None]:
            return torch.lerp(instead, value, share[0, ..., None])
        parts: list[Tensor] = list(value.unbind(2))
        for head, own in zip(heads, share, strict=True):
            assert head is not None
            parts[head] = torch.lerp(instead[:, :, head], parts[head], own[..., None])
        return torch.stack(parts, 2)

    return edit


class MaskedEdges(Masked):
    """Shares of all edges of the graph, in the order of ``graph.edges``."""

    def __init__(self, setting: Setting) -> None:
        self.graph = edge_graph(setting.model)
        self._source, self._slot = self.graph.source, self.graph.slot
        super().__init__(setting, setting.places.of_each(self.graph.edges), writer_sites(self.graph))

    def _edits(self, batch: Prepared, keep: Tensor) -> Edits:
        places = len(self.setting.places)
        lost = keep.new_zeros(len(self.graph.writers), len(self.graph.slots), places)
        lost = lost.index_put((self._source, self._slot), 1 - keep.view(-1, places))
        return rewired(self.graph, lost, batch.instead, batch.place, everywhere=keep.requires_grad)


def masked(setting: Setting, level: str, names: Sequence[str] | None = None) -> Masked:
    """The masked model over all nodes or edges; ``names`` chooses some nodes."""
    if level == "node":
        return MaskedNodes(setting, names)
    if names is not None:
        raise WorkbenchError("edges are masked all together; names= chooses nodes")
    return MaskedEdges(setting)


def rewired(graph: Graph, lost: Tensor, instead: Acts, place: Tensor, *, everywhere: bool = False) -> Edits:
    """Edits that follow the writers through the run and move, in every input, the ``lost`` share of each edge from the
    source's own output to its replacement. ``lost`` is ``[writers, slots, places]``, ``place`` ``[B, T]``.

    Inputs that lose nothing are left alone unless ``everywhere``; where no input loses anything there are no edits, and
    the run is the model's own to the last bit.
    """
    if not everywhere and not lost.any():
        return {}
    changes: list[Tensor] = []  # replacement minus own output of the writers so far, each [n, B, T, D]

    def write(site: Site) -> Callable[[Tensor], Tensor]:
        def follow(value: Tensor) -> Tensor:
            changes.append(heads_first(instead[site].to(value) - value))
            return value

        return follow

    def read(columns: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(value: Tensor) -> Tensor:
            gone = torch.cat(changes)[: len(columns)]
            share = columns.to(value)
            if share.shape[2] == 1:
                # In this order one matrix product; "sbtd,sn->btnd" is several times slower.
                change = torch.einsum("sbtd,sn->nbtd", gone, share[..., 0]).permute(1, 2, 0, 3)
            else:
                change = torch.einsum("sbtd,snbt->btnd", gone, share[:, :, place.to(value.device)])
            return value + (change if value.ndim == 4 else change[:, :, 0])

        return edit

    edits: Edits = {site: write(site) for site in writer_sites(graph)}
    for site, span in reader_sites(graph).items():
        columns = lost[: graph.slots[span.start].sources, span]
        if everywhere or (columns != 0).any():
            edits[site] = read(columns)
    return edits
