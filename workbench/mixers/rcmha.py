"""Relative convolutional multi-head attention (RCMHA): depth-wise convolutions of queries, keys and values, then the scores of
Transformer-XL.

    q~_ic = sum_t f_ct q_{i - t, c},   k~, v~ alike,   o_ic = sum_j P_ij v~_jc = sum_l (sum_j P_ij f_{c, j - l}) v_lc

P belongs to convolved values; on the tokens' own values every channel has a map of its own, the product of P and that channel's
band of W taps. Convolutions look back where the mask is causal and to both sides where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index
from workbench.mixers.relative import XL_PARAMETERS, prepare_xl, transformer_xl_attention
from workbench.mixers.scored import check_tensor, checked


def rcmha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_filter: Tensor,
    k_filter: Tensor,
    v_filter: Tensor,
    relative: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    *,
    mask: Mask,
    first: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ConvolvedValuesMap]:
    """RCMHA of q ``[B, H, N, E]``, k ``[B, G, N, E]`` and v ``[B, G, N, V]``, all before their convolution.

    ``q_filter`` ``[H, E, W]``, ``k_filter`` ``[G, E, W]`` and ``v_filter`` ``[G, V, W]`` hold W taps per channel: with a causal
    mask tap t is for the token t steps back, else the middle tap is for the token itself and W is odd. ``relative``,
    ``content_bias``, ``position_bias`` and ``first`` are those of ``transformer_xl_attention``. Queries stand on the keys.
    ``mask`` is about convolved keys: a token that it hides still enters the convolutions of its neighbours.
    Source: RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling.
    """
    _, h, n, m = checked(q, k, v, mask)
    if n != m or mask.offset:
        raise WorkbenchError(f"q and k are of one length with mask.offset=0; got {n}, {m} and {mask.offset}")
    g, width = k.shape[1], v_filter.shape[-1]
    check_tensor("v_filter", v_filter, (g, v.shape[3], "W"))
    check_tensor("q_filter", q_filter, (h, q.shape[3], width))
    check_tensor("k_filter", k_filter, (g, k.shape[3], width))
    if not mask.causal and width % 2 == 0:
        raise WorkbenchError(f"filters without a causal mask have an odd number of taps; got {width}")
    ahead = 0 if mask.causal else width // 2
    out, inner = transformer_xl_attention(
        convolved(q, q_filter, ahead),
        convolved(k, k_filter, ahead),
        convolved(v, v_filter, ahead),
        relative,
        content_bias,
        position_bias,
        mask=mask,
        first=first,
        scale=scale,
    )
    inner.value_space = "post-conv V"
    return out, ConvolvedValuesMap(inner, v_filter, ahead)


def convolved(x: Tensor, taps: Tensor, ahead: int = 0) -> Tensor:
    """``sum_t taps[h, c, t] x[b, h, i + ahead - t, c]`` for x ``[B, H, N, E]`` and taps ``[H, E, W]``; zero beyond the ends."""
    width = taps.shape[2]
    spread = pad(x, (0, 0, width - 1 - ahead, ahead)).unfold(2, width, 1)
    work = torch.promote_types(x.dtype, taps.dtype)
    return (spread.to(work) * taps.flip(-1)[:, None].to(work)).sum(-1).to(x.dtype)


class ConvolvedValuesMap(AttentionMap):
    """Attention on convolved values, as a map of the tokens' own: channel c has ``P F_c`` with F_c the band of its taps.

    ``inner`` is P ``[B, H, N, N]``, ``taps`` ``[G, V, W]``. Rows are the mean over channels, P times the mean band; ``matvec``
    convolves channel by channel. ``channel(c)`` is the map of one channel and ``native()`` is P.
    """

    row_sum = "free"
    channelwise = True

    def __init__(self, inner: AttentionMap, taps: Tensor, ahead: int) -> None:
        super().__init__(inner.shape, kv_heads=inner.kv_heads, offset=inner.offset)
        self.inner, self.taps, self.ahead = inner, taps.detach(), ahead
        mean = self.taps.to(working_dtype(taps.dtype)).mean(1, keepdim=True)
        self._mean = mean.repeat_interleave(self.shape[1] // mean.shape[0], 0)
        self.sign = "signed" if bool((self.taps < 0).any()) else inner.sign

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._through(self.inner.rows(lo, hi), self._mean)

    def native(self) -> AttentionMap:
        """The attention on the convolved values."""
        return self.inner

    def channel(self, index: int) -> AttentionMap:
        """The map of one channel of every head."""
        if not 0 <= index < self.taps.shape[1]:
            raise WorkbenchError(f"channel {index} of {self.taps.shape[1]}")
        return ConvolvedValuesMap(self.inner, self.taps[:, index : index + 1], self.ahead)

    def heads(self, indices: Sequence[int]) -> ConvolvedValuesMap:
        chosen = head_index(indices, self.shape[1])
        group = self.shape[1] // self.kv_heads
        return ConvolvedValuesMap(self.inner.heads(chosen), self.taps[[i // group for i in chosen]], self.ahead)

    def entropy(self) -> Tensor:
        raise Refused("convolved weights are no distribution: take native().entropy()")

    def row_sums(self) -> Tensor:
        ones = self._mean.new_ones(self.shape[0], self.shape[1], self.shape[3], 1)
        sums = convolved(ones, self._mean, self.ahead)
        return _per_head(self.inner).matvec(sums).squeeze(-1)

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        self._check_width(v)
        return self.inner.matvec(convolved(v, self.taps, self.ahead))

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        self._check_width(y)
        return _back(self.inner.rmatvec(y), self.taps, self.ahead)

    def _received(self) -> Tensor:
        return _back(self.inner.received()[..., None], self._mean, self.ahead).squeeze(-1)

    def _through(self, weights: Tensor, taps: Tensor) -> Tensor:
        """Rows on convolved values ``[B, H, R, K]`` to rows on raw ones, with one filter per head ``[H, 1, W]``."""
        return _back(weights.transpose(2, 3), taps.to(weights.dtype), self.ahead).transpose(2, 3)

    def _check_width(self, values: Tensor) -> None:
        if values.shape[3] != self.taps.shape[1]:
            raise WorkbenchError(f"this map has {self.taps.shape[1]} channels per head; got {list(values.shape)}")


def _back(y: Tensor, taps: Tensor, ahead: int) -> Tensor:
    """The adjoint of ``convolved``: a convolution with the taps in reverse. One filter for all channels if E is 1 in it."""
    return convolved(y, taps.expand(-1, y.shape[3], -1).flip(-1), taps.shape[2] - 1 - ahead)


def _per_head(amap: AttentionMap) -> AttentionMap:
    """The map with a value head for every query head."""
    return amap if amap.kv_heads == amap.shape[1] else amap.heads(range(amap.shape[1]))


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {
        "q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6), "relative": (4, tokens, 8),
        "q_filter": (4, 8, 3), "k_filter": (2, 8, 3), "v_filter": (2, 6, 3),
        "content_bias": (4, 8), "position_bias": (4, 8),
    }  # fmt: skip
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    return {**prepare_xl(given), **{name: given[name] for name in ("q_filter", "k_filter", "v_filter")}}


def _first_tap(shape: tuple[int, ...]) -> Tensor:
    """Filters that start as none: all weight on the token itself."""
    taps = torch.zeros(shape)
    taps[..., 0] = 1
    return taps


VARIANTS = (
    Variant(
        name="rcmha",
        paper="#23 RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling (2023)",
        family="weighted softmax",
        priority="C",
        operator=rcmha_attention,
        example=_example,
        causal=True,
        reference="the paper's abstract",
        note="taps per channel and head, one-sided under a causal mask: the paper's kernel and padding were not checked",
        recipe=Recipe(
            parameters={
                **XL_PARAMETERS,
                "q_filter": Parameter("HE3", _first_tap),
                "k_filter": Parameter("GE3", _first_tap),
                "v_filter": Parameter("GE3", _first_tap),
            },
            prepare=_prepare,
        ),
    ),
)
