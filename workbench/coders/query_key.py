"""The query-key half of an attention layer on its own: from normed inputs to queries and keys, and from these to attention maps.

    q_h(t) = R_t norm_q(x_t W_Q[h] + b_Q[h]),   k_h(s) = R_s norm_k(x_s W_K[h] + b_K[h])
    A[h, t, s] = exp(scale q_h(t) . k_h(s)) / sum over the visible s'      (``kernels/scores.py``: softcap, sink, masks)

R_t turns the pairs of the first ``2 M`` dimensions by the angles ``t * rates[m]``: (i, i + M), or (2 i, 2 i + 1) if ``adjacent``.
Only differences of positions matter, so that t counts from the first column whatever padding there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.flash_attention import flash_attention
from workbench.kernels.mask import Mask
from workbench.patterns.softmax import SoftmaxMap


@dataclass(frozen=True)
class QueryKeyWeights:
    """Weights of H heads with keys of their own (those of grouped heads repeated): ``q k [H, D, E]``, biases ``[H, E]`` or None,
    ``q_norm k_norm [E]`` scales of an RMS norm per head or None, ``rates [M]`` rotary angles per position or None, ``sink [H]``
    logits or None. ``rotary_scale`` multiplies cosine and sine (YaRN)."""

    q: Tensor
    k: Tensor
    b_q: Tensor | None = None
    b_k: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    rates: Tensor | None = None
    sink: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    causal: bool = True
    adjacent: bool = False
    rotary_scale: float = 1.0
    eps: float = 1e-6


class QueryKey(nn.Module):
    """Queries and keys of H heads as a module; weights are trainable, rates and sink logits are not."""

    b_Q: nn.Parameter | None
    b_K: nn.Parameter | None
    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None
    rates: Tensor | None
    sink: Tensor | None

    def __init__(self, weights: QueryKeyWeights) -> None:
        super().__init__()
        if weights.q.ndim != 3 or weights.q.shape != weights.k.shape:
            raise WorkbenchError(
                f"queries and keys have weights [H, D, E] each; got {list(weights.q.shape)} and {list(weights.k.shape)}"
            )
        self.heads, self.width, self.head_width = weights.q.shape
        self.scale = self.head_width**-0.5 if weights.scale is None else weights.scale
        self.softcap, self.window, self.causal = weights.softcap, weights.window, weights.causal
        self.adjacent, self.rotary_scale, self.eps = weights.adjacent, weights.rotary_scale, weights.eps
        self.W_Q, self.W_K = _parameter(weights.q), _parameter(weights.k)
        given = {"b_Q": weights.b_q, "b_K": weights.b_k, "q_norm": weights.q_norm, "k_norm": weights.k_norm}
        for name, part in given.items():
            self.register_parameter(name, None if part is None else _parameter(part))
        self.register_buffer("rates", None if weights.rates is None else weights.rates.detach().double().clone())
        self.register_buffer("sink", None if weights.sink is None else weights.sink.detach().clone())

    @property
    def settings(self) -> dict[str, Any]:
        """What is not a tensor, JSON-able: arguments of ``QueryKeyWeights``."""
        names = ("scale", "softcap", "window", "causal", "adjacent", "rotary_scale", "eps")
        return {name: getattr(self, name) for name in names}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Rates stay float64 whatever the weights become: a position times a rounded rate is a wrong angle."""
        rates = self.rates
        super()._apply(fn, recurse)
        if rates is not None:
            self.rates = rates.to(self.W_Q.device)
        return self

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q and k ``[B, H, T, E]`` after rotary positions, of x ``[B, T, D]``."""
        if x.ndim != 3 or x.shape[2] != self.width:
            raise WorkbenchError(f"attention reads sequences [B, T, D = {self.width}]; got {list(x.shape)}")
        q = self._rotated(_normed(_projected(x, self.W_Q, self.b_Q), self.q_norm, self.eps))
        k = self._rotated(_normed(_projected(x, self.W_K, self.b_K), self.k_norm, self.eps))
        return q, k

    def mask(self, padding: Tensor | None) -> Mask:
        """Who sees whom: causality and window of the layer, and ``padding`` ``[B, T]`` bool, False on tokens that are none."""
        return Mask(causal=self.causal, window=self.window, keys=padding, queries=padding)

    def mix(self, x: Tensor, values: Tensor, padding: Tensor | None = None) -> Tensor:
        """``sum_s A[h, t, s] values[h, s]``: values ``[B, H, T, V]`` to ``[B, H, T, V]``, in chunks of rows, never T x T."""
        q, k = self.queries_keys(x)
        found = flash_attention(
            q.contiguous(), k.contiguous(), values.contiguous(), mask=self.mask(checked_padding(x, padding)), scale=self.scale,
            softcap=self.softcap, sink=self.sink,
        )  # fmt: skip
        return found.output

    def attention(self, x: Tensor, padding: Tensor | None = None) -> SoftmaxMap:
        """The map ``[B, H, T, T]``, detached."""
        with torch.no_grad():
            q, k = self.queries_keys(x)
        mask = self.mask(checked_padding(x, padding))
        return SoftmaxMap(q, k, mask=mask, scale=self.scale, softcap=self.softcap, sink=self.sink)

    def _rotated(self, x: Tensor) -> Tensor:
        if self.rates is None:
            return x
        half = len(self.rates)
        angles = torch.arange(x.shape[2], device=x.device, dtype=torch.float64)[:, None] * self.rates
        cos, sin = ((part * self.rotary_scale).to(x.dtype) for part in (angles.cos(), angles.sin()))
        turned, rest = x[..., : 2 * half], x[..., 2 * half :]
        a, b = (turned[..., 0::2], turned[..., 1::2]) if self.adjacent else turned.chunk(2, dim=-1)
        new = (a * cos - b * sin, b * cos + a * sin)
        joined = torch.stack(new, -1).flatten(-2) if self.adjacent else torch.cat(new, -1)
        return torch.cat([joined, rest], -1) if rest.shape[-1] else joined


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[B, H, T, E]`` of x ``[B, T, D]``, weight ``[H, D, E]`` and bias ``[H, E]``."""
    h, d, e = weight.shape
    made = (x @ weight.transpose(0, 1).reshape(d, h * e)).unflatten(-1, (h, e))
    return (made if bias is None else made + bias).transpose(1, 2)


def checked_padding(x: Tensor, padding: Tensor | None) -> Tensor | None:
    """``padding`` if it is bool ``[B, T]``; None where no token is padding."""
    if padding is None:
        return None
    if padding.dtype != torch.bool or padding.shape != x.shape[:2]:
        raise WorkbenchError(
            f"padding is bool [B, T] = {list(x.shape[:2])}, False on tokens that are none; got {padding.dtype} "
            f"{list(padding.shape)}"
        )
    return None if bool(padding.all()) else padding.to(x.device)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone().contiguous())


def _normed(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    return x if scale is None else x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * scale
