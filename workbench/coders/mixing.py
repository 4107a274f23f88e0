"""Batches of well mixed rows, from passes over a model that never touch the disk.

Neighbouring rows of a pass are neighbouring tokens; training wants them apart. A block of rows is collected, shuffled, and
served; then the next block takes its place in the same memory. What a block holds follows from where it began to be read, so
a cursor of a few numbers is enough to build it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError

BLOCK = 65_536
"""Rows of a block, where nothing else is said."""


class Batches(Protocol):
    """Rows of several sites in batches of one size, each row the same token everywhere. ``state()`` is JSON: a fresh object made
    of the same data gives, after ``restore(state)``, the batches that would have come next."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...

    def __next__(self) -> dict[str, Tensor]: ...

    def peek(self, rows: int) -> dict[str, Tensor]:
        """Up to that many rows of those that come next, which come nevertheless."""
        ...

    @property
    def epochs(self) -> float | None:
        """How often the data have been read; None where they cannot be read again."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Source(Protocol):
    """What ``Mixed`` reads: rows by site, a pass at a time, with a cursor. ``SiteReader`` is one."""

    def __next__(self) -> dict[str, Tensor]: ...

    @property
    def epochs(self) -> float | None: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Mixed:
    """``Batches`` of a ``Source``, shuffled within blocks of about ``block`` rows; the same ``seed``, the same order.

    Memory is one block and one pass, however long the data are. Rows behind the last whole batch are not served.
    """

    def __init__(
        self, source: Source, batch: int, *, block: int = BLOCK, seed: int = 0, device: torch.device | str | None = None
    ) -> None:
        for name, value in (("batch", batch), ("block", block)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise WorkbenchError(f"{name} is a number of rows, at least 1; got {value!r}")
        self._source, self._batch, self._block, self._seed = source, batch, max(block, batch), seed
        self._device = None if device is None else torch.device(device)
        self._memory: dict[str, Tensor] = {}
        self._order = torch.zeros(0, dtype=torch.int64)
        self._number, self._at = -1, 0
        self._begin = source.state()
        self._end: dict[str, Any] | None = None

    @property
    def epochs(self) -> float | None:
        return self._source.epochs

    def state(self) -> dict[str, Any]:
        return {"block": self._number, "begin": self._begin, "end": self._end, "at": self._at}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Build the block again that ``state`` was in; its passes run again."""
        self._source.restore(state["begin"])
        self._number, self._at = int(state["block"]), int(state["at"])
        self._begin = dict(state["begin"])
        self._order = self._order[:0]
        if self._number >= 0:
            self._number -= 1
            if not self._fill() or self._end != state["end"]:
                raise Refused(
                    "the texts that had been read are not those that come now; pass the same ones in the same order"
                )
            self._at = int(state["at"])

    def peek(self, rows: int) -> dict[str, Tensor]:
        if self._at >= len(self._order) and not self._fill():
            return {}
        return self._rows(self._order[self._at : self._at + rows])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        parts: list[dict[str, Tensor]] = []
        need = self._batch
        while need:
            if self._at >= len(self._order) and not self._fill():
                raise StopIteration
            chosen = self._order[self._at : self._at + need]
            parts.append(self._rows(chosen))
            self._at += len(chosen)
            need -= len(chosen)
        return parts[0] if len(parts) == 1 else joined(parts)

    def _rows(self, chosen: Tensor) -> dict[str, Tensor]:
        return {site: memory[chosen.to(memory.device)] for site, memory in self._memory.items()}

    def _fill(self) -> bool:
        """Collect and shuffle the next block; False when the data have ended."""
        self._begin = self._source.state()
        held = 0
        while held < self._block:
            found = self._next()
            if found is None:
                break
            held = self._put(found, held)
        if not held:
            return False
        self._number += 1
        self._order = permutation(held, self._seed, self._number)
        self._at, self._end = 0, self._source.state()
        return True

    def _next(self) -> dict[str, Tensor] | None:
        try:
            return self._source.__next__()
        except StopIteration:
            return None

    def _put(self, found: Mapping[str, Tensor], held: int) -> int:
        count = len(next(iter(found.values())))
        for site, rows in found.items():
            memory = self._memory.get(site)
            if memory is None or len(memory) < held + count:
                more = max(self._block, held) + 2 * count
                grown = torch.empty(more, rows.shape[1], dtype=rows.dtype, device=self._device or rows.device)
                if memory is not None:
                    grown[:held] = memory[:held]
                self._memory[site] = memory = grown
            memory[held : held + count] = rows
        return held + count


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several pieces, site by site, behind one another."""
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


def permutation(size: int, *seeds: int) -> Tensor:
    """A random order of ``size`` things that depends on the seeds alone."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 6_364_136_223_846_793_005 + seed + 1_442_695_040_888_963_407) % 2**63
    return torch.randperm(size, generator=torch.Generator().manual_seed(mixed))
