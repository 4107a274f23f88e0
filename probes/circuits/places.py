"""Places: the groups of token positions that a per-position circuit tells apart.

A part at a place is written ``a1.h2@S2`` or ``a0.h1->a1.h2<k>@END``: the node's output, or what the edge carries,
at those positions of the residual stream and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.pairs import Pairs

POSITIONS = ("all", "each", "spans")
REST = "rest"


@dataclass(frozen=True)
class Places:
    """``kind`` is one of ``POSITIONS``: ``all`` positions as one place without a name, ``each`` position by its
    number, or the ``spans`` that the task names, with ``rest`` for positions in none of them. A position in several
    spans belongs to the shortest one."""

    kind: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, kind: str, pairs: Pairs) -> Places:
        if kind not in POSITIONS:
            raise UnknownName("positions", kind, POSITIONS)
        if kind == "all":
            return cls(kind, ("",))
        if kind == "each":
            return cls(kind, tuple(map(str, range(pairs.clean.shape[1]))))
        if not pairs.spans:
            raise WorkbenchError("these pairs name no spans; use positions='each', or a task whose pairs have spans")
        return cls(kind, (*pairs.spans, REST))

    def __len__(self) -> int:
        return len(self.names)

    def index(self, pairs: Pairs) -> Tensor:
        """The place of every token, ``[B, T]``."""
        size, length = pairs.clean.shape
        if self.kind == "all":
            return torch.zeros(size, length, dtype=torch.int64)
        if self.kind == "each":
            return torch.arange(length).expand(size, length)
        at = torch.arange(length)
        found = torch.full((size, length), len(self.names) - 1)
        shortest = torch.full((size, length), length + 1)
        for number, name in enumerate(self.names[:-1]):
            start, stop = pairs.spans[name][:, :1], pairs.spans[name][:, 1:]
            better = (at >= start) & (at < stop) & (start >= 0) & (stop - start < shortest)
            found = torch.where(better, number, found)
            shortest = torch.where(better, stop - start, shortest)
        return found

    def of_each(self, names: Sequence[str]) -> tuple[str, ...]:
        """Every name at every place, places innermost."""
        if self.kind == "all":
            return tuple(names)
        return tuple(f"{name}@{place}" for name in names for place in self.names)
