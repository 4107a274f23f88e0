"""Softmax whose queries are not its keys: pointers, summaries, selected rows, foreign keys, fewer keys.

pointer network   u_ij = w . tanh(k_j + q_i)                       the row is the output distribution over the input
Selfie            s_ij = (u + p_i) . k_j                           u summarises what is seen, p_i is the place to fill
DCAL, GLCA        the R rows with the largest response of attention rollout, over all keys
DCAL, PWCA        P_i over the keys of this image and of another one
MQSA              alpha P(q_i) + (1 - alpha) P(mean of the last L queries)
MAFormer, GLD     P_i over M keys W k, applied to W v: the token map is P W
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench import attention_map
from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.maps import GatedMap
from workbench.mixers.chosen import best, check_side
from workbench.mixers.scored import check_tensor, checked, masked_softmax, visible, weighted
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.algebra import ProductMap, SumMap
from workbench.patterns.lazy import LazyMap
from workbench.patterns.softmax import SoftmaxMap


def pointer_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *, mask: Mask = Mask()
) -> tuple[Tensor, LazyMap]:
    """Pointer network: decoder states q ``[B, H, Q, A]`` and encoder states k ``[B, G, K, A]``, both projected, ``weight``
    ``[H, A]``.

    The map's rows are the network's output: distributions over the K inputs. With v ``[B, G, K, E]`` they blend, as in the
    content-based attention that pointers come from. ``mask.keys`` hides inputs that are not there. Source: Vinyals et al.,
    arXiv:1506.03134, equation 3.
    """
    b, h, n, m = checked(q, k, v, mask)
    check_tensor("weight", weight, (h, q.shape[3]))
    weights, _ = masked_softmax(_additive(q, k, weight), visible(mask, n, m, q.device))
    held = q.detach(), k.detach(), weight.detach()

    def rows(lo: int, hi: int) -> Tensor:
        step = max(1, attention_map.CHUNK // (b * h * m * q.shape[3]))
        parts = [_additive(held[0][:, :, x : min(hi, x + step)], *held[1:]) for x in range(lo, max(hi, lo + 1), step)]
        return masked_softmax(torch.cat(parts, 2), visible(mask, hi - lo, m, q.device, lo))[0]

    row_sum = "1" if mask.covers(n, m) else "<=1"
    return weighted(weights, v), LazyMap((b, h, n, m), rows, kv_heads=k.shape[1], offset=mask.offset, row_sum=row_sum)


def _additive(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    work = working_dtype(q.dtype)
    keys = k.to(work).repeat_interleave(q.shape[1] // k.shape[1], 1)
    both = (q.to(work)[:, :, :, None] + keys[:, :, None]).tanh()
    return (both @ weight.to(work)[:, None, :, None]).squeeze(-1)


def patch_selection(
    pooled: Tensor, places: Tensor, k: Tensor, v: Tensor, *, mask: Mask = Mask()
) -> tuple[Tensor, SoftmaxMap]:
    """Selfie: which of the patches k ``[B, G, K, E]`` belongs to each masked place.

    ``pooled`` ``[B, H, E]`` is the summary of the patches that are seen, ``places`` ``[B, H, Q, E]`` the position embeddings of
    the masked ones; products are not scaled. The map's rows are the network's predictions over the candidates; v
    ``[B, G, K, V]`` is blended by them. Source: Trinh et al., Selfie, arXiv:1906.02940, section 3.
    """
    check_tensor("places", places, ("B", "H", "Q", "E"))
    check_tensor("pooled", pooled, (*places.shape[:2], places.shape[3]))
    return softmax_attention(pooled[:, :, None] + places, k, v, mask=mask, scale=1.0)


class ChosenRowsMap(SoftmaxMap):
    """Rows of attention for some queries only; ``chosen`` ``[B, R]`` says which."""

    def __init__(self, executed: SoftmaxMap, chosen: Tensor) -> None:
        s = executed.scores
        super().__init__(s.q, s.k, executed._lse, mask=s.mask, scale=s.scale)
        self.chosen = chosen


def attention_rollout(weights: Sequence[Tensor | AttentionMap]) -> Tensor:
    """Accumulated attention ``[B, N, N]`` of layers from the first to the last: the product of (mean over heads + identity) / 2.

    Row 0 is the response of a class token. Source: Abnar and Zuidema, arXiv:2005.00928."""
    total: Tensor | None = None
    for layer in weights:
        mean = (layer.dense() if isinstance(layer, AttentionMap) else layer).detach().mean(1)
        step = (mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)) / 2
        total = step if total is None else step @ total
    if total is None:
        raise WorkbenchError("weights are the attention maps of one or more layers; got none")
    return total


def global_local_attention(
    q: Tensor, k: Tensor, v: Tensor, response: Tensor, *, rows: int, mask: Mask = Mask(), scale: float | None = None
) -> tuple[Tensor, ChosenRowsMap]:
    """Global-local cross-attention of DCAL: the ``rows`` queries with the largest ``response`` ``[B, Q]`` attend to all keys.

    q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``; output ``[B, H, rows, V]``, in the order of the queries.
    ``response`` is the class token's row of ``attention_rollout``. Source: Zhu et al., Dual Cross-Attention Learning,
    arXiv:2205.02151, section 3.2.
    """
    b, h, n, _ = checked(q, k, v, mask)
    check_tensor("response", response, (b, n))
    if mask.causal or mask.window is not None or mask.queries is not None or mask.dense is not None or mask.offset:
        raise WorkbenchError("mask hides keys alone here: rows are taken out of their order")
    kept = best(response, rows, torch.ones_like(response, dtype=torch.bool), name="rows")
    chosen = kept.nonzero()[:, 1].view(b, -1)
    index = chosen[:, None, :, None].expand(-1, h, -1, q.shape[3])
    out, executed = softmax_attention(q.gather(2, index), k, v, mask=mask, scale=scale)
    return out, ChosenRowsMap(executed, chosen)


def pair_wise_attention(
    q: Tensor, k: Tensor, v: Tensor, distractor: Tensor, *, mask: Mask = Mask(), scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Pair-wise cross-attention of DCAL: q ``[B, H, Q, E]`` over its own keys k ``[B, G, K, E]`` and those of another image,
    ``distractor`` ``[B, G, D, E]``, in one softmax.

    v ``[B, G, K + D, V]`` are the values of both, the own ones first. ``map.mass(mods.span(K, K + D))`` is what the distractor
    takes. Used in training only. Source: Zhu et al., arXiv:2205.02151, section 3.3.
    """
    check_tensor("k", k, ("B", "G", "K", "E"))
    check_tensor("distractor", distractor, (*k.shape[:2], "D", k.shape[3]))
    return softmax_attention(q, torch.cat([k, distractor], 2), v, mask=mask, scale=scale)


