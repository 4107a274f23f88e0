"""Softmax attention whose scores know the distance d = j - i from query i to key j.

    Music Transformer  s_ij = scale (q_i . k_j + q_i . e_d)
    Transformer-XL     s_ij = scale ((q_i + u) . k_j + (q_i + w) . r_d)
    T5                 s_ij = q_i . k_j + b_bucket(d)
    ALiBi              s_ij = scale q_i . k_j - m_h |d|
    rotary (RoPE)      s_ij = scale (R_i q_i) . (R_j k_j),   R_i rotates pair r by the angle i / base^(2 r / width)

Each map is a ``SoftmaxMap``: T5 and ALiBi with a table of one number per distance, the first two with a bias that is made of q
for the rows asked for, rotary attention with the rotated queries and keys. None holds Q x K numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Bias, Relative, working_dtype
from workbench.mixers.scored import check_tensor, checked, masked_softmax, plain_scores, visible, weighted
from workbench.patterns.softmax import SoftmaxMap


def distances(queries: int, keys: int, offset: int, device: torch.device, lo: int = 0) -> Tensor:
    """j - i ``[queries, keys]`` for query rows from ``lo`` on, at absolute positions."""
    rows = torch.arange(lo, lo + queries, device=device)[:, None] + offset
    return torch.arange(keys, device=device) - rows


def at_distances(table: Tensor, first: int, away: Tensor) -> Tensor:
    """``table[..., i, d - first]`` for the distances d of ``away`` ``[Q, K]``; beyond its ends the table's end counts.

    ``table`` is ``[..., Q, M]`` (a row of its own for every query) to ``[..., Q, K]``."""
    at = (away - first).clamp(0, table.shape[-1] - 1)
    return table.gather(-1, at.expand(*table.shape[:-2], *at.shape))


def _mixed(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor, mask: Mask, scale: float | None, bias: Bias | None
) -> tuple[Tensor, SoftmaxMap]:
    """Output of given scores, and the map that makes them again from q, k and bias."""
    weights, lse = masked_softmax(scores, visible(mask, q.shape[2], k.shape[2], q.device))
    return weighted(weights, v), SoftmaxMap(q, k, lse, mask=mask, scale=scale, bias=bias)


def relative_logits(q: Tensor, table: Tensor, first: int, mask: Mask, keys: int, lo: int = 0) -> Tensor:
    """q_i . e_d ``[B, H, Q, K]`` for q ``[B, H, Q, E]``, the rows from ``lo`` on, and one vector per distance ``[H or 1, M, E]``.

    The product with all vectors is taken once and its entries are shifted into place, so no ``[Q, K, E]`` is made."""
    products = q @ table.transpose(-1, -2)
    return at_distances(products, first, distances(q.shape[2], keys, mask.offset, q.device, lo))


def music_transformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    *,
    mask: Mask,
    first: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """Relative attention of the Music Transformer: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``.

    ``relative`` ``[H or 1, M, E]`` holds one vector per distance j - i from ``first`` on (default ``1 - M``: the past, up to and
    with the query itself); distances beyond its ends take the vector at the end. Source: Huang et al., Music Transformer,
    arXiv:1809.04281, section 3.4.
    """
    _, h, _, m = checked(q, k, v, mask)
    check_tensor("relative", relative, (h, "M", q.shape[3]), (1, "M", q.shape[3]))
    start = 1 - relative.shape[1] if first is None else first
    work, factor = working_dtype(q.dtype), q.shape[3] ** -0.5 if scale is None else scale
    added = relative_logits(q.to(work), relative.to(work), start, mask, m) * factor
    held, vectors = q.detach(), relative.detach()

    def bias(lo: int, hi: int) -> Tensor:
        return relative_logits(held[:, :, lo:hi].to(work), vectors.to(work), start, mask, m, lo) * factor

    return _mixed(q, k, v, plain_scores(q, k, factor) + added, mask, factor, bias)


def transformer_xl_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    *,
    mask: Mask,
    first: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """Attention of Transformer-XL: scores ``scale ((q_i + u) . k_j + (q_i + w) . r_d)``.

    ``relative`` ``[H or 1, M, E]`` holds r for the distances j - i from ``first`` on (default ``1 - M``), projected sinusoids in
    the paper; beyond its ends the vector at the end counts. ``content_bias`` u and ``position_bias`` w are ``[H, E]``.
    Source: Dai et al., arXiv:1901.02860, section 3.3.
    """
    _, h, _, m = checked(q, k, v, mask)
    width = q.shape[3]
    check_tensor("relative", relative, (h, "M", width), (1, "M", width))
    check_tensor("content_bias", content_bias, (h, width))
    check_tensor("position_bias", position_bias, (h, width))
    start = 1 - relative.shape[1] if first is None else first
    work, factor = working_dtype(q.dtype), width**-0.5 if scale is None else scale
    content = q + content_bias[:, None].to(q.dtype)
    places = q.to(work) + position_bias[:, None].to(work)
    scores = plain_scores(content, k, factor) + relative_logits(places, relative.to(work), start, mask, m) * factor
    held, vectors = places.detach(), relative.detach()

    def bias(lo: int, hi: int) -> Tensor:
        return relative_logits(held[:, :, lo:hi], vectors.to(work), start, mask, m, lo) * factor

    return _mixed(content, k, v, scores, mask, factor, bias)


def sinusoids(positions: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """Sines and cosines ``[..., width]`` of positions, as of Vaswani et al. (2017): first all sines, then all cosines."""
    rates = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    angles = positions[..., None].double() * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :width]


def t5_buckets(away: Tensor, buckets: int, max_distance: int, both_ways: bool) -> Tensor:
    """Bucket of each distance j - i: one per distance up to half the buckets, then logarithmic up to ``max_distance``.

    With ``both_ways`` the second half of the buckets is for keys after the query; else those share the bucket of distance 0.
    """
    side = torch.zeros_like(away)
    if both_ways:
        buckets //= 2
        side = (away > 0) * buckets
        steps = away.abs()
    else:
        steps = (-away).clamp(min=0)
    exact = buckets // 2
    far = steps.clamp(min=max(exact, 1)).double() / max(exact, 1)
    grown = exact + (far.log() / math.log(max_distance / max(exact, 1)) * (buckets - exact)).long()
    return side + torch.where(steps < exact, steps, grown.clamp(max=buckets - 1))


def t5_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    mask: Mask,
    max_distance: int = 128,
    both_ways: bool | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, SoftmaxMap]:
    """T5 attention: a learned number per bucket of distances, ``table`` ``[H or 1, buckets]``, is added to unscaled scores.

    ``both_ways`` tells keys before and after the query apart; the default does unless the mask is causal. Source: Raffel et
    al., arXiv:1910.10683, section 2.1.
    """
    _, h, n, m = checked(q, k, v, mask)
    check_tensor("table", table, (h, "buckets"), (1, "buckets"))
    both = not mask.causal if both_ways is None else both_ways
    if table.shape[1] < (4 if both else 2) or max_distance <= table.shape[1] // (4 if both else 2):
        got = f"{table.shape[1]} buckets and max_distance={max_distance}"
        raise WorkbenchError(f"table needs 2 buckets a side or more, and max_distance beyond half of them; got {got}")
    span = torch.arange(1 - mask.offset - n, m - mask.offset, device=q.device)
    return _with_table(
        q, k, v, table[:, t5_buckets(span, table.shape[1], max_distance, both)], int(span[0]), mask, scale
    )


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of ALiBi: 2^(-8/H), 2^(-16/H), ... for H a power of two, else those of the power of two below and then every
    other one of the power of two above."""
    whole = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return torch.tensor(slopes, dtype=torch.float64)


