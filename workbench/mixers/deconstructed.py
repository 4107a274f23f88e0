"""Attention with one design principle taken away each: token mixing, the softmax of dot products, dependence on the sequence,
dependence on the current hidden states.

    RndEmbQK         q, k = X W with X made of random vectors         one pattern for all inputs of a length
    FixedSeqQK       q, k = X W with X made of one fixed text         one pattern for all inputs of a length
    StaticEmbQK      q, k = e W with e the input embeddings           the pattern does not see the hidden states
    Approximate      M_ij = t(s_ij) / sum_{j' <= i} t(s_ij'),         t(s) = 1 + s + s^2 / 2,  s_ij = scale q_i . k_j
    Non-approximate  M_ij = exp(a_j) / sum_{j' <= i} exp(a_j'),       a_j = scale silu(q_j) . k_j
    MLP              o_i = silu(g_i) * u_i                            nothing mixes

t(s) is a product of feature maps (1, x, x (x) x / sqrt 2), so the approximate form is linear attention. The non-approximate
pattern is one number per token: every row is the same softmax, cut off at the query. Source of all: Xue, Moosavi, Aletras,
arXiv:2510.11602, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.image import spread
from workbench.mixers.scored import check_tensor, checked, masked_softmax, plain_scores, visible, weighted
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.lazy import LazyMap
from workbench.patterns.linear import LinearMap
from workbench.patterns.per_channel import PerChannelMap
from workbench.patterns.softmax import SoftmaxMap

Blocks = Callable[[Tensor], Tensor]


def random_embedding_attention(
    v: Tensor,
    query_weights: Tensor,
    key_weights: Tensor,
    *,
    mask: Mask,
    seed: int = 0,
    deviation: float = 1.0,
    blocks: Blocks | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """RndEmbQK: queries and keys of random vectors that stay the same for all inputs.

    v ``[B, G, N, V]``; ``query_weights`` ``[H, D, E]``, ``key_weights`` ``[G, D, E]``. The vectors are normal with standard
    deviation ``deviation``, drawn from ``seed``; ``blocks`` takes them ``[1, N, D]`` through the layers below. The map holds one
    pattern, whatever the batch.
    """
    check_tensor("v", v, ("B", "G", "N", "V"))
    check_tensor("query_weights", query_weights, ("H", "D", "E"))
    # Whole blocks of 16 numbers come out the same whatever the length, so a longer text starts like a shorter one.
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise WorkbenchError(f"seed is a whole number; got {seed!r}")
    n, width = v.shape[2], query_weights.shape[1]
    source = torch.Generator().manual_seed(seed)
    drawn = torch.randn(1, n + -n % 16, width, generator=source, dtype=torch.float64)[:, :n]
    x = (drawn * deviation).to(query_weights)
    return _attention_of(x if blocks is None else blocks(x), query_weights, key_weights, v, mask, scale)


def fixed_sequence_attention(
    v: Tensor,
    embeddings: Tensor,
    query_weights: Tensor,
    key_weights: Tensor,
    *,
    text: Tensor,
    mask: Mask,
    blocks: Blocks | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """FixedSeqQK: queries and keys of one fixed text that stays the same for all inputs.

    v ``[B, G, N, V]``; ``text`` int64 ``[L]`` token numbers, of which the first N <= L count, ``embeddings`` ``[tokens, D]``;
    weights and ``blocks`` as in ``random_embedding_attention``. The map holds one pattern, whatever the batch.
    """
    check_tensor("v", v, ("B", "G", "N", "V"))
    check_tensor("embeddings", embeddings, ("tokens", "D"))
    if text.ndim != 1 or text.dtype != torch.int64 or text.shape[0] < v.shape[2]:
        raise WorkbenchError(f"text is int64 [L] with L >= {v.shape[2]} tokens; got {text.dtype} {list(text.shape)}")
    if int(text.min()) < 0 or int(text.max()) >= embeddings.shape[0]:
        raise WorkbenchError(f"text is of {embeddings.shape[0]} tokens; got {int(text.min())} to {int(text.max())}")
    x = embeddings[text[: v.shape[2]]][None]
    return _attention_of(x if blocks is None else blocks(x), query_weights, key_weights, v, mask, scale)


def static_embedding_attention(
    v: Tensor,
    embeddings: Tensor,
    query_weights: Tensor,
    key_weights: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """StaticEmbQK: queries and keys of the input's token embeddings ``[B, N, D]`` in every layer, values of its hidden states.

    v ``[B, G, N, V]``; ``query_weights`` ``[H, D, E]``, ``key_weights`` ``[G, D, E]``.
    """
    check_tensor("v", v, ("B", "G", "N", "V"))
    check_tensor("embeddings", embeddings, (v.shape[0], v.shape[2], "D"))
    return _attention_of(embeddings, query_weights, key_weights, v, mask, scale)


def _attention_of(
    x: Tensor, query_weights: Tensor, key_weights: Tensor, v: Tensor, mask: Mask, scale: float | None
) -> tuple[Tensor, SoftmaxMap]:
    """Attention with queries and keys of x ``[B or 1, N, D]``."""
    check_tensor("query_weights", query_weights, ("H", x.shape[2], "E"))
    check_tensor("key_weights", key_weights, (v.shape[1], x.shape[2], query_weights.shape[2]))
    x = x.to(query_weights.dtype)
    q, k = x[:, None] @ query_weights, x[:, None] @ key_weights.to(x.dtype)
    batch = (v.shape[0], -1, -1, -1)
    checked(q.expand(batch), k.expand(batch), v, mask)
    scores, allowed = plain_scores(q, k, scale), visible(mask, q.shape[2], k.shape[2], v.device)
    weights, lse = masked_softmax(scores, allowed)
    lse = lse.expand(v.shape[0], -1, -1)
    found = SoftmaxMap(q.expand(batch), k.expand(batch), lse, mask=mask, scale=scale)
    return weighted(weights.expand(batch), v), found


def taylor_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None
) -> tuple[Tensor, LinearMap]:
    """Approximate: softmax attention with the exponential cut off after its square, normalised per row.

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``; ``scale=None`` is ``E ** -0.5``. Weights are positive, as
    1 + s + s^2 / 2 = ((1 + s)^2 + 1) / 2. The output is computed with all pairs of tokens; the map holds 1 + E + E^2 features
    of each token.
    """
    _, _, n, m = checked(q, k, v, Mask(causal=causal))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    s = plain_scores(q, k, scale)
    weights = 1 + s + s.square() / 2
    if causal:
        weights = weights * visible(Mask(causal=True), n, m, q.device)
    total = weights.sum(-1)
    work = working_dtype(q.dtype)
    found = LinearMap(
        _taylor_features(q.detach().to(work) * scale),
        _taylor_features(k.detach().to(work)),
        causal=causal,
        norm=total.detach(),
        sign="nonnegative",
        row_sum="1",
    )
    return weighted(weights / total[..., None], v), found


def _taylor_features(x: Tensor) -> Tensor:
    """``(1, x, x (x) x / sqrt 2)`` ``[B, H, N, 1 + E + E^2]``."""
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs], -1)


def token_importance_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> tuple[Tensor, LazyMap]:
    """Non-approximate: every token has one logit, that of its own query and key, and each query takes a softmax over the past.

    q ``[B, H, N, E]`` before its SiLU, k ``[B, G, N, E]``, v ``[B, G, N, V]``; ``scale=None`` is ``E ** -0.5``.
    """
    b, h, n, m = checked(q, k, v, Mask(causal=True))
    if n != m:
        raise WorkbenchError(f"every token has a query and a key; got {n} queries and {m} keys")
    work = working_dtype(q.dtype)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = (functional.silu(q.to(work)) * spread(k, h).to(work)).sum(-1) * scale
    weights, lse = masked_softmax(logits[:, :, None].expand(-1, -1, n, -1), visible(Mask(causal=True), n, n, q.device))
    held = logits.detach()

    def rows(lo: int, hi: int) -> Tensor:
        seen = visible(Mask(causal=True), hi - lo, n, held.device, lo)
        return (held[:, :, None] - lse[:, :, lo:hi, None]).masked_fill(~seen, float("-inf")).exp()

    found = LazyMap((b, h, n, n), rows, kv_heads=v.shape[1], sign="nonnegative", row_sum="1")
    return weighted(weights, v), found


def gated_mlp_mixing(gate: Tensor, v: Tensor) -> tuple[Tensor, PerChannelMap]:
    """MLP: no token mixing at all, every number of v is scaled by the SiLU of its gate; both ``[B, H, N, E]``.

    v is the up-projection of the gated MLP that stands in for attention; the down-projection follows.
    """
    check_tensor("gate", gate, ("B", "H", "N", "E"))
    b, h, n, e = gate.shape
    check_tensor("v", v, (b, h, n, e))
    factor = functional.silu(gate)
    each = factor.transpose(2, 3).reshape(b, h * e, n)
    return factor.to(v.dtype) * v, PerChannelMap(DiagonalMap(each, domain="token"), e)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 6), "k": (2, 2, tokens, 6), "v": (2, 2, tokens, 5)}
    return example_tensors(seed, dtype, **shapes)


def _example_of_embeddings(seed: int, tokens: int, dtype: torch.dtype, **embeddings: tuple[int, ...]) -> dict[str, Any]:
    shapes = {"v": (2, 2, tokens, 5), "query_weights": (4, 7, 6), "key_weights": (2, 7, 6), **embeddings}
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}


def _random(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_example_of_embeddings(seed, tokens, dtype), "seed": seed}


def _fixed(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    text = torch.randint(0, 11, (tokens + 3,), generator=torch.Generator().manual_seed(seed))
    return {**_example_of_embeddings(seed, tokens, dtype, embeddings=(11, 7)), "text": text}


def _static(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return _example_of_embeddings(seed, tokens, dtype, embeddings=(2, tokens, 7))


def _gated(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return example_tensors(seed, dtype, gate=(2, 3, tokens, 4), v=(2, 3, tokens, 4))


def _unit(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * shape[-2] ** -0.5


def _prepare_random(parts: dict[str, Any]) -> dict[str, Any]:
    return {**_own_weights(parts), "v": parts["v"], "mask": parts["mask"]}


def _prepare_fixed(parts: dict[str, Any]) -> dict[str, Any]:
    """A text that runs through 61 kinds of tokens; its embeddings are those of a model that was never trained."""
    text = (torch.arange(parts["v"].shape[2], device=parts["v"].device) * 29) % 61
    table = torch.randn(61, 16, generator=torch.Generator().manual_seed(1)).to(parts["v"])
    return {**_own_weights(parts), "v": parts["v"], "mask": parts["mask"], "embeddings": table, "text": text}


def _own_weights(parts: dict[str, Any]) -> dict[str, Any]:
    """Projections of one set of keys for every value head."""
    heads, groups = parts["query_weights"].shape[0], parts["v"].shape[1]
    return {"query_weights": parts["query_weights"], "key_weights": parts["key_weights"][:: heads // groups]}


def _without_mask(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: parts[name] for name in ("q", "k", "v")}


def _prepare_gated(parts: dict[str, Any]) -> dict[str, Any]:
    return {"gate": parts["gate"], "v": spread(parts["v"], parts["gate"].shape[1])}


_PAPER = "#100 Deconstructing Attention: Investigating Design Principles for Effective Language Modeling (2025)"
_PROJECTIONS = {"query_weights": Parameter("H16E", _unit), "key_weights": Parameter("H16E", _unit)}

VARIANTS = (
    Variant(
        name="random-embedding-queries-and-keys",
        paper=_PAPER,
        family="weighted softmax",
        priority="B",
        operator=random_embedding_attention,
        example=_random,
        causal=True,
        reference="arXiv:2510.11602, equations 9 and 10",
        recipe=Recipe(parameters=_PROJECTIONS, prepare=_prepare_random, ignores=("q", "k")),
    ),
    Variant(
        name="fixed-sequence-queries-and-keys",
        paper=_PAPER,
        family="weighted softmax",
        priority="B",
        operator=fixed_sequence_attention,
        example=_fixed,
        causal=True,
        reference="arXiv:2510.11602, equations 11 and 12",
        recipe=Recipe(parameters=_PROJECTIONS, prepare=_prepare_fixed, ignores=("q", "k")),
    ),
    Variant(
        name="static-embedding-queries-and-keys",
        paper=_PAPER,
        family="weighted softmax",
        priority="B",
        operator=static_embedding_attention,
        example=_static,
        causal=True,
        reference="arXiv:2510.11602, equation 13",
        note="Not in native models: layers above the first do not see the token embeddings.",
    ),
    Variant(
        name="second-order-taylor-attention",
        paper=_PAPER,
        family="linear",
        priority="B",
        operator=taylor_attention,
        example=_example,
        causal=True,
        reference="arXiv:2510.11602, equation 6",
        note="Normalised over all orders together, as in the work it follows; the appendix writes one normaliser per order.",
        recipe=Recipe(prepare=_without_mask),
    ),
    Variant(
        name="non-approximate-attention",
        paper=_PAPER,
        family="weighted softmax",
        priority="B",
        operator=token_importance_attention,
        example=_example,
        causal=True,
        reference="arXiv:2510.11602, equations 7, 8 and 18",
        recipe=Recipe(prepare=_without_mask),
    ),
    Variant(
        name="gated-mlp-without-mixing",
        paper=_PAPER,
        family="channel",
        priority="B",
        operator=gated_mlp_mixing,
        example=_gated,
        causal=True,
        reference="arXiv:2510.11602, equations 4 and 5",
        recipe=Recipe(learned={"gate": Learned("HE")}, prepare=_prepare_gated, ignores=("q", "k")),
    ),
)
