"""Recorder of Longformer: a window around every token, and some tokens that see and are seen by all.

    local rows    softmax over [global tokens, window of w on either side without them]
    global rows   softmax over all tokens, with queries, keys and values of projections of their own

The weights are the executed ones. Rows of global tokens multiply other values (``value_global``) than all other rows:
the map over the tokens holds every row's weights, whichever values they meet, and its ``native()`` keeps the two apart:
the map of the local values, a band with some columns, and that of the global ones, rows over everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.maps import DenseMap
from workbench.models.recorders.state import work
from workbench.models.recorders.text import TextWatch
from workbench.patterns.algebra import ProductMap, SumMap
from workbench.patterns.sparse import SparseMap

GLOBAL = "raw V; in rows of global tokens the values of value_global"


class Longformer(TextWatch):
    mixer = "softmax + window + global tokens"
    missing = "editing pattern; values of global rows as a site (map.native() keeps them apart)"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weights: list[Tensor] = []

    @classmethod
    def named(cls, module: Any) -> str:
        return f"softmax + window of {module.one_sided_attn_window_size} on either side + global tokens"

    @classmethod
    def pads(cls, module: Any) -> bool:
        return True

    def arrange(self, projected: Tensor) -> Tensor:
        return projected.transpose(0, 1)  # the model has the tokens first

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func is torch.nn.functional.dropout:
            self.weights.append(args[0])

    def build(self) -> None:
        if not self.weights:
            return
        local, *others = (part.detach() for part in work(*self.weights))
        n = self.tokens(local.shape[1])
        chosen = _listed(self.given["is_index_global_attn"]) if others else None
        keys = self._keys(local.shape[1], chosen, local.device)[:, :, :n]
        weights = local.transpose(1, 2)[:, :, :n]
        if chosen is not None:
            weights = weights.masked_fill(self.given["is_index_global_attn"][:, None, :n, None], 0.0)
        band = SparseMap(keys.masked_fill(keys >= n, -1), weights, n)
        padded = bool(self.given["is_index_masked"][:, :n].any())
        if chosen is None:
            band.row_sum = "<=1" if padded else "1"
            self.session.on_built(self.layer, band)
            return
        b, h = weights.shape[:2]
        everything = others[0].unflatten(0, (b, h))[..., :n] if others[0].ndim == 3 else others[0][..., :n]
        rows = torch.arange(n, device=keys.device)[:, None] == chosen[:, None]
        at = torch.where(rows.any(-1), rows.int().argmax(-1), -1)[:, None, :, None]
        to_all = ProductMap(
            SparseMap(at, weights.new_ones(b, h, n, 1), chosen.shape[1], row_sum="<=1"),
            DenseMap(everything * (chosen >= 0)[:, None, :, None], offset=0),
        )
        self.session.on_built(self.layer, SumMap(band, to_all, row_sum="<=1" if padded else "1", value_space=GLOBAL))

    def _keys(self, length: int, chosen: Tensor | None, device: torch.device) -> Tensor:
        """The key of every weight of a local row, ``[B or 1, 1, N, S]``: global tokens, then the window; -1 outside."""
        w = self.module.one_sided_attn_window_size
        places = torch.arange(length, device=device)
        window = places[:, None] + torch.arange(-w, w + 1, device=device)
        window = window.masked_fill((window < 0) | (window >= length), -1)[None, None]
        if chosen is None:
            return window
        table = chosen[:, None, None].expand(-1, 1, length, -1)
        return torch.cat([table, window.expand(len(chosen), 1, -1, -1)], -1)


def _listed(chosen: Tensor) -> Tensor:
    """Places of the True entries of each row ``[B, N]`` in order, ``[B, S]``, -1 behind the last."""
    most = int(chosen.sum(1).max())
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return order.masked_fill(~chosen.gather(1, order), -1)