def alibi_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    slopes: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """Attention with linear biases: the score falls by ``slopes[h]`` a token of distance, on either side of the query.

    ``slopes`` ``[H]`` defaults to the paper's geometric sequence. Source: Press et al., arXiv:2108.12409, section 3.
    """
    _, h, n, m = checked(q, k, v, mask)
    used = alibi_slopes(h).to(q.device, working_dtype(q.dtype)) if slopes is None else slopes
    check_tensor("slopes", used, (h,))
    span = torch.arange(1 - mask.offset - n, m - mask.offset, device=q.device)
    return _with_table(q, k, v, -used[:, None] * span.abs().to(used.dtype), int(span[0]), mask, scale)


def _with_table(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, first: int, mask: Mask, scale: float | None
) -> tuple[Tensor, SoftmaxMap]:
    """Scores plus ``table[h, j - i - first]``, which holds every distance there is."""
    n, m = q.shape[2], k.shape[2]
    away = distances(n, m, mask.offset, q.device) - first
    scores = plain_scores(q, k, scale) + table.to(working_dtype(q.dtype))[:, away]
    return _mixed(q, k, v, scores, mask, scale, Relative(table.detach(), first))


def rotate(x: Tensor, positions: Tensor, *, base: float = 10000.0, width: int | None = None) -> Tensor:
    """x ``[..., N, E]`` with its first ``width`` channels (default all) rotated by position ``[N]``.

    Channel r < width/2 and channel r + width/2 are a pair, turned by the angle ``position / base^(2 r / width)``.
    """
    width = x.shape[-1] if width is None else width
    rates = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    angles = positions.double()[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)


