"""Mixture of heads (MoH): every token weights its heads, and shuts most of them.

    o_i = sum_h g_ih head_h(i) W_h

    LLaMA form   g_ih = 1 for the shared heads and for the ``routed`` others with the longest queries |q_ih|, else 0
    ViT form     g_ih = 2 a_i1 S softmax_s(x_i W_s)_h          for the S shared heads
                 g_ih = 2 a_i2 R p_ih / sum of the p chosen    for the R routed heads with the largest p_i = softmax_r(x_i W_r)
                 a_i = softmax(x_i W_a), two numbers

Heads are what is sparse, tokens are not: the map is ``g_ih P_ij``, with P as ``raw`` and the routing as ``gate``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Learned, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.maps import GatedMap
from workbench.mixers.scored import check_tensor, checked
from workbench.mixers.softmax import gated_softmax_attention


def norm_routing(q: Tensor, shared: int, routed: int) -> Tensor:
    """1 for the first ``shared`` heads and, in every token, for the ``routed`` others with the longest queries; ``[B, H, Q]``."""
    lengths = q.detach()[:, shared:].to(working_dtype(q.dtype)).norm(dim=-1)
    chosen = lengths.topk(routed, dim=1).indices
    gate = torch.zeros(q.shape[:3], dtype=lengths.dtype, device=q.device)
    gate[:, :shared] = 1
    gate[:, shared:].scatter_(1, chosen, 1.0)
    return gate


def norm_routed_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    shared: int,
    routed: int,
    scale: float | None = None,
) -> tuple[Tensor, GatedMap]:
    """MoH as in MoH-LLaMA3: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]`` to ``[B, H, Q, V]``.

    The first ``shared`` heads (half of them in the paper's model) always run; of the others each token keeps the ``routed`` (a
    quarter) with the longest queries. Rotary positions leave lengths alone, so q may come before or after them. The choice
    carries no gradient. Source: Jin et al., MoH, arXiv:2410.11842, and its code.
    """
    _, h, _, _ = checked(q, k, v, mask)
    _check_counts(h, shared, routed)
    return gated_softmax_attention(q, k, v, norm_routing(q, shared, routed), mask=mask, scale=scale)


def softmax_routing(router: Tensor, balance: Tensor, shared: int, routed: int) -> Tensor:
    """Head weights ``[B, H, Q]`` of the ViT form from ``router`` ``[B, H, Q]`` (logits, shared heads first) and ``balance``
    ``[B, 2, Q]`` (logits of the shared and the routed part). Where one part has no heads the other is not scaled by it."""
    work = working_dtype(router.dtype)
    always = router[:, :shared].to(work).softmax(1) * shared
    likely = router[:, shared:].to(work).softmax(1)
    if routed:
        kept = torch.zeros_like(likely).scatter(1, likely.topk(routed, dim=1).indices, 1.0)
        likely = likely * kept
        likely = likely / likely.sum(1, keepdim=True).clamp(min=torch.finfo(work).eps) * routed
    if shared and routed:
        parts = balance.to(work).softmax(1) * 2
        always, likely = always * parts[:, :1], likely * parts[:, 1:]
    return torch.cat([always, likely], 1)


def softmax_routed_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    router: Tensor,
    balance: Tensor,
    *,
    mask: Mask,
    shared: int,
    routed: int,
    scale: float | None = None,
) -> tuple[Tensor, GatedMap]:
    """MoH as in MoH-ViT: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``; heads weighted by ``softmax_routing``.

    ``router`` ``[B, H, Q]`` are logits of the heads, the ``shared`` ones first; ``balance`` ``[B, 2, Q]`` logits of the two
    parts; ``routed`` heads beside the shared ones run in each token. A head's weight may exceed 1. Source: Jin et al., MoH,
    arXiv:2410.11842, with the normalisation of its code.
    """
    b, h, n, _ = checked(q, k, v, mask)
    _check_counts(h, shared, routed)
    check_tensor("router", router, (b, h, n))
    check_tensor("balance", balance, (b, 2, n))
    gate = softmax_routing(router, balance, shared, routed)
    out, found = gated_softmax_attention(q, k, v, gate, mask=mask, scale=scale)
    found.row_sum = "free"  # weights of heads may exceed 1, such rows are no sub-distributions
    return out, found


def _check_counts(heads: int, shared: int, routed: int) -> None:
    whole = all(isinstance(count, int) and not isinstance(count, bool) for count in (shared, routed))
    if not whole or shared < 0 or routed < 0 or not 0 < shared + routed <= heads or (shared < heads and not routed):
        got = f"shared={shared}, routed={routed}"
        raise WorkbenchError(
            f"shared and routed count heads of {heads}, with a routed one unless all are shared; got {got}"
        )


def _llama_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8)}
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True), "shared": 2, "routed": 1}


def _vit_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {
        "q": (2, 4, tokens, 8), "k": (2, 4, tokens, 8), "v": (2, 4, tokens, 8),
        "router": (2, 4, tokens), "balance": (2, 2, tokens),
    }  # fmt: skip
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(), "shared": 2, "routed": 1}


def _counts(heads: int) -> dict[str, int]:
    """Half of the heads shared, half of the rest routed."""
    shared = heads // 2
    return {"shared": shared, "routed": max(1, (heads - shared) // 2)}


def _prepare_llama(given: dict[str, Any]) -> dict[str, Any]:
    return {**{name: given[name] for name in ("q", "k", "v", "mask")}, **_counts(given["q"].shape[1])}


def _prepare_vit(given: dict[str, Any]) -> dict[str, Any]:
    names = ("q", "k", "v", "mask", "router")
    balance = given["balance"].mean(1).transpose(-1, -2)
    return {**{name: given[name] for name in names}, "balance": balance, **_counts(given["q"].shape[1])}


PAPER = "#29 MoH: Multi-Head Attention as Mixture-of-Head Attention (2024)"

VARIANTS = (
    Variant(
        name="mixture-of-heads-llama",
        paper=PAPER,
        family="weighted softmax",
        priority="B",
        operator=norm_routed_heads,
        example=_llama_example,
        causal=True,
        reference="SkyworkAI/MoH MoH-LLaMA3",
        recipe=Recipe(prepare=_prepare_llama),
    ),
    Variant(
        name="mixture-of-heads-vit",
        paper=PAPER,
        family="weighted softmax",
        priority="B",
        operator=softmax_routed_heads,
        example=_vit_example,
        reference="SkyworkAI/MoH MoH-ViT attention.py",
        note="the routing alone: the repository's ViT also has TransNeXt's scores (normalised q and k, log-spaced bias)",
        recipe=Recipe(learned={"router": Learned("H"), "balance": Learned("H2")}, prepare=_prepare_vit),
    ),
)
