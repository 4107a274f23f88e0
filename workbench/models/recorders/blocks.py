"""Recorder of BigBird: block-sparse attention, and the full softmax that it turns to for short texts.

    first and last block    softmax over all keys
    the others              softmax over [first block, neighbouring blocks, last block, random blocks]

A block that is listed twice (outside of training all random blocks are the first one) counts twice in the softmax of the model,
and so in the map. The map is built of the weights as executed; the probabilities that the module returns count such a block once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from workbench.attention_map import AttentionMap
from workbench.maps import DenseMap
from workbench.models.current import current
from workbench.models.recorders.state import work
from workbench.models.recorders.text import PRODUCTS, SOFTMAX, TextWatch
from workbench.patterns.algebra import QueriesMap
from workbench.patterns.sparse import SparseMap


class BigBird(TextWatch):
    """Sits on the module around the one that mixes, which the model replaces by a full one when a text is short."""

    mixer = "softmax + window, global and random blocks"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weights: list[Tensor] = []
        self.random: Tensor | None = None
        self.full: AttentionMap | None = None

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        return super().heads(module.self)

    @classmethod
    def named(cls, module: Any) -> str:
        return cls.mixer if module.attention_type == "block_sparse" else "softmax"

    @classmethod
    def causal(cls, module: Any) -> bool:
        return bool(module.config.is_decoder)

    @classmethod
    def quadratic(cls, module: Any) -> bool:
        return module.attention_type == "original_full"

    @classmethod
    def pads(cls, module: Any) -> bool:
        return module.attention_type == "block_sparse"

    @property
    def value(self) -> nn.Module:
        return self.module.self.value

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def mixed(_: nn.Module, args: Any, output: Any) -> Any:
            return self.leave(output) if current() is self.session else None

        handles = [self.value.register_forward_hook(self._project), self.module.self.register_forward_hook(mixed)]
        try:
            with self:
                return forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func in PRODUCTS and self.module.attention_type == "original_full" and self.full is None:
            if self.session.wants_map(self.layer):
                self.full = self._softmax(args[0], args[1].transpose(-1, -2))
        elif func in SOFTMAX:
            self.weights.append(result.detach())
        elif func is torch.gather and args[0].ndim == 5 and self.random is None:
            self.random = args[2][..., 0, 0]

    def _softmax(self, q: Tensor, k: Tensor) -> AttentionMap:
        cross = self.given.get("encoder_hidden_states") is not None
        mask = self.given.get("encoder_attention_mask" if cross else "attention_mask")
        causal = type(self).causal(self.module) and not cross
        found, bias = self.session.masks.resolve(self.layer, mask, q, k, "eager", {"is_causal": causal})
        return self.session.softmax(self.layer, q, k, found, scale=q.shape[-1] ** -0.5, bias=bias)

    def build(self) -> None:
        if self.full is not None:
            self.session.on_built(self.layer, self.full)
        elif len(self.weights) == 5 and self.random is not None:
            self.session.on_built(self.layer, self._blocks(self.random))

    def _blocks(self, random: Tensor) -> AttentionMap:
        first, second, middle, before_last, last = work(*self.weights)
        b, h, side, length = first.shape
        n, count = self.tokens(length), length // side
        random = random.reshape(b, h, count - 2, -1)
        # Every row of blocks lists one place more than the second and the last but one have.
        weights = torch.cat([pad(second, (0, side))[:, :, None], middle, pad(before_last, (0, side))[:, :, None]], 2)
        listed = _listed(random, count)
        keys = (listed[..., None] * side + torch.arange(side, device=listed.device)).flatten(-2)
        keys = keys.masked_fill((keys < 0) | (keys >= n), -1).repeat_interleave(side, 2)
        shown = pad(self.shown(n, first), (0, length - n))[..., None]
        inner = weights.flatten(2, 3) * shown[:, :, side:-side]
        rows = "1" if self.session.real(self.layer) is None else "<=1"
        return QueriesMap(
            DenseMap(first[..., :n] * shown[:, :, :side], offset=0),
            SparseMap(keys, inner, n),
            DenseMap((last[..., :n] * shown[:, :, -side:])[:, :, : n - length + side], offset=0),
            row_sum=rows,
        )


def _listed(random: Tensor, count: int) -> Tensor:
    """Blocks that the rows of blocks 1 to ``count - 2`` list, ``[B, H, count - 2, 5 + R]``, -1 for none: first, neighbours,
    random ones and last in the order of the model's weights."""
    at = torch.arange(1, count - 1, device=random.device)[:, None]
    near = at + torch.arange(-1, 2, device=random.device)
    table = torch.cat([torch.zeros_like(at), near], 1).expand(*random.shape[:2], -1, -1)
    last = torch.full_like(random[..., :1], count - 1)
    listed = torch.cat([table, random, last], -1)
    none = torch.full_like(random[:, :, 0, :1], -1)
    listed[:, :, 0] = torch.cat([table[:, :, 0, 1:], last[:, :, 0], random[:, :, 0], none], -1)
    listed[:, :, -1] = torch.cat([table[:, :, -1], random[:, :, -1], none], -1)
    return listed
