"""MossFormer's joint local and global attention: every pair inside of a chunk, low rank over the whole sequence.

    M_ij = relu(q_i . k_j / C)^2 [i and j in one chunk of C tokens] + q'_i . k'_j / N

The four queries and keys are one shared vector per token, scaled and shifted four ways and rotated by position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.linear import causal_option, linear_product
from workbench.mixers.scored import check_tensor
from workbench.patterns.algebra import SumMap
from workbench.patterns.linear import LinearMap
from workbench.patterns.sparse import SparseMap

ROTATED = 32
"""Channels that rotary positions turn."""


def mossformer_attention(
    shared: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    chunk: int = 256,
    linear: bool = True,
    rotary: bool = True,
) -> tuple[Tensor, AttentionMap]:
    """Joint attention of MossFormer: ``shared`` ``[B, H, N, E]``, v ``[B, G, N, V]``; the paper has one head.

    ``gamma`` and ``beta`` ``[H, 4, E]`` make of a shared vector z the vectors gamma z + beta: local query, global query, local
    key, global key; ``rotary`` turns the first 32 channels of each by position. Local weights are squared ReLUs of products over
    ``chunk``, between tokens of a chunk; global ones are products over N, left out without ``linear``. Source: Zhao and Ma,
    arXiv:2302.11824, and the authors' code (FLASH_ShareA_FFConvM), before the gates.
    """
    check_tensor("shared", shared, ("B", "H", "N", "E"))
    b, h, n, e = shared.shape
    check_tensor("v", v, (b, "G", n, "V"))
    for name, part in (("gamma", gamma), ("beta", beta)):
        check_tensor(name, part, (h, 4, e))
    g = v.shape[1]
    if h % g:
        raise WorkbenchError(f"the {h} heads of shared are a multiple of those of v; got {g}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise WorkbenchError(f"chunk is a positive number of tokens; got {chunk!r}")
    work = torch.promote_types(working_dtype(shared.dtype), v.dtype)
    four = shared.to(work)[:, :, None] * gamma.to(work)[:, :, None] + beta.to(work)[:, :, None]
    four = rotated(four) if rotary else four
    q, q_all, k, k_all = four.unbind(2)
    size = min(chunk, n)
    cut = [
        pad(x, (0, 0, 0, -n % size)).unflatten(2, (-1, size)) for x in (q, k, v.to(work).repeat_interleave(h // g, 1))
    ]
    weights = (cut[0] @ cut[1].transpose(-1, -2) / chunk).relu().square()
    out = (weights @ cut[2]).flatten(2, 3)[:, :, :n]
    keys = torch.arange(n, device=v.device)[:, None] // size * size + torch.arange(size, device=v.device)
    keys = keys.masked_fill(keys >= n, -1)[None, None]
    found: AttentionMap = SparseMap(keys, weights.detach().flatten(2, 3)[:, :, :n], n, kv_heads=g)
    if linear:
        out = out + linear_product(q_all, k_all, v.to(work).repeat_interleave(h // g, 1), causal=False, scale=1 / n)
        found = SumMap(found, LinearMap(q_all, k_all, causal=False, scale=1 / n, kv_heads=g))
    return out.to(v.dtype), found


def rotated(x: Tensor) -> Tensor:
    """Rotary positions over the tokens of ``[..., N, E]``: neighbouring channels in pairs, the first 32 channels of E."""
    n, width = x.shape[-2], min(ROTATED, x.shape[-1]) // 2 * 2
    speeds = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / max(1, width))
    angles = torch.arange(n, dtype=torch.float64, device=x.device)[:, None] * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., :width:2], x[..., 1:width:2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([turned, x[..., width:]], -1)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"shared": (2, 2, tokens, 6), "v": (2, 1, tokens, 5), "gamma": (2, 4, 6), "beta": (2, 4, 6)}
    return {**example_tensors(seed, dtype, **shapes), "chunk": 4}


def _prepare(made: dict[str, Any]) -> dict[str, Any]:
    causal_option(made["mask"])
    return {"shared": made["q"], "v": made["v"], "gamma": made["gamma"], "beta": made["beta"]}


VARIANTS = (
    Variant(
        name="mossformer-joint-attention",
        paper="#164 MossFormer: Pushing the Performance Limit of Monaural Speech Separation using Gated Single-Head "
        "Transformer with Convolution-Augmented Joint Self-Attentions (2023)",
        family="linear",
        priority="C",
        operator=mossformer_attention,
        example=_example,
        reference="modelscope/ClearerVoice-Studio FLASH_ShareA_FFConvM",
        note="Code of the authors' later model, which keeps this class. The gates that multiply two such outputs come after, so "
        "that the layer is quadratic in its values.",
        recipe=Recipe(
            parameters={"gamma": Parameter("H4E", torch.ones), "beta": Parameter("H4E")},
            prepare=_prepare,
            ignores=("k",),
        ),
    ),
)
