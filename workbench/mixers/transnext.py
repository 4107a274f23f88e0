"""Aggregated attention: a token sees its own neighbourhood and a pooled view of the whole image in one softmax.

    q'_i = (q^_i + e_h) softplus(t_h) ln(n_i)          q^ = q / |q|, n_i = keys that token i sees
    P_i  = softmax over [neighbours: q'_i . k^_j + b_{j-i} | pooled: q'_i . k^_p + B_ip]
    o_i  = sum over neighbours (P_ij + q^_i . tau_{j-i} + c_{j-i}) v_j + sum over pooled P_ip v_p

The learned tokens tau and their bias c add signed weights to the neighbours, beside the softmax. Keys are the N tokens and after
them the pooled ones; in the network these are a projection, activation, average and normalisation of the tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.image import Grid, check_grid, gathered, grid_of, pooled, spread, taps
from workbench.mixers.scored import check_tensor
from workbench.patterns.algebra import KeysMap
from workbench.patterns.sparse import SparseMap

VALUES = "raw V, then pooled V"


def aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    grid: Grid,
    query_embedding: Tensor | None = None,
    tokens: Tensor | None = None,
    token_bias: Tensor | None = None,
    local_bias: Tensor | None = None,
    pool_bias: Tensor | None = None,
    size: int = 3,
) -> tuple[Tensor, KeysMap]:
    """Pixel-focused attention: q ``[B, H, N, E]``; k ``[B, H, N + P, E]`` and v ``[B, H, N + P, V]``, tokens first, then pooled.

    ``temperature`` ``[H]`` before its softplus; ``query_embedding`` e ``[H, E]``; ``tokens`` tau ``[H, E, size^2]``,
    ``token_bias`` c and ``local_bias`` b ``[H, size^2]``; ``pool_bias`` B ``[H, N, P]``; each 0 where it is None. Neighbours
    beyond the edge of the image have no key. The map puts the two kinds of keys side by side; ``native()`` is the pair.
    Source: Shi, TransNeXt, arXiv:2311.17132.
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    b, h, n, e = q.shape
    grid = check_grid(grid, n)
    check_tensor("k", k, (b, h, "N + P", e))
    total = k.shape[2]
    if total <= n:
        raise WorkbenchError(f"k holds {n} tokens and after them the pooled keys; got {total} keys")
    check_tensor("v", v, (b, h, total, "V"))
    check_tensor("temperature", temperature, (h,))
    at = taps(grid, size, device=q.device)
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "query_embedding": (query_embedding, (h, e)),
        "tokens": (tokens, (h, e, size * size)),
        "token_bias": (token_bias, (h, size * size)),
        "local_bias": (local_bias, (h, size * size)),
        "pool_bias": (pool_bias, (h, n, total - n)),
    }
    for name, (part, shape) in wanted.items():
        if part is not None:
            check_tensor(name, part, shape)
    work = working_dtype(q.dtype)
    unit, keys = (functional.normalize(x.to(work), dim=-1) for x in (q, k))
    sharp = unit if query_embedding is None else unit + query_embedding.to(work)[:, None]
    seen = (at >= 0).sum(-1).to(work) + (total - n)
    sharp = sharp * functional.softplus(temperature.to(work))[:, None, None] * seen.log()[:, None]
    near = (sharp[..., None, :] @ gathered(keys[:, :, :n], at).transpose(-1, -2)).squeeze(-2)
    if local_bias is not None:
        near = near + local_bias.to(work)[:, None]
    far = sharp @ keys[:, :, n:].transpose(-1, -2)
    if pool_bias is not None:
        far = far + pool_bias.to(work)
    logits = torch.cat([near.masked_fill(at < 0, float("-inf")), far], -1)
    shared, pool_weights = logits.softmax(-1).split([at.shape[1], total - n], -1)
    local_weights = shared
    if tokens is not None:
        local_weights = local_weights + unit @ tokens.to(work)
    if token_bias is not None:
        local_weights = local_weights + token_bias.to(work)[:, None]
    local_weights = local_weights.masked_fill(at < 0, 0.0)
    values = v.to(work)
    out = (local_weights[..., None, :] @ gathered(values[:, :, :n], at)).squeeze(-2) + pool_weights @ values[:, :, n:]
    local = SparseMap(at[None, None], local_weights, n)
    pool = AttentionMap.from_dense(pool_weights.detach(), offset=0, sign="nonnegative", row_sum="<=1")
    plain = tokens is None and token_bias is None
    return out.to(v.dtype), KeysMap(local, pool, row_sum="1" if plain else "free", value_space=VALUES)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    found = example_tensors(
        seed,
        dtype,
        q=(2, 3, n, 4),
        k=(2, 3, n + 2, 4),
        v=(2, 3, n + 2, 5),
        temperature=(3,),
        query_embedding=(3, 4),
        tokens=(3, 4, 9),
        token_bias=(3, 9),
        local_bias=(3, 9),
        pool_bias=(3, n, 2),
    )
    return {**found, "grid": grid}


def _temperature(shape: tuple[int, ...]) -> Tensor:
    """Its softplus is 1 / 0.24."""
    return torch.full(shape, math.log(math.exp(1 / 0.24) - 1))


def _prepare(parts: dict[str, Any]) -> dict[str, Any]:
    """Pooled keys and values are averages of k and v on a grid of half the sides."""
    grid, heads = grid_of(parts), parts["q"].shape[1]
    half = (-(-grid[0] // 2), -(-grid[1] // 2))
    k, v = (spread(parts[name], heads) for name in ("k", "v"))
    names = ("temperature", "query_embedding", "tokens", "token_bias", "local_bias")
    k, v = (torch.cat([x, pooled(x, grid, half)], 2) for x in (k, v))
    return {**{name: parts[name] for name in names}, "q": parts["q"], "k": k, "v": v, "grid": grid}


def _small(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.02


VARIANTS = (
    Variant(
        name="aggregated-attention",
        paper="#62 TransNeXt: Robust Foveal Visual Perception for Vision Transformers (2024)",
        family="weighted softmax",
        priority="C",
        operator=aggregated_attention,
        example=_example,
        reference="DaiShiResearch/TransNeXt classification/attention_native.py",
        note="Native models pool keys and values; the network projects, activates, pools and normalises tokens for them.",
        recipe=Recipe(
            parameters={
                "temperature": Parameter("H", _temperature),
                "query_embedding": Parameter("HE", _small),
                "tokens": Parameter("HE9", _small),
                "token_bias": Parameter("H9"),
                "local_bias": Parameter("H9", _small),
            },
            prepare=_prepare,
        ),
    ),
)
