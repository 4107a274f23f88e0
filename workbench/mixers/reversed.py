"""Reversed attention: every token sends its value to the tokens it attends to, instead of gathering theirs.

    F    = softmax(scale q k^T)          row j: where token j sends
    M_ij = F_ji p_hj m_j,   o = M v

The head selector p_hj says which heads token j sends through (a softmax over heads), the message controller m_j whether it sends
at all (a sigmoid, multiplied over the layers so far). Column j of head h sums to p_hj m_j: mass is sent, never created. The sum
over heads is the soft tree of which token depends on which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index
from workbench.mixers.scored import check_tensor, checked, masked_softmax, plain_scores, visible, weighted
from workbench.patterns.lazy import LazyMap
from workbench.patterns.softmax import SoftmaxMap


class ReversedMap(AttentionMap):
    """M_ij = F_ji s_j for square softmax attention F (``forward``) and what each token sends, ``sender`` s ``[B, H, N]``.

    A row is a column of F: it costs all scores of that key, never N x N numbers. Received mass is s times the row sums of F.
    """

    row_sum = "columns"

    def __init__(self, forward: SoftmaxMap, sender: Tensor) -> None:
        b, h, n, m = forward.shape
        if n != m or forward.offset:
            raise WorkbenchError(f"a map is reversed if it is square; got {[n, m]} with offset {forward.offset}")
        if tuple(sender.shape) != (b, h, n):
            raise WorkbenchError(f"sender is [B, H, N] = {[b, h, n]}; got {list(sender.shape)}")
        super().__init__((b, h, n, n), kv_heads=forward.kv_heads)
        self.forward = forward
        self.sender = sender.detach().to(working_dtype(sender.dtype))
        self.sign = "signed" if bool((self.sender < 0).any()) else "nonnegative"

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._tile(lo, hi, 0, self.shape[3])

    def heads(self, indices: Sequence[int]) -> ReversedMap:
        return ReversedMap(self.forward.heads(indices), self.sender[:, head_index(indices, self.shape[1])])

    def dependency(self) -> LazyMap:
        """The sum over heads ``[B, 1, N, N]``: how much token i depends on what token j sends."""
        b, _, n, _ = self.shape
        return LazyMap(
            (b, 1, n, n), lambda lo, hi: self.rows(lo, hi).sum(1, keepdim=True), sign=self.sign, row_sum="columns"
        )

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        sent = self.forward._tile(k_lo, k_hi, q_lo, q_hi).transpose(-1, -2)
        return sent * self.sender[:, :, None, k_lo:k_hi]

    def _received(self) -> Tensor:
        return self.forward.row_sums() * self.sender


def reversed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selector: Tensor,
    sender: Tensor,
    *,
    mask: Mask = Mask(),
    scale: float | None = None,
) -> tuple[Tensor, ReversedMap]:
    """Attention that sends: q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]`` to ``[B, H, N, V]``.

    ``selector`` p ``[B, H, N]`` is the share of each head, ``sender`` m ``[B, N]`` the gate of each token, controllers of earlier
    layers included. ``mask`` is that of the forward attention: row j says to whom token j may send. Source: Ding et al.,
    Visual Dependency Transformers, arXiv:2304.03282.
    """
    b, h, n, m = checked(q, k, v, mask)
    if n != m or mask.offset:
        raise WorkbenchError(f"reversed attention has as many keys as queries; got {n} queries, {m} keys")
    check_tensor("selector", selector, (b, h, n))
    check_tensor("sender", sender, (b, n))
    forward, lse = masked_softmax(plain_scores(q, k, scale), visible(mask, n, n, q.device))
    sent = selector * sender[:, None]
    out = weighted(forward.transpose(-1, -2) * sent[:, :, None].to(forward.dtype), v)
    return out, ReversedMap(SoftmaxMap(q, k, lse, mask=mask, scale=scale), sent)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 6), "k": (2, 2, tokens, 6), "v": (2, 2, tokens, 5)}
    found = example_tensors(seed, dtype, **shapes, selector=(2, 4, tokens), sender=(2, tokens))
    return {**found, "selector": (found["selector"] / 0.1).softmax(1), "sender": found["sender"].sigmoid()}


def _prepare(parts: dict[str, Any]) -> dict[str, Any]:
    """Selector at temperature 0.1; the controller of this layer alone."""
    gates = {"selector": (parts["choice"] / 0.1).softmax(1), "sender": parts["message"].mean(1).sigmoid()}
    return {**{name: parts[name] for name in ("q", "k", "v", "mask")}, **gates}


VARIANTS = (
    Variant(
        name="reversed-attention",
        paper="#115 Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention (2023)",
        family="weighted softmax",
        priority="C",
        operator=reversed_attention,
        example=_example,
        reference="DependencyViT in a fork of pytorch-image-models; the authors' repository holds no code",
        note="Temperature 0.1 of the head selector follows that re-implementation.",
        recipe=Recipe(learned={"choice": Learned("H"), "message": Learned("H")}, prepare=_prepare),
    ),
)