def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    base: float = 10000.0,
    width: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """Attention with rotary positions: queries and keys, before positions, are rotated here by where they stand.

    ``width`` channels of E are rotated (default all), an even number. The map's scores are made of the rotated q and k.
    Source: Su et al., RoFormer, arXiv:2104.09864, section 3.2, with the two halves of a head as pairs.
    """
    _, _, n, m = checked(q, k, v, mask)
    turned = q.shape[3] if width is None else width
    if turned % 2 or not 0 < turned <= q.shape[3]:
        raise WorkbenchError(f"width is an even number of channels up to {q.shape[3]}; got {turned}")
    if not base > 0:
        raise WorkbenchError(f"base is a positive number; got {base}")
    rows = torch.arange(n, device=q.device) + mask.offset
    rotated = rotate(q, rows, base=base, width=turned)
    keys = rotate(k, torch.arange(m, device=k.device), base=base, width=turned)
    return _mixed(rotated, keys, v, plain_scores(rotated, keys, scale), mask, scale, None)


# ---------------------------------------------------------------------------- records


def _tensors(seed: int, tokens: int, dtype: torch.dtype, **more: tuple[int, ...]) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8), **more}
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}


def _music_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return _tensors(seed, tokens, dtype, relative=(4, 6, 8))


def _xl_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return _tensors(seed, tokens, dtype, relative=(4, tokens, 8), content_bias=(4, 8), position_bias=(4, 8))


def _t5_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_tensors(seed, tokens, dtype, table=(4, 8)), "max_distance": 12}


def _small(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.02


def prepare_xl(given: dict[str, Any]) -> dict[str, Any]:
    """Sinusoids of all distances, projected by ``projection`` ``[H, E, width]``, in the place of ``relative``."""
    keys = given["k"].shape[2]
    first, mask = 1 - keys, given["mask"]
    span = torch.arange(first, 1 if mask.causal else keys, device=given["q"].device)
    waves = sinusoids(span, given["projection"].shape[2]).to(given["projection"].dtype)
    names = ("q", "k", "v", "mask", "content_bias", "position_bias")
    relative = torch.einsum("hes,ms->hme", given["projection"], waves)
    return {**{name: given[name] for name in names}, "relative": relative, "first": first}


XL_PARAMETERS = {
    "projection": Parameter("HE64", _small),
    "content_bias": Parameter("HE", _small),
    "position_bias": Parameter("HE", _small),
}

VARIANTS = (
    Variant(
        name="music-transformer",
        paper="#149 Music Transformer (2018)",
        family="weighted softmax",
        priority="C",
        operator=music_transformer_attention,
        example=_music_example,
        causal=True,
        reference="the paper's section 3.4",
        recipe=Recipe(parameters={"relative": Parameter("H64E", _small)}),
    ),
    Variant(
        name="transformer-xl",
        paper="Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context (2019)",
        family="weighted softmax",
        priority="B",
        operator=transformer_xl_attention,
        example=_xl_example,
        causal=True,
        reference="the paper's section 3.3",
        note="one segment: memories of earlier segments are keys before the first query (mask.offset)",
        recipe=Recipe(parameters=XL_PARAMETERS, prepare=prepare_xl),
    ),
    Variant(
        name="t5-relative-bias",
        paper="Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (2020)",
        family="weighted softmax",
        priority="A",
        operator=t5_attention,
        example=_t5_example,
        causal=True,
        reference="HF T5Attention",
        recipe=Recipe(parameters={"table": Parameter("H32", _small)}),
    ),
    Variant(
        name="alibi",
        paper="Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation (2022)",
        family="weighted softmax",
        priority="A",
        operator=alibi_attention,
        example=_tensors,
        causal=True,
        reference="HF BloomModel",
        note="symmetric in the distance where the mask is not causal, which the paper does not treat",
        recipe=Recipe(),
    ),
    Variant(
        name="rotary-attention",
        paper="RoFormer: Enhanced Transformer with Rotary Position Embedding (2021)",
        family="weighted softmax",
        priority="A",
        operator=rotary_attention,
        example=_tensors,
        causal=True,
        reference="HF LlamaAttention",
        note="pairs are the two halves of a head, as in LLaMA; the paper pairs neighbouring channels",
        recipe=Recipe(),
    ),
)
