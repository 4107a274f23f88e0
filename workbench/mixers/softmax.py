"""Softmax attention and its map: full, causal, windowed, prefix, documents, padding, grouped heads, softcap, sink logits, bias."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Bias, Scores
from workbench.maps import AttentionMap, GatedMap


class SoftmaxMap(AttentionMap):
    """M_ij = exp(s_ij - lse_i), with s as in ``kernels/scores.py``.

    ``q`` ``[B, H, Q, E]`` and ``k`` ``[B, G, K, E]`` are what the scores are made of, after rotary positions; ``lse``
    ``[B, H, Q]`` is the natural logarithm of the row's denominator, sink included, computed on first use if not given.
    Rows that see no key are zero and have lse -inf. ``row_sum`` is ``"<=1"`` with a sink or if such rows are possible.
    Tensors are detached; narrower types than float32 are answered in float32.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor | None = None,
        *,
        mask: Mask,
        scale: float | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
        bias: Bias | None = None,
    ) -> None:
        bias = bias.detach() if isinstance(bias, Tensor) else bias
        try:
            scores = Scores(q.detach(), k.detach(), mask, scale, softcap, None if sink is None else sink.detach(), bias)
        except ValueError as error:
            raise WorkbenchError(str(error)) from None
        super().__init__(scores.shape, kv_heads=k.shape[1], offset=mask.offset)
        if lse is not None and tuple(lse.shape) != self.shape[:3]:
            raise WorkbenchError(f"lse is [B, H, Q] = {list(self.shape[:3])}; got {list(lse.shape)}")
        self.scores = scores
        self._lse = None if lse is None else lse.detach().to(scores.dtype)
        hidden = isinstance(bias, Tensor) and bool(torch.isneginf(bias).any())
        self.row_sum = "1" if sink is None and not hidden and mask.covers(self.shape[2], self.shape[3]) else "<=1"

    @property
    def mask(self) -> Mask:
        return self.scores.mask

    @property
    def lse(self) -> Tensor:
        """Natural log of the row denominators, ``[B, H, Q]``."""
        if self._lse is None:
            b, h, q, k = self.shape
            step = max(1, 2**22 // max(1, b * h * k))
            parts = [self._score_lse(self.scores.tile(slice(lo, min(q, lo + step)), slice(0, k))) for lo in range(0, q, step)]
            self._lse = torch.cat(parts, 2)
        return self._lse

    def _score_lse(self, scores: Tensor) -> Tensor:
        out = scores.logsumexp(-1)
        sink = self.scores.sink_logits()
        return out if sink is None else torch.logaddexp(out, sink)

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        scores = self.scores.tile(slice(lo, hi), slice(0, self.shape[3]))
        lse = self.lse[:, :, lo:hi, None]
        return (scores - lse.masked_fill(lse.isneginf(), 0.0)).exp()


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    bias: Bias | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """Plain softmax attention: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]`` to output ``[B, H, Q, V]`` and map.

    The output is differentiable and has v's dtype; the map is detached.
    """
    found = SoftmaxMap(q, k, mask=mask, scale=scale, softcap=softcap, sink=sink, bias=bias)
    b, h, n, m = found.shape
    if v.ndim != 4 or tuple(v.shape[:3]) != (b, k.shape[1], m):
        raise WorkbenchError(f"v is [B, G, K, width] = {[b, k.shape[1], m, 'width']}; got {list(v.shape)}")
    group = h // k.shape[1]
    work = found.scores.dtype
    s = (q.to(work) * found.scores.scale) @ k.to(work).repeat_interleave(group, 1).transpose(-1, -2)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + (bias if isinstance(bias, Tensor) else bias(0, n)).to(work)
    allowed = mask.tile(slice(0, n), slice(0, m), q.device)
    if allowed is not None:
        s = s.masked_fill(~allowed, float("-inf"))
    top = s.amax(-1, keepdim=True) if sink is None else torch.maximum(s.amax(-1, keepdim=True), sink.to(work)[None, :, None, None])
    top = top.detach().masked_fill(top.isneginf(), 0.0)
    weights = (s - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink.to(work)[None, :, None, None] - top).exp()
    found._lse = (total.log() + top).squeeze(-1).detach()
    weights = weights / total.masked_fill(total == 0, 1.0)
    return (weights.to(v.dtype) @ v.repeat_interleave(group, 1)), found


def gated_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    bias: Bias | None = None,
) -> tuple[Tensor, GatedMap]:
    """Softmax attention whose head outputs are multiplied by ``gate`` ``[B, H, Q]`` (head-wise gate, arXiv 2505.06708)."""
    out, raw = softmax_attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sink=sink, bias=bias)
    found = GatedMap(raw, gate.detach())
    return out * gate[..., None].to(out.dtype), found
