"""Recorders of Reformer: attention inside of chunks of the text (local) or of the text sorted by hashes (LSH).

    local   softmax over the own chunk and its neighbours, around the ends of the text where nothing masks them
    LSH     M = sum_h w_h P_h: in each hash round softmax over the chunk and its neighbours in the order of the buckets,
            without the token itself; rounds are weighted by their denominators, w_h = exp(lse_h - logsumexp_h lse_h)

Buckets, weights and round weights are those of the run. A key that several rounds find adds up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import Refused
from workbench.maps import DenseMap
from workbench.models.recorders.state import work
from workbench.models.recorders.text import TextWatch
from workbench.patterns.sparse import SparseMap

if TYPE_CHECKING:
    from workbench.models.layers import AttentionLayer
    from workbench.models.session import Session


class LocalChunks(TextWatch):
    mixer = "softmax + chunks"
    missing = "editing pattern; decoding from a cache"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weights: list[Tensor] = []

    @classmethod
    def named(cls, module: Any) -> str:
        return f"{cls.mixer} of {module.chunk_length}"

    @classmethod
    def causal(cls, module: Any) -> bool:
        return bool(module.is_decoder)

    @classmethod
    def pads(cls, module: Any) -> bool:
        return True

    @classmethod
    def check(cls, layer: AttentionLayer, session: Session) -> None:
        real = session.real(layer)
        if real is not None and session.wants_map(layer) and not bool(real[:, 0].all()):
            raise Refused(
                f"layer {layer.key} of {session.family}: {layer.name} has padding before a text, where transformers fails to "
                "make positions for the padding it adds itself; pad on the right"
            )

    def output(self, output: Any) -> Any:
        return output.hidden_states, lambda z: output._replace(hidden_states=z)

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func is torch.exp:
            self.weights.append(result.detach())

    def build(self) -> None:
        if not self.weights:
            return
        length = self.given["hidden_states"].shape[1]
        n, weights = self.tokens(length), work(*self.weights)
        shown = self.shown(n, weights[0])[..., None]
        if weights[0].ndim == 4:
            self.session.on_built(self.layer, DenseMap(weights[0][:, :, :n, :n] * shown, offset=0))
            return
        keys, parts = self._sorted(length, weights)
        keys, parts = keys[:, :, :n], parts[:, :, :n] * shown
        self.session.on_built(self.layer, self._sparse(keys.masked_fill(keys >= n, -1), parts, n))

    def _sparse(self, keys: Tensor, weights: Tensor, n: int) -> AttentionMap:
        return SparseMap(keys, weights, n)

    def _sorted(self, length: int, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and weights of every row, ``[B or 1, H or 1, N, S]``."""
        places = torch.arange(length, device=weights[0].device).view(1, 1, -1, weights[0].shape[3])
        return self._around(places, weights[0].shape[3]), weights[0].flatten(2, 3)

    def _around(self, places: Tensor, size: int) -> Tensor:
        """The keys of every row of chunks ``[..., chunks, size]``: those of its chunk and of the neighbouring ones."""
        keys = self.module._look_adjacent(places, self.module.num_chunks_before, self.module.num_chunks_after)
        return keys.repeat_interleave(size, 2)


class HashedChunks(LocalChunks):
    mixer = "softmax + hash buckets (LSH), chunks"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.order: Tensor | None = None

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        super().seen(func, args, kwargs, result)
        if func is torch.argsort:
            self.order = result

    def _sorted(self, length: int, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        order = self.order
        assert order is not None
        size = weights[0].shape[3]
        keys = self._around((order % length).unflatten(-1, (-1, size)), size)
        back = order.argsort(-1)[..., None].expand(-1, -1, -1, keys.shape[-1])
        # From the order of the buckets to [B, H, rounds, N, S].
        keys, parts = (x.gather(2, back).unflatten(2, (-1, length)) for x in (keys, weights[0].flatten(2, 3)))
        if len(weights) > 1:
            parts = parts * weights[1]
        return keys.transpose(2, 3).flatten(3), parts.transpose(2, 3).flatten(3)