def multi_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    length: int,
    alpha: float,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
) -> tuple[Tensor, SumMap]:
    """Multi-query self-attention for sequential recommendation: q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``.

    A convex mixture, ``alpha`` for attention by the query of each item and ``1 - alpha`` for attention by the mean of the last
    ``length`` queries (of as many as there are; padding is left out). ``map.short`` and ``map.long`` are the two maps.

    Source: Zhu et al., Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for Sequential
    Recommendation; its code mixes the predictions of two stacks of layers.
    """
    b, h, n, m = checked(q, k, v, mask)
    check_side("length", length)
    if not 0 <= alpha <= 1:
        raise WorkbenchError(f"alpha is the weight of short queries, 0 to 1; got {alpha}")
    if mask.offset or n != m:
        raise WorkbenchError("queries are averaged from the first item on: give the whole sequence, without an offset")
    real = torch.ones(1, n, device=q.device, dtype=torch.bool) if mask.keys is None else mask.keys
    out_short, short = softmax_attention(q, k, v, mask=mask, scale=scale)
    out_long, long = softmax_attention(_last_means(q, length, real), k, v, mask=mask, scale=scale)
    shares = torch.full((b, h, n), alpha, dtype=working_dtype(q.dtype), device=q.device)
    row_sum = "1" if short.row_sum == "1" else "<=1"
    found = MixedQueriesMap(GatedMap(short, shares), GatedMap(long, 1 - shares), row_sum=row_sum)
    return alpha * out_short + (1 - alpha) * out_long, found


class MixedQueriesMap(SumMap):
    """The mixture of attention by short and by long queries."""

    @property
    def short(self) -> AttentionMap:
        first = self.maps[0]
        return first.raw if isinstance(first, GatedMap) else first

    @property
    def long(self) -> AttentionMap:
        second = self.maps[1]
        return second.raw if isinstance(second, GatedMap) else second


def _last_means(x: Tensor, length: int, real: Tensor) -> Tensor:
    """Means of x ``[B, H, N, E]`` over the last ``length`` real tokens up to each."""
    counted = real[:, None, :, None].to(x)
    pad = (0, 0, length, 0)
    sums, counts = (F.pad(part, pad).cumsum(2) for part in (x * counted, counted))
    total, number = (part[:, :, length:] - part[:, :, :-length] for part in (sums, counts))
    return total / number.clamp(min=1)


