"""Recorder of differential attention (DiffLlama): M = P_1 - lambda P_2, one map for each pair of heads.

Heads h and h + H/2 share a value head, the h-th and the (h + G/2)-th projection of the values side by side, so that the layer has
H/2 heads and G/2 value heads of twice the width. The module calls the attention interface once for each half of the values, with
the same queries and keys; its group norm comes behind the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.maps import GatedMap
from workbench.models.current import current
from workbench.models.recorders.base import Watch
from workbench.patterns.algebra import SumMap

_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__)
_DIFFERENCES = (torch.sub, Tensor.sub, Tensor.__sub__)


class Differential(Watch):
    mixer = "difference of two softmaxes"
    missing = "group norm (the map is before it); editing pattern; steps of generate()"
    sites = frozenset({"v", "z"})
    interface = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._call: tuple[Tensor, Tensor, Any, dict[str, Any]] | None = None
        self._halves: tuple[Tensor, ...] = ()
        self._weight: Tensor | None = None

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        heads = module.config.num_attention_heads // 2
        return heads, heads // module.num_key_value_groups, module.head_dim

    def attended(
        self, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Any, base: str
    ) -> Any:
        query, key, _, mask = args
        if self._call is None and self.session.wants_map(self.layer):
            found, bias = self.session.masks.resolve(self.layer, mask, query, key, base, options)
            self._call = query, key, found, {"scale": options.get("scaling"), "bias": bias}
        return kernel(self.module, *args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if current() is not self.session:  # what an edit runs
            return result
        if func is torch.chunk and not self.met and not self._halves:
            if self._values_are_split(args, kwargs or {}):
                return self._values(result)
            self._halves = result
        elif self._halves and func in _PRODUCTS and args[1] is self._halves[1]:
            self._weight = args[0]
        elif self._halves and func in _DIFFERENCES and args[0] is self._halves[0]:
            self.met, self._halves = True, ()
            self._build()
            return self.session.on_output(self.layer, result)
        return result

    def _values_are_split(self, args: Any, kwargs: dict[str, Any]) -> bool:
        return kwargs.get("dim", args[2] if len(args) > 2 else 0) == 1

    def _values(self, halves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Values ``[B, G/2, K, E]`` of both halves, edited as those of the layer, ``[B, K, G/2, 2 E]``."""
        if not self.session.touches(self.layer, "v"):
            return halves
        values = self.session.on_values(self.layer, torch.cat(halves, -1).transpose(1, 2))
        return values.transpose(1, 2).chunk(2, -1)

    def _build(self) -> None:
        if self._call is None or self._weight is None:
            return
        query, key, mask, options = self._call
        with torch.no_grad():
            first, second = (
                self.session.softmax(self.layer, q, k, mask, **options)
                for q, k in zip(query.chunk(2, 1), key.chunk(2, 1), strict=True)
            )
            weight = -self._weight.detach().to(first.scores.dtype)
            self.session.on_built(
                self.layer, SumMap(first, GatedMap(second, weight.expand(second.shape[:3])), sign="signed")
            )
