"""What is to be trained: which sites a coder reads, which it writes, of what kind it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.coders.catalogue import coder_kinds, make_coder
from workbench.coders.coder import Coder
from workbench.coders.start import STARTS
from workbench.errors import UnknownName, WorkbenchError
from workbench.sites import Site

_LOW_RANK = ("z", "attn_out", "result")
"""Site kinds whose activations fill a part of their space alone (Wang et al. 2025, arXiv 2508.16929)."""


@dataclass(frozen=True)
class CoderSpec:
    """One coder to train. ``reads`` and ``writes`` are texts of sites: the same one for an autoencoder, the same several for a
    crosscoder, different ones for a transcoder. ``skip`` adds a linear map beside a transcoder. ``options`` are the kind's own,
    ``start`` where its directions begin: ``active-subspace``, ``random``, or None for the first where attention outputs are
    read, for the other elsewhere."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    kind: str = "topk"
    features: int = 1024
    skip: bool = False
    start: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("reads", "writes"):
            given = getattr(self, name)
            given = (given,) if isinstance(given, str | Site) else given
            object.__setattr__(self, name, tuple(_site(site) for site in given))
            if not getattr(self, name):
                raise WorkbenchError(f"a coder {name} at least one site")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise WorkbenchError(f"a coder {name} each site once; got {', '.join(getattr(self, name))}")
        told = {name: tuple(value) if isinstance(value, list) else value for name, value in self.options.items()}
        object.__setattr__(self, "options", told)
        known = coder_kinds()
        if self.kind not in known:
            raise UnknownName("kind of coder", self.kind, known)
        if self.skip and self.reads == self.writes:
            raise WorkbenchError("a skip connection belongs to a transcoder; this coder writes what it reads")
        if self.start not in (None, *STARTS):
            raise UnknownName("start", self.start, STARTS)
        self.make([1] * len(self.reads), [1] * len(self.writes))  # refuses options that the kind does not take

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> CoderSpec:
        """The spec that ``told`` describes: the inverse of ``json``."""
        return cls(**{**told, "reads": tuple(told["reads"]), "writes": tuple(told["writes"])})

    def json(self) -> dict[str, Any]:
        """The spec as JSON."""
        return {
            "reads": list(self.reads), "writes": list(self.writes), "kind": self.kind, "features": self.features,
            "skip": self.skip, "start": self.start, "options": plain(self.options),
        }  # fmt: skip

    @property
    def same(self) -> bool:
        """Whether what it writes is what it reads."""
        return self.reads == self.writes

    @property
    def begins(self) -> str:
        """``start``, or what stands for None."""
        if self.start is not None:
            return self.start
        return "active-subspace" if any(map(_low_rank, self.reads)) else "random"

    def make(self, reads: Sequence[int], writes: Sequence[int], *, seed: int = 0) -> Coder:
        """The untrained coder for sites of these widths."""
        shape: dict[str, Any] = {}
        if not self.same:
            shape = {"d_out": sum(writes), "reads": tuple(reads), "writes": tuple(writes), "skip": self.skip}
        elif len(self.reads) > 1:
            shape = {"reads": tuple(reads), "writes": tuple(writes)}
        drawn = torch.Generator().manual_seed(seed)
        return make_coder(self.kind, sum(reads), self.features, generator=drawn, **shape, **self.options)

    def rows(self, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What the coder reads ``[N, D_in]`` and writes ``[N, D_out]``, None where that is the same."""
        return _beside(found, self.reads), None if self.same else _beside(found, self.writes)


def _beside(found: Mapping[str, Tensor], sites: Sequence[str]) -> Tensor:
    return found[sites[0]] if len(sites) == 1 else torch.cat([found[site] for site in sites], 1)


def _site(given: Any) -> str:
    if not isinstance(given, str | Site):
        raise WorkbenchError(f"a site is a text such as blocks.1.attn.hook_z; got {given!r}")
    number, colon, rest = str(given).partition(":")
    try:
        return f"{number}:{Site.parse(rest)}" if colon and number.isdigit() else str(Site.parse(given))
    except UnknownName:
        return str(given)  # a bridge has hooks that are no site; models refuse what they do not know


def _low_rank(site: str) -> bool:
    try:
        return Site.parse(site.partition(":")[2] or site).kind in _LOW_RANK
    except WorkbenchError:
        return False


def plain(value: Any) -> Any:
    """``value`` as JSON has it: tuples are lists."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value
