"""Rows of an activation store in mixed batches, with a cursor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.coders.mixing import joined, permutation
from workbench.errors import Refused, UnknownName, WorkbenchError

if TYPE_CHECKING:
    from workbench.coders.store import ActivationStore


class StoreBatches:
    """``Batches`` (see ``mixing.py``) of a store. A batch may span two groups of shards; the rows behind the last whole batch
    of the last epoch are not served."""

    def __init__(
        self,
        store: ActivationStore,
        size: int,
        seed: int,
        *,
        sites: Sequence[str] | None,
        mix: int,
        epochs: int | None,
        dtype: torch.dtype,
    ) -> None:
        for name, value in (("size", size), ("mix", mix), ("epochs", 1 if epochs is None else epochs)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise WorkbenchError(f"{name} of batches is a whole number from 1; got {value!r}")
        for site in sites or ():
            if str(site) not in store.widths:
                raise UnknownName(f"site of {store.folder}", site, store.sites)
        if not store.rows:
            raise Refused(f"{store.folder} holds no rows yet")
        self._store, self._size, self._seed, self._mix, self._epochs = store, size, seed, mix, epochs
        self._sites = list(store.sites) if sites is None else [str(site) for site in sites]
        self._dtype = dtype
        self._epoch, self._group, self._at = 0, -1, 0
        self._shards = len(store.shards)
        self._rows: dict[str, Tensor] = {}
        self._order = torch.zeros(0, dtype=torch.int64)

    @property
    def epochs(self) -> float:
        """How often the rows have been read."""
        total = math.ceil(self._shards / self._mix)
        return self._epoch + (self._group + self._at / max(1, len(self._order))) / total if self._group >= 0 else 0.0

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch, "group": self._group, "at": self._at, "shards": self._shards,
            "seed": self._seed, "mix": self._mix,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, own in (("seed", self._seed), ("mix", self._mix)):
            if state[name] != own:
                raise Refused(f"the cursor was taken with {name}={state[name]}; these batches have {name}={own}")
        if state["shards"] > len(self._store.shards):
            raise Refused(
                f"{self._store.folder} has {len(self._store.shards)} shards; the cursor knows {state['shards']}"
            )
        self._epoch, self._shards = int(state["epoch"]), int(state["shards"])
        self._group, self._at = int(state["group"]), 0
        self._order = self._order[:0]
        if self._group >= 0:
            self._load()
            self._at = int(state["at"])

    def peek(self, rows: int) -> dict[str, Tensor]:
        if self._at >= len(self._order) and not self._next_group():
            return {}
        return self._chosen(self._order[self._at : self._at + rows])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        parts: list[dict[str, Tensor]] = []
        need = self._size
        while need:
            if self._at >= len(self._order) and not self._next_group():
                raise StopIteration
            chosen = self._order[self._at : self._at + need]
            parts.append(self._chosen(chosen))
            self._at += len(chosen)
            need -= len(chosen)
        return parts[0] if len(parts) == 1 else joined(parts)

    def _chosen(self, order: Tensor) -> dict[str, Tensor]:
        return {site: rows[order].to(self._dtype) for site, rows in self._rows.items()}

    def _next_group(self) -> bool:
        epoch, group, shards = self._epoch, self._group + 1, self._shards
        if group * self._mix >= shards:
            epoch, group, shards = epoch + 1, 0, len(self._store.shards)
        if self._epochs is not None and epoch >= self._epochs:
            return False
        self._epoch, self._group, self._shards = epoch, group, shards
        self._load()
        return True

    def _load(self) -> None:
        """Read the shards of the present group and draw their order."""
        self._rows = {}
        order = permutation(self._shards, self._seed, self._epoch)
        chosen = order[self._group * self._mix : (self._group + 1) * self._mix].tolist()
        self._rows = joined([self._store.read(number, self._sites) for number in chosen])
        self._order = permutation(len(next(iter(self._rows.values()))), self._seed, self._epoch, self._group)
        self._at = 0
