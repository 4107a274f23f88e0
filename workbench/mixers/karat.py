"""Kolmogorov-Arnold attention, Fourier form (KArAt): learned functions of the scores in the place of the softmax.

    s_ij = scale q_i . k_j,   z_ip = sum_j sum_{f=1..F} a_pjf cos(f s_ij) + b_pjf sin(f s_ij),   M_ij = sum_p w_jp z_ip

Each row of K scores goes through its own functions to R numbers and linearly back to K weights. The functions belong to places,
so the number of keys is fixed. Weights have any sign and any sum; the map has rank R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.scored import check_tensor, checked, plain_scores
from workbench.patterns.linear import LinearMap

RANK, GRID, PLACES = 12, 3, 256
"""Rank and frequencies of the paper's models; keys that a native model has functions for."""


def fourier_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosines: Tensor,
    sines: Tensor,
    projection: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, LinearMap]:
    """Fourier-KArAt of q ``[B, H, Q, E]`` over k ``[B, G, K, E]`` and v ``[B, G, K, V]`` to ``[B, H, Q, V]``.

    ``cosines`` and ``sines`` ``[H or 1, R, K, F]`` are the coefficients of the frequencies 1 .. F (12 and 3 in the paper's
    models), ``projection`` ``[H or 1, K, R]`` leads back to the keys. The map is ``LinearMap`` of the R numbers of each query
    (``map.q``) and the projection. Source: Maity et al., arXiv:2503.10632.
    """
    b, h, n, m = checked(q, k, v, Mask())
    wanted = ("R", m, "F")
    check_tensor("cosines", cosines, (h, *wanted), (1, *wanted))
    check_tensor("sines", sines, tuple(cosines.shape))
    rank = cosines.shape[1]
    check_tensor("projection", projection, (h, m, rank), (1, m, rank))
    work = working_dtype(q.dtype)
    scores = plain_scores(q, k, scale)
    found = scores.new_zeros(b, h, n, rank)
    for f in range(cosines.shape[3]):
        angles = scores * (f + 1)
        for wave, table in ((angles.cos(), cosines), (angles.sin(), sines)):
            found = found + wave @ table[..., f].to(work).transpose(-1, -2)
    back = projection.to(work).expand(h, m, rank)
    g = k.shape[1]
    values = v.to(work).repeat_interleave(h // g, 1)
    out = found @ (back.transpose(-1, -2) @ values)
    return out.to(v.dtype), LinearMap(found, back.expand(b, -1, -1, -1), causal=False, kv_heads=g)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {
        "q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8),
        "cosines": (4, 5, tokens, GRID), "sines": (4, 5, tokens, GRID), "projection": (4, tokens, 5),
    }  # fmt: skip
    given = example_tensors(seed, dtype, **shapes)
    return {**given, "cosines": given["cosines"] / tokens, "sines": given["sines"] / tokens}


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    """The functions of the first N of ``PLACES`` keys."""
    heads, n = given["q"].shape[1], given["k"].shape[2]
    if n > PLACES:
        raise WorkbenchError(f"KArAt has functions for {PLACES} keys; got {n} tokens")
    tables = {name: given[name].view(heads, RANK, PLACES, GRID)[:, :, :n] for name in ("cosines", "sines")}
    projection = given["projection"].view(heads, PLACES, RANK)[:, :n]
    return {**{name: given[name] for name in ("q", "k", "v")}, **tables, "projection": projection}


def _small(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.1


VARIANTS = (
    Variant(
        name="fourier-kolmogorov-arnold-attention",
        paper="#27 Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers? (2025)",
        family="weighted softmax",
        priority="C",
        operator=fourier_attention,
        example=_example,
        reference="the paper's abstract",
        note="rank 12, 3 frequencies and no normalisation of the rows from general knowledge: no code was at hand",
        recipe=Recipe(
            parameters={
                "cosines": Parameter(f"H{RANK * PLACES * GRID}", _small),
                "sines": Parameter(f"H{RANK * PLACES * GRID}", _small),
                "projection": Parameter(f"H{PLACES * RANK}", _small),
            },
            prepare=_prepare,
        ),
    ),
)
