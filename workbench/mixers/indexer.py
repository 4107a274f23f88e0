"""DeepSeek sparse attention: a light indexer ranks all earlier tokens, attention reads the best ``top`` of them.

    I_ij = sum_h w_ih ReLU(scale q^I_ih . k^I_j)            the indexer: few narrow heads, one key per token
    P_ij = softmax over the ``top`` visible j with the largest I_ij, the same for all heads; 0 elsewhere

Source: DeepSeek-AI, DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention. The choice is not
differentiated: the indexer is trained to match the summed attention, not through the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench import attention_map
from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.chosen import RoutedSparseMap, best, chosen_keys
from workbench.mixers.local import local_softmax
from workbench.mixers.scored import check_tensor, checked, visible
from workbench.patterns.lazy import LazyMap


def indexer_map(
    index_q: Tensor, index_k: Tensor, index_weights: Tensor, *, mask: Mask, scale: float | None = None
) -> LazyMap:
    """The indexer's scores as a map ``[B, 1, Q, K]``, zero where the mask hides.

    ``index_q`` ``[B, I, Q, D]``, ``index_k`` ``[B, K, D]``, ``index_weights`` ``[B, I, Q]`` of either sign; ``scale`` is inside
    the ReLU (default ``D ** -0.5``).
    """
    check_tensor("index_q", index_q, ("B", "I", "Q", "D"))
    b, heads, n, width = index_q.shape
    check_tensor("index_k", index_k, (b, "K", width))
    check_tensor("index_weights", index_weights, (b, heads, n))
    m, work = index_k.shape[1], working_dtype(index_q.dtype)
    queries, weights = index_q.detach().to(work), index_weights.detach().to(work)
    keys = index_k.detach().to(work)[:, None].transpose(-1, -2)
    factor = width**-0.5 if scale is None else scale

    def rows(lo: int, hi: int) -> Tensor:
        hits = (factor * queries[:, :, lo:hi] @ keys).relu()
        scores = (weights[:, :, lo:hi, None] * hits).sum(1, keepdim=True)
        return scores.masked_fill(~visible(mask, hi - lo, m, scores.device, lo), 0.0)

    return LazyMap((b, 1, n, m), rows, offset=mask.offset, sign="signed", row_sum="free")


def indexed_keys(indexer: AttentionMap, top: int, mask: Mask) -> Tensor:
    """Keys ``[B, 1, Q, S]`` with the ``top`` largest scores among those that each row sees, in order of position, -1 where it
    sees fewer; S is at most ``top``. Equal scores: the earlier key."""
    b, _, n, m = indexer.shape
    step = max(1, attention_map.CHUNK // (b * m))
    parts = []
    for lo in range(0, n, step):
        hi = min(n, lo + step)
        scores = indexer.rows(lo, hi)
        seen = visible(mask, hi - lo, m, scores.device, lo)
        if seen.shape[1] != 1:
            raise WorkbenchError("mask is the same for all heads here, as the choice is; got a mask per head")
        seen = seen.expand_as(scores)
        parts.append(chosen_keys(best(scores, top, seen), min(top, m)))
    return torch.cat(parts, 2)


def deepseek_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    top: int = 2048,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
    index_scale: float | None = None,
) -> tuple[Tensor, RoutedSparseMap]:
    """Attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]``, v ``[B, G, K, V]`` on the ``top`` keys of each row that the
    indexer (``index_q`` ``[B, I, Q, D]``, ``index_k`` ``[B, K, D]``, ``index_weights`` ``[B, I, Q]``) ranks highest.

    The map holds S weights per row; ``map.native()`` is the indexer's map ``[B, 1, Q, K]``, made when asked.
    """
    checked(q, k, v, mask)
    indexer = indexer_map(index_q, index_k, index_weights, mask=mask, scale=index_scale)
    b, n, m = q.shape[0], q.shape[2], k.shape[2]
    check_tensor("index_q", index_q, (b, "I", n, "D"))
    check_tensor("index_k", index_k, (b, m, "D"))
    listed = indexed_keys(indexer, top, mask)
    out, found = local_softmax(q, k, v, listed, scale=scale, offset=mask.offset)
    return out, RoutedSparseMap(found, indexer)


# ---------------------------------------------------------------------------- records


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6)}
    index = {"index_q": (2, 3, tokens, 4), "index_k": (2, tokens, 4), "index_weights": (2, 3, tokens)}
    return {**example_tensors(seed, dtype, **shapes, **index), "top": 4, "mask": Mask(causal=True)}


def prepare_indexer(given: dict[str, Any]) -> dict[str, Any]:
    """One indexer key per token, the mean over key heads; 8 keys are read."""
    names = ("q", "k", "v", "mask", "index_q", "index_weights")
    return {**{name: given[name] for name in names}, "index_k": given["index_k"].mean(1), "top": 8}


VARIANTS = (
    Variant(
        name="deepseek-sparse-attention",
        paper="DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention (2025)",
        family="routing",
        priority="A",
        operator=deepseek_sparse_attention,
        example=_example,
        causal=True,
        reference="HF DeepseekV32Indexer",
        note="the reference multiplies the weights by the root of 1 / I, which changes no choice",
        recipe=Recipe(
            learned={"index_q": Learned("H16"), "index_k": Learned("G16"), "index_weights": Learned("H")},
            prepare=prepare_indexer,
        ),
    ),
)