def downsampled_attention(
    q: Tensor, k: Tensor, v: Tensor, down: Tensor, *, scale: float | None = None
) -> tuple[Tensor, ProductMap]:
    """Global learning with down-sampling of MAFormer: q ``[B, H, Q, E]`` attends to M mixtures ``down`` ``[M, K]`` of the tokens
    of k ``[B, G, K, E]`` and v ``[B, G, K, V]``.

    The map is the product of the softmax ``[B, H, Q, M]`` and ``down``, signed; ``native()`` are the two. Source:
    MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition: tokens are flattened and
    down-sampled by one fully connected layer before keys and values are made, which is mixing those (without biases).
    """
    b, h, _, m = checked(q, k, v, Mask())
    check_tensor("down", down, ("M", m))
    mixer = down.to(q.dtype)
    group = h // k.shape[1]
    keys, values = mixer @ k, down.to(v.dtype) @ v
    out, _ = softmax_attention(q, keys, values, mask=Mask(), scale=scale)
    left = SoftmaxMap(q, keys.repeat_interleave(group, 1), mask=Mask(), scale=scale)
    right = AttentionMap.from_dense(mixer.detach().expand(b, h, -1, -1), offset=0, kv_heads=k.shape[1])
    return out, ProductMap(left, right)


# ---------------------------------------------------------------------------- records


def _tensors(seed: int, tokens: int, dtype: torch.dtype, **more: tuple[int, ...]) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6), **more}
    return example_tensors(seed, dtype, **shapes)


def _pointer_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return _tensors(seed, tokens, dtype, q=(2, 2, 5, 8), weight=(2, 8))


def _selfie_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    given = _tensors(seed, tokens, dtype, pooled=(2, 4, 8), places=(2, 4, 3, 8))
    return {name: given[name] for name in ("pooled", "places", "k", "v")}


def _glca_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_tensors(seed, tokens, dtype, response=(2, tokens)), "rows": -(-tokens // 3)}


def _pwca_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return _tensors(seed, tokens, dtype, v=(2, 2, 2 * tokens, 6), distractor=(2, 2, tokens, 8))


def _mqsa_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_tensors(seed, tokens, dtype), "length": 3, "alpha": 0.4, "mask": Mask(causal=True)}


def _gld_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return _tensors(seed, tokens, dtype, down=(4, tokens))


def prepare_multi_query(given: dict[str, Any]) -> dict[str, Any]:
    """Half of the weight to the means of the last 3 queries."""
    return {**{name: given[name] for name in ("q", "k", "v", "mask")}, "length": 3, "alpha": 0.5}


def prepare_downsampled(given: dict[str, Any]) -> dict[str, Any]:
    """8 mixtures, learned for 64 tokens and interpolated to the image."""
    size = given["k"].shape[2]
    down = F.interpolate(given["down"].view(1, 8, 64), size=size, mode="linear", align_corners=True)[0]
    return {**{name: given[name] for name in ("q", "k", "v")}, "down": down}


def _mixtures(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) / 8


DCAL = "#16 Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification (2022)"

VARIANTS = (
    Variant(
        name="pointer-network",
        paper="#40 Pointer Networks (2015)",
        family="weighted softmax",
        priority="C",
        operator=pointer_attention,
        example=_pointer_example,
        reference="the paper's equation 3",
    ),
    Variant(
        name="selfie",
        paper="#142 Selfie: Self-supervised Pretraining for Image Embedding (2019)",
        family="softmax",
        priority="C",
        operator=patch_selection,
        example=_selfie_example,
        reference="the paper's section 3",
        note="the pooling network that makes the summary is ordinary self-attention and not part of it",
    ),
    Variant(
        name="global-local-cross-attention",
        paper=DCAL,
        family="softmax",
        priority="C",
        operator=global_local_attention,
        example=_glca_example,
        reference="the paper's section 3.2",
    ),
    Variant(
        name="pair-wise-cross-attention",
        paper=DCAL,
        family="softmax",
        priority="C",
        operator=pair_wise_attention,
        example=_pwca_example,
        reference="the paper's section 3.3",
    ),
    Variant(
        name="multi-query-self-attention",
        paper="#148 Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for Sequential "
        "Recommendation (2023)",
        family="softmax",
        priority="C",
        operator=multi_query_attention,
        example=_mqsa_example,
        causal=True,
        reference="zhuty16/MQSA-TED MQSA_TED.py",
        note="the mixture is of the two outputs for one set of values; the code mixes the predictions of two stacks",
        recipe=Recipe(prepare=prepare_multi_query),
    ),
    Variant(
        name="global-learning-with-down-sampling",
        paper="#140 MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition (2022)",
        family="two-stage",
        priority="C",
        operator=downsampled_attention,
        example=_gld_example,
        reference="the paper's abstract",
        note="taken from general knowledge of the paper; the local windows and the fusion beside it are other mechanisms",
        recipe=Recipe(parameters={"down": Parameter("512", _mixtures)}, prepare=prepare_downsampled),
    ),
)
