"""The map of attention inside of windows that lie side by side: every token in one of them, seeing that one alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.maps import head_index
from workbench.patterns.sparse import SparseMap


class WindowsMap(SparseMap):
    """``[B, H, W S, W S]`` from the maps ``[B W, H, S, S]`` of W windows of S tokens each, all windows of an example in turn.

    ``places`` int64 ``[W S]`` says which token stands at each place of the windows laid end to end, and names every token once.
    ``weights`` ``[B, H, W S, S]`` are those of the tokens in their order, for who has them; made from the windows if not given.
    ``native()`` and ``windows`` are the map as given, ``lse`` is its own in the order of the tokens.
    """

    def __init__(self, windows: AttentionMap, places: Tensor, *, weights: Tensor | None = None) -> None:
        several, _, size, keys = windows.shape
        tokens = places.numel()
        if size != keys or places.ndim != 1 or tokens % size or several % (tokens // size):
            raise WorkbenchError(
                f"windows are maps [B W, H, S, S] and the places of W S tokens; got {list(windows.shape)} and "
                f"{list(places.shape)}"
            )
        if not torch.equal(places.sort().values, torch.arange(tokens, device=places.device)):
            raise WorkbenchError(f"places name each of the {tokens} tokens once")
        count = tokens // size
        self._back = places.argsort()
        table = places.view(count, size).repeat_interleave(size, 0)[self._back]
        if weights is None:
            weights = windows.dense().unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)[:, :, self._back]
        super().__init__(
            table[None, None],
            weights,
            tokens,
            kv_heads=windows.kv_heads,
            sign=windows.sign,
            row_sum=windows.row_sum,
            value_space=windows.value_space,
            exactness=windows.exactness,
        )
        self.windows, self.places = windows, places

    def native(self) -> AttentionMap:
        """The maps of the windows."""
        return self.windows

    @property
    def lse(self) -> Tensor:
        """Natural log of the row denominators, ``[B, H, N]``, where the windows have it."""
        inner: Tensor | None = getattr(self.windows, "lse", None)
        if inner is None:
            raise AttributeError("the maps of these windows have no log-sum-exp")
        count = self.shape[2] // self.windows.shape[2]
        return inner.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)[:, :, self._back]

    def parts(self) -> dict[str, Any] | None:
        return {"windows": self.windows, "places": self.places, "weights": self.weights}

    def heads(self, indices: Sequence[int]) -> WindowsMap:
        return WindowsMap(self.windows.heads(head_index(indices, self.shape[1])), self.places)
