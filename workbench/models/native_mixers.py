"""Sequence mixers of the native model: modules around the operators of ``workbench.mixers``.

A mixer is called ``mixer(x, q, k, v, mask, xk)`` with the normalised input ``x`` (``[B, T, D]``, or ``[B, T, H, D]`` where heads
have inputs of their own), ``q [B, H, Q, E]``, ``k v [B, G, K, E]`` after rotary positions, and a ``Mask``; it returns the head
outputs ``z [B, H, Q, E]`` and the ``AttentionMap`` with ``z == map.matvec(v)``. Every self-attention variant of the catalogue is
a mixer too, by its recipe (``native_variants.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from workbench.errors import Refused
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.patterns.explicit import ExplicitMap
from workbench.patterns.softmax import SoftmaxMap

if TYPE_CHECKING:
    from workbench.models.native_config import NativeConfig

_MASK_LIMIT = 2**26


class SoftmaxMixer(nn.Module):
    """Softmax attention through torch's fused kernel.

    While a hook is attached to ``hook_attn_scores`` or ``hook_pattern`` the scores are built explicitly, so that they can be
    edited; the map is then the pattern that was used.
    """

    keeps_inputs = False
    """Whether a cache has to hold the inputs and queries of earlier tokens too."""
    ignores: tuple[str, ...] = ()
    """Those of q, k and v that it has no use for."""
    steps = True
    exactness = "exact"
    """Whether tokens can be added one by one."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.scale = config.head_width**-0.5 if config.scale is None else config.scale
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, xk: Tensor | None = None
    ) -> tuple[Tensor, AttentionMap]:
        if self.hook_pattern.fwd_hooks or self.hook_attn_scores.fwd_hooks:
            return self._explicit(q, k, v, mask)
        queries, keys = q.shape[2], k.shape[2]
        plain = mask.keys is None and (mask.offset == 0 or queries == 1)
        allowed = None
        if not plain:
            if queries * keys > _MASK_LIMIT:
                raise Refused(
                    f"padding or a cache with {queries} x {keys} positions would need an explicit mask; "
                    "run texts of one length, or one text at a time"
                )
            allowed = mask.tile(slice(0, queries), slice(0, keys), q.device)
        if mask.keys is not None:
            own = torch.arange(queries, device=q.device)[:, None] + mask.offset == torch.arange(keys, device=q.device)
            allowed = own if allowed is None else allowed | own
        z = nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=plain and mask.causal and queries > 1,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        if mask.keys is not None:
            z = z * mask.keys[:, None, mask.offset : mask.offset + queries, None]
        # A padded query sees only padding and gets a zero row, as the map has it.
        return z, SoftmaxMap(q.detach(), k.detach(), mask=_rows_of_padding_hidden(mask), scale=self.scale)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, AttentionMap]:
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * self.scale
        allowed = _rows_of_padding_hidden(mask).tile(slice(0, q.shape[2]), slice(0, k.shape[2]), q.device)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        scores = self.hook_attn_scores(scores)
        blind = scores.isneginf().all(-1, keepdim=True)
        pattern = self.hook_pattern(scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0))
        z = pattern @ v.repeat_interleave(group, 1)
        lse = scores.detach().logsumexp(-1)
        return z, ExplicitMap(pattern, lse, offset=mask.offset, kv_heads=k.shape[1])


class GatedSoftmaxMixer(SoftmaxMixer):
    """Head-gated softmax attention: z_h(i) = sigmoid(x_i w_h + b_h) sum_j P_ij v_j (arXiv 2505.06708, head-wise form)."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__(config)
        self.W_gate = nn.Parameter(torch.zeros(config.width, config.heads))
        self.b_gate = nn.Parameter(torch.zeros(config.heads))
        self.hook_gate = HookPoint()

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, xk: Tensor | None = None
    ) -> tuple[Tensor, AttentionMap]:
        z, raw = super().forward(x, q, k, v, mask)
        logits = torch.einsum("bthd,dh->bth", x, self.W_gate) if x.ndim == 4 else x @ self.W_gate
        gate = self.hook_gate(torch.sigmoid(logits + self.b_gate)).transpose(1, 2)
        return z * gate[..., None], GatedMap(raw, gate.detach())


def _rows_of_padding_hidden(mask: Mask) -> Mask:
    """With left padding a padded query sees no key at all; with right padding hide its row too, as the output does."""
    if mask.keys is None:
        return mask
    documents = torch.where(mask.keys, 0, -1 - torch.arange(mask.keys.shape[1], device=mask.keys.device))
    return Mask(causal=mask.causal, keys=mask.keys, documents=documents, offset=mask.offset)


MIXERS: dict[str, type[SoftmaxMixer]] = {"softmax": SoftmaxMixer, "gated-softmax": GatedSoftmaxMixer}
"""Mixers through torch's fused kernel, whose scores and pattern can be edited."""


def make_mixer(config: NativeConfig) -> nn.Module:
    """The mixer that a configuration names."""
    if config.mixer in MIXERS:
        return MIXERS[config.mixer](config)
    from workbench.models.native_variants import VariantMixer

    return VariantMixer(config)
