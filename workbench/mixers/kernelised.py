"""Kernelised attention with relative positions, in N log N: softmax weights by positive random features times a Toeplitz matrix.

    M_ij = exp(b_{j-i}) phi(q_i) . phi(k_j) / sum_j' exp(b_{j'-i}) phi(q_i) . phi(k_j')
    phi(x)_r = exp(w_r . x' - |x'|^2 / 2) / sqrt(R),   x' = x / |x|,   w_r normal: E phi(x) . phi(y) = exp(x' . y')

For every feature and channel, sum_j exp(b_{j-i}) (phi(k_j)_r v_jc) is a product with a Toeplitz matrix, which is a corner of a
circulant one, which the Fourier transform makes diagonal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.linear import causal_option, check_linear
from workbench.mixers.scored import check_tensor
from workbench.patterns.lazy import LazyMap


def kernelised_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, directions: Tensor, *, causal: bool = True
) -> tuple[Tensor, LazyMap]:
    """Normalised kernelised attention with relative positions: q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``.

    ``bias`` b ``[H, M]``, M odd, belongs to the distances j - i from -(M // 2) to M // 2, and its ends to what is further;
    ``directions`` w ``[R, E]`` are normal random vectors. Output by FFT, rows of the map as numbers. Where biases differ by more
    than the digits of the type, the transform loses the small ones. Source: Luo et al., arXiv:2106.12566, section 3.
    """
    check_linear(q, k, v, True)
    b, h, n, e = q.shape
    check_tensor("bias", bias, (h, "M"))
    check_tensor("directions", directions, ("R", e))
    if not bias.shape[1] % 2:
        raise WorkbenchError(f"bias has a number for every distance and its opposite, and 0: odd; got {bias.shape[1]}")
    work = torch.promote_types(working_dtype(q.dtype), v.dtype)
    phi_q, phi_k = (positive_features(x.to(work), directions.to(work)) for x in (q, k))
    away = torch.arange(1 - n, n, device=q.device)
    half = bias.shape[1] // 2
    logs = bias.to(work)[:, away.clamp(-half, half) + half]
    if causal:
        logs = logs.masked_fill(away > 0, -torch.inf)
    weights = (logs - logs.amax(-1, keepdim=True).detach()).exp()
    g, r = k.shape[1], directions.shape[0]
    ones = v.new_ones(*v.shape[:3], 1, dtype=work)
    bound = phi_k[..., :, None] * torch.cat([v.to(work), ones], -1)[..., None, :]
    mixed = toeplitz_product(weights.view(g, h // g, -1), bound.flatten(3)[:, :, None])
    both = torch.einsum("bhnr,bhnrc->bhnc", phi_q, mixed.view(b, h, n, r, v.shape[3] + 1))
    out = (both[..., :-1] / both[..., -1:]).to(v.dtype)
    held_q, held_k, held = phi_q.detach(), phi_k.detach().repeat_interleave(h // g, 1), weights.detach()

    def rows(lo: int, hi: int) -> Tensor:
        gap = torch.arange(n, device=held.device) - torch.arange(lo, hi, device=held.device)[:, None]
        raw = held_q[:, :, lo:hi] @ held_k.transpose(-1, -2) * held[:, gap + n - 1]
        return raw / raw.sum(-1, keepdim=True)

    return out, LazyMap((b, h, n, n), rows, kv_heads=g, row_sum="1")


def positive_features(x: Tensor, directions: Tensor) -> Tensor:
    """Positive random features ``[..., R]`` of the directions of x ``[..., E]``."""
    unit = normalize(x, dim=-1)
    logs = unit @ directions.transpose(-1, -2) - unit.square().sum(-1, keepdim=True) / 2
    return logs.exp() * directions.shape[0] ** -0.5


def toeplitz_product(weights: Tensor, x: Tensor) -> Tensor:
    """sum_j weights[j - i + N - 1] x_j by FFT: weights ``[..., 2N - 1]``, x ``[..., N, D]`` to ``[..., N, D]``."""
    n = x.shape[-2]
    first = torch.cat([weights[..., :n].flip(-1), weights[..., n:].flip(-1)], -1)  # the circulant's first column
    length = 2 * n - 1
    spectrum = torch.fft.rfft(first, n=length)[..., None] * torch.fft.rfft(x, n=length, dim=-2)
    return torch.fft.irfft(spectrum, n=length, dim=-2)[..., :n, :]


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {
        "q": (2, 4, tokens, 6),
        "k": (2, 2, tokens, 6),
        "v": (2, 2, tokens, 5),
        "bias": (4, 9),
        "directions": (7, 6),
    }
    return {**example_tensors(seed, dtype, **shapes), "causal": True}


def _prepare(made: dict[str, Any]) -> dict[str, Any]:
    """64 random directions that are the same in every layer and run, not learned."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, made["q"].shape[3], generator=generator, dtype=torch.float64).to(made["q"])
    causal = causal_option(made["mask"])
    return {name: made[name] for name in ("q", "k", "v", "bias")} | {"directions": directions, "causal": causal}


VARIANTS = (
    Variant(
        name="kernelised-attention-with-relative-positions",
        paper="#37 Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding (2021)",
        family="linear",
        priority="C",
        operator=kernelised_attention,
        example=_example,
        causal=True,
        reference="the paper's equations",
        note="Random directions are independent, not orthogonalised.",
        recipe=Recipe(parameters={"bias": Parameter("H129")}, prepare=_prepare),
    ),
)
