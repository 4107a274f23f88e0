"""Recorders of linear attention and linear recurrences: lightning attention (MiniMax), RG-LRU (RecurrentGemma), RWKV-4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.maps import GatedMap
from workbench.models.recorders.state import CONV, StateRecorder, StateWatch, masked, work
from workbench.patterns.linear import ChannelDecayMap, LinearMap
from workbench.patterns.prefix import PrefixSoftmaxMap

_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__)


class Lightning(StateWatch):
    """M_ij = (q_i . k_j) exp(-slope (i - j)). q, k and v are split off one projection; the output is its blocks side by side."""

    mixer = "linear attention + decay (lightning)"
    missing = "norm and output gate (the map is before them); editing pattern; decoding from a cache"

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        return module.num_attention_heads, module.num_attention_heads, module.head_dim

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        if func in (torch.split, Tensor.split) and not self.met and kwargs.get("dim") == 3:
            q, k, v = result
            self.build(lambda: self._map(q, k))
            return q, k, self.session.on_values(self.layer, v)
        if func is torch.cat and self.met and result.ndim == 4:
            return self.session.on_output(self.layer, result.transpose(1, 2)).transpose(1, 2)
        return result

    def _map(self, q: Tensor, k: Tensor) -> AttentionMap:
        shown = self.shown(q.shape[1], q)
        q, k, slope = work(q.transpose(1, 2), k.transpose(1, 2), self.module.slope_rate)
        return LinearMap(masked(q, shown), masked(k, shown), -slope.flatten(), causal=True, value_space="SiLU V")


class RgLru(StateWatch):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t) per channel; the first token of a text empties the state and enters whole."""

    mixer = "gated linear recurrence (RG-LRU)"
    missing = "output gate (the map is before it); editing pattern; decoding from a cache"
    heeds_padding = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gates: list[Tensor] = []

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        width = module.recurrent_param.shape[0]
        return width, width, 1

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().run(forward, args, kwargs)
        return self.session.on_output(self.layer, output[..., None])[..., 0]

    def pass_on(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = self.given["activations"]
        if func in _PRODUCTS and len(self.gates) == 2 and args[0] is x and not self.met:
            self.build(self._map)
            new = self.session.on_values(self.layer, x[..., None])
            return (new[..., 0], *args[1:]), kwargs
        return args, kwargs

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        if func is torch.sigmoid and len(self.gates) < 2:
            self.gates.append(result)
        return result

    def _map(self) -> AttentionMap:
        enters, decays, strength = work(*self.gates, self.module.recurrent_param)
        log_decay = -8.0 * decays * torch.nn.functional.softplus(strength)
        reset = (self.given["position_ids"] == 0)[..., None].expand_as(log_decay)
        scale = torch.where(reset, 1.0, torch.sqrt(1 - torch.exp(2 * log_decay)))
        log_decay = log_decay.masked_fill(reset, float("-inf"))
        shown = self.shown(enters.shape[1], enters)
        write = masked((enters * scale).transpose(1, 2)[..., None], shown)
        read = masked(torch.ones_like(write), shown)
        return ChannelDecayMap(read, write, log_decay.transpose(1, 2)[..., None], sign="nonnegative", value_space=CONV)


class Rwkv(StateRecorder):
    """WKV of RWKV-4, per channel: softmax over keys j of k_j - (i - 1 - j) w for j < i, and of u + k_i for the token itself."""

    mixer = "softmax of decaying keys (RWKV-4)"
    missing = "receptance (the map is before it); editing pattern; decoding from a cache"
    heeds_padding = False
    functions = ("rwkv_linear_attention",)
    values = "value"
    statistics = StateRecorder.statistics | {"entropy", "lse"}

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        return module.attention_hidden_size, module.attention_hidden_size, 1

    def unfold(self, x: Tensor) -> Tensor:
        return x[..., None]

    def fold(self, x: Tensor) -> Tensor:
        return x[..., 0]

    def map(self, given: Mapping[str, Any]) -> AttentionMap:
        key, decay, bonus = work(given["key"].transpose(1, 2), given["time_decay"], given["time_first"])
        found = PrefixSoftmaxMap(key, decay.exp(), bonus)
        shown = self.shown(key.shape[2], key)  # padding comes after the text: no real token sees it
        return found if shown is None else GatedMap(found, shown[:, None].expand_as(key))
